"""The figures of edits, on discs whose places and sizes are known."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_annotate import config as annotate_config
from test_edit import SMALL, scenes
from test_train import config as train_config
from typer.testing import CliRunner

from ldm_sg.annotate.run import annotate_shards
from ldm_sg.cli import app
from ldm_sg.config import AnnotatorConfig, FeaturesConfig, GuidanceConfig, SegmentsConfig
from ldm_sg.errors import InputError
from ldm_sg.evaluate import edits
from ldm_sg.evaluate.edits import (
    Asked,
    Made,
    able,
    by_prototypes,
    choose,
    coverage,
    figures,
    localised,
    look_distance,
    moved,
    paste,
)
from ldm_sg.guidance import selfguide
from ldm_sg.guidance.spatial import mask_coverage
from ldm_sg.pipeline import open_pipeline
from ldm_sg.sampling.edit import Edit
from ldm_sg.sampling.editor import Editor, relaid
from ldm_sg.verbs.train import train

CELLS = 64


def disc(x: float, y: float, radius: float) -> torch.Tensor:
    at = (torch.arange(CELLS) + 0.5) / CELLS
    return ((at[None] - x) ** 2 + (at[:, None] - y) ** 2 < radius**2).float()


def scene(x: float, radius: float = 0.15) -> torch.Tensor:
    """Masks [3, h, w]: the ground, a disc at x in the upper half, and one that stays."""
    first, second = disc(x, 0.3, radius), disc(0.5, 0.75, 0.1)
    return torch.stack([(1 - first - second).clamp(min=0), first, second])


def painted(masks: torch.Tensor) -> torch.Tensor:
    """[3, H, W] in [-1, 1]: each concept in its colour."""
    return torch.einsum("khw,kc->chw", masks, torch.tensor([[-0.8, -0.8, -0.8], [0.9, -0.5, -0.5], [-0.5, 0.9, 0.2]]))


class Colours:
    """A network whose features are the colours."""

    def patches(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, torch.nn.functional.avg_pool2d(images, 2)


def test_the_share_of_a_shift_is_that_of_the_disc() -> None:
    for x, made in ((0.5, 1.0), (0.4, 0.5), (0.3, 0.0), (0.2, -0.5)):
        share, others = moved(scene(0.3), scene(x), Asked(1, 0.2, 1.0))
        assert share == pytest.approx(made, abs=0.03) and max(others) < 0.15  # the ground around it, a little
    gone = scene(0.3)
    gone[1] = 0
    assert moved(scene(0.3), gone, Asked(1, 0.2, 1.0))[0] == 0
    carried = scene(0.5)
    carried[2] = carried[2].roll(CELLS // 4, 1)  # by a quarter of the width
    carried[0] = 0  # too small to be counted
    assert moved(scene(0.3), carried, Asked(1, 0.2, 1.0))[1] == pytest.approx([0.25 / 0.2], abs=0.01)


def test_figures_of_edits_that_do_what_is_asked_and_of_such_that_do_nothing() -> None:
    right, nothing = [], []
    for i, ratio in enumerate((0.5, 0.7, 1.4, 2.0, 0.5, 2.0)):
        asked, before = Asked(1, 0.2, ratio), scene(0.3)
        done = {"source": before, "moved": scene(0.5), "resized": scene(0.3, 0.15 * ratio**0.5)}
        for found, masks in ((right, done), (nothing, dict.fromkeys(done, before))):
            features = {name: painted(m) + 0.001 * i for name, m in masks.items()}
            found.append(Made(asked, masks, features))
    good, none = figures(right), figures(nothing)
    assert good["edit_shift"] == pytest.approx(1, abs=0.05) and good["edit_size_rank"] == pytest.approx(1, abs=1e-6)
    assert good["edit_look"] < 0.02 and good["edit_fd"] < 1e-3
    assert none["edit_shift"] == none["edit_others"] == none["edit_size_rank"] == 0 and none["edit_look"] < 1e-6


def test_figures_of_two_edits_of_one_ratio_have_a_rank() -> None:
    masks = {name: scene(0.3) for name in ("source", "moved")} | {"resized": scene(0.3, 0.2)}
    features = {name: torch.ones(4, 2, 2) for name in masks}
    found = figures([Made(Asked(1, 0.2, 2.0), masks, features), Made(Asked(1, 0.2, 2.0), masks, features)])
    assert found["edit_size_rank"] == 0 and found["edit_shift"] == 0


def test_masks_are_compared_on_any_size_of_image() -> None:
    def own(images: torch.Tensor) -> SimpleNamespace:
        masks = torch.zeros(len(images), *images.shape[2:], dtype=torch.uint8)
        masks[..., : masks.shape[-1] // 2] = 1
        return SimpleNamespace(guidance=lambda grid: SimpleNamespace(spatial=mask_coverage(masks, 2, grid)))

    for size, cells in ((64, 32), (80, 20), (112, 28), (16, 16)):
        found = coverage(own, torch.zeros(2, 3, size, size))
        assert found.shape == (2, 2, cells, cells) and found[0, 1].mean() == 0.5


def test_another_network_finds_the_concepts_by_what_they_look_like() -> None:
    images = torch.stack([painted(scene(0.3)), painted(scene(0.55)), painted(scene(0.3, 0.2))])
    masks, _ = by_prototypes(Colours())(images, scene(0.3))
    assert torch.equal(masks.sum(1), torch.ones_like(masks[:, 0]))
    x = selfguide.centroid(masks[:, 1])[:, 0]
    assert x.tolist() == pytest.approx([0.3, 0.55, 0.3], abs=0.02)
    assert float(masks[2, 1].mean() / masks[0, 1].mean()) == pytest.approx((0.2 / 0.15) ** 2, rel=0.1)
    empty = scene(0.3)
    empty[1] = 0
    assert not by_prototypes(Colours())(images, empty)[0][:, 1].any()  # what is not in the source is nowhere


def test_only_concepts_that_can_be_moved_and_that_attention_sees_are_asked_for() -> None:
    masks = scene(0.3)
    assert able(masks).tolist() == [False, True, True]  # the ground is most of the image
    maps = masks.clone()
    maps[2] = maps[2].roll(CELLS // 4, 1)
    assert localised(masks, maps).tolist() == [True, True, False]
    asked = {choose(masks, able(masks), np.random.default_rng(i)) for i in range(40)}
    assert {a.concept for a in asked} == {1, 2} and {a.ratio for a in asked} == {0.5, 0.7, 1.4, 2.0}
    assert {a.dx for a in asked if a.concept == 1} == {0.2}
    assert look_distance(torch.stack([masks, masks]), torch.stack([painted(masks)] * 2), 1) < 1e-6


@pytest.mark.parametrize(("edit", "x", "area"), [(Edit(1, dx=0.2), 0.5, 1.0), (Edit(1, scale=1.3), 0.3, 1.69)])
def test_pasting_is_the_edit_in_pixels(edit: Edit, x: float, area: float) -> None:
    before = scene(0.3)
    after = paste(painted(before), before[1], edit)
    red = (after[0] > 0.3).float()
    assert selfguide.centroid(red)[0].item() == pytest.approx(x, abs=0.02)
    assert float(red.mean() / before[1].mean()) == pytest.approx(area, rel=0.1)


def test_an_edited_mask_has_its_class_there_and_one_class_a_place() -> None:
    before, edit = scene(0.3)[None], Edit(1, dx=0.3)
    [after], [old] = relaid(before, edit), before
    assert selfguide.centroid(after)[1].tolist() == pytest.approx([0.6, 0.3], abs=0.01)
    assert after.min() >= 0 and after.sum(0).max() <= 1 + 1e-6
    assert after[1].sum().item() == pytest.approx(old[1].sum().item(), rel=0.02)
    apart = (old[1] + after[1]) == 0
    assert torch.equal(after[:, apart], old[:, apart]) and bool(
        (after[0, old[1] > 0] == 1).all()
    )  # ground fills the hole


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ("SMALL", 0.0), ("LARGE", 1.1), ("NEAR", 1.0):  # its network has learnt next to nothing
        monkeypatch.setattr(edits, name, value)
    shards = scenes(tmp_path / "source")
    f = AnnotatorConfig("segments", k=3, segments=SegmentsConfig(method="patch_kmeans", flips=False))
    g = FeaturesConfig(model="demo-g")
    made = annotate_shards(annotate_config(tmp_path, shards, annotator=f, features=g))
    tied = GuidanceConfig(parts=["concepts"], attention=0.1)
    run = train(
        train_config(
            made,
            tmp_path / "run",
            model=SMALL | {"inject": "none", "tokens": "concepts"},
            guidance=tied,
            steps=40,
            batch_size=8,
        )
    )
    flags = ["--reference", shards, "--metrics", "edit", "--device", "cpu"]
    for option, value, said in (
        ("--w", "1", "w=1: edits are as strong"),
        ("--scheduler", "ddim", "draws with dpmpp_2m"),
    ):
        done = CliRunner().invoke(app, ["evaluate", str(run), *flags, option, value])
        assert done.exit_code == 2 and said in done.output, done.output
    done = CliRunner().invoke(app, ["evaluate", str(run), *flags[:3], "layout", *flags[4:]])
    assert done.exit_code == 2 and "for runs guided by boxes or masks" in done.output
    asked = ["evaluate", str(run), *flags, "--steps", "2", "-n", "6", "--out", str(tmp_path / "e.json")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "e.json").read_text())["metrics"]["demo-g"]
    assert {"edit_shift", "edit_shift_paste", "edit_size_rank_real", "edit_fd_paste_real"} <= found.keys()
    laid = train(
        train_config(made, tmp_path / "laid", model=SMALL, steps=10, batch_size=8)
    )  # told by masks: they are moved
    done = CliRunner().invoke(app, ["evaluate", str(laid), *asked[2:]])
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads((tmp_path / "e.json").read_text())["metrics"]["demo-g"].keys() == found.keys()
    refused = CliRunner().invoke(app, ["evaluate", str(tmp_path / "source"), *flags])
    assert refused.exit_code == 2 and "give a run" in refused.output
    pipe = open_pipeline(run, "cpu")
    there = [
        editor.observed[-1].there[0]
        for editor in (
            Editor(pipe, steps=2).photo(Image.new("RGB", (40, 30), (250, 20, 20))),
            Editor(pipe, steps=2).drawn(1, 9),
        )
    ]
    concept = int((there[0] & there[1]).nonzero()[0])
    Image.new("RGBA", (40, 30), (250, 20, 20, 255)).save(tmp_path / "photo.png")
    (tmp_path / "take.yaml").write_text(f"take: [{{seed: 9, concepts: [{concept}]}}]")
    photo = [
        "edit",
        str(run),
        "--steps",
        "4",
        "--device",
        "cpu",
        "--like",
        str(tmp_path / "photo.png"),
        "--move",
        f"{concept}=0.01,0",
    ]
    for _ in range(2):  # with the usual n, which a photo has no use for; and once more into the same folder
        done = CliRunner().invoke(
            app, [*photo, "--compose", str(tmp_path / "take.yaml"), "--out", str(tmp_path / "photo")]
        )
        assert done.exit_code == 0, (done.output, done.exception)
    (tmp_path / "mapping.yaml").write_text("take: {seed: 9, concepts: [1]}")
    assert CliRunner().invoke(app, [*photo, "--compose", str(tmp_path / "mapping.yaml")]).exit_code == 2
    with Image.open(tmp_path / "photo.png") as image:
        pipe.edit(image, [Edit(concept, dx=0.01)])
        for source, strength in ((image, -1.0), ("photo.png", 1.0)):
            with pytest.raises(InputError):
                pipe.edit(source, [Edit(concept, dx=0.01)], strength)
