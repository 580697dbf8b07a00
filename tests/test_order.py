"""The order of training: each image once an epoch, the same global batches on any number of ranks, well mixed."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, spearmanr

from ldm_sg.data.order import Kept, permuted, split, step_indices
from ldm_sg.training.data import Steps

# ranks of a job between its stops: a divisor of 240, as a global batch has that many images
TOPOLOGIES = [1, 2, 4, 8, 16, 3, 120, 60, 6, 24, 1, 5, 40, 12, 48, 2]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 97, 256, 1000, 4097])
def test_every_index_comes_once(n: int) -> None:
    assert sorted(permuted(torch.arange(n), n, 3, 1).tolist()) == list(range(n))


def test_any_position_alone_and_far_beyond_memory() -> None:
    whole = permuted(torch.arange(1000), 1000, 5, 0)
    assert torch.equal(permuted(torch.tensor([[7, 999], [0, 7]]), 1000, 5, 0), whole[torch.tensor([[7, 999], [0, 7]])])
    far = permuted(10**12 - 1 - torch.arange(1000), 10**12, 0, 0)
    assert far.unique().numel() == 1000 and far.min() >= 0 and far.max() < 10**12
    assert abs(far.double().mean() / 10**12 - 0.5) < 0.05


def test_all_permutations_are_equally_likely() -> None:
    drawn = np.array([permuted(torch.arange(4), 4, seed).tolist() for seed in range(2400)])
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24 and chisquare(counts).pvalue > 0.001


def test_epochs_and_neighbours_are_unrelated() -> None:
    n = 50_000
    first, second = (permuted(torch.arange(n), n, 0, epoch).numpy() for epoch in (0, 1))
    for one, other in ((first, second), (first, np.arange(n)), (first[1:], first[:-1])):
        assert abs(spearmanr(one, other).statistic) < 0.015  # chance: 0.0045


def test_a_batch_has_images_of_many_shards() -> None:
    """As many of one shard (of 500 images here) as a draw with equal chances gives."""
    n, batch, steps = 50_000, 256, 100
    worst = [np.bincount(step_indices(0, s, batch, n).numpy() // 500).max() for s in range(steps)]
    fair = np.random.default_rng(0)
    by_chance = [np.bincount(fair.choice(n, batch, replace=False) // 500).max() for _ in range(steps)]
    assert abs(np.mean(worst) - np.mean(by_chance)) < 0.4


def test_steps_are_a_pure_stream_of_permutations() -> None:
    n, batch = 10, 4
    stream = torch.cat([step_indices(3, s, batch, n) for s in range(5)])
    assert stream[:10].sort().values.tolist() == stream[10:].sort().values.tolist() == list(range(10))
    assert not torch.equal(stream[:10], stream[10:])
    assert torch.equal(step_indices(3, 2, batch, n), stream[8:12])  # across the epochs' border
    assert not torch.equal(step_indices(4, 0, 10, n), step_indices(3, 0, 10, n))
    singles = torch.cat([step_indices(0, s, 1, n) for s in range(50)])
    assert torch.equal(step_indices(0, 1, 25, n), singles[25:])  # a batch of more than an epoch


def test_the_order_stays_what_it_is() -> None:
    """It may not change with a version of this project: resumed runs would see images twice."""
    assert step_indices(0, 0, 6, 1000).tolist() == [606, 662, 628, 712, 564, 831]


def test_a_job_that_changes_its_ranks_at_every_stop_sees_what_one_rank_sees() -> None:
    n, batch, each = 1200, 240, 2  # an epoch has 5 steps, so stops fall inside epochs too
    pool = split(n + 24, 24 / (n + 24), 0)[0]
    total = each * len(TOPOLOGIES)
    alone = [request[2:] for request in Steps([(pool, batch)], 9, total, 0, 0, 1)]
    seen: list[list[int]] = []
    for stop, world in enumerate(TOPOLOGIES):
        first = stop * each
        ranks = [list(Steps([(pool, batch)], 9, first + each, first, rank, world)) for rank in range(world)]
        assert {len(requests) for requests in ranks} == {each}
        for same_step in zip(*ranks):
            assert {len(request) for request in same_step} == {2 + batch // world}
            seen.append(sorted(i for request in same_step for i in request[2:]))
    assert seen == [sorted(step) for step in alone]
    images = [i for step in alone for i in step]
    for epoch in range(len(images) // n):
        assert len(set(images[epoch * n : (epoch + 1) * n])) == n


def test_held_out_images_are_never_learnt_from() -> None:
    kept, held_out = split(100, 0.02, 0)
    every = kept[torch.arange(len(kept))].tolist()
    assert len(held_out) == 2 and sorted([*every, *held_out.tolist()]) == list(range(100))
    assert len(split(100, 0.0, 0)[1]) == 0 and len(split(2, 0.9, 0)[0]) == 1
    assert len(Kept(10**12, 10**9, 0)) == 10**12 - 10**9  # a table of nothing
