"""k-means: goldens against scikit-learn, both normalisations, NMI and ARI."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm_sg.annotate.clusters import Clusters, ami, ari, contingency, nmi, normalise
from ldm_sg.config import AnnotatorConfig
from ldm_sg.errors import InputError

sklearn_cluster = pytest.importorskip("sklearn.cluster")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def blobs(n: int, k: int, dim: int = 16, noise: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n features of random length around k directions, and which one each belongs to."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(k, size=n)
    points = rng.normal(size=(k, dim))[ids] + noise * rng.normal(size=(n, dim))
    return (points * rng.uniform(0.1, 10, (n, 1))).astype(np.float32), ids


def inertia(points: np.ndarray, centroids: np.ndarray) -> float:
    return float(((points[:, None] - centroids[None]) ** 2).sum(-1).min(1).sum())


def test_inertia_is_near_scikit_learns():
    points, _ = blobs(2000, 12, noise=0.8)
    ours = Clusters(AnnotatorConfig(k=12, seed=1)).fit_features(points)
    unit = normalise(points)
    theirs = sklearn_cluster.KMeans(12, n_init=10, random_state=0).fit(unit)
    assert inertia(unit, ours.centroids.numpy()) <= 1.05 * theirs.inertia_


def test_clear_clusters_are_found_whatever_the_length_of_features():
    points, truth = blobs(1200, 6, noise=0.1)
    ids = Clusters(AnnotatorConfig(k=6, seed=3)).fit_features(points).assign(points).numpy()
    assert nmi(contingency(ids, truth, (6, 6))) > 0.9
    scaled = points * np.random.default_rng(1).uniform(0.01, 100, (len(points), 1)).astype(np.float32)
    again = Clusters(AnnotatorConfig(k=6, seed=3)).fit_features(points).assign(scaled).numpy()
    assert (ids == again).all()  # assignment reads normalised features too


def test_same_seed_same_ids_and_torch_equals_numpy():
    points, _ = blobs(500, 5, noise=1.0)
    a, b = (
        Clusters(AnnotatorConfig(k=5, seed=7)).fit_features(p).assign(p) for p in (points, torch.from_numpy(points))
    )
    assert torch.equal(a, b)


def test_restarts_keep_the_best():
    points, _ = blobs(600, 20, noise=0.8)
    unit = normalise(points)
    once, often = (
        inertia(unit, Clusters(AnnotatorConfig(k=20, seed=0, restarts=r)).fit_features(points).centroids.numpy())
        for r in (1, 10)
    )
    assert often < once


def test_nearest_starts_with_the_assigned_and_save_load_keeps_ids(tmp_path):
    points, _ = blobs(400, 8)
    clusters = Clusters(AnnotatorConfig(k=8)).fit_features(points)
    near = clusters.nearest(points, 3)
    assert near.shape == (400, 3) and torch.equal(near[:, 0], clusters.assign(points))
    exact = torch.cdist(torch.from_numpy(normalise(points)), clusters.centroids)
    assert torch.equal(near, exact.argsort(1)[:, :3])
    clusters.save(tmp_path)
    loaded = Clusters(clusters.cfg)
    loaded.restore(tmp_path)
    assert torch.equal(loaded.assign(points), near[:, 0])
    signals = loaded.annotate(lambda images: images, SimpleNamespace(squares=torch.from_numpy(points)))  # g = identity
    assert torch.equal(signals.k, near[:, 0]) and signals.guidance((4, 4)).keep.all()


def test_nearest_of_more_than_there_are_gives_all():
    points, _ = blobs(50, 2)
    assert Clusters(AnnotatorConfig(k=2)).fit_features(points).nearest(points, 3).shape == (50, 2)


@pytest.mark.parametrize("k", [1, 50])
def test_k_from_one_to_the_number_of_images(k):
    points, _ = blobs(50, 5)
    ids = Clusters(AnnotatorConfig(k=k)).fit_features(points).assign(points)
    assert int(ids.min()) >= 0 and int(ids.max()) < k
    assert len(ids.unique()) == k  # every image its own centroid at k = N


def test_k_of_ten_thousand():
    points, _ = blobs(10_500, 100, dim=8)
    clusters = Clusters(AnnotatorConfig(k=10_000, niter=1)).fit_features(points)
    assert clusters.centroids.shape == (10_000, 8) and int(clusters.assign(points).max()) < 10_000


def test_k_larger_than_the_data_says_how_many_there_are():
    with pytest.raises(InputError, match=r"annotator\.k=51: only 50 images .* at most 50"):
        Clusters(AnnotatorConfig(k=51)).fit_features(blobs(50, 5)[0])


def test_few_images_a_cluster_give_one_line_of_warning(capfd):
    Clusters(AnnotatorConfig(k=10)).fit_features(blobs(100, 5)[0])
    err = capfd.readouterr().err.strip()
    assert "please provide at least 390 training points" in err and len(err.splitlines()) == 1  # faiss's own
    Clusters(AnnotatorConfig(k=2)).fit_features(blobs(100, 5)[0])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [300, 200_000])
def test_nmi_ami_and_ari_equal_scikit_learns(seed, n):
    rng = np.random.default_rng(seed)
    a = rng.integers(7, size=n)
    b = np.where(rng.random(n) < 0.25 * seed, rng.integers(5, size=n), a % 5)
    table = contingency(a, b, (9, 5))  # two rows stay empty
    assert nmi(table) == pytest.approx(sklearn_metrics.normalized_mutual_info_score(a, b), abs=1e-9)
    assert ari(table) == pytest.approx(sklearn_metrics.adjusted_rand_score(a, b), abs=1e-9)
    assert ami(table) == pytest.approx(sklearn_metrics.adjusted_mutual_info_score(a, b), abs=1e-9)


def test_nmi_and_ari_of_one_cluster():
    same = contingency(np.zeros(10, int), np.zeros(10, int), (1, 1))
    assert nmi(same) == 1 and ari(same) == 1 == ami(same)
    assert nmi(contingency(np.zeros(10, int), np.arange(10) % 2, (1, 2))) == 0
