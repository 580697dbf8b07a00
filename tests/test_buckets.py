"""Aspect-ratio buckets, from photos of several shapes to samples of each: what is cropped, which batches are drawn."""

import io
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from ldm_sg import build
from ldm_sg.cli import app
from ldm_sg.config import AnnotateConfig, AnnotatorConfig, ReplayConfig, TrainConfig
from ldm_sg.data.images import crop_resize, nearest_shape, part_of, squares
from ldm_sg.data.latents import LatentSet, read_manifest, write_manifest
from ldm_sg.data.order import step_indices, turns
from ldm_sg.data.photos import annotated_keys
from ldm_sg.data.shards import read_shard
from ldm_sg.errors import InputError
from ldm_sg.pipeline import open_pipeline
from ldm_sg.training.data import LatentBatches, LatentData, Steps
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.dedup import dedup
from ldm_sg.verbs.pack import pack
from ldm_sg.verbs.train import train

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
SIDES = [(60, 62), (88, 50), (50, 88), (90, 50)]  # nearest to 16x16, 24x16, 16x24, 24x16
BUCKETS = ((16, 16), (24, 16), (16, 24))


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exit_code == 1:
        raise result.exception
    return result.exit_code, result.output


def photos(folder: Path, n: int) -> Path:
    """n flat photos of each colour in each of SIDES."""
    folder.mkdir(parents=True)
    for i in range(n):
        for shape, sides in enumerate(SIDES):
            for c, colour in enumerate(COLOURS):
                Image.new("RGB", sides, tuple(v + i % 5 for v in colour)).save(folder / f"{shape}_{c}_{i:03d}.png")
    return folder


def annotation(shards: Path, out: Path, **changes) -> AnnotateConfig:
    base = AnnotateConfig(
        shards=f"{shards}/*.tar", out=str(out), autoencoder="patch2", annotator=AnnotatorConfig(k=3, restarts=3), buckets=True,
        flips=True, device="cpu", workers=0,
    )  # fmt: skip
    return replace(base, **changes)


def training(folder: Path, out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        annotation=str(folder), out=str(out), model=TINY, steps=6, batch_size=6, lr=2e-3, warmup=4, ema=0.9, device="cpu",
        workers=0, val_share=0.1, log_every=3, val_every=3, sample_every=0, checkpoint_every=20,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("photos")
    flags = ("--buckets", "16x16,24x16,16x24", "--format", "png", "--shard-size", 40, "--workers", 0)
    code, output = invoke("pack", photos(home / "photos", 6), home / "shards", *flags)
    assert code == 0 and "72 images (36 of 24x16, 18 of" in output, output
    return home / "shards"


@pytest.fixture(scope="module")
def latents(shards: Path) -> LatentSet:
    return LatentSet(annotate(annotation(shards, shards.parent / "set")))


def test_an_image_loses_the_least_that_a_bucket_can_take() -> None:
    """Over all shapes: inside the image, of the bucket's ratio, one side whole, and no other bucket keeps a larger share."""
    for width, height in [(60, 62), (88, 50), (50, 88), (4000, 3000), (37, 91), (33, 33), (48, 32), (7, 301)]:
        kept = {}
        for shape in BUCKETS:
            left, top, right, bottom = part_of(width, height, shape)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left) / (bottom - top) == pytest.approx(shape[0] / shape[1])
            assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
            assert abs(left - (width - right)) < 2 and abs(top - (height - bottom)) < 2  # centred, to a pixel
            kept[shape] = (right - left) * (bottom - top) / (width * height)
        assert kept[nearest_shape(width, height, BUCKETS)] == pytest.approx(max(kept.values()))
    pixels = np.random.default_rng(0).integers(0, 255, (18, 24, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(crop_resize(Image.fromarray(pixels), (24, 16))), pixels[1:17])
    grid = torch.arange(12).view(1, 3, 4)
    assert squares(grid).tolist() == [[[0, 1, 2], [4, 5, 6], [8, 9, 10]]] and squares(grid.mT).shape == (1, 3, 3)


def test_every_photo_lies_in_a_shard_of_its_bucket_and_the_command_resumes(shards: Path, tmp_path: Path) -> None:
    found = {}
    for path in sorted(shards.glob("*.tar")):
        sides = tuple(map(int, path.stem.partition("-")[2].split("x")))
        for sample in read_shard(str(path), lambda *skip: pytest.fail(str(skip))):
            with Image.open(io.BytesIO(sample.image)) as image:
                assert image.size == sides
            found[sample.key] = sides
    assert len(found) == 72 and len(list(shards.glob("*.tar"))) == 6
    assert all(sides == nearest_shape(*SIDES[int(key[0])], BUCKETS) for key, sides in found.items())
    flags = {"buckets": BUCKETS, "format": "png", "shard_size": 40, "workers": 0}
    before = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    times = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert pack(shards.parent / "photos", shards, **flags).buckets == {"24x16": 36, "16x16": 18, "16x24": 18}
    assert times == {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    (shards / "000001-24x16.tar").unlink()  # one file of it is gone: all of that shard is made again
    summary = pack(shards.parent / "photos", shards, **flags)
    assert (summary.images, summary.shards) == (72, 6)
    assert before == {path.name: path.read_bytes() for path in shards.glob("*.tar")}


def test_boxes_and_masks_go_with_their_images(tmp_path: Path) -> None:
    home = photos(tmp_path / "photos", 1)
    index = np.zeros((50, 88), np.uint8)
    index[:, 44:] = 3
    for file in home.glob("*.png"):
        with Image.open(file) as image:
            mask = Image.fromarray(index).resize(image.size, Image.Resampling.NEAREST)
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / file.name)
    (tmp_path / "boxes.json").write_text('{"1_0_000.png": [[44, 0, 88, 25, 0]]}')
    options = {"masks": tmp_path / "masks", "annotations": tmp_path / "boxes.json", "workers": 0, "max_skipped": 0.0}
    pack(home, tmp_path / "shards", buckets=BUCKETS, **options)
    for sample in read_shard(str(tmp_path / "shards" / "000000-24x16.tar"), lambda *skip: pytest.fail(str(skip))):
        with Image.open(io.BytesIO(sample.mask)) as mask:
            assert mask.size == (24, 16) and (np.asarray(mask) == np.where(np.arange(24) < 12, 0, 3)).all()
        if sample.key.startswith("1_0_"):  # 88 x 50: 75 of its 88 columns are kept
            assert sample.meta["boxes"][0] == pytest.approx([(44 - 6) * 0.32, 0, 24, 8, 0])


def test_one_f_says_the_same_of_all_shapes(latents: LatentSet, shards: Path) -> None:
    assert latents.shapes == [(12, 8, 12), (12, 8, 8), (12, 12, 8)] and latents.latent_shape == (12, 8, 12)
    keys = [key for path in latents.paths for key in annotated_keys(path)]
    colours = torch.tensor([int(key[2]) for key in keys])
    ids = torch.stack([latents.signals.k[colours == colour].unique() for colour in range(3)])  # one id a colour
    assert ids.shape == (3, 1) and len(ids.unique()) == 3
    decode = build.load_autoencoder(str(latents.folder / "autoencoder")).decode
    for i in range(0, len(latents), 5):
        latent, _ = latents[i]
        (width, height), colour = nearest_shape(*SIDES[int(keys[i][0])], BUCKETS), COLOURS[colours[i]]
        assert latent.shape == (12, height // 2, width // 2) == latents.shapes[latents.buckets(torch.tensor([i]))[0]]
        pixels = (decode(latent[None])[0] + 1) * 127.5
        assert (pixels - torch.tensor(colour)[:, None, None]).abs().max() < 7
    flipped = latents.latents(torch.tensor([0, 0]), torch.tensor([True, False]))
    assert torch.allclose(decode(flipped[:1]).flip(-1), decode(flipped[1:]), atol=1e-2)


def test_turns_are_in_proportion_whatever_the_total() -> None:
    sizes = [500, 300, 5, 195]
    chosen, before = turns(sizes, 3, 4000)
    for step in (100, 1000, 4000):
        counts = np.bincount(chosen[:step].numpy(), minlength=4)
        assert np.abs(counts - np.array(sizes) / 1000 * step).max() < 3.5
    seen = Counter[int]()
    for bucket, nth in zip(chosen.tolist(), before.tolist()):
        assert seen[bucket] == nth
        seen[bucket] += 1
    short = turns(sizes, 3, 150)
    assert torch.equal(short[0], chosen[:150]) and torch.equal(short[1], before[:150])
    assert not torch.equal(turns(sizes, 4, 150)[0], short[0])


def test_batches_have_one_shape_and_an_epoch_of_a_bucket_every_image_once(latents: LatentSet, tmp_path: Path) -> None:
    data = LatentData(latents, training(latents.folder, tmp_path), None)
    pools = [(pool, 6) for pool in data.by_shape(data.train_pool)]
    requests = list(Steps(pools, 5, 60, 0, 0, 1, one_a_step=True))
    seen: dict[int, list[int]] = {}
    for _, _, *indices in requests:
        [bucket] = latents.buckets(torch.tensor(indices)).unique().tolist()
        seen.setdefault(bucket, []).extend(indices)
    for bucket, pool in enumerate(pool for pool, _ in pools):
        order, n = seen[bucket], len(pool)
        for start in range(0, len(order) - n + 1, n):
            assert sorted(order[start : start + n]) == sorted(pool.tolist())
    batches = LatentBatches(latents, 5, None, True)
    assert {batches[request][2].shape[2:] for request in requests[:20]} == {(8, 12), (8, 8), (12, 8)}
    assert list(Steps(pools, 5, 60, 23, 0, 1, one_a_step=True)) == requests[23:]
    halves = [list(Steps(pools, 5, 60, 0, rank, 2, one_a_step=True)) for rank in (0, 1)]
    for whole, *parts in zip(requests, *halves, strict=True):
        assert all(part[2:] == whole[2:][rank::2] for rank, part in enumerate(parts))
    for step, (_, _, *indices) in enumerate(Steps([(data.train_pool, 6)], 5, 20, 0, 0, 1)):  # one pool: as ever
        assert indices == data.train_pool[step_indices(5, step, 6, len(data.train_pool))].tolist()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


def test_readme_from_photos_to_samples_of_each_shape(shards: Path, tmp_path: Path) -> None:
    """The README's commands at tiny size: each learnt shape is made, silently, in the colour of the cluster that is asked for."""
    own = ("device=cpu", "workers=0")
    folder, run = tmp_path / "set", tmp_path / "run"
    code, output = invoke(
        "annotate", "configs/annotate/photos256-buckets.yaml", f"shards={shards}/*.tar", f"out={folder}", *own, "flips=false",
        "autoencoder=patch2", "features.model=demo-g", "annotator.k=3", "annotator.restarts=3",
    )  # fmt: skip
    assert code == 0, output
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(TINY))
    small = ("steps=90", "batch_size=12", "lr=4e-3", "warmup=20", "decay=0.4", "ema=0.98", "val_every=90", "sample_every=0",
             "checkpoint_every=90", "objective.kind=x0", "channels_last=false", f"model={tmp_path / 'net.yaml'}", *own)  # fmt: skip
    command = ("train", "configs/train/photos256-buckets.yaml", f"annotation={folder}", *small)
    code, output = invoke(*command, f"out={run}")
    assert code == 0 and "12x8x12 (" in output, output
    assert "16x16, 16x24, 24x16" in (run / "report.html").read_text()
    for bucket, flags in (("24x16", ()), ("16x16", ("--size", "16x16")), ("16x24", ("--size", "16x24"))):
        out = tmp_path / bucket
        code, output = invoke("sample", run, "--cluster", 0, "-n", 4, "-w", 1, "--steps", 8, *flags, "--out", out)
        assert code == 0 and "has learnt" not in output, output
        images = [np.asarray(Image.open(out / f"{i:06d}.png"), np.float32) for i in range(4)]
        assert {f"{i.shape[1]}x{i.shape[0]}" for i in images} == {bucket}
        latents = LatentSet(folder)
        first = latents.latents(latents.signals.having(0)[:1])
        colour = build.load_autoencoder(str(folder / "autoencoder")).decode(first).mean((2, 3))[0] * 127.5 + 127.5
        assert all(np.abs(i.mean((0, 1)) - colour.numpy()).max() < 40 for i in images), [i.mean((0, 1)) for i in images]
    code, output = invoke(
        "evaluate", run, "--reference", f"{shards}/*.tar", "--metrics", "fd,consistency", "-n", 12, "--steps", 4
    )
    assert code == 0, output


def test_resumed_is_straight_and_what_a_pipeline_knows(
    latents: LatentSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(training(latents.folder, tmp_path / "straight"))
    train(training(latents.folder, tmp_path / "resumed", steps=2))
    resumed = train(training(latents.folder, tmp_path / "resumed"))
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(straight).items())
    assert dedup(latents.folder, threshold=0.9, out=tmp_path / "twins.jsonl").with_suffix(".png").is_file()
    pipe = open_pipeline(straight, "cpu")
    assert pipe.learnt == [(24, 16), (16, 16), (16, 24)] and (pipe.image_size, pipe.latent_shape) == (16, (12, 8, 12))
    capsys.readouterr()
    for size, said in (((16, 24), ""), ((32, 16), "learnt 24x16, 16x16, 16x24")):
        pipe.resize(*size)
        assert (said in (err := capsys.readouterr().err)) and bool(err) == bool(said)
    pipe.save_pretrained(tmp_path / "copy")
    assert open_pipeline(tmp_path / "copy", "cpu").latent_shape == (12, 8, 12)


def test_what_cannot_be_is_one_line(latents: LatentSet, shards: Path, tmp_path: Path) -> None:
    for config, word in (
        (annotation(shards, tmp_path / "a", size=16), "size=16"),
        (annotation(shards, tmp_path / "b", annotator=AnnotatorConfig(kind="oracle", truth="masks")), "square images"),
        (annotation(shards, tmp_path / "c", autoencoder="patch32"), "patch32"),
    ):
        with pytest.raises(InputError, match=word):
            annotate(config)
    pack(shards.parent / "photos", tmp_path / "mixed", size=16, crop="none", workers=0)
    with pytest.raises(InputError, match="`pack --buckets` wrote"):
        annotate(annotation(tmp_path / "mixed", tmp_path / "d", autoencoder="patch1"))
    deep = training(latents.folder, tmp_path / "run", model={**TINY, "multipliers": [1, 1, 1, 1]})
    again = ReplayConfig(str(latents.folder), 0.5)
    for config, word in ((deep, "8x12"), (replace(deep, model=TINY, crop=8), "crop=8"), (replace(deep, model=TINY, replay=again), "several shapes")):  # fmt: skip
        with pytest.raises(InputError, match=word):
            train(config)
    for flags, word in ((("--buckets", "32x"), "--buckets"), (("--buckets", "4x32"), "4x32"), (("--buckets", "32"), "32"),
                        (("--buckets", "32x32", "--size", 32), "leave")):  # fmt: skip
        code, output = invoke("pack", shards.parent / "photos", tmp_path / "no", *flags)
        assert code == 2 and word in output and output.count("\n") == 1 and not (tmp_path / "no").exists(), output


def test_a_manifest_with_other_shapes_is_noticed(latents: LatentSet, tmp_path: Path) -> None:
    """Also where the set has been opened before, and its index is there."""
    copy = tmp_path / "set"
    shutil.copytree(latents.folder, copy)
    LatentSet(copy)
    manifest = read_manifest(copy)
    shapes = [entry["latent_shape"] for entry in manifest["shards"]]
    turned, huge = [[c, w, h] for c, h, w in shapes], [[c, 2**40, 2**40] for c, _, _ in shapes]
    for wrong in (shapes[::-1], turned, huge, [[c, 1, 1] for c, _, _ in shapes]):
        write_manifest(
            copy, manifest | {"shards": [e | {"latent_shape": s} for e, s in zip(manifest["shards"], wrong)]}
        )
        with pytest.raises(InputError, match="the manifest says float16"):
            LatentSet(copy)
    write_manifest(copy, manifest)
    assert len(LatentSet(copy)) == len(latents)


def test_shards_of_buckets_taken_for_squares_are_said(shards: Path, tmp_path: Path, capsys) -> None:
    annotate(annotation(shards, tmp_path / "set", buckets=False))
    said = capsys.readouterr().err
    assert "shards of `pack --buckets` (16x16, 16x24, 24x16)" in said and "buckets=true keeps their shapes" in said


@pytest.mark.parametrize("text", ["", ",", "axb", "32.5x32", "32X32", "32,24", "32", "8x8x3", "-8x8"])
def test_buckets_that_are_none(text: str, tmp_path: Path) -> None:
    photos(tmp_path / "photos", 1)
    code, output = invoke("pack", tmp_path / "photos", tmp_path / "out", f"--buckets={text}")
    assert code == 2 and f"--buckets {text!r}: WIDTHxHEIGHT in pixels" in output.replace("\n", "")
    assert not (tmp_path / "out").exists()
