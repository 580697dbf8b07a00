"""STEGO: the loss against a literal loop, the fit on made-up classes, masks, and Hungarian matching."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

from ldm_sg.annotate import segments, stego
from ldm_sg.annotate.matching import confusion, match
from ldm_sg.annotate.segments import Segments
from ldm_sg.annotate.stego import correspondence_loss, fit_head, nearest_images, sample_points
from ldm_sg.config import SEGMENT_METHODS, AnnotatorConfig, SegmentsConfig
from ldm_sg.errors import InputError
from ldm_sg.guidance.spatial import VOID

CLASSES, DIM, GRID = 4, 24, 6
QUICK = SegmentsConfig(width=16, steps=200, batch_size=8)


def segmenter(k: int, cfg: SegmentsConfig) -> Segments:
    return Segments(AnnotatorConfig("segments", k, segments=cfg))


def world(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of four quarters, each of one class: patch features float16 [n, D, 6, 6] (a direction a class, of any length,
    plus noise and an offset common to all), image-level features [n, D], classes uint8 [n, 6, 6]."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(99).standard_normal((CLASSES, DIM))
    quarters = np.stack([generator.permutation(CLASSES)[generator.integers(0, CLASSES, 4)] for _ in range(n)])
    classes = quarters.reshape(n, 2, 2).repeat(GRID // 2, 1).repeat(GRID // 2, 2)
    patches = directions[classes] * generator.uniform(0.5, 2, (n, GRID, GRID, 1)) + 0.5
    patches = (patches + 0.3 * generator.standard_normal(patches.shape)).transpose(0, 3, 1, 2)
    return patches.astype(np.float16), patches.mean((2, 3)).astype(np.float32), classes.astype(np.uint8)


def literal_loss(fa, fb, ca, cb, shift, centre, clamp) -> float:
    """Eq. 1 to 4 of the paper, loop by loop."""

    def cosine(u, v):
        return float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))

    total, places = 0.0, list(itertools.product(range(fa.shape[2]), range(fa.shape[3])))
    for image in range(len(fa)):
        for p in places:
            f = [cosine(fa[image][:, *p], fb[image][:, *q]) for q in places]
            s = [cosine(ca[image][:, *p], cb[image][:, *q]) for q in places]
            mean = sum(f) / len(f) if centre else 0.0
            total -= sum((fq - mean - shift) * (max(sq, 0) if clamp else sq) for fq, sq in zip(f, s))
    return total / (len(fa) * len(places) ** 2)


@pytest.mark.parametrize(("centre", "clamp"), itertools.product([True, False], repeat=2))
def test_the_loss_is_the_papers(centre: bool, clamp: bool) -> None:
    generator = np.random.default_rng(0)
    fa, fb, ca, cb = (generator.standard_normal((2, dim, 3, 3)) for dim in (5, 5, 4, 4))
    ours = correspondence_loss(*map(torch.from_numpy, (fa, fb, ca, cb)), 0.2, centre, clamp)
    assert float(ours) == pytest.approx(literal_loss(fa, fb, ca, cb, 0.2, centre, clamp), abs=1e-12)


def test_centring_removes_what_all_pairs_share_and_the_clamp_leaves_opposed_codes_alone() -> None:
    features, codes = torch.randn(2, 1, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    flat = torch.ones(1, 5, 2, 2)  # a constant image
    assert float(correspondence_loss(flat, flat, codes, codes, 0.0)) == pytest.approx(0, abs=1e-6)
    assert float(correspondence_loss(flat, flat, flat, flat, 0.0, centre=False)) == pytest.approx(-1)
    scaled = correspondence_loss(9 * features, features, codes, 3 * codes, 0.1)
    assert float(scaled) == pytest.approx(float(correspondence_loss(features, features, codes, codes, 0.1)), abs=1e-6)
    codes = (codes + 3).requires_grad_()
    opposed = -codes.detach().flip(3)
    for clamp in (True, False):
        codes.grad = None
        correspondence_loss(features, features, codes, opposed, 0.1, zero_clamp=clamp).backward()
        assert codes.grad is not None
        assert bool(codes.grad.any()) is not clamp


def test_points_are_all_patches_when_there_are_few_and_drawn_inside_otherwise() -> None:
    few, many = torch.randn(2, 3, 6, 6), torch.arange(400.0).view(1, 1, 20, 20).expand(2, -1, -1, -1)
    assert sample_points(few, torch.Generator()) is few
    drawn = sample_points(many, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 1, 11, 11)
    assert 0 <= drawn.min() < 40 < 360 < drawn.max() <= 399
    assert not torch.equal(drawn[0], drawn[1])


def test_nearest_images_are_others_and_the_most_similar() -> None:
    features = np.random.default_rng(0).standard_normal((1500, 8)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similar = unit @ unit.T - 3 * np.eye(len(unit))
    assert (np.sort(nearest_images(features, 7).numpy()) == np.sort(np.argsort(-similar)[:, :7])).mean() > 0.999
    assert nearest_images(features[:3], 7).shape == (3, 2)


@pytest.mark.parametrize("method", SEGMENT_METHODS)
def test_known_classes_are_recovered(method: str, tmp_path: Path) -> None:
    patches, features, _ = world(60)
    fitted = segmenter(CLASSES, replace(QUICK, method=method)).learn(patches, features, tmp_path, "cpu")
    new, _, truth = world(20, seed=1)
    masks = fitted.segment(torch.from_numpy(new), None, GRID).numpy()
    assert masks.dtype == np.uint8
    found = match(confusion(masks, truth, CLASSES, CLASSES))
    assert found["miou"] > 0.9
    loaded = segmenter(CLASSES, replace(QUICK, method=method))
    fitted.save(tmp_path)
    loaded.restore(tmp_path)
    assert torch.equal(loaded.segment(torch.from_numpy(new), None, 32), fitted.segment(torch.from_numpy(new), None, 32))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", [30, 70])
def test_a_killed_fit_resumes_to_the_same_weights(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, features, _ = world(20)
    cfg = replace(QUICK, steps=100, images=15, patience=100)
    whole = fit_head(patches, features, cfg, 3, "cpu", tmp_path / "whole").state_dict()
    loss, calls = stego.stego_loss, itertools.count()

    def killed(*args):
        if next(calls) == steps:
            raise Killed
        return loss(*args)

    monkeypatch.setattr(stego, "stego_loss", killed)
    with pytest.raises(Killed):
        fit_head(patches, features, cfg, 3, "cpu", tmp_path / "killed")
    monkeypatch.setattr(stego, "stego_loss", loss)
    resumed = fit_head(patches, features, cfg, 3, "cpu", tmp_path / "killed").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    monkeypatch.setattr(stego, "stego_loss", None)  # nothing is left to do, so it is not called
    again = fit_head(patches, features, cfg, 3, "cpu", tmp_path / "killed").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    monkeypatch.setattr(stego, "stego_loss", loss)
    other = fit_head(patches, features, replace(cfg, steps=50), 4, "cpu", tmp_path / "killed").state_dict()
    fresh = fit_head(patches, features, replace(cfg, steps=50), 4, "cpu", tmp_path / "fresh").state_dict()
    assert all(torch.equal(other[name], fresh[name]) for name in fresh)  # another fit's checkpoint is left alone


def test_a_fit_that_no_longer_improves_stops(tmp_path: Path) -> None:
    patches, features, _ = world(20)
    cfg = replace(QUICK, steps=10_000, patience=2, min_improvement=0.5)
    fit_head(patches, features, cfg, 0, "cpu", tmp_path)
    assert torch.load(tmp_path / stego.CHECKPOINT, weights_only=True)["steps"] <= 10 * stego.WINDOW


def test_masks_commute_with_a_mirror_when_both_are_averaged(tmp_path: Path) -> None:
    patches, features, _ = world(20)
    fitted = segmenter(CLASSES, QUICK).learn(patches, features, tmp_path, "cpu")
    ours, mirrored = torch.randn(2, 5, DIM, GRID, GRID, generator=torch.Generator().manual_seed(0))
    masks = fitted.segment(ours, mirrored, 24)
    assert torch.equal(fitted.segment(mirrored.flip(-1), ours.flip(-1), 24), masks.flip(-1))
    assert not torch.equal(fitted.segment(ours, None, 24), masks)


def test_masks_are_the_argmax_of_upsampled_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, features, _ = world(20)
    fitted = segmenter(7, QUICK).learn(patches, features, tmp_path, "cpu")
    some = torch.from_numpy(patches[:5])
    codes = F.normalize(F.interpolate(fitted.codes(some), (50, 50), mode="bilinear"), dim=1)
    expected = torch.einsum("bchw,kc->bkhw", codes, fitted.centroids).argmax(1)
    assert (fitted.segment(some, None, 50) == expected).float().mean() > 0.999
    monkeypatch.setattr(segments, "SCORES", 1)  # one image at a time
    assert (fitted.segment(some, None, 50) == expected).float().mean() > 0.999


def test_patches_that_were_padded_lie_where_they_were_seen() -> None:
    """An edge at pixel 80 of 100, which 6.25 patches of 16 span."""
    fitted = segmenter(2, QUICK)
    fitted.centroids = torch.eye(2)
    left = torch.arange(7)[None, :].expand(7, 7) < 5  # the first five patches, 80 pixels
    masks = fitted.segment(torch.stack([left, ~left]).float()[None], None, 100, 6.25)
    assert masks.shape == (1, 100, 100) and masks[0, 50].tolist() == [0] * 80 + [1] * 20


def test_images_of_one_colour_do_not_crash(tmp_path: Path) -> None:
    patches, features = np.ones((4, 8, 3, 3), np.float16), np.ones((4, 8), np.float32)
    patches[3] = 0
    for method in SEGMENT_METHODS:
        fitted = segmenter(3, replace(QUICK, method=method, steps=20)).learn(patches, features, tmp_path, "cpu")
        assert torch.isfinite(fitted.centroids).all()
        assert fitted.segment(torch.from_numpy(patches), None, 8).shape == (4, 8, 8)


def test_wrong_input_is_named(tmp_path: Path) -> None:
    patches, features, _ = world(4)
    for k in (0, 256):
        with pytest.raises(InputError, match=rf"k={k}.*255"):
            segmenter(k, QUICK)
    for wrong in ({"method": "steego"}, {"neighbours": 0}, {"batch_size": 1}, {"lr": 0.0}):
        with pytest.raises(InputError, match=rf"annotator\.segments\.{next(iter(wrong))}="):
            segmenter(4, replace(QUICK, **wrong))
    with pytest.raises(InputError, match="36 patches"):
        segmenter(37, replace(QUICK, method="patch_kmeans")).learn(patches[:1], features[:1], tmp_path, "cpu")
    with pytest.raises(InputError, match="too few"):
        segmenter(3, QUICK).learn(patches[:1], features[:1], tmp_path, "cpu")
    with pytest.raises(InputError, match="damaged or not complete"):
        segmenter(3, QUICK).restore(tmp_path)


def test_confusion_counts_pixels_and_leaves_void_out() -> None:
    predicted = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
    truth = np.array([[1, 1, VOID], [0, 0, 1]], np.uint8)
    assert confusion(predicted, truth, 3, 2).tolist() == [[0, 2], [0, 1], [2, 0]]
    assert confusion(predicted, np.full_like(truth, VOID), 3, 2).sum() == 0
    with pytest.raises(ValueError, match="invalid entry"):
        confusion(predicted, truth, 2, 2)


def test_matching_undoes_a_permutation() -> None:
    truth = np.random.default_rng(0).integers(0, 5, (3, 20, 20)).astype(np.uint8)
    permutation = np.array([3, 0, 4, 1, 2])
    for predicted in (truth, permutation[truth].astype(np.uint8)):
        found = match(confusion(predicted, truth, 5, 5))
        assert found["miou"] == found["accuracy"] == 1
        assert (found["assignment"][predicted] == truth).all()


@pytest.mark.parametrize("k", [4, 5, 7])
def test_matching_is_the_best_of_all_and_iou_is_scikit_learns(k: int) -> None:
    generator = np.random.default_rng(k)
    truth = generator.integers(0, 4, 500).astype(np.uint8)
    predicted = np.where(generator.random(500) < 0.5, truth + k - 4, generator.integers(0, k, 500)).astype(np.uint8)
    table = confusion(predicted, truth, k, 4)
    found = match(table)
    best = max(sum(table[p, c] for c, p in enumerate(chosen)) for chosen in itertools.permutations(range(k), 4))
    assert found["accuracy"] == pytest.approx(best / 500)
    renamed = found["assignment"][predicted]
    scores = jaccard_score(truth, renamed, labels=range(4), average=None)
    assert found["iou"] == pytest.approx(scores)
    assert found["miou"] == pytest.approx(scores.mean())


def test_fewer_predictions_than_classes_and_classes_that_do_not_occur() -> None:
    found = match(
        np.array([[6, 0, 0, 0], [0, 2, 2, 0]])
    )  # the last class has no pixel, one of the others no prediction
    assert found["iou"] == pytest.approx([1, 0.5, 0, np.nan], nan_ok=True)
    assert found["miou"] == pytest.approx(0.5)
    assert found["accuracy"] == pytest.approx(0.8)
    assert match(np.zeros((2, 3), np.int64))["miou"] == 0
