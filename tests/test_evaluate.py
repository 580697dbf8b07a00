"""Evaluation: figures against torch-fidelity and closed forms, image sources, the verb on a run whose answers are known."""

import io
import json
import pickle
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import COLOURS, SHARED, TINY, write_annotation_set
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ldm_sg.annotate.clusters import Clusters
from ldm_sg.annotate.features import file_sha256, load_extractor
from ldm_sg.annotate.kinds import save_annotator
from ldm_sg.build import PipelineWriter, network
from ldm_sg.config import AnnotatorConfig, FeaturesConfig, TrainConfig
from ldm_sg.data.images import to_float
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError
from ldm_sg.evaluate import metrics, sources
from ldm_sg.evaluate.consistency import chance, check_ids, consistency, landing
from ldm_sg.evaluate.figures import parse_metrics
from ldm_sg.evaluate.inception import load_inception
from ldm_sg.pipeline import SelfGuidedPipeline
from ldm_sg.verbs.evaluate import evaluate

INCEPTION = SHARED / "weights" / "inception_fid" / "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose time to threads waiting for each other, much of it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features(n: int, d: int = 16, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) / d**0.5 + shift


# ---- metrics


@pytest.mark.parametrize("n, d", [(300, 24), (50, 24), (20, 24), (40, 1)])
def test_frechet_distance_is_torch_fidelitys(n: int, d: int) -> None:
    a, b = features(n, d), features(n + 7, d, seed=1, shift=0.3)
    stats = [fid_features_to_statistics(x.double()) for x in (a, b)]
    for s in stats:
        s["sigma"] = np.atleast_2d(s["sigma"])
    expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    # theirs takes eigenvalues of a product that is not symmetric: fewer digits where covariances are singular
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_known_gaussians() -> None:
    """Features made to have mean m and covariance diag(s) exactly: |m1 - m2|^2 + sum (sqrt s1 - sqrt s2)^2."""

    def exact(mean: torch.Tensor, var: torch.Tensor, seed: int) -> torch.Tensor:
        x = features(100, 4, seed).double()
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 99)).T
        return x * var.sqrt() + mean

    m1, m2 = torch.tensor([1.0, -2.0, 0.5, 100.0]).double(), torch.tensor([0.0, 0.0, 0.0, 101.0]).double()
    s1, s2 = torch.tensor([1.0, 4.0, 9.0, 0.25]).double(), torch.tensor([4.0, 4.0, 1.0, 1.0]).double()
    expected = (m1 - m2).square().sum() + (s1.sqrt() - s2.sqrt()).square().sum()
    assert metrics.frechet_distance(exact(m1, s1, 0), exact(m2, s2, 1)) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_to_itself_is_zero_even_far_from_the_origin() -> None:
    a = features(60, 80, shift=1e3)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_torch_fidelitys_and_the_formulas() -> None:
    a, b = features(60), features(60, seed=1, shift=0.2)
    expected = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=20, kid_subset_size=30, rng_seed=3, verbose=False
    )
    ours = metrics.kernel_distance(a, b, subsets=20, subset_size=30, seed=3)
    assert ours["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert ours["kid_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    x, y = a.double(), b.double()
    k_xx, k_yy, k_xy = ((p @ q.T / 16 + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    n = len(x)
    off = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (n * (n - 1))
    assert metrics.kernel_distance(a, b)["kid"] == pytest.approx(float(off - 2 * k_xy.mean()), rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    values = [metrics.kernel_distance(features(40, 4, s)[:20], features(40, 4, s)[20:])["kid"] for s in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5 and min(values) < 0


@pytest.mark.parametrize("block", [metrics.BLOCK, 1, 1000])
def test_manifolds_are_the_papers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision and recall as torch-fidelity's, density and coverage from the definitions, whatever the block size."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    fake, real = features(70, 4, seed=1, shift=0.4), features(90, 4)
    ours = metrics.manifold(fake, real, k=5)
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=5, verbose=False)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    between = torch.cdist(fake.double(), real.double())  # [N, M]
    radius = torch.cdist(real.double(), real.double()).kthvalue(6, dim=1).values  # itself is the first
    inside = between <= radius
    assert ours["density"] == pytest.approx(float(inside.sum()) / (5 * 70))
    assert ours["coverage"] == pytest.approx(float(inside.any(0).float().mean()))
    assert 0 < ours["coverage"] < 1


def test_manifolds_of_equal_and_of_disjoint_sets() -> None:
    same = metrics.manifold(features(600, 4)[:300], features(600, 4)[300:])
    assert all(abs(value - 1) < 0.15 for value in same.values()), same
    assert set(metrics.manifold(features(50), features(50, seed=1, shift=1e3)).values()) == {0.0}


def test_inception_score_of_known_predictions() -> None:
    """Certain predictions spread evenly over 7 classes: exp(log 7)."""
    logits = 100 * torch.nn.functional.one_hot(torch.arange(700) % 7, 7).float()
    score = metrics.inception_score(logits, splits=1)
    assert score["is"] == pytest.approx(7, rel=1e-6)
    with pytest.raises(InputError, match="fc"):
        metrics.inception_score(torch.zeros(100, 1008))


@pytest.mark.parametrize(
    "compute, least", [(metrics.frechet_distance, 2), (metrics.kernel_distance, 2), (metrics.manifold, 6)]
)
def test_too_few_unlike_or_broken_features_are_refused(compute, least: int) -> None:
    with pytest.raises(InputError, match=f"samples: {least - 1} images are too few"):
        compute(features(least - 1), features(20))
    with pytest.raises(InputError, match="reference: 0 images"):
        compute(features(20), features(0))
    with pytest.raises(InputError, match="features of 16 numbers, the reference of 8"):
        compute(features(20, 16), features(20, 8))
    with pytest.raises(InputError, match="not finite"):
        compute(features(20).index_fill(0, torch.tensor([3]), torch.nan), features(20))


@pytest.mark.parametrize(
    "text, wrong", [("fd,prcd", "did you mean 'prdc'"), ("", "name at least one"), (" , ", "name")]
)
def test_unknown_metrics_are_refused(text: str, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong):
        parse_metrics(text)
    assert parse_metrics(" fd, kid,fd") == ["fd", "kid"]


# ---- Inception


@pytest.fixture(scope="module")
def inception():
    if not INCEPTION.is_file():
        pytest.skip("../shared/weights/inception_fid is not here")
    return load_inception(INCEPTION)


def test_inception_reads_images_as_torch_fidelity_does(inception) -> None:
    pixels = torch.randint(0, 256, (1, 3, 40, 40), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = inception(to_float(pixels))
    assert torch.equal(found, inception.net(pixels)[0])
    assert found.shape == (1, 2048) and len(inception.manifest["sha256"]) == 64
    assert not inception.classifies  # these weights have an empty last layer


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trap-was-run"),))


def test_weights_with_code_or_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save(Trap(), tmp_path / "trap2.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in (
        "trap.pth",
        "trap2.pth",
        "other.safetensors",
        "text.pth",
        "text.safetensors",
        "list.pth",
        "nothing.pth",
    ):
        with pytest.raises(InputError, match=name):
            load_inception(tmp_path / name)
    assert not (tmp_path / "trap-was-run").exists()


def test_without_network_the_message_names_the_file_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(InputError, match=r"weights-inception-2015-12-05-6726825d\.pth.*inception:FILE"):
        load_inception()


@pytest.mark.slow
def test_inception_distances_of_real_photos(inception, tmp_path: Path) -> None:
    """../shared/README.md: 500 imagenette training images against others about 59, against churches about 182."""
    nette, church = (SHARED / "data" / name / "train" for name in ("imagenette10_224", "church_224"))
    if not (nette.is_dir() and church.is_dir()):
        pytest.skip("../shared/data is not here")
    weights, files = f"inception:{INCEPTION}", [p for p in sorted(nette.rglob("*")) if p.is_file()]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    sets = {"a": [files[i] for i in order[:500]], "b": [files[i] for i in order[500:1000]]}
    sets["church"] = sorted(church.iterdir())[:500]
    for name, chosen in sets.items():
        (tmp_path / name).mkdir()
        for i, path in enumerate(chosen):
            (tmp_path / name / f"{i}.jpg").symlink_to(path)
    for name, expected in (("church", 182), ("b", 59)):  # the features of `a`, the reference, are remembered
        result = evaluate(tmp_path / name, tmp_path / "a", "fd", features=weights, device="cpu")
        assert result["metrics"]["fd"] == pytest.approx(expected, rel=0.05)


# ---- image sources


def photo(value: int, side: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", side, (value, 255 - value, 40)).save(out, kind)
    return out.getvalue()


def folder_of(path: Path, n: int = 8) -> Path:
    path.mkdir(parents=True)
    for i in range(n):
        (path / f"{i:03d}.png").write_bytes(photo(i * 20))
    return path


def read(where: Path | str, limit: int = 100, size: int = 16) -> tuple[list[int], torch.Tensor, list[str]]:
    lost: list[str] = []
    parts = list(sources.batches(sources.open_images(str(where)), size, 3, limit, lambda *skip: lost.append(str(skip))))
    return [int(p) for places, _ in parts for p in places], torch.cat([images for _, images in parts]), lost


def test_folders_are_read_deeply_in_order_and_cropped(tmp_path: Path) -> None:
    folder_of(tmp_path / "a" / "deep", 4)
    (tmp_path / "b.JPEG").write_bytes(photo(200, (40, 20), "JPEG"))
    (tmp_path / "notes.txt").write_text("no image")
    places, images, lost = read(tmp_path)
    assert places == [0, 1, 2, 3, 4] and images.shape == (5, 3, 16, 16) and not lost
    assert images[:4, 0, 0, 0].tolist() == [0, 20, 40, 60] and abs(int(images[4, 0, 8, 8]) - 200) < 4
    assert sources.first_size(sources.open_images(str(tmp_path))) == 16


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "f", 4)
    (tmp_path / "f" / "001.png").write_bytes(b"not an image")
    (tmp_path / "f" / "002.png").write_bytes(photo(3)[:60])
    places, images, lost = read(tmp_path / "f")
    assert places == [0, 3] and len(images) == 2
    assert len(lost) == 2 and "001.png" in lost[0] and "002.png" in lost[1]


def test_a_limit_spreads_over_the_whole_set(tmp_path: Path) -> None:
    assert sources.spread(10, 4) == [0, 2, 5, 7] and sources.spread(3, 10) == [0, 1, 2]
    for shard in range(2):
        with ShardWriter(tmp_path / f"{shard}.tar") as writer:
            for i in range(5):
                writer.write(f"{shard}-{i}", {"png": photo(100 * shard + i), "cls": b"1"})
    places, images, _ = read(tmp_path, limit=4)
    assert places == [0, 2, 5, 7] and images[:, 0, 0, 0].tolist() == [0, 2, 100, 102]
    assert sources.count(sources.open_images(str(tmp_path / "*.tar"))) == 10


def test_a_cut_off_shard_gives_its_good_images(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for i in range(5):
            writer.write(str(i), {"png": photo(i)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 - 700])
    _, images, lost = read(tmp_path / "a.tar")
    assert 1 <= len(images) < 5 and "damaged tar" in lost[0]


@pytest.mark.parametrize(
    "make, wrong",
    [
        (lambda p: None, "not found"),
        (lambda p: p.mkdir(), "no images in this folder"),
        (lambda p: [(p / "shards").mkdir(parents=True), (p / "manifest.yaml").touch()], "annotation set holds latents"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").touch()], "is empty"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_text("{")], "line 1: not JSON"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_text("[1]")], "line 1: expected a mapping"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_text('{"file": "../x.png"}')], "in this folder"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_bytes(b"\xff\xfe")], "not UTF-8"),
    ],
)
def test_sources_that_are_none_are_refused(make, wrong: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(InputError, match=wrong):
        sources.open_images(str(tmp_path / "x"))


def test_samples_are_what_their_records_say(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "s", 3)
    (folder / "grid.png").write_bytes(photo(9))
    lines = [{"file": f"{i:03d}.png", "k": 3 - i, "w": 2.0, "seed": 0, "steps": 25, "index": i} for i in range(3)]
    (folder / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    images = sources.open_images(str(folder))
    assert len(images.paths) == 3 and images.ids().tolist() == [3, 2, 1]
    assert images.sampling() == {"w": 2.0, "steps": 25, "seed": 0}
    for k in (None, [0, 1], "3", -1, True):
        (folder / "samples.jsonl").write_text(json.dumps({**lines[0], "k": k}))
        with pytest.raises(InputError, match="line 1"):
            sources.open_images(str(folder)).ids()
    with pytest.raises(InputError, match=r"samples\.jsonl"):
        sources.open_images(str(folder_of(tmp_path / "plain"))).ids()


def test_fingerprints_follow_files_and_settings(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", 2)
    first = sources.fingerprint(sources.open_images(str(folder)), size=16)
    assert first == sources.fingerprint(sources.open_images(str(folder)), size=16)
    assert first != sources.fingerprint(sources.open_images(str(folder)), size=32)
    (folder / "000.png").write_bytes(photo(77, (18, 18)))
    assert first != sources.fingerprint(sources.open_images(str(folder)), size=16)
    assert sources.fingerprint(sources.ImageSet("u", ("https://x/a.tar",), True)) is None


# ---- consistency


class Line:
    """f over features [N, 1]: clusters at 0, 1, 2, 3."""

    k = 4

    def nearest(self, features: torch.Tensor, n: int) -> torch.Tensor:
        return (features - torch.arange(4.0)).abs().argsort(1)[:, :n]


def test_consistency_counts_hits_ceiling_and_chance() -> None:
    asked, samples = torch.tensor([0, 1, 2, 3]), torch.tensor([[0.1], [1.1], [3.1], [0.2]])
    signals = torch.tensor([0, 0, 1, 2])
    found = consistency(asked, samples, signals, torch.tensor([[0.0], [3.0]]), torch.tensor([[0.2], [1.9]]), Line())
    assert found["consistency"] == 0.5 and found["consistency_top3"] == 0.75
    assert found["consistency_real"] == 0.5 and found["consistency_top3_real"] == 1.0
    assert found["consistency_chance"] == pytest.approx(0.5**2 + 2 * 0.25**2)
    # the three nearest of 0.0 are 0, 1, 2 (all of p), of 3.0 are 3, 2, 1 (a half of it)
    assert found["consistency_top3_chance"] == pytest.approx(0.75)
    assert landing(torch.tensor([1]), torch.tensor([[1]])) == (1.0, 1.0)  # an annotator of one cluster
    assert chance(torch.tensor([0]), torch.tensor([[0]]), 1) == (1.0, 1.0)


def test_ids_that_the_annotator_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="cluster 9 was asked for; the annotator has clusters 0 to 3"):
        check_ids(torch.tensor([1, 9]), 4, "x")
    with pytest.raises(InputError, match="multi-hot"):
        check_ids(torch.zeros(2, 4), 4, "x")


# ---- the verb


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four flat colours with a real (untrained) network, g and f, and its source shard beside it."""
    root = tmp_path_factory.mktemp("evaluate")
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(64) % 4
    images = (COLOURS[truth][:, :, None, None] + 0.05 * torch.randn(64, 3, 16, 16, generator=generator)).clamp(-1, 1)
    with ShardWriter(root / "real.tar") as writer:
        for i, image in enumerate(images):
            out = io.BytesIO()
            Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(out, "PNG")
            writer.write(f"{i:03d}", {"png": out.getvalue()})
    g = load_extractor(FeaturesConfig(model=str(tiny_g(root / "g"))))
    f = Clusters(AnnotatorConfig(k=4)).fit_features(g(images))
    folder = write_annotation_set(root / "set", images, f.assign(g(images)).tolist(), 4)
    save_annotator(folder / "annotator", f, g)
    config = TrainConfig(annotation=str(folder), out=str(root / "run"), model=TINY)
    latents = LatentSet(folder)
    writer = PipelineWriter(config, latents, torch.device("cpu"))
    (root / "run").mkdir()
    writer.export(network(config, latents), root / "run" / "pipeline")
    return root / "run"


def tiny_g(folder: Path) -> Path:
    """An untrained network as a g folder: good enough to tell four colours apart."""
    torch.manual_seed(0)
    tower = timm.create_model("test_resnet", num_classes=0)
    folder.mkdir()
    save_file(tower.state_dict(), folder / "model.safetensors")
    manifest = {"name": "tiny-g", "model": "test_resnet", "kwargs": {"num_classes": 0}, "layer": None, "pool": "auto"}
    manifest |= {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    manifest["sha256"] = file_sha256(folder / "model.safetensors")
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return folder


def perfect(self, guidance, w=2.0, steps=25, scheduler="dpmpp_2m", seed=0, first_index=0, precision="fp32"):
    """A generator that gives each cluster one of its real latents, and with w = 0 any."""
    k, known = guidance.k, self.signals.k
    if w == 0:
        k = known[torch.arange(first_index, first_index + len(k)) * 7 % len(known)]
    picks = [int((known == wanted).nonzero()[(first_index + i) % 8, 0]) for i, wanted in enumerate(k)]
    return self.decode(LatentSet(self.test_set).latents(torch.tensor(picks), None))


def test_a_perfect_generator_reaches_the_ceiling(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(SelfGuidedPipeline, "__call__", perfect)
    monkeypatch.setattr(SelfGuidedPipeline, "test_set", str(run.parent / "set"), raising=False)
    result = evaluate(run, str(run.parent / "real.tar"), "fd,kid,prdc,consistency", n=60, batch_size=16, device="cpu")
    found = result["metrics"]
    assert found["consistency"] == 1.0 == found["consistency_real"]
    assert found["consistency_chance"] == pytest.approx(0.25) and found["consistency_top3_chance"] < 0.8
    assert found["precision"] > 0.9 and found["recall"] > 0.5
    assert result["samples"] == 60 and result["reference_images"] == 64
    assert result["features"]["name"] == "tiny-g" and len(result["features"]["sha256"]) == 64
    assert result["preprocessing"]["size"] == 16 and result["sampling"]["signals"].startswith("drawn")
    file = run / "evaluations" / "w2_dpmpp_2m25_seed0_n60_own.json"
    assert json.loads(file.read_text()) == result and str(file) in capsys.readouterr().out
    free = evaluate(run, str(run.parent / "real.tar"), "fd,consistency", n=60, w=0, batch_size=16, device="cpu")[
        "metrics"
    ]
    assert abs(free["consistency"] - 0.25) < 0.2
    assert free["fd"] < 0.1 * untrained(run)["metrics"]["fd"]


def untrained(run: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        noise = torch.randint(0, 256, (60, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()
        patch.setattr(SelfGuidedPipeline, "__call__", lambda self, guidance, **_: noise[: len(guidance)])
        return evaluate(run, str(run.parent / "real.tar"), "fd", n=60, batch_size=60, device="cpu")


def test_the_real_pipeline_and_any_batch_size_give_the_same(run: Path, tmp_path: Path) -> None:
    args = {"metrics": "fd,consistency", "n": 10, "steps": 2, "device": "cpu", "out": tmp_path / "r.json"}
    a = evaluate(run, str(run.parent / "real.tar"), batch_size=10, **args)["metrics"]
    b = evaluate(run / "pipeline", str(run.parent / "real.tar"), batch_size=3, **args)["metrics"]
    assert a == pytest.approx(b, rel=1e-3)
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == b


def test_reference_features_are_remembered(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"metrics": "fd", "n": 6, "steps": 1, "device": "cpu", "out": tmp_path / "r.json"}
    first = evaluate(run, str(run.parent / "real.tar"), **args)
    monkeypatch.setattr(sources, "batches", None)  # a second reading would fail
    second = evaluate(run, str(run.parent / "real.tar"), **args)
    assert first["metrics"] == second["metrics"] and second["reference_images"] == 64


def test_samples_on_disk_are_judged_by_the_run_that_holds_them(run: Path) -> None:
    folder = run / "samples" / "made"
    folder.mkdir(parents=True)
    pipe = SelfGuidedPipeline.from_pretrained(run / "pipeline")
    latents = LatentSet(run.parent / "set")
    images, k = pipe.decode(latents.latents(torch.arange(8), None)), latents.signals.k[:8]
    for i in range(8):
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    wrong = [int(k[i]) if i < 6 else (int(k[i]) + 1) % 4 for i in range(8)]
    (folder / "samples.jsonl").write_text("\n".join(json.dumps({"file": f"{i}.png", "k": wrong[i]}) for i in range(8)))
    result = evaluate(folder, str(run.parent / "real.tar"), "consistency,prdc", device="cpu")
    assert result["metrics"]["consistency"] == 0.75
    assert (folder / "evaluation.json").is_file() and "8 samples, not the 10,000 asked for" in result["notes"]


def test_wrong_input_is_one_line_and_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, plain = str(run.parent / "real.tar"), folder_of(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    unfinished = folder_of(tmp_path / "unfinished" / "samples").parent
    (unfinished / "checkpoints").mkdir()
    one = folder_of(tmp_path / "one", 1)
    cases = [
        ((run, real, "fdd"), {}, "did you mean 'fd'"),
        ((run, real), {"n": 0}, "n=0"),
        ((run, real, "fd"), {"n": 1}, "1 images are too few for fd"),
        ((run, real), {"n": 5}, "5 images are too few for prdc"),
        ((run, real), {"w": float("nan")}, "finite"),
        ((run, real), {"scheduler": "ddimm"}, "did you mean 'ddim'"),
        ((run, real), {"size": 32}, "size=32"),
        ((run, real, "is"), {"n": 10}, "reads a classifier"),
        ((run, str(tmp_path / "empty")), {}, "no images in this folder"),
        ((run, str(one), "fd"), {}, "1 images are too few"),
        ((run, str(tmp_path / "nothing")), {}, "not found"),
        ((tmp_path / "norun", real), {}, "not found"),
        ((unfinished, real, "fd"), {"features": "tiny"}, "no complete pipeline"),
        ((plain, str(run), "fd"), {"features": "tiny"}, "not images"),
        ((plain, real, "fd"), {}, "belongs to no run"),
        ((plain, real, "consistency"), {"features": "tiny"}, "asked for"),
        ((plain, real, "fd"), {"features": "resnet9000"}, "resnet9000"),
        ((plain, real, "fd"), {"run": tmp_path / "norun"}, "norun"),
        ((run, real, "fd"), {"run": run}, "is a run itself"),
        ((plain, real, "fd"), {"features": "no.safetensors"}, "no such file"),
        ((run, real), {"out": plain}, "cannot be written"),
        ((run, real), {"out": plain / "000.png" / "x.json"}, "give another --out"),
        ((run, real), {"device": "gpu"}, "device='gpu'"),
    ]
    before = sorted(run.rglob("*"))
    for args, extra, wrong in cases:
        with pytest.raises(InputError, match=wrong) as caught:
            evaluate(*args, **{"device": "cpu", "n": 8, "steps": 2, **extra})
        assert "\n" not in str(caught.value), caught.value
    assert sorted(p for p in run.rglob("*") if p.is_file()) == [p for p in before if p.is_file()]


def test_a_run_of_ground_truth_labels_says_what_to_do(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def oracle(*_):
        raise InputError("annotator.kind=oracle reads ground truth from shards")

    monkeypatch.setattr("ldm_sg.verbs.evaluate.load_annotator", oracle)
    with pytest.raises(InputError, match=r"oracle.*--features"):
        evaluate(run, str(run.parent / "real.tar"), "fd", n=4, device="cpu")


def test_other_networks_judge_beside_the_runs_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances with g from a YAML at another size; consistency still with the run's own g."""
    (tmp_path / "g.yaml").write_text(f"model: {run.parent / 'g'}\nsize: 48\n")
    args = {"metrics": "fd,consistency", "n": 10, "steps": 2, "device": "cpu"}
    own = evaluate(run, str(run.parent / "real.tar"), out=tmp_path / "own.json", **args)
    other = evaluate(run, str(run.parent / "real.tar"), features=str(tmp_path / "g.yaml"), **args)
    assert other["features"]["size"] == 48 and own["features"]["size"] == 32
    assert other["metrics"]["fd"] != own["metrics"]["fd"]
    assert other["metrics"]["consistency"] == own["metrics"]["consistency"]
    assert (run / "evaluations" / "w2_dpmpp_2m2_seed0_n10_g.json").is_file()


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    evaluate(run, str(run.parent / "real.tar"), "fd", n=4, steps=1, device="cpu", out=tmp_path / "r.json")
    assert (tmp_path / "r.json").is_file() and "not remembered" in capsys.readouterr().err


def test_a_full_disk_loses_no_figures(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(self, target):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(InputError, match="No space left"):
            evaluate(run, str(run.parent / "real.tar"), "fd", n=4, steps=1, device="cpu", out=tmp_path / "o" / "r.json")
    assert capsys.readouterr().out.startswith("fd ") and list((tmp_path / "o").iterdir()) == []


def test_small_references_are_noted_when_enlarged(tmp_path: Path, run: Path) -> None:
    big, small = tmp_path / "big", folder_of(tmp_path / "small")
    big.mkdir()
    for i in range(6):
        (big / f"{i}.png").write_bytes(photo(i, (64, 80)))
    result = evaluate(big, small, "fd", features=str(run.parent / "g"), device="cpu")
    assert result["preprocessing"]["size"] == 64 and any("enlarged to 64 px" in note for note in result["notes"])
    assert json.loads((big / "evaluation.json").read_text())["samples"] == 6


def test_damaged_reference_images_are_noted(run: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "real")
    (folder / "bad.png").write_bytes(b"x")
    result = evaluate(run, folder, "fd", n=4, steps=1, device="cpu", out=tmp_path / "r.json")
    assert result["reference_images"] == 8 and any("bad.png" in note for note in result["notes"])
    assert tarfile.is_tarfile(run.parent / "real.tar")
