"""A run moved to other images: labels that start from those like them, what stays as it was, adapters, replay, early stopping."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ldm_sg import build
from ldm_sg.annotate.clusters import Clusters, kmeans_beside
from ldm_sg.annotate.kinds import load_f
from ldm_sg.cli import app
from ldm_sg.config import (
    AnnotateConfig,
    AnnotatorConfig,
    ModelConfig,
    ObjectiveConfig,
    ReplayConfig,
    SegmentsConfig,
    TrainConfig,
)
from ldm_sg.configfile import from_mapping
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.models.transfer import likeness, transfer
from ldm_sg.models.unet import make_unet
from ldm_sg.pipeline import open_pipeline
from ldm_sg.report.run import run_facts
from ldm_sg.training.data import LatentBatches, Mixed
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.pack import pack
from ldm_sg.verbs.train import train


def photos(folder: Path, colours: list[tuple[int, int, int]], n: int, seed: int = 0) -> Path:
    """n photos of 32 px of each colour, with noise."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(n * len(colours)):
        pixels = np.array(colours[i % len(colours)]) + generator.normal(0, 12, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by fewer of them than a user's are."""
    monkeypatch.setattr("ldm_sg.verbs.train.JUDGED", 40)
    monkeypatch.setattr("ldm_sg.verbs.finetune.JUDGED", 60)
    monkeypatch.setattr("ldm_sg.verbs.finetune.FEWEST", 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on red, green and blue photos."""
    home = tmp_path_factory.mktemp("base")
    pack(
        photos(home / "photos", [(200, 30, 30), (30, 200, 30), (30, 30, 200)], 16),
        home / "shards",
        size=32,
        format="png",
    )
    annotate(
        AnnotateConfig(
            shards=f"{home}/shards/*.tar", out=str(home / "annotation"), autoencoder="patch4", flips=True, device="cpu",
            annotator=AnnotatorConfig(k=3), workers=0,
        )
    )  # fmt: skip
    return train(
        TrainConfig(
            annotation=str(home / "annotation"), out=str(home / "run"), model=TINY, steps=120, batch_size=16, lr=4e-3, warmup=5,
            ema=0.9, precision="fp32", device="cpu", workers=0, val_share=0.1, val_every=0, sample_every=0, checkpoint_every=120, objective=ObjectiveConfig(kind="v"),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("other") / "photos", [(220, 200, 40), (30, 40, 190)], 20, seed=1)


def finetune(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments), "--device", "cpu"])
    if result.exit_code == 1:
        raise result.exception
    return result.exit_code, result.output


def test_likeness_is_a_mean_of_what_is_near() -> None:
    old = torch.eye(3)
    found = likeness(torch.tensor([[1.0, 0.1, 0], [0, 1, 1]]), old, (2, 3))
    assert torch.allclose(found.sum(1), torch.ones(2)) and found[0, 0] > 0.99
    assert torch.allclose(found[1, 1], found[1, 2]) and found[1, 0] < 0.01
    kept = likeness(torch.cat([old, torch.rand(2, 3)]), old, (5, 3))
    assert torch.equal(kept[:3], torch.eye(3))
    assert torch.equal(likeness(None, old, (2, 3)), torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("tokens", ["none", "vector", "concepts"])
@pytest.mark.parametrize("spatial", [None, "mask"])
def test_moved_network_predicts_for_a_new_label_what_the_old_did_for_its_twin(tokens: str, spatial: str | None) -> None:
    """New label i is old label [2, 0][i]: the same prediction, exactly; k_s has a channel a label."""
    config = ModelConfig(**TINY | {"tokens": tokens})
    specs = [GuidanceSpec(num_labels=n, multi_hot=spatial is not None, spatial=spatial) for n in (3, 2)]
    old, new = (make_unet(config, spec, (4, 8, 8)).eval() for spec in specs)
    for p in old.parameters():
        torch.nn.init.normal_(p, std=0.2)
    twins = [2, 0]
    weights = torch.eye(3)[twins]
    assert transfer(new, old, specs[1], weights) == []
    x, t, maps = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.rand(2, 3, 8, 8)
    maps[:, 1] = 0
    hots = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    keep = torch.ones(2, dtype=torch.bool)
    if spatial:
        concepts = [torch.tensor([[2, -1], [0, -1]]), torch.tensor([[0, -1], [1, -1]])]
        asked = [
            Guidance(keep, hots, concepts[0], None, maps),
            Guidance(keep, hots[:, twins], concepts[1], None, maps[:, twins]),
        ]
    else:
        asked = [Guidance(keep, torch.tensor(twins)), Guidance(keep, torch.tensor([0, 1]))]
    for there, here in (asked, [g.null() for g in asked]):
        if spatial and not here.keep.any():
            continue  # the null of k_s has a value a channel: a mean is not the same as dropping one
        assert torch.allclose(old(x, t, there), new(x, t, here), atol=1e-5)


def test_clusters_beside_fixed_ones_find_what_those_do_not_cover() -> None:
    generator = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    points = (centres[:, None] + generator.normal(0, 0.3, (4, 50, 2))).reshape(-1, 2).astype(np.float32)
    added = kmeans_beside(centres[:2], points, 2, 10, 0)
    assert np.allclose(sorted(added.tolist()), centres[2:], atol=0.2)


def test_a_folder_of_photos_becomes_a_run_and_the_command_resumes(base: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    flags = (base, other, "--k", 2, "--out", out, "--steps", 40, "workers=0", "lr=4e-3")
    code, output = finetune(*flags)
    assert code == 0, output
    said = json.loads((out / "finetune.json").read_text())
    assert said["labels"] == 2 and said["clusters"] == "refit" and -1 <= said["nearest_cosine"] <= 1
    assert (out / "nearest.png").is_file() and (out / "report.html").is_file()
    with (out / "metrics.csv").open() as file:
        judged = [float(row["fd_held_out"]) for row in csv.DictReader(file) if row["fd_held_out"]]
    assert len(judged) >= 3 and min(judged) < judged[0]
    tuned = open_pipeline(out, "cpu")
    pixels = tuned.generate(tuned.clusters([0, 1] * 4), w=1.0).float().mean((2, 3))
    assert (pixels[0] - pixels[1]).abs().max() > 60  # the two colours are told apart
    code, output = finetune(*flags)
    assert code == 0 and "already trained" in output
    before = read_mapping(out / "config.yaml")
    code, output = finetune(*[60 if flag == 40 else flag for flag in flags])
    assert code == 0 and "resuming at step 40" in output, output
    assert read_mapping(out / "config.yaml") == before | {"steps": 60}
    said = json.loads((out / "finetune.json").read_text())
    assert said["steps"] > 40
    facts = run_facts(out)
    assert (facts["fine-tuned from"], facts["its labels"]) == ("run", "new ones (refit)")
    assert f"{said['fd_held_out']:.4g} at best" in facts["FD to held-out images"]
    assert f"{said['nearest_cosine']:.3f}" in facts["nearest training image"]
    assert "fine-tuned from" not in run_facts(base)


def test_adapters_are_small_load_onto_the_base_and_leave_its_weights(base: Path, other: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "tuned"
    code, output = finetune(base, other, "--lora", 4, "--k", 2, "--out", out, "--steps", 20, "workers=0")
    assert code == 0, output
    pipe, merged = open_pipeline(base, "cpu", lora=str(out / "lora")), open_pipeline(out, "cpu")
    images = [p.generate(p.clusters([0, 1]), steps=5).int() for p in (pipe, merged)]
    assert (images[0] - images[1]).abs().max() <= 1
    weights = [load_file(run / "pipeline/unet/diffusion_pytorch_model.safetensors") for run in (base, out)]
    moved = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert moved and all(weights[0][name].ndim > 1 for name in moved)  # biases and norms rest
    for name in moved:
        change = (weights[1][name] - weights[0][name]).flatten(1)
        assert torch.linalg.matrix_rank(change, atol=1e-5) <= 4, name
    shutil.copytree(out / "lora", tmp_path / "bad")
    (tmp_path / "bad" / "pytorch_lora_weights.safetensors").write_bytes(b"no")
    for run, folder, word in (
        (base, tmp_path / "bad", "does not fit"),
        (base, other, "give the lora/ folder of a run"),
        (out, out / "lora", "another run"),  # its adapters are in these weights already
    ):
        with pytest.raises(InputError, match=word):
            open_pipeline(run, "cpu", lora=str(folder))
    file, pipe = tmp_path / "bad" / "pytorch_lora_weights.safetensors", open_pipeline(base, "cpu")
    good, first = load_file(out / "lora" / file.name), "conv_in.lora_A.weight"
    untouched = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    for tensors, word in (
        ({name: value for name, value in good.items() if name != first}, f"no {first} in it"),
        (good | {first: torch.full_like(good[first], torch.nan)}, f"{first} holds NaN"),
        (good | {first: good[first][:, :3].contiguous()}, f"{first} is torch.float32 .* any x 48 x 3 x 3 is expected"),
        (good | {first: good[first][:2]}, "adapters of one rank"),
        (good | {"other.lora_A.weight": torch.ones(4, 4)}, "nothing else"),
        (None, "conditioner"),
    ):
        if tensors is None:
            save_file(good, file)
            shutil.rmtree(tmp_path / "bad" / "conditioner")
        else:
            save_file(tensors, file)
        with pytest.raises(InputError, match=word):
            pipe.load_lora(tmp_path / "bad")
    now = pipe.unet.state_dict()
    assert now.keys() == untouched.keys() and all(torch.equal(now[name], value) for name, value in untouched.items())


def test_extended_clusters_keep_the_old_ones_and_replay_their_images(base: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    code, output = finetune(
        base, other, "--clusters", "extend", "--k", 1, "--replay", 0.25, "--out", out, "--steps", 20, "workers=0"
    )
    assert code == 0, output
    latents = LatentSet(tmp_path / "tuned-data" / "annotation")
    assert latents.spec.num_labels == 4
    f, old = (load_f(p)[0] for p in (latents.folder / "annotator", base / "pipeline" / "annotator"))
    assert isinstance(f, Clusters) and torch.equal(f.centroids[:3], old.prototypes())
    assert (latents.signals.k == 3).any()
    said = json.loads((out / "finetune.json").read_text())
    assert said["fd_of_the_base_before"] > 0 and said["fd_of_the_base_after"] > 0


def test_mixed_sets_give_each_image_its_own_latent_and_label(base: Path) -> None:
    run = from_mapping(TrainConfig, read_mapping(base / "config.yaml"), "")
    one = LatentSet(run.annotation)
    both = Mixed(one, one)
    at = torch.tensor([len(one) + 3, 5, len(one), 7])
    own = at % len(one)
    assert torch.equal(both.latents(at), one.latents(own))
    assert torch.equal(both.guidance(at).k, one.guidance(own).k)
    flip = torch.tensor([True, False, False, True])
    assert torch.equal(both.latents(at, flip), one.latents(own, flip))
    assert len(LatentBatches(both, 0, 8, True)[[0, 0, *at.tolist()]][2]) == 4
    with pytest.raises(InputError, match=r"annotator\.reuse"):
        other = dataclasses.replace(run, replay=ReplayConfig(run.annotation, 0.5))
        moved = LatentSet(run.annotation)
        moved.folder = base / "pipeline"
        f = moved.folder / "annotator" / "centroids.safetensors"
        saved = f.read_bytes()
        try:
            save_file({"centroids": load_file(f)["centroids"] + 1}, f)
            build.replay(other, moved)
        finally:
            f.write_bytes(saved)


def test_training_stops_when_held_out_images_say_so(base: Path, tmp_path: Path) -> None:
    """At a learning rate that ruins the network the first judgement stays the best, and the pipeline is of that step."""
    run = from_mapping(TrainConfig, read_mapping(base / "config.yaml"), "")
    wanted = dataclasses.replace(
        run, out=str(tmp_path / "run"), init=str(base), steps=40, lr=0.2, warmup=0, val_every=4, val_share=0.2, patience=2,
        ema=0.0, checkpoint_every=100,
    )  # fmt: skip
    train(wanted)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        judged = {int(row["step"]): float(row["fd_held_out"]) for row in csv.DictReader(file) if row["fd_held_out"]}
    best = min(judged, key=judged.get)
    assert max(judged) == best + 8 < 40
    train(wanted)  # it stays where it stopped


def test_a_run_of_masks_moves_too(base: Path, other: Path, tmp_path: Path) -> None:
    """Classes of the new photos start from those like them, by their prototypes; k_s has a channel a class."""
    run = from_mapping(TrainConfig, read_mapping(base / "config.yaml"), "")
    segments = AnnotatorConfig(kind="segments", k=3, segments=SegmentsConfig(method="patch_kmeans", flips=False))
    shards = f"{base.parent}/shards/*.tar"
    cfg = AnnotateConfig(
        shards=shards, out=str(tmp_path / "set"), autoencoder="patch4", annotator=segments, device="cpu", workers=0
    )
    cfg.features.layer = -2
    masks = train(dataclasses.replace(run, annotation=str(annotate(cfg)), out=str(tmp_path / "masks"), steps=2))
    out = tmp_path / "tuned"
    code, output = finetune(masks, other, "--k", 2, "--out", out, "--steps", 4, "workers=0")
    assert code == 0, output
    tuned = open_pipeline(out, "cpu")
    assert tuned.spec.spatial == "mask" and tuned.unet.config.in_channels == 48 + 2
    f, old = (load_f(p / "pipeline" / "annotator")[0].prototypes() for p in (out, masks))
    assert f.shape == (2, old.shape[1]) and (f.norm(dim=1) - 1).abs().max() < 1e-4
    code, output = finetune(masks, other, "--clusters", "extend", "--k", 2, "--out", tmp_path / "more")
    assert code == 2 and "none can be added" in output


def test_folders_that_are_not_whole_or_anothers_are_refused(base: Path, tmp_path: Path) -> None:
    def edited(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = Path(shutil.copytree(base / "pipeline", tmp_path / name))
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return folder

    for name, change, word in (
        ("lacks", lambda t: t.pop("conv_in.weight"), "conv_in"),
        ("nan", lambda t: t["conv_in.bias"].fill_(float("nan")), "NaN"),
    ):
        with pytest.raises(InputError, match=word):
            open_pipeline(edited(name, change), "cpu")
    linked = Path(shutil.copytree(base / "pipeline", tmp_path / "linked"))
    (linked / "annotator" / "mine").symlink_to(tmp_path / "nan")
    with pytest.raises(InputError, match="a link"):
        open_pipeline(linked, "cpu").save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("annotation=x",), "annotation"),
        (("--clusters", "old"), "refit"),
        (("--clusters", "reuse", "--k", "3"), "reuse"),
        (("--replay", "0.2"), "extend"),
        (("--lora", "-1"), "lora"),
        (("--lora", "100000"), "lora=100000: at most 32"),
        (("only=[nothing]",), "nothing"),
        (("--k", "999"), "999"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    flags: tuple[str, ...], word: str, base: Path, other: Path, tmp_path: Path
) -> None:
    code, output = finetune(base, other, "--out", tmp_path / "tuned", "--steps", 4, *flags)
    lines = [line for line in output.splitlines() if line.startswith("ldm-sg: ")]
    assert code == 2 and len(lines) == 1 and word in lines[0], output


def test_another_first_stage_or_g_is_refused(base: Path, other: Path, tmp_path: Path) -> None:
    pack(other, tmp_path / "shards", size=32, format="png")
    common = {"shards": f"{tmp_path}/shards/*.tar", "device": "cpu", "workers": 0}
    annotate(AnnotateConfig(out=str(tmp_path / "set"), autoencoder="patch2", annotator=AnnotatorConfig(k=3), **common))
    code, output = finetune(base, tmp_path / "set", "--out", tmp_path / "tuned")
    assert code == 2 and "other channels, factor" in output, output
    cfg = AnnotateConfig(
        out=str(tmp_path / "g"), autoencoder="patch4", annotator=AnnotatorConfig(reuse=str(base)), **common
    )
    cfg.features.layer = -2
    with pytest.raises(InputError, match="layer"):
        annotate(cfg)
    assert not (tmp_path / "g" / "manifest.yaml").exists()
