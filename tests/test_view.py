"""What g, LOST and the autoencoder see of an image: squares and whole images, at which size, from which pixels."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from packing import by_key, run
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from ldm_sg.annotate import stream
from ldm_sg.annotate.features import FeatureExtractor, load_extractor, own_size
from ldm_sg.annotate.kinds import KINDS, load_annotator
from ldm_sg.annotate.lost import to_crop
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.config import READ_BY, AnnotateConfig, AnnotatorConfig, FeaturesConfig
from ldm_sg.configfile import load
from ldm_sg.data.images import MAX_ASPECT, crop_resize, show, to_array, to_float, to_tensor
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter, image_batches
from ldm_sg.errors import InputError

SIZE, G = 16, 32


def photo(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 60, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, photos: list[Image.Image], boxes: list[list[float]] | None = None) -> str:
    with ShardWriter(path) as writer:
        for i, image in enumerate(photos):
            meta = {"json": json.dumps({"boxes": [[*boxes[i], 0]]}).encode()} if boxes else {}
            writer.write(f"{i:03d}", {"png": png(image)} | meta)
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return str(path)


def config(tmp_path: Path, source: str, weights: str, size: int | None = G, **annotator) -> AnnotateConfig:
    features = FeaturesConfig("test_vit", weights, size=size, batch_size=4, precision="fp32")
    return AnnotateConfig(
        source, str(tmp_path / "set"), "patch4", SIZE, features, AnnotatorConfig(**annotator), workers=0
    )


def features_of(out: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(out / "features" / "000000.npy").astype(np.float32))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-3)  # features lie on disk in float16


def test_what_is_shown() -> None:
    image = photo(0, 60, 40)
    seen = show(image, SIZE, view=G, whole=True)
    assert np.array_equal(seen.square, to_array(crop_resize(image, SIZE)))
    assert np.array_equal(seen.view, to_array(crop_resize(image, G)))
    assert seen.whole.shape == (3, G, 48) and seen.crop == (10 / 60, 0, 50 / 60, 1)
    again = show(image, SIZE, within=20, view=G, whole=True)  # the middle 0.8 of the square: 32 of its 40 pixels
    assert np.array_equal(again.square, to_array(crop_resize(image, SIZE, within=20)))
    assert again.view is None or again.view.shape == (3, G, G)
    assert again.crop == (14 / 60, 4 / 40, 46 / 60, 36 / 40) and again.whole.shape == (3, G, 48)
    square = show(photo(1, SIZE, SIZE), SIZE, view=G, whole=True)
    assert (square.view, square.whole, square.crop) == (None, None, (0, 0, 1, 1))
    assert show(photo(1, 10, 10), SIZE, view=G).view is None  # there are no more pixels than the square has
    long = show(photo(2, 800, 8), SIZE, view=G, whole=True).whole
    assert long.shape[1] >= 1 and long.shape[2] <= MAX_ASPECT * G + 1


def test_squares_of_the_trained_size_give_bit_equal_signals(tmp_path: Path, weights: str) -> None:
    """g reads the very square, enlarged by itself, in batches of the config's size: as if nothing else were known."""
    photos = [photo(i, SIZE, SIZE) for i in range(6)]
    out = annotate_shards(config(tmp_path, shard(tmp_path / "a.tar", photos), weights, kind="boxes", k=2, k_patches=3))
    g = load_extractor(FeaturesConfig("test_vit", weights, size=G, precision="fp32"))
    images = to_float(torch.stack([to_tensor(image) for image in photos]))
    direct = torch.cat([g(batch) for batch in images.split(4)])
    assert torch.equal(features_of(out), direct.half().float())
    annotator = load_annotator(out / "annotator")
    again = torch.cat([annotator(batch).box for batch in images.split(4)])
    assert torch.equal(again, LatentSet(out).signals.box)


def test_g_sees_the_source_s_own_pixels(tmp_path: Path, weights: str) -> None:
    """Larger photos: features are those of the square at g's size, not of the trained square enlarged; a batch may mix."""
    photos = [photo(0, 64, 64), photo(1, 80, 50), photo(2, SIZE, SIZE), photo(3, 48, 96), photo(4, 12, 12)]
    out = annotate_shards(config(tmp_path, shard(tmp_path / "a.tar", photos), weights, k=2))
    g = load_extractor(FeaturesConfig("test_vit", weights, size=G, precision="fp32"))
    near = g(to_float(torch.stack([to_tensor(crop_resize(image, G)) for image in photos])))
    far = g(to_float(torch.stack([to_tensor(crop_resize(image, SIZE)) for image in photos])))
    large = torch.tensor([True, True, False, True, False])
    found = features_of(out)
    assert same(found[large], near[large]) and same(found[~large], far[~large])
    assert not any(same(a, b) for a, b in zip(found[large], far[large]))
    manifest = yaml.safe_load((out / "manifest.yaml").read_text())
    assert (
        manifest["view"]["g"] == f"the centre square at {G} pixels, from the source's own where it has more than {SIZE}"
    )


def test_of_image_is_what_annotate_gave(tmp_path: Path, weights: str) -> None:
    photos = [photo(i, 64 + 8 * (i % 3), 64) for i in range(9)]
    cfg = config(tmp_path, shard(tmp_path / "a.tar", photos), weights, kind="boxes", k=3, k_patches=4, centre=True)
    out = annotate_shards(cfg)
    annotator, signals = load_annotator(out / "annotator"), LatentSet(out).signals
    for i, image in enumerate(photos):
        one = annotator.of_image(image, SIZE)
        assert one.k[0] == signals.k[i] and torch.allclose(one.box[0], signals.box[i], atol=1e-5)


def bright(g: FeatureExtractor, images, layer: int = -1, mirrored: bool = False):
    """Keys in which the bright patches are alike and unlike all others."""
    prepared = g.prepare(images, mirrored)
    level = F.avg_pool2d(prepared.mean(1, keepdim=True), g.patch)
    keys = torch.cat([torch.where(level > 0, -1.0, 1.0), torch.ones_like(level) * 0.1], 1)
    features = g(images) if isinstance(images, torch.Tensor) else torch.zeros(len(images), g.dim)
    return features, keys.flip(-1) if mirrored else keys


def test_boxes_are_found_on_the_whole_image_and_mapped_through_the_crop(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureExtractor, "features_and_keys", bright)
    places = [
        (96, 64, (32, 16, 48, 48)),
        (96, 64, (0, 16, 48, 32)),
        (64, 96, (16, 0, 48, 16)),
        (64, 64, (16, 16, 48, 32)),
    ]
    photos = []
    for i, (width, height, (x0, y0, x1, y1)) in enumerate(places):
        pixels = np.array(photo(i, width, height))
        pixels[y0:y1, x0:x1] = 255
        photos.append(Image.fromarray(pixels))
    source = shard(tmp_path / "a.tar", photos, [list(box) for *_, box in places])
    out = annotate_shards(config(tmp_path, source, weights, size=64, kind="boxes", k=1, k_patches=100))
    boxes = LatentSet(out).signals.box[:, 0] * 64
    expected = [[16, 16, 32, 48], [0, 16, 32, 32], [0, 0, 64, 64], [16, 16, 48, 32]]  # the third lies above the square
    assert np.allclose(boxes, expected, atol=1e-4)
    f = yaml.safe_load((out / "manifest.yaml").read_text())["annotator"]
    assert (f["outside_crop"], f["corloc"], f["corloc_images"]) == (1, 1.0, 4)
    again = load_annotator(out / "annotator").of_image(photos[1], SIZE).box[0, 0] * 64
    assert np.allclose(again, expected[1], atol=1e-4)


def test_boxes_through_a_crop() -> None:
    crops = torch.tensor([[0.0, 0, 1, 1], [0.25, 0, 0.75, 1], [0.25, 0, 0.75, 1]])
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.1, 0.5, 0.2], [0.0, 0.1, 0.25, 0.2]])
    moved, outside = to_crop(boxes, crops)
    assert torch.equal(moved[0], boxes[0]) and outside.tolist() == [False, False, True]
    assert torch.allclose(moved[1:], torch.tensor([[0, 0.1, 0.5, 0.2], [0, 0, 1, 1]]))


def test_keys_of_whole_images_have_their_own_grid_and_squares_stay_as_they_were(weights: str) -> None:
    g = load_extractor(FeaturesConfig("test_vit", weights, size=G, precision="fp32"))
    assert g.any_shape and g.patch == 16
    images = [to_float(to_tensor(photo(i, 40 + i, 32))) for i in range(3)]  # 2 x 3 patches, the third partly padding
    keys = g.keys(images)
    assert keys.shape[2:] == (2, 3)
    assert torch.allclose(keys[1:2], g.keys(images[1:2]), atol=1e-5)
    square = to_float(torch.stack([to_tensor(photo(9, G, G))]))
    assert torch.allclose(g.keys(square), g.keys([square[0]]), atol=1e-6)
    plain = timm.create_model("test_vit", num_classes=0, img_size=G).eval()
    plain.load_state_dict(g.tower.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(g.prepare(square)), g(square))


@pytest.mark.parametrize(("source", "size"), [(224, 224), (64, 224), (256, 252), (300, 294), (2000, 518), (None, 518)])
def test_size_is_the_images_own_in_patches(source: int | None, size: int) -> None:
    assert own_size(518, 14, source) == size


def test_an_open_size_follows_the_images_and_is_kept(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_sg.annotate.features.LEAST", 32)
    source = shard(tmp_path / "a.tar", [photo(i, 70, 50) for i in range(4)])
    out = annotate_shards(config(tmp_path, source, weights, size=None, k=2))
    manifest = yaml.safe_load((out / "manifest.yaml").read_text())
    assert manifest["features"]["size"] == 48  # test_vit: own 160, patches of 16
    assert load_annotator(out / "annotator").extractor.size == 48


@pytest.mark.parametrize("shards", [1, 2, 40])
def test_latents_are_measured_all_over_the_set(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in order of brightness: the mean that is measured is the set's, not the first ones'."""
    levels = np.arange(0, 240).astype(np.uint8)
    urls = []
    for s, part in enumerate(np.array_split(levels, shards)):
        urls.append(shard(tmp_path / f"{s:03d}.tar", [Image.new("RGB", (8, 8), (int(v),) * 3) for v in part]))
    seen = torch.stack(list(stream.calibration_images(urls, 8, 32))).float()
    assert 16 <= len(seen) <= 64
    assert float(seen.mean()) == pytest.approx(119.5, abs=6) and float(seen.std()) == pytest.approx(69.3, rel=0.1)


def test_pack_without_crop(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photo(0, 60, 40).save(tmp_path / "in" / "a.png")
    (tmp_path / "boxes.json").write_text(json.dumps({"a": [[0, 10, 15, 30, "x"], [50, 0, 90, 20, "x"]]}))
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.repeat(np.arange(60, dtype=np.uint8)[None], 40, 0)).save(tmp_path / "masks" / "a.png")
    beside = {"annotations": tmp_path / "boxes.json", "masks": tmp_path / "masks"}
    run(tmp_path / "in", tmp_path / "out", size=20, crop="none", **beside)
    [sample] = by_key(tmp_path / "out").values()
    image, mask = (Image.open(io.BytesIO(data)) for data in (sample.image, sample.mask))
    assert image.size == mask.size == (30, 20)
    assert sample.meta["boxes"] == [[0, 5, 7.5, 15, 0], [25, 0, 30, 10, 0]]
    assert np.abs(np.asarray(mask, int)[0] - (2 * np.arange(30) + 0.5)).max() <= 1
    with pytest.raises(InputError, match="crop is False there"):
        run(tmp_path / "in", tmp_path / "out", size=20, **beside)
    with pytest.raises(InputError, match="crop='centre'"):
        run(tmp_path / "in", tmp_path / "other", crop="centre")
    photo(1, 2000, 2).save(tmp_path / "in" / "b.png")
    with pytest.raises(InputError, match="long side longer"):
        run(tmp_path / "in", tmp_path / "long", size=20, crop="none")


def test_true_boxes_of_the_whole_image(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", [photo(0, 60, 40)], [[0, 10, 15, 30]])
    [batch] = image_batches([url], SIZE, 2, 0, print, truth=True)
    assert np.allclose(batch.truth[0].whole_boxes, [[0, 0.25, 0.25, 0.75]], atol=0.01)
    assert np.allclose(batch.truth[0].boxes, [[0, 0.25, 0.125, 0.75]])


def test_every_setting_says_which_kinds_read_it() -> None:
    assert set(READ_BY) == set(AnnotatorConfig.__dataclass_fields__)
    assert {kind for kinds in READ_BY.values() for kind in kinds} == set(KINDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["annotator.k_patches=50"], "annotator.k_patches=50: annotator.kind=clusters does not read it; boxes does"),
        (
            ["annotator.kind=boxes", "annotator.truth=masks"],
            "annotator.truth=masks: annotator.kind=boxes .*; oracle does",
        ),
        (
            ["annotator.kind=oracle", "annotator.k=7"],
            "annotator.k=7: annotator.kind=oracle does not read it; clusters, ",
        ),
        (["annotator.kind=random", "annotator.segments.width=9"], "segments does"),
    ],
)
def test_settings_of_another_kind_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(AnnotateConfig, "configs/annotate/demo.yaml", given)


def test_what_a_config_gave_to_another_kind_is_let_go() -> None:
    assert load(AnnotateConfig, "configs/annotate/demo.yaml", ["annotator.kind=random"]).annotator.restarts == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["annotator.k=7"], "annotator.k=7: leave it out: .*, reused, has 4"),
        (["annotator.niter=3"], "annotator.niter=3"),
        (["annotator.shuffle=0.5"], "annotator.shuffle=0.5"),
        (["annotator.k=4", "annotator.seed=0"], None),  # what it has anyway
    ],
)
def test_settings_beside_a_reused_f_are_not_ignored(given: list[str], message: str | None, colours: Path) -> None:
    """What the config below gave was for an f of its own."""
    asked = ("configs/annotate/demo.yaml", [f"annotator.reuse={colours}", *given])
    if message is None:
        assert load(AnnotateConfig, *asked).annotator.reuse == str(colours)
    else:
        with pytest.raises(InputError, match=message):
            load(AnnotateConfig, *asked)
