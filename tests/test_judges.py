"""What `evaluate` judges beside distances: memorisation, clusters, statistics in files, priors of labels, input that is wrong."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import folder_of
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from test_evaluate import look_of, run  # noqa: F401
from test_features import TINY_CLIP
from test_metrics import INCEPTION
from test_sample import invoke

from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.data.images import to_float
from ldm_sg.data.shards import ShardWriter, read_shard
from ldm_sg.errors import InputError
from ldm_sg.evaluate import figures, memory, metrics, sources, statistics
from ldm_sg.evaluate.judges import is_guide
from ldm_sg.evaluate.options import Options
from ldm_sg.evaluate.subjects import open_subject
from ldm_sg.verbs.evaluate import evaluate

ROOT = Path(__file__).parents[1]


def noisy(folder: Path, n: int, seed: int, size: int = 16) -> Path:
    """Images of noise, no two of them alike."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def test_copies_are_found_in_features_and_pixels_and_shown(run: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """9 of 30 samples are training images, or those with one grey level more."""
    train, unseen = noisy(tmp_path / "train", 120, 0), noisy(tmp_path / "unseen", 200, 1)
    made = noisy(tmp_path / "made", 30, 2)
    for i in range(9):
        pixels = np.asarray(Image.open(train / f"{i * 7:03d}.png")).astype(int) + i % 2
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(made / f"{i:03d}.png")
    args: dict[str, Any] = {"held_out": str(unseen), "features": str(run.parent / "g"), "device": "cpu"}
    result = evaluate(made, train, "memory", **args)
    for space in ("g", "pixels"):
        found = result["metrics"][space]
        assert found["memory_copies"] == pytest.approx(9 / 30, abs=1.01 / 30)  # 1% of the others by chance
        assert found["memory_copies_real"] == pytest.approx(0.01, abs=0.006)
        pairs = result["details"][space]["nearest"]
        assert {pair["sample"] for pair in pairs} <= set(range(9)) and len(pairs) == memory.SHOWN
        assert all(pair["images"][0] == 7 * pair["sample"] for pair in pairs)
        assert all(pair["distances"] == sorted(pair["distances"]) for pair in pairs)
    assert result["metrics"]["pixels"]["memory_threshold"] > 20 > 1 >= pairs[-1]["distances"][0]  # grey levels
    picture = np.asarray(Image.open(made / "evaluation.png").convert("RGB"))
    assert picture.shape[0] > 16 * 16 * 8 and str(made / "evaluation.png") in capsys.readouterr().out
    again = evaluate(made, train, "memory", **args)  # neither its figures nor its picture are samples
    assert again["samples"] == 30 and not any("left out" in note or "copies" in note for note in again["notes"])
    for i in range(3):
        shutil.copy(train / f"{i:03d}.png", unseen / f"seen{i}.png")
    note = evaluate(made, train, "memory", **args)["notes"][-1]
    assert note.startswith("at least 1% of the held-out images are copies of reference images (0 grey levels apart)")


def test_nearest_are_those_of_all_distances() -> None:
    g = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(n, 7, generator=g) for n in (20, 50, 300))
    found, distances, rows = memory.copies(x, y, z, unit=False)
    every = torch.cdist(x.double(), y.double())
    assert torch.equal(torch.from_numpy(rows), every.argsort(1)[:, :3])
    np.testing.assert_allclose(distances, every.sort(1).values[:, :3].numpy(), rtol=1e-4)
    apart = torch.cdist(z.double(), y.double()).amin(1)
    assert found["memory_threshold"] == pytest.approx(float(apart.sort().values[2]), rel=1e-4)  # 1% of 300
    assert found["memory_copies"] == float((every.amin(1) <= found["memory_threshold"] + 1e-6).float().mean())


def test_drawn_samples_are_drawn_again_for_the_picture(run: Path) -> None:  # noqa: F811
    options = Options(str(run), str(run.parent / "real.tar"), "fd", n=40, steps=2, device="cpu")
    subject = open_subject(options, [])
    whole = torch.cat([images for _, images in subject.batches(slice(None), print)])
    found = subject.at({3, 17, 39})
    assert {3, 17, 39} <= found.keys() and all(torch.equal(found[i], whole[i]) for i in (3, 17, 39))
    real = sources.open_images(options.reference)
    every = torch.cat([images for _, images in sources.batches(real, 16, 8, 99, print)])
    assert all(torch.equal(image, every[i]) for i, image in sources.at(real, {0, 33, 63}, 16).items())


# ---- clusters


def test_fd_of_each_cluster_says_what_it_rests_on(run: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "made"
    folder.mkdir()
    images = [sample.image for sample in read_shard(str(run.parent / "real.tar"), print)]
    for copy in range(2):
        for i, data in enumerate(images):
            (folder / f"{copy}_{i:02d}.png").write_bytes(data)
    own = load_annotator(run / "pipeline" / "annotator")
    pixels = torch.stack(list(sources.at(sources.open_images(str(run.parent / "real.tar")), range(64), 16).values()))
    features = own.features(to_float(pixels))
    k = own.f.assign(features)
    lines = [json.dumps({"file": f"{c}_{i:02d}.png", "k": int(k[i])}) for c in range(2) for i in range(64)]
    (folder / "samples.jsonl").write_text("\n".join(lines))
    args: dict[str, Any] = {"run": run, "device": "cpu"}
    none = evaluate(folder, str(run.parent / "real.tar"), "fd_clusters", out=tmp_path / "r.json", **args)
    assert none["metrics"]["tiny-g"] == {"fd_clusters_counted": 0, "fd_clusters_left_out": 4}
    assert any("leaves out 4 clusters of fewer than 20" in note for note in none["notes"])
    result = evaluate(folder, folder, "fd_clusters", out=tmp_path / "r.json", **args)
    assert result["metrics"]["tiny-g"]["fd_clusters"] == pytest.approx(0, abs=1e-4)
    rows = result["details"]["tiny-g"]["clusters"]
    assert [row["cluster"] for row in rows] == [0, 1, 2, 3]
    assert [row["samples"] for row in rows] == [row["real"] for row in rows] == (2 * torch.bincount(k)).tolist()


def test_fd_by_cluster_is_that_of_its_members() -> None:
    g = torch.Generator().manual_seed(0)
    asked, ids = torch.arange(90) % 3, torch.cat([torch.zeros(40), torch.ones(25), torch.full((5,), 2.0)]).long()
    a, b = torch.randn(90, 4, generator=g), 2 * torch.randn(70, 4, generator=g)
    found, rows = figures.by_cluster(asked, a, ids, b)
    for row in rows[:2]:
        k = row["cluster"]
        assert row["fd"] == metrics.frechet_distance(a[asked == k], b[ids == k]) and row["real"] == int(
            (ids == k).sum()
        )
    assert rows[2] == {"cluster": 2, "samples": 30, "real": 5} and found["fd_clusters_left_out"] == 1
    assert found["fd_clusters"] == pytest.approx(np.mean([row["fd"] for row in rows[:2]]))


def test_agreement_of_clusters_with_labels_is_scikit_learns(run: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of shards by KEY.cls, images without one left out; of a folder by its folders."""
    images = [sample.image for sample in read_shard(str(run.parent / "real.tar"), print)]
    classes = [i % 4 if i % 5 else (i + 1) % 3 for i in range(64)]
    with ShardWriter(tmp_path / "labelled.tar") as writer:
        for i, data in enumerate(images):
            cls = {"cls": str(classes[i]).encode()} if i < 60 else {}
            writer.write(f"{i:03d}", {"png": data if i != 7 else b"broken", **cls})
    for i, data in enumerate(images):
        (tmp_path / "folders" / str(classes[i])).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / str(classes[i]) / f"{i}.png").write_bytes(data)
    k = load_annotator(run / "pipeline" / "annotator").f
    own = load_annotator(run / "pipeline" / "annotator")
    pixels = torch.stack(list(sources.at(sources.open_images(str(run.parent / "real.tar")), range(64), 16).values()))
    k = own.f.assign(own.features(to_float(pixels))).numpy()
    kept = [i for i in range(60) if i != 7]
    for reference, used in ((tmp_path / "labelled.tar", kept), (tmp_path / "folders", list(range(64)))):
        args: dict[str, Any] = {"n": 2, "steps": 1, "device": "cpu", "out": tmp_path / "r.json"}
        found = evaluate(run, str(reference), "nmi", **args)["metrics"]["tiny-g"]
        a, b = k[used], np.array(classes)[used]
        assert found["nmi_images"] == len(used)
        assert found["nmi"] == pytest.approx(normalized_mutual_info_score(b, a), abs=1e-6)
        assert found["ami"] == pytest.approx(adjusted_mutual_info_score(b, a), abs=1e-6)
    with pytest.raises(InputError, match="at least two classes"):
        evaluate(run, str(run.parent / "real.tar"), "nmi", **args)


# ---- an open_clip tower


def test_cmmd_is_judged_by_an_open_clip_tower(run: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny-clip", pretrained=None)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    (tmp_path / "clip.yaml").write_text(f"model: open_clip:tiny-clip\nweights: {tmp_path / 'clip.safetensors'}\n")
    args: dict[str, Any] = {"n": 8, "steps": 1, "device": "cpu", "out": tmp_path / "r.json"}
    real = str(run.parent / "real.tar")
    result = evaluate(run, real, "cmmd,fd", features=f"own,{tmp_path / 'clip.yaml'}", **args)
    assert result["metrics"]["clip"].keys() == {"cmmd", "fd"} and result["metrics"]["tiny-g"].keys() == {"fd"}
    with pytest.raises(InputError, match="open_clip tower"):
        evaluate(run, real, "cmmd", **args)


# ---- statistics in files


def test_statistics_are_written_and_read(run: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    real, file = str(run.parent / "real.tar"), tmp_path / "stats.npz"
    args: dict[str, Any] = {"n": 20, "steps": 1, "device": "cpu", "out": tmp_path / "r.json"}
    first = evaluate(run, real, "fd", statistics=str(file), **args)
    with np.load(file, allow_pickle=False) as made:
        assert made["mu"].shape == (96,) and made["sigma"].shape == (96, 96) and int(made["images"]) == 64
    second = evaluate(run, str(file), **args)
    expected = first["metrics"]["tiny-g"]["fd"]
    assert second["metrics"]["tiny-g"]["fd"] == pytest.approx(expected, rel=1e-4)
    assert second["reference_images"] == 64 and "against the statistics" not in capsys.readouterr().out
    with np.load(file) as made:
        np.savez(tmp_path / "theirs.npz", mu=made["mu"], sigma=made["sigma"])
        np.savez(tmp_path / "uncounted.npz", **{key: made[key] for key in ("mu", "sigma", "sha256")})
    with pytest.raises(InputError, match="does not say which network made it, and the judge is tiny-g"):
        evaluate(run, tmp_path / "theirs.npz", "fd", **args)
    third = evaluate(run, tmp_path / "uncounted.npz", "fd", **args)
    assert third["metrics"]["tiny-g"]["fd"] == second["metrics"]["tiny-g"]["fd"] and third["reference_images"] is None
    assert "against the statistics of" in capsys.readouterr().out
    for metric, more, wrong in (
        ("prdc", {}, "prdc needs the images"),
        ("fd", {"statistics": str(file)}, "written of reference images"),
        ("fd", {"features": str(run.parent / "g")}, None),
    ):
        if wrong:
            with pytest.raises(InputError, match=wrong):
                evaluate(run, str(file), metric, **{**args, **more})
        else:
            assert evaluate(run, str(file), metric, **{**args, **more})["metrics"]["g"]


def test_statistics_that_are_none_or_do_not_fit_are_refused(run: Path, tmp_path: Path) -> None:  # noqa: F811
    cov = np.eye(4)
    bad = {
        "text": None,
        "other": {"x": cov},
        "shape": {"mu": np.zeros(3), "sigma": cov},
        "nan": {"mu": np.full(4, np.nan), "sigma": cov},
        "skew": {"mu": np.zeros(4), "sigma": np.triu(np.ones((4, 4)))},
        "half": {"mu": np.zeros(4)},
        "infinite": {"mu": np.zeros(4), "sigma": np.full((4, 4), np.inf)},
        "none-of": {"mu": np.zeros(4), "sigma": cov, "images": -5},
        "object": {"mu": np.array([{"a": 1}], dtype=object), "sigma": cov},
        "dim": {"mu": np.zeros(4), "sigma": cov},
    }
    for name, arrays in bad.items():
        file = tmp_path / f"{name}.npz"
        file.write_text("no npz") if arrays is None else np.savez(file, **arrays)
        if name == "text":
            (tmp_path / "empty.npz").touch()
            with pytest.raises(InputError, match="not the statistics of clean-fid"):
                statistics.read(str(tmp_path / "empty.npz"))
        with pytest.raises(InputError, match=name):
            evaluate(run, str(file), "fd", n=4, device="cpu", out=tmp_path / "r.json")
    with pytest.raises(InputError, match="none"):
        evaluate(run, str(tmp_path / "none.npz"), "fd", n=4, device="cpu")
    with pytest.raises(InputError, match="made with sha256 0, and the judge has"):
        statistics.check_fits(
            "x.npz", {"fd": metrics.Moments.of(torch.randn(9, 4))}, {"sha256": "0"}, {"dim": 4, "name": "g"}, ["fd"]
        )
    own, known = {"dim": 4, "spatial": 6, "name": "inception"}, {"fd": metrics.Moments.of(torch.randn(9, 4))}
    statistics.check_fits("x.npz", known, {}, own, ["fd"])
    with pytest.raises(InputError, match="has no mu_s and sigma_s, which sfid is of"):
        statistics.check_fits("x.npz", known, {}, own, ["fd", "sfid"])
    with pytest.raises(InputError, match="made with spatial 5, and the judge has 6"):
        statistics.check_fits("x.npz", known | {"sfid": metrics.Moments.of(torch.randn(9, 5))}, {}, own, ["sfid"])
    assert not (tmp_path / "r.json").exists()


@pytest.mark.skipif(not INCEPTION.is_file(), reason="needs the weights of Inception")
def test_statistics_of_sfid_alone_can_be_read(run: Path, tmp_path: Path) -> None:  # noqa: F811
    judge, file = f"inception:{INCEPTION}", str(tmp_path / "stats.npz")
    args: dict[str, Any] = {"n": 4, "steps": 1, "device": "cpu", "features": judge, "out": tmp_path / "r.json"}
    first = evaluate(run, str(run.parent / "real.tar"), "sfid", statistics=file, **args)["metrics"]["inception"]
    second = evaluate(run, file, "sfid,fd", **args)["metrics"]["inception"]
    assert first.keys() == {"sfid"} and second["sfid"] == pytest.approx(first["sfid"], rel=1e-3) and second["fd"] > 0


# ---- what labels are drawn from


def test_priors_of_labels(run: Path, tmp_path: Path) -> None:  # noqa: F811
    real, out = str(run.parent / "real.tar"), tmp_path / "r.json"
    images = list(read_shard(real, print))
    held = tmp_path / "held"
    held.mkdir()
    for i in (0, 4, 8, 1):  # colours 0, 0, 0, 1
        (held / f"{i}.png").write_bytes(images[i].image)
    known = load_annotator(run / "pipeline" / "annotator")
    pixels = torch.stack(list(sources.at(sources.open_images(str(held)), range(4), 16).values()))
    expected = known.f.assign(known.features(to_float(pixels)))

    def drawn(**more: Any) -> torch.Tensor:
        return open_subject(Options(str(run), real, n=400, device="cpu", **more), []).ids()

    free, uniform, other = drawn(), drawn(prior="uniform"), drawn(prior="held-out", held_out=str(held))
    assert torch.equal(drawn(prior="empirical"), free)
    assert all(abs(count - 100) < 40 for count in torch.bincount(uniform, minlength=4).tolist())
    assert set(other.tolist()) == set(expected.tolist())
    share = (other == expected[0]).float().mean()
    assert float(share) == pytest.approx(float((expected == expected[0]).float().mean()), abs=0.1)
    args: dict[str, Any] = {"n": 4, "steps": 1, "device": "cpu", "out": out}
    assert "uniform" in evaluate(run, real, "fd", prior="uniform", **args)["sampling"]["signals"]
    said = evaluate(run, real, "fd", prior="held-out", held_out=str(held), **args)
    assert said["sampling"]["signals"] == "drawn from the clusters of 4 held-out images"
    assert said["asked"]["held_out"] == str(held)
    for metric, more, wrong in (
        ("fd", {"prior": "flat"}, "prior='flat'"),
        ("fd", {"prior": "held-out"}, "held"),
        ("fd", {"held_out": str(held)}, "needed by"),
        ("memory", {}, "needed by"),
        ("memory", {"held_out": str(held)}, "4 images are too few for memory"),
    ):
        with pytest.raises(InputError, match=wrong):
            evaluate(run, real, metric, **args, **more)


# ---- wrong input


def test_features_that_are_not_finite_name_the_image(run: Path, tmp_path: Path) -> None:  # noqa: F811
    passes = look_of(run, 20)
    broken = {("g", ""): lambda x: torch.where(torch.arange(len(x)) == 2, torch.nan, 1.0)[:, None]}
    passes.look.__dict__["networks"] = broken
    with pytest.raises(InputError, match=rf"^sample 2 of {re.escape(str(run))}: its features in g are not finite"):
        passes(None, [("g", "")])
    with pytest.raises(InputError, match=r"^image 2 of .*real\.tar: its features in g"):
        passes(sources.open_images(str(run.parent / "real.tar")), [("g", "")])
    folder = noisy(tmp_path / "made", 4, 0)
    assert sources.open_images(str(folder)).name(2).endswith("002.png")


def test_images_of_which_too_few_can_be_read_are_refused(run: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = folder_of(tmp_path / "made")
    for file in sorted(folder.iterdir())[1:]:
        file.write_bytes(b"x")
    args: dict[str, Any] = {"features": str(run.parent / "g"), "device": "cpu", "out": tmp_path / "r.json"}
    for made, real in ((folder, run.parent / "real.tar"), (run.parent / "real.tar", folder)):
        with pytest.raises(InputError, match=rf"^{re.escape(str(folder))}: 1 images are too few for fd"):
            evaluate(made, str(real), "fd", **args)


@pytest.mark.slow
def test_copies_and_priors_are_the_same_by_two_processes(
    run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unseen, found = noisy(tmp_path / "unseen", 120, 1), []
    args: dict[str, Any] = {
        "metrics": "memory,fd_clusters",
        "prior": "held-out",
        "held_out": str(unseen),
        "n": 40,
        "steps": 2,
    }
    for processes in (1, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{processes}"))
        out = tmp_path / f"{processes}.json"
        result = evaluate(
            run, str(run.parent / "real.tar"), processes=processes, device="cpu", out=out, batch_size=16, **args
        )
        found.append((result["metrics"], result["details"], out.with_suffix(".png").read_bytes()))
    assert found[0] == found[1]


def test_files_beside_images_are_noted(run: Path, tmp_path: Path) -> None:  # noqa: F811
    folder, real = folder_of(tmp_path / "made"), str(run.parent / "real.tar")
    shutil.copy(folder / "000.png", folder / "grid.png")
    (folder / "evaluation.old.json").write_text("{}")
    (folder / "notes.txt").write_text("x")
    result = evaluate(folder, real, "fd", features=str(run.parent / "g"), device="cpu")
    assert (
        result["samples"] == 8
        and f"1 images or files are left out; the first: {folder / 'notes.txt'}: not one of the images of its folder"
        in result["notes"]
    )
    (folder / "samples.jsonl").write_text('{"file": "000.png"}\n{"file": "001.png"}\n')
    result = evaluate(folder, real, "fd", features=str(run.parent / "g"), device="cpu")
    assert result["samples"] == 2 and any(note.startswith("7 images or files are left out") for note in result["notes"])


def test_too_few_images_for_the_dimensions_say_how_many_are_needed(run: Path, tmp_path: Path) -> None:  # noqa: F811
    result = evaluate(run, str(run.parent / "real.tar"), "fd", n=8, steps=1, device="cpu", out=tmp_path / "r.json")
    assert any(
        "fd of 8 images in 96 dimensions" in note and "7 directions only" in note and "more than 96" in note
        for note in result["notes"]
    )


def test_new_flags_as_they_are_typed(run: Path, tmp_path: Path) -> None:  # noqa: F811
    flags = (
        "--reference",
        run.parent / "real.tar",
        "-n",
        "4",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--out",
        tmp_path / "r.json",
    )
    code, shown = invoke(
        "evaluate", run, *flags, "--metrics", "fd", "--prior", "uniform", "--statistics", tmp_path / "s.npz"
    )
    assert code == 0 and (tmp_path / "s.npz").is_file(), shown
    for wrong in (("--prior", "no"), ("--held-out", tmp_path / "none"), ("--metrics", "sfid"), ("--metrics", "fdd")):
        code, shown = invoke("evaluate", run, *flags, *wrong)
        assert code == 2 and shown.count("\n") == 1, shown


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(metrics.NEEDS)
    shown = invoke("evaluate", "--help")[1]
    assert all(re.search(rf"\b{name}\b", shown) for name in metrics.NEEDS)


def test_a_network_is_its_runs_guide_at_any_input_size_and_with_its_weights_alone() -> None:
    g = {"model": "vit", "weights": "/a", "sha256": "1"}
    for judge, same in (({"model": "vit", "weights": "/a", "sha256": "2"}, True), ({"sha256": "1"}, True),
                        ({"model": "vit", "weights": "/b", "sha256": "2"}, False), ({"sha256": "2"}, False)):  # fmt: skip
        assert is_guide(judge, g) is same
    assert not is_guide({"model": None, "weights": None, "sha256": "1"}, None)
