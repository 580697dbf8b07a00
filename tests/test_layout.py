"""Guidance in space, end to end: tiny runs trained on ground-truth masks and boxes follow what a user draws."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import invoke
from test_train import config

from ldm_sg.config import AnnotateConfig, AnnotatorConfig, FeaturesConfig, ObjectiveConfig
from ldm_sg.data.images import crop_resize, to_float, to_tensor
from ldm_sg.data.shards import ShardWriter
from ldm_sg.data.signals import PackedMasks, Signals
from ldm_sg.errors import InputError
from ldm_sg.evaluate.layout import box_figures, faithfulness, mask_figures
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.guidance.spatial import VOID
from ldm_sg.pipeline import open_pipeline
from ldm_sg.sampling.request import SampleOptions, signals
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.evaluate import evaluate
from ldm_sg.verbs.sample import sample
from ldm_sg.verbs.train import train

SIZE = 16
COLOURS = np.array([[30, 30, 30], [230, 40, 40], [40, 220, 60]], np.uint8)  # ground, class 1, class 2


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rectangle(x0: int, y0: int, x1: int, y1: int, label: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[y0:y1, x0:x1] = label
    return mask


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 pictures of one coloured rectangle, with its mask and box."""
    folder = tmp_path_factory.mktemp("rectangles")
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "a.tar") as writer:
        for i in range(96):
            x, y = generator.integers(0, 9, 2).tolist()
            w, h = generator.integers(5, 9, 2).tolist()
            label = 1 + i % 2
            mask = rectangle(x, y, min(x + w, SIZE), min(y + h, SIZE), label)
            noise = generator.integers(-15, 16, (SIZE, SIZE, 3))
            image = (COLOURS[mask].astype(int) + noise).clip(0, 255).astype(np.uint8)
            box = [x, y, min(x + w, SIZE), min(y + h, SIZE), label - 1]
            files = {"png": png(image), "mask.png": png(mask), "json": json.dumps({"boxes": [box]}).encode()}
            writer.write(f"{i:03d}", files)
    return str(folder / "*.tar")


def trained(source: str, folder: Path, truth: str) -> Path:
    cfg = AnnotateConfig(
        shards=source,
        out=str(folder / "set"),
        autoencoder="patch2",
        features=FeaturesConfig(precision="fp32"),
        annotator=AnnotatorConfig(kind="oracle", truth=truth),
        flips=True,
        precision="fp32",
        workers=0,
        device="cpu",
    )
    options = {"steps": 300, "batch_size": 16, "warmup": 20, "decay": 0.3, "ema": 0.98, "checkpoint_every": 300}
    options |= {"val_every": 150, "objective": ObjectiveConfig(kind="v")}
    return train(config(annotate(cfg), folder / "run", **options))


@pytest.fixture(scope="module")
def mask_run(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(source, tmp_path_factory.mktemp("masks"), "masks")


@pytest.fixture(scope="module")
def box_run(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(source, tmp_path_factory.mktemp("boxes"), "boxes")


def made(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png"))])  # [N, H, W, 3]


def agreement(images: np.ndarray, mask: np.ndarray) -> float:
    """Share of pixels whose colour is that of the class asked for."""
    nearest = np.abs(images[..., None, :].astype(int) - COLOURS).sum(-1).argmin(-1)
    return float((nearest == mask).mean())


def test_samples_follow_a_drawn_mask(mask_run: Path, tmp_path: Path) -> None:
    mask = rectangle(1, 2, 8, 9, 2)
    big = Image.fromarray(np.kron(mask, np.ones((4, 4), np.uint8)))  # any size
    big.save(tmp_path / "mask.png")
    code, output = invoke("sample", mask_run, "--mask", tmp_path / "mask.png", "-n", "6", "--out", tmp_path / "s")
    assert code == 0, output
    images = made(tmp_path / "s")
    assert agreement(images, mask) > 0.9 and agreement(images, rectangle(8, 8, 15, 15, 2)) < 0.75
    records = [json.loads(line) for line in (tmp_path / "s" / "samples.jsonl").read_text().splitlines()]
    assert records[0]["k"] == [0, 2] and np.array_equal(
        np.asarray(Image.open(tmp_path / "s" / records[0]["mask"])), mask
    )
    assert (tmp_path / "s" / "grid.png").is_file()


def test_a_trajectory_shows_and_records_what_was_asked(mask_run: Path, tmp_path: Path) -> None:
    flags = ("--trajectory", "-n", "2", "--steps", "4", "--seed", "3", "--out", tmp_path / "s")
    assert invoke("sample", mask_run, *flags)[0] == 0
    records = [json.loads(line) for line in (tmp_path / "s" / "samples.jsonl").read_text().splitlines()]
    masks = [np.asarray(Image.open(tmp_path / "s" / record["mask"])) for record in records]
    assert len(masks) == 8 and np.array_equal(masks[0], masks[3]) and not np.array_equal(masks[0], masks[4])
    assert [record["index"] for record in records] == [0] * 4 + [1] * 4


def test_samples_follow_a_drawn_box_and_its_label(box_run: Path, tmp_path: Path) -> None:
    code, output = invoke("sample", box_run, "--box", "8,1,15,8", "--cluster", "1", "-n", "6", "--out", tmp_path / "s")
    assert code == 0, output
    assert agreement(made(tmp_path / "s"), rectangle(8, 1, 15, 8, 2)) > 0.9
    record = json.loads((tmp_path / "s" / "samples.jsonl").read_text().splitlines()[0])
    assert record["box"] == [[0.5, 0.0625, 0.9375, 0.5]] and record["k"] == [1]


def test_varying_layout_and_content(mask_run: Path) -> None:
    pipe = open_pipeline(mask_run, "cpu")
    one = signals(pipe, SampleOptions(n=3, vary="content")).masks()
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], one[2])
    several = signals(pipe, SampleOptions(n=8, vary="layout")).masks()
    assert len(several.flatten(1).unique(dim=0)) > 4


def test_drawn_signals_have_the_class_asked_for(mask_run: Path) -> None:
    pipe = open_pipeline(mask_run, "cpu")
    drawn = pipe.draw(6, clusters=[2] * 6)
    assert all(2 in ids["k"] for ids in map(drawn.describe, range(6)))
    with pytest.raises(InputError, match="clusters 0 to 2"):
        pipe.draw(1, clusters=[3])


def test_a_mask_that_changed_is_another_request(tmp_path: Path) -> None:
    names = []
    for label in (0, 1):
        Image.fromarray(np.full((8, 8), label, np.uint8)).save(tmp_path / "m.png")
        options = SampleOptions(mask=str(tmp_path / "m.png"))
        names.append((options.name(), options.settings()["sha256"]))
    assert names[0][0] != names[1][0] and names[0][1] != names[1][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--box", "0,0,20,8"], "needs 0 <= x0 < x1 <= 16"),
        (["--box", "4,4,4,8"], "needs 0 <= x0 < x1"),
        (["--box", "4,4,8"], "write it as 40,60,200,240"),
        (["--box", "4,4,8,8", "--like", "x.png"], "--like and --box do not go together"),
        (["--mask", "m.png"], "--mask: this run was trained without masks; it accepts --cluster, --box"),
        (["--vary", "colour"], "layout"),
        (["--vary", "layout", "--box", "1,1,4,4"], "--vary and --box do not go together"),
        (["--interpolate", "0,1"], "more than an id"),
    ],
)
def test_what_a_box_run_refuses(flags: list[str], message: str, box_run: Path, tmp_path: Path) -> None:
    code, output = invoke("sample", box_run, *flags, "--out", tmp_path / "s")
    assert code == 2 and message in output and not (tmp_path / "s").exists()


def test_what_a_mask_run_refuses(mask_run: Path, tmp_path: Path) -> None:
    wrong = {
        "beyond.png": (np.full((8, 8), 7, np.uint8), "class 7 in it; this run has 0 to 2"),
        "void.png": (np.full((8, 8), VOID, np.uint8), "all of it is 255"),
        "colour.png": (np.zeros((8, 8, 3), np.uint8), "mode RGB"),
        "deep.png": (np.zeros((8, 8), np.uint16), "mode I;16"),
    }
    for name, (pixels, message) in wrong.items():
        Image.fromarray(pixels).save(tmp_path / name)
        code, output = invoke("sample", mask_run, "--mask", tmp_path / name, "--out", tmp_path / "s")
        assert code == 2 and message in output, (name, output)
    Image.new("L", (12000, 12000)).save(tmp_path / "large.png")
    Image.new("1", (15000, 15000)).save(tmp_path / "larger.png")
    for name in ("large.png", "larger.png"):
        code, output = invoke("sample", mask_run, "--mask", tmp_path / name, "--out", tmp_path / "s")
        assert code == 2 and "more than 134,217,728" in output, output
    code, output = invoke("sample", mask_run, "--mask", tmp_path / "beyond.png", "--cluster", "1")
    assert code == 2 and "--mask and --cluster do not go together" in output
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("text.png", "it is no PNG"), ("none.png", "No such file")):
        code, output = invoke("sample", mask_run, "--mask", tmp_path / name, "--out", tmp_path / "s")
        assert code == 2 and message in output
    code, output = invoke("sample", mask_run, "--box", "1,1,5,5", "--out", tmp_path / "s")
    assert code == 2 and "--box: this run was trained without boxes; it accepts --cluster, --mask" in output
    code, output = invoke("sample", mask_run, "--like", tmp_path / "beyond.png", "--out", tmp_path / "s")
    assert code == 2 and "cannot annotate new ones" in output
    assert not (tmp_path / "s").exists()


def test_layout_figures_of_known_pairs() -> None:
    a = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    assert box_figures(a, a)["iou"] == pytest.approx(1.0)
    assert box_figures(a, torch.tensor([[0.0, 0, 0.5, 1.0], [0, 0, 0.5, 0.5]]))["iou"] == pytest.approx(0.25)
    masks = torch.tensor([[0.0, 0, 1, -1], [1, 1, 1, 0]])
    assert mask_figures(masks, masks) == {"agreement": 1.0, "miou": 1.0}
    found = mask_figures(masks, torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, -1]]))
    assert found["agreement"] == pytest.approx(5 / 6) and found["miou"] == pytest.approx((1 / 2 + 4 / 5) / 2)
    both = faithfulness(masks, masks, masks, masks, "mask")
    assert both["layout_agreement"] == both["layout_agreement_real"] == 1.0 > both["layout_agreement_shuffled"]


class ByColour:
    """f of a run whose classes are colours, in the place of a network that finds them."""

    digest, extractor = (
        "by colour",
        SimpleNamespace(name="colour", manifest={"name": "colour", "sha256": "0", "dim": 3}),
    )
    extractor.manifest |= {"layer": None, "pool": "auto", "size": SIZE}

    def __init__(self, spec: GuidanceSpec):
        self.spec = spec

    def see(self, images: list[Image.Image], size: int, within: int) -> tuple[torch.Tensor, torch.Tensor]:
        squares = to_float(torch.stack([to_tensor(crop_resize(image, size, within)) for image in images]))
        return squares, squares

    def __call__(self, images: torch.Tensor) -> Signals:
        pixels = (images.permute(0, 2, 3, 1).numpy() + 1) * 127.5  # [B, H, W, 3]
        nearest = np.abs(pixels[..., None, :] - COLOURS).sum(-1).argmin(-1).astype(np.uint8)
        return Signals.from_columns(self.spec, {"mask": PackedMasks.of(nearest)}, len(nearest))


def test_evaluate_tells_runs_that_follow_their_layouts(
    mask_run: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by masks, judged by colour: agreement near that of real images at w = 1, as of shuffled ones at w = 0."""
    own = ByColour(open_pipeline(mask_run, "cpu").spec)
    monkeypatch.setattr("ldm_sg.evaluate.judges.load_annotator", lambda *_: own)
    found = {}
    for w in (0.0, 1.0):
        result = evaluate(mask_run, source, "layout", n=24, w=w, steps=10, device="cpu", out=tmp_path / "r.json")
        found[w] = result["metrics"]["colour"]
    assert found[1.0]["layout_agreement"] > 0.9 and found[1.0]["layout_agreement_real"] > 0.97
    assert abs(found[0.0]["layout_agreement"] - found[0.0]["layout_agreement_shuffled"]) < 0.15
    assert result["reference_images"] == 24


def test_layout_needs_a_run_that_can_annotate(mask_run: Path, source: str, tmp_path: Path) -> None:
    folder = sample(str(mask_run), SampleOptions(n=4, steps=2, device="cpu"), str(tmp_path / "s"))
    with pytest.raises(InputError, match="give a run"):
        evaluate(folder, source, "layout", n=4, device="cpu", run=mask_run)
    with pytest.raises(InputError, match="reads no image"):
        evaluate(mask_run, source, "layout", n=4, device="cpu")
