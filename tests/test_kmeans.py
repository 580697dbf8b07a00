"""The streaming k-means: faiss's own fit as the truth, empty clusters, memory, kills, and what `annotate` chooses."""

import functools
import json
import pickle
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import yaml
from test_annotate import config, make_shards
from test_clusters import blobs

from ldm_sg.annotate import kmeans as streaming
from ldm_sg.annotate.annotator import Annotator
from ldm_sg.annotate.clusters import kmeans
from ldm_sg.annotate.kinds import load_f
from ldm_sg.annotate.kmeans import lloyd, means, normalise, sums_of
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.annotate.stage import Stage, added, sample_features
from ldm_sg.config import AnnotatorConfig
from ldm_sg.configfile import ROOT
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError

K = 20


@pytest.fixture
def features(tmp_path: Path) -> tuple[list[Path], np.ndarray]:
    """Files of 1, 1,699 and 1,300 features in float16, and all of them normalised [3000, 16]."""
    points = blobs(3000, K, noise=0.6)[0].astype(np.float16)
    files = [tmp_path / f"{i}.npy" for i in range(3)]
    for file, part in zip(files, np.split(points, [1, 1700])):
        np.save(file, part)
    return files, normalise(points)


def fit(files: list[Path], start: np.ndarray, passes: int, tolerance: float = 0, **options):
    checkpoint = files[0].with_name(f"checkpoint{passes}")
    return lloyd(files, lambda: torch.from_numpy(start), passes, checkpoint, "", tolerance=tolerance, **options)


def test_passes_are_faiss_iterations(features, monkeypatch):
    files, points = features
    monkeypatch.setattr(streaming, "BLOCK", 300)  # five and a rest in the longest file
    monkeypatch.setattr(streaming, "SCORES", 70 * K)  # of four tiles and a rest
    start = points[np.random.default_rng(1).choice(3000, K, replace=False)]
    for passes in (1, 9):
        theirs = faiss.Kmeans(16, K, niter=passes, min_points_per_centroid=1, max_points_per_centroid=3000)
        theirs.train(points, init_centroids=start)
        ours, inertia = fit(files, start, passes)
        assert len(inertia) == passes
        assert np.allclose(ours, theirs.centroids, atol=1e-5)
        assert np.allclose(np.array(inertia) * 3000, theirs.obj, rtol=1e-5)
        ids = [faiss.knn(points, np.ascontiguousarray(c), 1)[1] for c in (ours.numpy(), theirs.centroids)]
        assert (ids[0] == ids[1]).all()


def test_sums_are_those_of_a_plain_loop(features):
    files, points = features
    centroids = points[5 : 5 + K] * 0.7  # not of unit length, as means are not
    near = ((points[1:1700, None].astype(np.float64) - centroids) ** 2).sum(-1)
    ids, total = near.argmin(1), sums_of(files[1], torch.from_numpy(centroids))
    assert (total["counts"] == np.bincount(ids, minlength=K)).all() and total["points"].dtype == np.float64
    assert total["inertia"] == pytest.approx(near.min(1).sum(), rel=1e-5)
    assert np.allclose(total["points"], [points[1:1700][ids == k].sum(0) for k in range(K)], atol=1e-3)


def test_an_empty_cluster_takes_half_of_the_largest(features):
    files, points = features
    start = points[:K].copy()
    start[[3, 7]] = -50  # nearest to nothing
    first = added(sums_of(file, torch.from_numpy(start)) for file in files)
    assert (np.flatnonzero(first["counts"] == 0) == [3, 7]).all()
    halves, mean = (
        means(first)[[3, first["counts"].argmax()]],
        first["points"][first["counts"].argmax()] / first["counts"].max(),
    )
    assert (halves[0] != halves[1]).all() and np.allclose(halves, [mean, mean], atol=2e-3)
    centroids, inertia = fit(files, start, 8)
    assert min(np.bincount(faiss.knn(points, centroids.numpy(), 1)[1][:, 0], minlength=K)) > 0
    assert (np.diff(inertia) < 0).all()


def test_it_ends_when_nothing_changes_any_more(features):
    files, points = features
    start = kmeans(points, K, "images", niter=60).numpy()
    loose, exact = (fit(files, start, 50 + i, tolerance=t)[1] for i, t in enumerate((1e-4, 0)))
    assert len(loose) < 5 and len(exact) < 50
    assert exact[-1] == exact[-2] and loose[-1] == pytest.approx(exact[-1], rel=1e-3)


def test_memory_is_one_block_however_long_the_file(features, monkeypatch):
    files, points = features
    monkeypatch.setattr(streaming, "BLOCK", 256)
    rows = []
    monkeypatch.setattr(streaming, "normalise", lambda part: rows.append(len(part)) or normalise(part))
    sums_of(files[1], torch.from_numpy(points[:K]))
    assert rows == [256] * 6 + [1699 - 6 * 256]


def elsewhere(step, files):
    """Like an executor's: the function goes there pickled, and several files are worked on at once."""
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(pickle.loads(pickle.dumps(step)), files))


def test_who_computes_changes_no_bit(features):
    files, points = features
    here, there = fit(files, points[:K], 4), fit(files, points[:K], 5, run=elsewhere)
    assert here[1] == there[1][:4]
    assert torch.equal(fit(files, points[:K], 4)[0], here[0])  # the finished checkpoint


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same_fit(features):
    files, points = features
    cpu, gpu = fit(files, points[:K], 4), fit(files, points[:K], 5, device="cuda")
    assert gpu[1][:4] == pytest.approx(cpu[1], rel=1e-5)


def test_a_checkpoint_is_gone_on_from_only_by_its_own_fit(features, tmp_path):
    files, points = features
    whole, inertia = fit(files, points[:K], 6)
    begun = functools.partial(lloyd, files, checkpoint=tmp_path / "c", tolerance=0)
    begun(start=lambda: torch.from_numpy(points[:K]), passes=2, of="mine")
    centroids, found = begun(start=lambda: pytest.fail("begun again"), passes=6, of="mine")
    assert torch.equal(centroids, whole) and found == inertia
    other, found = begun(start=lambda: torch.from_numpy(points[K : 2 * K]), passes=1, of="another")
    assert len(found) == 1 and not torch.equal(other, whole)
    data = (tmp_path / "c").read_bytes()
    at = data.index(centroids_of(tmp_path / "c").numpy().tobytes())
    for damaged in (b"\x10" * 20, data[:-100], data[:at] + b"\x10" * 8 + data[at + 8 :]):
        (tmp_path / "c").write_bytes(damaged)
        with pytest.raises(InputError, match=r"c is damaged: .*; remove it to begin this fit again"):
            begun(start=lambda: pytest.fail("begun again"), passes=6, of="another")


def centroids_of(checkpoint: Path) -> torch.Tensor:
    return torch.load(checkpoint, weights_only=True)["centroids"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_named(tmp_path, bad):
    stages, points = [Stage(tmp_path, i) for i in range(2)], blobs(600, 4)[0].astype(np.float16)
    stages[0].features.parent.mkdir()
    points[531, 3] = bad
    for stage, part in zip(stages, np.split(points, 2)):
        np.save(stage.features, part)
    for reading in (
        lambda: sums_of(stages[1].features, torch.randn(K, 16)),
        lambda: sample_features(stages, [300, 300], 1000, 0),
        lambda: sample_features(stages, [300, 300], 599, 4),
    ):
        with pytest.raises(InputError, match=r"features/000001\.npy: row 231 is NaN or infinite"):
            reading()


def annotated(tmp_path: Path, name: str, capsys, **annotator) -> tuple[dict, np.ndarray, str]:
    """2 x 9 images -> what the manifest says of k-means, all features as they are on disk, and the note."""
    shards = str(tmp_path / "source" / "*.tar")
    cfg = config(tmp_path, shards, out=str(tmp_path / name), annotator=AnnotatorConfig(k=3, **annotator))
    out = annotate_shards(cfg)
    said = yaml.safe_load((out / "manifest.yaml").read_text())["annotator"]["kmeans"]
    points = np.concatenate([np.load(file) for file in sorted((out / "features").iterdir())])
    note = next(line for line in capsys.readouterr().err.splitlines() if "note: k-means" in line)
    return said, points, note[note.index("note") :]


def test_annotate_streams_what_a_sample_does_not_hold_and_says_so(tmp_path, capsys):
    make_shards(tmp_path / "source")
    said, points, note = annotated(tmp_path, "memory", capsys)
    assert note == "note: k-means in memory, all 18 images (annotator.fit=auto, annotator.sample=1,000,000)"
    settings = {"niter": 30, "nredo": 1, "seed": 0}
    expected = kmeans(normalise(points), 3, "images", **settings)  # bit by bit as before there was a choice
    assert torch.equal(annotator(tmp_path / "memory").centroids, expected)
    assert (said["fit"], said["images"], said["passes"]) == ("memory", 18, 30)
    distance = ((normalise(points)[:, None] - expected.numpy()) ** 2).sum(-1).min(1).mean()
    assert said["inertia"] == pytest.approx(distance, abs=2e-6)

    said, _, note = annotated(tmp_path, "stream", capsys, sample=7)
    assert note == "note: k-means passes over the files of all 18 images (annotator.fit=auto, annotator.sample=7)"
    assert said["fit"] == "stream" and said["images"] == 18 and 2 <= said["passes"] < 30
    stages = [Stage(tmp_path / "stream", i) for i in range(2)]
    start = kmeans(normalise(sample_features(stages, [9, 9], 7, 0)), 3, "images", **settings)
    expected = faiss.Kmeans(points.shape[1], 3, niter=said["passes"], min_points_per_centroid=1)
    expected.train(normalise(points), init_centroids=start.numpy())
    assert np.allclose(annotator(tmp_path / "stream").centroids, expected.centroids, atol=1e-5)

    said, _, note = annotated(tmp_path, "sample", capsys, sample=7, fit="sample")
    assert note == "note: k-means in memory, a sample of 7 of all 18 images (annotator.fit=sample, annotator.sample=7)"
    assert torch.equal(annotator(tmp_path / "sample").centroids, start) and said["images"] == 7

    said, _, note = annotated(tmp_path, "more", capsys, sample=7, extend=str(tmp_path / "memory"))
    assert note.endswith("a sample of 7 of all 18 images (annotator.fit=auto, annotator.sample=7, annotator.extend)")
    assert torch.equal(annotator(tmp_path / "more").centroids[:3], annotator(tmp_path / "memory").centroids)


def annotator(out: Path) -> Annotator:
    return load_f(out / "annotator")[0]


@pytest.mark.parametrize("settings", [{"fit": "streams"}, {"fit": "stream", "extend": "other"}])
def test_a_fit_that_cannot_be_is_told(tmp_path, settings):
    with pytest.raises(InputError, match=rf"annotator\.fit={settings['fit']}: "):
        config(tmp_path, "x", annotator=AnnotatorConfig(k=3, **settings)).check()


KILLED = """
import os, signal, sys
from pathlib import Path
from ldm_sg.annotate import kmeans
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.config import AnnotateConfig, AnnotatorConfig, FeaturesConfig
sums_of, calls = kmeans.sums_of, []

def killing(file, centroids, device):
    calls.append(file)
    if len(calls) == 4:  # in the second pass, after its first file
        os.kill(os.getpid(), signal.SIGKILL)
    return sums_of(file, centroids, device)

kmeans.sums_of = killing
annotate_shards(AnnotateConfig(sys.argv[1], sys.argv[2], "patch4", features=FeaturesConfig(batch_size=4, precision="fp32"),
    annotator=AnnotatorConfig(k=5, sample=7), workers=0, device="cpu"))
"""


def test_a_killed_fit_ends_with_the_same_bytes(tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "source")
    cfg = config(tmp_path, shards, annotator=AnnotatorConfig(k=5, sample=7))
    whole = annotate_shards(config(tmp_path, shards, out=str(tmp_path / "whole"), annotator=cfg.annotator))
    killed = subprocess.run([sys.executable, "-c", KILLED, shards, cfg.out], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (Path(cfg.out) / "work" / "kmeans.pt").is_file()
    monkeypatch.setattr("ldm_sg.annotate.clusters.kmeans", lambda *_, **__: pytest.fail("begun again"))
    out = annotate_shards(cfg)
    assert LatentSet(out).hash == LatentSet(whole).hash
    for name in ("centroids.safetensors", "annotator.yaml"):
        assert (out / "annotator" / name).read_bytes() == (whole / "annotator" / name).read_bytes()


def test_the_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kmeans.py", "--n", "10000", "--k", "50", "--each", "3000"])
    runpy.run_path(str(ROOT / "benchmarks" / "bench_kmeans.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 10_000 and found["clock"]["ratio"] > 0 and found["inertia"][1] < found["inertia"][0]
