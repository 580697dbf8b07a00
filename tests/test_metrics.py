"""Figures of an evaluation against torch-fidelity and closed forms, Inception, cluster consistency."""

import pickle
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ldm_sg.data.images import to_float
from ldm_sg.errors import InputError
from ldm_sg.evaluate import figures, metrics, statistics
from ldm_sg.evaluate.consistency import chance, check_ids, consistency, landing
from ldm_sg.evaluate.figures import parse_metrics
from ldm_sg.evaluate.inception import RESIZES, load_inception
from ldm_sg.verbs.evaluate import evaluate

INCEPTION = SHARED / "weights" / "inception_fid" / "model.safetensors"


def features(n: int, d: int = 16, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) / d**0.5 + shift


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
    fake, real = features(80, 4, seed=1, shift=0.4), features(80, 4)
    ours = metrics.manifold(fake, real, k=5)
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=5, verbose=False)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    between = torch.cdist(fake.double(), real.double())  # [N, M]
    radius = torch.cdist(real.double(), real.double()).kthvalue(6, dim=1).values  # itself is the first
    inside = between <= radius
    assert ours["density"] == pytest.approx(float(inside.sum()) / (5 * 80))
    assert ours["coverage"] == pytest.approx(float(inside.any(0).float().mean()))
    assert 0 < ours["coverage"] < 1


@pytest.mark.parametrize("counts", [(300, 1500), (1500, 300)])
def test_manifolds_of_one_distribution_do_not_depend_on_the_counts(counts: tuple[int, int]) -> None:
    """One Gaussian on both sides: a coverage of 1 - 2^-5 = 0.97 (Naeem et al., 2020, Lemma 2), whichever set is larger."""
    g = torch.Generator().manual_seed(0)
    found = metrics.manifold(torch.randn(counts[0], 4, generator=g), torch.randn(counts[1], 4, generator=g))
    assert found["coverage"] == pytest.approx(0.97, abs=0.02) and found["density"] == pytest.approx(1, abs=0.1)
    assert found["precision"] == pytest.approx(found["recall"], abs=0.06)


def test_manifolds_of_equal_and_of_disjoint_sets() -> None:
    same = metrics.manifold(features(600, 4)[:300], features(600, 4)[300:])
    assert all(abs(value - 1) < 0.15 for value in same.values()), same
    assert set(metrics.manifold(features(50), features(50, seed=1, shift=1e3)).values()) == {0.0}


def test_manifolds_are_those_of_prdc() -> None:
    theirs = pytest.importorskip("prdc").compute_prdc
    fake, real = features(90, 6, seed=1, shift=0.3), features(90, 6)
    expected = theirs(real_features=real.double().numpy(), fake_features=fake.double().numpy(), nearest_k=5)
    assert metrics.manifold(fake, real) == pytest.approx(expected, rel=1e-4)


def test_distances_are_those_of_clean_fid(tmp_path: Path) -> None:
    """Of features, and of the statistics that it keeps in a file."""
    theirs = pytest.importorskip("cleanfid.fid")
    a, b = features(300, 24), features(200, 24, seed=1, shift=0.3)
    mu, sigma = (lambda x: (x.mean(0), np.cov(x, rowvar=False)))(b.double().numpy())
    own = a.double().numpy()
    expected = theirs.frechet_distance(own.mean(0), np.cov(own, rowvar=False), mu, sigma)
    assert metrics.frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-4)
    np.savez_compressed(tmp_path / "cleanfid.npz", mu=mu, sigma=sigma)
    known = statistics.read(str(tmp_path / "cleanfid.npz"))[0]["fd"]
    assert metrics.frechet_of(metrics.Moments.of(a), known) == pytest.approx(float(expected), rel=1e-4)
    statistics.write(tmp_path / "ours.npz", {"fd": metrics.Moments.of(b), "sfid": metrics.Moments.of(a)}, {}, 200)
    ours = np.load(tmp_path / "ours.npz", allow_pickle=False)
    np.testing.assert_allclose(ours["sigma"], sigma, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours["mu"], mu, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours["sigma_s"], np.cov(own, rowvar=False), rtol=1e-6, atol=1e-9)
    kid = theirs.kernel_distance(own[:200], b.double().numpy(), num_subsets=1)  # the whole of both: nothing is drawn
    assert metrics.kernel_distance(a[:200], b)["kid"] == pytest.approx(kid, rel=1e-4)


@pytest.mark.parametrize("rows", [7, 100, 8192])
def test_moments_do_not_depend_on_how_many_rows_are_taken_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ROWS", rows)
    x = features(101, 16, shift=1e3)
    found = metrics.Moments.of(x)
    np.testing.assert_allclose(
        found.root.T @ found.root, np.cov(x.double().numpy(), rowvar=False), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("block", [metrics.BLOCK, 1])
def test_cmmd_is_the_papers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the paper's own code: embeddings of unit length, means over all pairs, each with itself too."""
    monkeypatch.setattr(metrics, "BLOCK", block)
    a, b = features(70, 32), features(90, 32, seed=1, shift=0.5)
    x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (a.double().numpy(), b.double().numpy()))
    k = [np.exp(-((p[:, None] - q[None]) ** 2).sum(2) / (2 * 10**2)).mean() for p, q in ((x, x), (y, y), (x, y))]
    assert metrics.cmmd(a, b) == pytest.approx(1000 * (k[0] + k[1] - 2 * k[2]), rel=1e-4)
    assert metrics.cmmd(3 * a, b) == pytest.approx(metrics.cmmd(a, b)) and metrics.cmmd(a, a) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_inception_score_is_torchmetrics_of_its_own_shuffle() -> None:
    """Ten splits, each its own marginal; torchmetrics shuffles by its own generator, so it is given what ours shuffled."""
    theirs = pytest.importorskip("torchmetrics.image.inception").InceptionScore
    logits = 2 * torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    order = np.random.RandomState(3).permutation(200)
    judge = theirs(feature=torch.nn.Identity(), splits=10)
    judge.features.append(logits[order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
        mean, spread = judge.compute()
    ours = metrics.inception_score(logits, seed=3)
    assert ours["is"] == pytest.approx(float(mean), rel=1e-4)
    assert ours["is_std"] == pytest.approx(
        float(spread) * (9 / 10) ** 0.5, rel=1e-4
    )  # over the splits, not of a sample


def test_inception_score_of_known_predictions() -> None:
    """Certain predictions spread evenly over 7 classes: exp(log 7)."""
    logits = 100 * torch.nn.functional.one_hot(torch.arange(700) % 7, 7).float()
    score = metrics.inception_score(logits, splits=1)
    assert score["is"] == pytest.approx(7, rel=1e-6)
    with pytest.raises(InputError, match="9 images are too few for 10 splits"):
        metrics.inception_score(logits[:9])


@pytest.mark.parametrize(
    "compute, least", [(metrics.frechet_distance, 2), (metrics.kernel_distance, 2), (metrics.manifold, 6)]
)
def test_too_few_or_broken_features_are_refused(compute, least: int) -> None:
    with pytest.raises(InputError, match=f"samples: {least - 1} images are too few"):
        compute(features(least - 1), features(20))
    with pytest.raises(InputError, match="reference: 0 images"):
        compute(features(20), features(0))
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


@pytest.mark.parametrize("shape", [(40, 56), (299, 299), (350, 410)])
def test_clean_resizing_is_clean_fids(shape: tuple[int, int]) -> None:
    """PIL's bicubic of each channel in float, clipped to 0 .. 255: cleanfid.resize.build_resizer("clean")."""
    pixels = torch.randint(0, 256, (2, 3, *shape), generator=torch.Generator().manual_seed(0)).float()
    found = RESIZES["clean"](pixels)
    for image, resized in zip(pixels, found, strict=True):
        for channel, ours in zip(image, resized, strict=True):
            theirs = Image.fromarray(channel.numpy(), mode="F").resize((299, 299), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(ours.numpy(), np.asarray(theirs).clip(0, 255), atol=1e-2)
    assert (found - RESIZES["tf"](pixels)).abs().max() > 20 or shape == (299, 299)


def test_the_maps_of_sfid_are_adms(inception) -> None:
    """The first 7 of TensorFlow's mixed_6/conv, 17 x 17, behind the pooled features, channels last, as ADM's evaluator flattens
    them, whose files are compared with; a distance by its own formula."""
    maps = load_inception(INCEPTION)
    maps.see_maps()
    pixels = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen: list[torch.Tensor] = []
    hook = inception.net.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[2]))
    pooled = inception(to_float(pixels))
    hook.remove()
    found = maps(to_float(pixels))
    assert found.shape == (4, 2048 + 7 * 17 * 17) and torch.equal(found[:, :2048], pooled)
    assert (
        torch.equal(found[:, 2048:], seen[0].permute(0, 2, 3, 1)[..., :7].reshape(4, -1))
        and (found[:, 2048:] >= 0).all()
    )
    assert maps.manifest["spatial"] == 2023 and "spatial" not in inception.manifest and maps.manifest["dim"] == 2048
    given = (
        torch.cat([features(40, 5), features(40, 3, seed=2)], 1),
        torch.cat([features(40, 5, 1), features(40, 3, 3)], 1),
    )
    known = figures.moments(["fd", "sfid"], given[1], 5)
    judge = SimpleNamespace(manifest={"dim": 5})
    both = figures.compute(["fd", "sfid"], given[0], None, known, judge, 0)
    assert both["fd"] == pytest.approx(metrics.frechet_distance(given[0][:, :5], given[1][:, :5]))
    assert both["sfid"] == pytest.approx(metrics.frechet_distance(given[0][:, 5:], given[1][:, 5:]))


def test_inception_says_how_it_resized(inception) -> None:
    clean = load_inception(INCEPTION, "clean")
    pixels = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    planes = [Image.fromarray(c.numpy().astype("f4"), mode="F").resize((299, 299), 3) for c in pixels[0]]
    x = (torch.from_numpy(np.stack(planes))[None].clamp(0, 255) - 128) / 128
    expected = torch.nn.Sequential(*list(clean.net.children())[:-1])(x).flatten(1)
    torch.testing.assert_close(clean(to_float(pixels)), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(clean(to_float(pixels)), inception(to_float(pixels)), atol=1e-2)
    assert (clean.manifest["resize"], inception.manifest["resize"]) == ("clean", "tf")


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
        assert result["metrics"]["inception"]["fd"] == pytest.approx(expected, rel=0.05)


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
    assert found["consistency_chance"] == pytest.approx(0.25 * (0.5 + 2 * 0.25))
    # the three nearest of 0.0 are 0, 1, 2, of 3.0 are 3, 2, 1: three quarters of what is asked
    assert found["consistency_top3_chance"] == pytest.approx(0.75)
    assert landing(torch.tensor([1]), torch.tensor([[1]])) == (1.0, 1.0)  # an annotator of one cluster
    only = torch.tensor([0])
    assert chance(only, only, torch.tensor([[0]]), 1) == (1.0, 1.0)


def test_chance_is_what_images_that_ignore_the_id_reach() -> None:
    """By drawing: images of the training distribution, asked for ids of another."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    signals, asked = (torch.multinomial(each, 20_000, True, generator=generator) for each in (p, q))
    images = torch.multinomial(p, 20_000, True, generator=generator)[:, None].float()
    nearest = Line().nearest(images, 3)
    reached = landing(asked, nearest)
    assert chance(asked, signals, nearest, 4) == pytest.approx(reached, abs=0.02) and reached[0] < 0.3
    assert chance(signals, signals, nearest, 4)[0] == pytest.approx(0.52, abs=0.02)


def test_ids_that_the_annotator_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="cluster 9 was asked for; the annotator has clusters 0 to 3"):
        check_ids(torch.tensor([1, 9]), 4, "x")
