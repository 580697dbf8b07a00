"""Spatial signals: coverage on the latent grid, the store of raw signals, what annotators make of shards with boxes and masks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from ldm_sg.annotate.baselines import corrupted
from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.kinds import KINDS, load_annotator
from ldm_sg.annotate.segments import Segments
from ldm_sg.annotate.stage import StageWriter
from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.config import AnnotateConfig, AnnotatorConfig, FeaturesConfig, SegmentsConfig
from ldm_sg.data.images import to_float
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter, image_batches
from ldm_sg.data.signals import PackedMasks, Signals, columns, stacked
from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.guidance.spatial import VOID, box_coverage, concept_ids, mask_coverage, present
from ldm_sg.report.signals import palette
from ldm_sg.training.data import LatentBatches
from ldm_sg.verbs.annotate import annotate

SIZE = 32


def random_masks(n: int = 4, classes: int = 5, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, classes, (n, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("grid", [(4, 4), (8, 16), (32, 32)])
def test_mask_coverage_adds_up_to_one_less_void_and_is_the_area(grid: tuple[int, int]) -> None:
    masks = random_masks()
    coverage = mask_coverage(masks, 5, grid)
    assert coverage.shape == (4, 5, *grid) and torch.allclose(coverage.sum(1), torch.ones(4, *grid))
    hot = torch.nn.functional.one_hot(masks.long(), 5).permute(0, 3, 1, 2).float()
    assert torch.allclose(coverage, torch.nn.functional.interpolate(hot, grid, mode="area"))
    masks[:, :16] = VOID
    half = mask_coverage(masks, 5, (4, 4))
    assert half[:, :, :2].sum() == 0 and torch.allclose(half[:, :, 2:].sum(1), torch.ones(4, 2, 4))


def test_box_coverage_has_fractional_edges_and_the_boxes_area() -> None:
    boxes = torch.tensor([[[0.25, 0.0, 0.5, 1.0]], [[0.1, 0.2, 0.35, 0.9]], [[0.0, 0.0, 0.0, 0.0]]])
    coverage = box_coverage(boxes, (4, 8))
    assert torch.allclose(coverage[0, 0], torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0]).expand(4, 8))
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, 0]
    assert torch.allclose(coverage.mean((1, 2, 3)), area)
    assert torch.allclose(coverage[1, 0, 0, :4], torch.tensor([0.2 * 0.2, 0.2, 0.2 * 0.8, 0.0]), atol=1e-6)
    two = torch.cat([boxes[:1], boxes[1:2]], 1)
    assert torch.equal(box_coverage(two, (4, 8)), torch.maximum(coverage[:1], coverage[1:2]))


def test_flipping_a_box_or_mask_flips_its_coverage() -> None:
    masks, boxes = random_masks(), torch.tensor([[[0.1, 0.2, 0.35, 0.9]]])
    mirrored = boxes.clone()
    mirrored[..., 0], mirrored[..., 2] = 1 - boxes[..., 2], 1 - boxes[..., 0]
    assert torch.equal(mask_coverage(masks.flip(2), 5, (8, 8)), mask_coverage(masks, 5, (8, 8)).flip(3))
    assert torch.allclose(box_coverage(mirrored, (8, 8)), box_coverage(boxes, (8, 8)).flip(3), atol=1e-6)


def test_present_concepts() -> None:
    multi_hot = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0]])
    assert concept_ids(multi_hot).tolist() == [[1, 3, -1, -1], [-1, -1, -1, -1]]
    masks = random_masks(2)
    masks[0] = 3
    assert present(mask_coverage(masks, 5, (4, 4))).tolist() == [[0, 0, 0, 1, 0], [1, 1, 1, 1, 1]]


def test_signals_keep_every_part_through_packing_picking_and_disk(tmp_path: Path) -> None:
    masks = random_masks(6).numpy()
    spec = GuidanceSpec("segments", 5, True, "mask", feature_dim=3)
    assert columns(spec) == ("mask", "feature")
    rows = [{"mask": m, "feature": np.full(3, i, np.float16)} for i, m in enumerate(masks)]
    signals = Signals.from_columns(spec, {n: stacked(n, [row[n] for row in rows]) for n in rows[0]}, len(rows))
    signals.save_pretrained(tmp_path / "s")
    again = Signals.from_pretrained(tmp_path / "s")
    assert again.spec == spec
    for s in (signals, again, again[torch.arange(6)]):
        assert len(s) == 6 and np.array_equal(s.masks().numpy(), masks)
        guidance = s.guidance((4, 4), torch.tensor([3, 1]), flip=torch.tensor([True, False]))
        plain = s.guidance((4, 4), torch.tensor([3, 1]))
        assert torch.equal(guidance.spatial[0], plain.spatial[0].flip(2))
        assert torch.equal(guidance.spatial[1], plain.spatial[1]) and torch.equal(guidance.k, plain.k)
        assert guidance.feature[:, 0].tolist() == [3, 1] and guidance.concepts.shape == (2, 5)
    config = {"_class_name": "Signals", **GuidanceSpec(spatial="box").to_dict()}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no box"):
        Signals.from_pretrained(tmp_path / "s")
    assert PackedMasks.of(masks)[4].tolist() == masks[4].tolist()
    assert signals.having(2).tolist() == list(range(6)) and signals.counts().tolist() == [6] * 5


def test_the_null_removes_every_part_of_the_signal() -> None:
    from ldm_sg.models.conditioner import Conditioner

    torch.manual_seed(0)
    net = Conditioner(num_labels=5, embed_dim=16, hidden=8, tokens="concepts", spatial_channels=5, feature_dim=3)
    spec = GuidanceSpec("segments", 5, True, "mask", feature_dim=3)
    rows = [{"mask": m, "feature": np.full(3, i + 1, np.float16)} for i, m in enumerate(random_masks(3).numpy())]
    rows[2]["mask"] = np.full((SIZE, SIZE), VOID, np.uint8)
    guidance = Signals.from_columns(
        spec, {n: stacked(n, [row[n] for row in rows]) for n in rows[0]}, len(rows)
    ).guidance((4, 4))
    found, null = net(guidance), net(guidance.null())
    for part in (null.vector, null.spatial, null.tokens * null.mask[..., None]):
        assert torch.equal(part[0], part[1]) and torch.equal(part[0], part[2])
    assert not torch.equal(found.vector[0], null.vector[0]) and not torch.equal(found.spatial[0], null.spatial[0])
    assert found.mask[2].sum() == 1 and (found.tokens[2, 0] == 0).all()  # nothing present is not the null
    assert not torch.equal(null.tokens[2, 0], found.tokens[2, 0])


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, masks: bool = True, boxes: bool = True, n: int = 12) -> str:
    """A bright square of one of three colours, at its box, on dark ground."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "a.tar") as writer:
        for i in range(n):
            x, y = generator.integers(0, 20, 2).tolist()
            pixels = generator.integers(0, 40, (SIZE, SIZE, 3)).astype(np.uint8)
            pixels[y : y + 12, x : x + 12, i % 3] = 220
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[y : y + 12, x : x + 12] = 1 + i % 3
            files = {"png": png(pixels)} | ({"mask.png": png(mask)} if masks else {})
            if boxes:
                files["json"] = json.dumps({"boxes": [[x, y, x + 12, y + 12, i % 3]], "labels": [i % 3]}).encode()
            writer.write(f"{i:03d}", files)
    return str(folder / "*.tar")


def config(tmp_path: Path, source: str, **annotator) -> AnnotateConfig:
    return AnnotateConfig(
        shards=source,
        out=str(tmp_path / "set"),
        autoencoder="patch4",
        features=FeaturesConfig(batch_size=5, precision="fp32"),
        annotator=AnnotatorConfig(**annotator),
        flips=True,
        workers=0,
        device="cpu",
    )


def test_oracle_masks(tmp_path: Path) -> None:
    out = annotate(config(tmp_path, shards(tmp_path / "source"), kind="oracle", truth="masks"))
    latents = LatentSet(out)
    assert (latents.spec.num_labels, latents.spec.spatial_channels, latents.spec.multi_hot) == (4, 4, True)
    guidance = latents.guidance(torch.tensor([0, 4]))
    assert guidance.spatial.shape == (2, 4, 8, 8) and guidance.k.tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]
    assert guidance.spatial[0, 1].mean() == pytest.approx((12 / SIZE) ** 2)
    assert LatentSet(out).signals.masks().shape == (12, SIZE, SIZE)  # from the index this time
    assert (out / "masks.png").is_file() and (out / "report.html").is_file()


def test_oracle_boxes_and_labels(tmp_path: Path) -> None:
    source = shards(tmp_path / "source", masks=False)
    latents = LatentSet(annotate(config(tmp_path, source, kind="oracle", truth="boxes")))
    guidance = latents.guidance(torch.tensor([0, 4]))
    assert guidance.spatial.shape == (2, 1, 8, 8) and guidance.k.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert guidance.spatial[0].mean() == pytest.approx((12 / SIZE) ** 2)
    assert (latents.folder / "boxes.png").is_file()
    several = LatentSet(annotate(config(tmp_path / "labels", source, kind="oracle")))
    assert several.spec.multi_hot and several.spec.spatial is None
    assert several.guidance(torch.tensor([2])).concepts.tolist() == [[2, -1, -1]]
    nothing = LatentSet(annotate(config(tmp_path / "none", source, kind="oracle", truth="none")))
    guidance = nothing.guidance(torch.tensor([0, 1]))
    assert len(nothing) == 12 and guidance.k is None and guidance.spatial is None and len(guidance) == 2


@pytest.mark.parametrize("truth", ["masks", "boxes"])
def test_crops_and_flips_take_image_box_and_mask_along(truth: str, tmp_path: Path) -> None:
    """patch4 loses nothing, so the bright square in the decoded view is where the view's signal says."""
    latents = LatentSet(annotate(config(tmp_path, shards(tmp_path / "source"), kind="oracle", truth=truth)))
    autoencoder, views = load_autoencoder(str(latents.folder / "autoencoder")), []
    for step in range(8):
        *_, view, guidance = LatentBatches(latents, 0, side=5, random=True)[[step, 0, *range(12)]]
        bright = (autoencoder.decode(view).amax(1, keepdim=True) > 0).float()
        assert view.shape[2:] == guidance.spatial.shape[2:] == (5, 5)
        thing = guidance.spatial if truth == "boxes" else guidance.spatial[:, 1:].sum(1, keepdim=True)
        assert torch.allclose(thing, F.avg_pool2d(bright, 4), atol=1e-6)
        if truth == "masks":
            assert torch.equal(guidance.k, present(guidance.spatial))
            assert torch.equal(guidance.concepts, concept_ids(guidance.k))
        views.append(view)
    assert len({tuple(view.flatten().tolist()) for view in torch.cat(views)}) > 48  # of 96 draws
    *_, middle = LatentBatches(latents, 0, side=6, random=False)[[0, 0, *range(12)]]
    assert torch.allclose(latents.signals.centre(6 / 8).guidance((6, 6)).spatial, middle.spatial, atol=1e-6)


def test_shards_without_what_the_oracle_should_read(tmp_path: Path) -> None:
    source = shards(tmp_path / "source", masks=False, boxes=False)
    with pytest.raises(InputError, match=r"truth=masks: no image .* KEY\.mask\.png"):
        annotate(config(tmp_path / "m", source, kind="oracle", truth="masks"))
    with pytest.raises(InputError, match=r"truth=boxes: no image .* boxes"):
        annotate(config(tmp_path / "b", source, kind="oracle", truth="boxes"))
    with pytest.raises(InputError, match=r"annotator\.truth='mask'.*masks"):
        annotate(config(tmp_path / "c", source, kind="oracle", truth="mask"))


def test_shuffled_ids_keep_their_sizes(tmp_path: Path) -> None:
    ids = np.arange(1000) % 7
    for share in (0.25, 0.5, 1.0):
        other = corrupted(ids, share, 0)
        assert np.array_equal(np.bincount(other), np.bincount(ids))
        assert np.mean(other != ids) == pytest.approx(share * 6 / 7, abs=0.04)
    source = shards(tmp_path / "source")
    plain = LatentSet(annotate(config(tmp_path / "p", source, k=3)))
    mixed = LatentSet(annotate(config(tmp_path / "s", source, k=3, shuffle=1.0)))
    assert sorted(plain.signals.k.tolist()) == sorted(mixed.signals.k.tolist())
    assert not torch.equal(plain.signals.k, mixed.signals.k)
    with pytest.raises(InputError, match=r"annotator\.shuffle.*no ids"):
        annotate(config(tmp_path / "f", source, kind="features", shuffle=0.5))


def images_of(source: str) -> torch.Tensor:
    return to_float(torch.cat([batch.images for batch in image_batches([source], SIZE, 64, 0, lambda *_: None)]))


def boxes_config(tmp_path: Path, source: str, **annotator) -> AnnotateConfig:
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    cfg = config(tmp_path, source, kind="boxes", k=3, **annotator)
    cfg.features = FeaturesConfig(model="test_vit", weights=str(weights), size=64, batch_size=5, precision="fp32")
    return cfg


def test_boxes_with_their_clusters_and_corloc(tmp_path: Path) -> None:
    source = shards(tmp_path / "source")
    cfg = boxes_config(tmp_path, source, centre=True, k_patches=5)
    latents = LatentSet(annotate(cfg))
    boxes, manifest = latents.signals.box, yaml.safe_load((latents.folder / "manifest.yaml").read_text())
    assert (
        boxes.shape == (12, 1, 4) and (boxes[..., 2:] > boxes[..., :2]).all() and 0 <= boxes.min() <= boxes.max() <= 1
    )
    assert latents.spec.num_labels == 3 and latents.spec.spatial_channels == 1
    assert manifest["annotator"]["corloc_images"] == 12 and 0 <= manifest["annotator"]["corloc"] <= 1
    again = load_annotator(latents.folder / "annotator")(images_of(source.replace("*", "a")))
    assert torch.allclose(again.box, boxes) and torch.equal(again.k, latents.signals.k)
    assert (latents.folder / "boxes.png").is_file() and (latents.folder / "clusters").is_dir()


def test_boxes_go_on_after_a_k_too_large_but_not_with_another_extraction(tmp_path: Path) -> None:
    source = shards(tmp_path / "source")
    cfg = boxes_config(tmp_path, source, centre=True, k_patches=5)
    cfg.annotator.k = 13
    with pytest.raises(InputError, match="only 12 images"):
        annotate(cfg)
    cfg.annotator.k, cfg.annotator.k_patches = 3, 4
    with pytest.raises(InputError, match="k_patches is 5 there and 4 here"):
        annotate(cfg)
    cfg.annotator.k_patches = 5
    box = LatentSet(annotate(cfg)).signals.box
    cfg.out = str(tmp_path / "fresh")
    assert torch.equal(box, LatentSet(annotate(cfg)).signals.box)


def test_a_refused_truth_is_not_read_as_another(tmp_path: Path) -> None:
    cfg = config(tmp_path, shards(tmp_path / "source", boxes=False), kind="oracle", truth="boxes")
    with pytest.raises(InputError, match="no image of these shards has boxes"):
        annotate(cfg)
    cfg.annotator.truth = "masks"
    with pytest.raises(InputError, match="truth is 'boxes' there and 'masks' here"):
        annotate(cfg)


def test_shuffling_what_has_no_ids_is_refused_at_once(tmp_path: Path) -> None:
    cfg = config(tmp_path, shards(tmp_path / "source"), kind="segments", k=3, shuffle=0.5)
    with pytest.raises(InputError, match="gives no ids"):
        annotate(cfg)
    assert not Path(cfg.out).exists()


@pytest.mark.parametrize("keys_flips", [True, False])
def test_boxes_of_averaged_keys_commute_with_a_mirror(keys_flips: bool, tmp_path: Path) -> None:
    source = shards(tmp_path / "source")
    cfg = boxes_config(tmp_path, source, centre=True, k_patches=5, keys_flips=keys_flips)
    cfg.features.size = 160  # 10 x 10 patches
    images, annotator = images_of(source.replace("*", "a")), load_annotator(annotate(cfg) / "annotator")
    box, mirrored = (annotator(x).box[:, 0] for x in (images, images.flip(-1)))
    back = torch.stack([1 - mirrored[:, 2], mirrored[:, 1], 1 - mirrored[:, 0], mirrored[:, 3]], 1)
    same = torch.isclose(back, box, atol=1e-4).all(1).float().mean()
    assert same > 0.9 if keys_flips else same < 0.9


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_what_every_image_has_at_a_place_moves_no_box_centred_there(
    place: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, real = shards(tmp_path / "source"), FeatureExtractor.features_and_keys
    pattern = torch.randn(64, 4, 1, generator=torch.Generator().manual_seed(0))  # rows: a mirror leaves it as it is
    found = []
    for strength in (0, 3):

        def patterned(*args, strength=strength) -> tuple[torch.Tensor, torch.Tensor]:
            features, keys = real(*args)
            return features, keys + strength * pattern

        folder = tmp_path / str(strength)
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(FeatureExtractor, "features_and_keys", patterned)
            out = annotate(boxes_config(folder, source, centre=True, centre_place=place, k_patches=3))
        found.append(LatentSet(out).signals.box)
    assert torch.equal(*found) == (place == 1)


def test_an_extractor_in_which_lost_finds_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = FeatureExtractor.features_and_keys

    def alike(*args) -> tuple[torch.Tensor, torch.Tensor]:
        features, keys = real(*args)
        return features, torch.ones_like(keys)

    monkeypatch.setattr(FeatureExtractor, "features_and_keys", alike)
    out = annotate(boxes_config(tmp_path, shards(tmp_path / "source")))
    assert "no box in 12 of 12 images" in capsys.readouterr().err
    assert yaml.safe_load((out / "manifest.yaml").read_text())["annotator"]["not_found"] == 12


@pytest.mark.parametrize("kind", ["boxes", "segments"])
def test_shards_without_a_usable_image(kind: str, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("000", {"png": b"no image"})
    cfg = boxes_config(tmp_path, str(tmp_path / "a.tar"), centre=True)
    cfg.size, cfg.annotator.kind, cfg.autoencoder = SIZE, kind, "demo-f8c16"  # one that need not be measured
    with pytest.raises(InputError, match="no usable image"):
        annotate(cfg)


@pytest.mark.parametrize("method", ["patch_kmeans", "stego"])
def test_segments_and_their_match_with_true_masks(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shards(tmp_path / "source")
    cfg = config(tmp_path, source, kind="segments", k=4, segments=SegmentsConfig(method=method, steps=50))
    cfg.features = FeaturesConfig(layer=-3, batch_size=5, precision="fp32")
    with monkeypatch.context() as patch:  # killed in the pass, after the fit
        patch.setattr(StageWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            annotate(cfg)
    monkeypatch.setattr(Segments, "learn", lambda *_: pytest.fail("fitted again"))
    latents = LatentSet(annotate(cfg))
    masks, manifest = latents.signals.masks(), yaml.safe_load((latents.folder / "manifest.yaml").read_text())
    assert masks.shape == (12, SIZE, SIZE) and masks.max() < 4 and latents.spec.spatial_channels == 4
    assert manifest["annotator"]["true_classes"] == 4
    assert manifest["annotator"]["accuracy"] > (0.5 if method == "patch_kmeans" else 0.25)  # 12 images teach no head
    again = load_annotator(latents.folder / "annotator")(images_of(source.replace("*", "a")))
    assert (again.masks() == masks).float().mean() > 0.99
    assert (latents.folder / "masks.png").is_file() and not (latents.folder / "work").exists()


@pytest.mark.parametrize("kind", ["features", "centroids", "neighbours"])
def test_feature_conditioning(kind: str, tmp_path: Path) -> None:
    out = annotate(config(tmp_path, shards(tmp_path / "source"), kind=kind, k=3, neighbours=2))
    latents = LatentSet(out)
    feature = latents.guidance(torch.arange(12)).feature
    assert latents.spec.num_labels == 0 and latents.spec.feature_dim == feature.shape[1] == 96
    assert torch.allclose(feature.norm(dim=1), torch.ones(12), atol=1e-2)
    distinct = len({tuple(row.tolist()) for row in feature})
    assert distinct <= 3 if kind == "centroids" else distinct > 3
    again = load_annotator(out / "annotator")
    made = again(torch.zeros(2, 3, SIZE, SIZE))
    assert made.feature.shape == (2, 96) and made.spec == latents.spec


def test_random_ids_need_no_g(tmp_path: Path) -> None:
    out = annotate(config(tmp_path, shards(tmp_path / "source"), kind="random", k=4))
    assert set(LatentSet(out).signals.k.tolist()) <= set(range(4))
    assert yaml.safe_load((out / "manifest.yaml").read_text())["features"] is None
    with pytest.raises(InputError, match="reads no image"):
        load_annotator(out / "annotator")


def test_every_kind_is_listed_and_colours_differ() -> None:
    assert {"clusters", "boxes", "segments", "oracle", "random", "features", "centroids", "neighbours"} == set(KINDS)
    assert len({tuple(c) for c in palette(27)[:27].tolist()}) == 27
