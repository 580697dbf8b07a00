"""LOST: boxes as a literal transcription of the paper finds them, images without an object, keys of ViTs, padding."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import SHARED
from safetensors.torch import save_file
from scipy import ndimage
from torch.nn import functional as F

from ldm_sg.annotate.features import load_extractor
from ldm_sg.annotate.lost import connected, correct_localisation, lost, to_relative
from ldm_sg.config import FeaturesConfig
from ldm_sg.data.images import crop_resize, decode, to_float, to_tensor
from ldm_sg.errors import InputError
from ldm_sg.guidance.spatial import iou

PEDESTRIANS = SHARED / "data" / "pennfudan_256"
DINO = SHARED / "weights" / "dinov2_small" / "model.safetensors"


def reference(keys, k_patches):
    """One image's keys [D, h, w] -> its box, or None: Sec. 3.2 word by word, with the public code's > for >=."""
    d, h, w = keys.shape
    features = keys.double().numpy().reshape(d, h * w).T
    similarity = features @ features.T
    degree = [sum(similarity[p, q] > 0 for q in range(h * w) if q != p) for p in range(h * w)]
    lowest_first = sorted(range(h * w), key=lambda p: (degree[p], p))
    seed = lowest_first[0]
    expanded = [q for q in lowest_first[:k_patches] if similarity[seed, q] > 0]
    mask = np.array([sum(similarity[s, q] for s in expanded) > 0 for q in range(h * w)]).reshape(h, w)
    parts, _ = ndimage.label(mask)
    label = parts[seed // w, seed % w]
    rows, columns = np.nonzero(parts == label)
    if label == 0 or len(rows) == h * w:
        return None
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def same_boxes(keys, k_patches=100):
    """Compares `lost` with the reference; how many images have an object."""
    h, w = keys.shape[2:]
    boxes, found = lost(keys, k_patches)
    for image, box, there in zip(keys.float(), boxes, found):
        expected = reference(image, k_patches)
        assert there == (expected is not None)
        assert box.tolist() == (expected or [0, 0, w, h])
    return int(found.sum())


def blobs(seed, grid, n=11, dim=12, levels=3):
    """Smooth fields with noise, rounded: whole numbers make every similarity exact and many of them 0 or equal."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, dim, 3, 3, generator=generator)
    noise = torch.randn(n, dim, *grid, generator=generator)
    return (levels * (F.interpolate(coarse, grid, mode="bilinear") + noise / 3)).round()


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (3, 12), (14, 14), (18, 17)])  # the last has more than one tile
@pytest.mark.parametrize("k_patches", [1, 20, 100, 1000])
def test_boxes_are_the_papers(grid, k_patches):
    assert sum(same_boxes(blobs(seed, grid), k_patches) for seed in range(3)) > 10


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_ties_zero_keys_and_seeds_outside_the_mask(dim):
    assert same_boxes(blobs(0, (5, 6), n=60, dim=dim, levels=1), 5) < 60


def test_a_patch_is_not_its_own_friend():
    """A lone patch before an empty one: both have degree 0, so the first is the seed."""
    keys = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]]).view(1, 2, 1, 4)
    assert same_boxes(keys) == 1 and lost(keys)[0].tolist() == [[0, 0, 1, 1]]


def test_bf16_keys_and_any_layout_give_the_same_boxes():
    keys = blobs(0, (18, 17))
    expected = lost(keys)[0]
    for same in (keys.bfloat16(), keys.to(memory_format=torch.channels_last)):
        assert torch.equal(lost(same)[0], expected)


def real_images(n):
    names = sorted(json.loads((PEDESTRIANS / "boxes.json").read_text()))[:: 170 // n][:n]
    photos = [decode(next((PEDESTRIANS / "images").glob(f"{name}.*")).read_bytes()) for name in names]
    return to_float(torch.stack([to_tensor(crop_resize(photo, 256)) for photo in photos]))


@pytest.mark.skipif(
    not (PEDESTRIANS.is_dir() and DINO.is_file()), reason="needs ../shared: pennfudan_256, dinov2_small"
)
def test_boxes_of_photos_are_the_papers():
    cfg = FeaturesConfig(model="vit_small_patch14_dinov2", weights=str(DINO), size=230)
    g = load_extractor(cfg)
    keys = g.keys(real_images(6))
    assert keys.shape == (6, 384, 17, 17) and g.grid == 230 / 14
    keys = keys - keys.mean((2, 3), keepdim=True)
    rounded = (keys / keys.abs().amax() * 15).round()  # exact, as in `blobs`
    assert same_boxes(rounded) == 6 and same_boxes(rounded, 20) == 6


@pytest.mark.parametrize("grid", [(6, 9), (16, 16)])
def test_a_mirrored_image_gives_the_mirrored_box_within_a_patch(grid):
    """But for equals, of which the first in reading order counts, from whichever side one reads."""
    keys = blobs(3, grid, n=100)
    (boxes, found), mirrored = lost(keys, 20), lost(keys.flip(3), 20)[0]
    back = torch.stack([grid[1] - mirrored[:, 2], mirrored[:, 1], grid[1] - mirrored[:, 0], mirrored[:, 3]], 1)
    assert ((back - boxes).abs().amax(1) <= 1)[found].float().mean() > 0.95


def test_an_object_is_boxed():
    keys = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(0)) / 50
    keys[:, 0] += 1
    keys[0, 0, 2:5, 3:9] = -1
    keys[1, 0, 6:8, :2] = -1
    keys[1, 0, 8, 2] = -1  # touches the other part at a corner only
    boxes, found = lost(keys, 4)
    assert boxes.tolist() == [[3, 2, 9, 5], [0, 6, 2, 8]] and found.all()


@pytest.mark.parametrize("bad", [0.0, 1.0, float("nan"), float("inf")])
def test_nothing_found_is_the_whole_image_and_leaves_others_alone(bad):
    keys = blobs(1, (6, 9), n=3)
    alone = lost(keys[[0, 2]])
    if bad in (0.0, 1.0):
        keys[1] = bad
    else:
        keys[1, 0, 3, 3] = bad
    boxes, found = lost(keys)
    assert found.tolist() == [alone[1][0], False, alone[1][1]]
    assert boxes[1].tolist() == [0, 0, 9, 6] and torch.equal(boxes[[0, 2]], alone[0])


def test_an_image_of_one_patch():
    assert [part.tolist() for part in lost(torch.ones(1, 4, 1, 1))] == [[[0, 0, 1, 1]], [False]]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_connected_components(share):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(50, 13, 16, generator=generator) < share
    seed = torch.randint(13 * 16, (50,), generator=generator)
    for found, image, patch in zip(connected(mask, seed), mask, seed):
        parts, _ = ndimage.label(image.numpy())
        label = parts.flat[int(patch)]
        assert np.array_equal(found.numpy(), (parts == label) & image.numpy())


def test_a_spiral_is_one_component():
    rows = [
        "#########",
        "........#",
        "#######.#",
        "#.....#.#",
        "#.###.#.#",
        "#.#...#.#",
        "#.#####.#",
        "#.......#",
        "#########",
    ]
    mask = torch.tensor([[c == "#" for c in row] for row in rows])[None]
    assert torch.equal(connected(mask, torch.tensor([4 * 9 + 4])), mask)


def test_relative_boxes_are_clipped_where_the_padding_begins():
    boxes = torch.tensor([[0.0, 1, 4, 2], [1, 0, 3, 4]])
    assert torch.allclose(to_relative(boxes, 3.2), torch.tensor([[0, 0.3125, 1, 0.625], [0.3125, 0, 0.9375, 1]]))


def test_iou_and_correct_localisation():
    a = torch.tensor([[0.0, 0, 2, 2], [5, 5, 5, 5]])
    b = torch.tensor([[1.0, 0, 3, 2], [0, 0, 2, 2], [2, 2, 3, 3], [5, 5, 5, 5]])
    assert torch.allclose(iou(a, b), torch.tensor([[1 / 3, 1, 0, 0], [0, 0, 0, 0]]))
    assert correct_localisation(a[0], torch.tensor([[0.0, 0, 2, 1]]))  # exactly a half
    assert not correct_localisation(a[0], b[[0, 2]]) and not correct_localisation(a[0], b[:0])


def random_extractor(folder, name, **changes):
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=0).state_dict(), folder / "g.safetensors")
    cfg = {"model": name, "weights": str(folder / "g.safetensors"), "precision": "fp32", **changes}
    return load_extractor(FeaturesConfig(**cfg))


def photos(size):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


VITS = [  # name, size, width, grid
    ("test_vit", None, 64, 10),
    ("test_vit2", 64, 64, 4),  # register, no class token
    ("vit_tiny_patch16_224", 96, 192, 6),
    ("deit_tiny_distilled_patch16_224", 64, 192, 4),  # two prefix tokens
    ("vit_small_patch14_reg4_dinov2", 56, 384, 4),  # five
]


@pytest.mark.parametrize("name, size, width, grid", VITS)
@pytest.mark.parametrize("layer, read", [(-1, None), (2, None), (-1, 1)])
def test_keys_are_the_middle_third_of_qkv(tmp_path, name, size, width, grid, layer, read):
    g = random_extractor(tmp_path, name, size=size, layer=read)
    attention = g.tower.blocks[layer].attn
    seen = []
    hook = attention.qkv.register_forward_hook(lambda *parts: seen.append(parts[2]))
    with torch.no_grad():
        g.tower(g.prepare(photos(70)))
    hook.remove()
    b, n, _ = seen[0].shape
    k = (
        seen[0].reshape(b, n, 3, attention.num_heads, -1)[:, :, 1].reshape(b, n, -1)[:, -grid * grid :]
    )  # heads side by side
    keys = g.keys(photos(70), layer)
    assert keys.shape == (2, width, grid, grid) and keys.dtype == torch.float32 and g.grid == grid
    assert torch.allclose(keys, k.mT.reshape(keys.shape), atol=1e-5)
    assert not attention._forward_pre_hooks
    features, same = g.features_and_keys(photos(70), layer)
    assert torch.equal(same, keys) and torch.allclose(features, g(photos(70)), atol=1e-6)


def test_a_block_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"annotator\.keys_layer=-7.* 0 to 5"):
        random_extractor(tmp_path, "test_vit").keys(photos(64), -7)


def test_keys_of_a_vit_without_bias_for_keys(tmp_path):
    g = random_extractor(tmp_path, "eva02_tiny_patch14_224", size=56)
    assert g.keys(photos(56)).shape == (2, 192, 4, 4)


def test_keys_in_bf16(tmp_path):
    full, half = (
        random_extractor(tmp_path, "test_vit", size=64, precision=p).keys(photos(64)) for p in ("fp32", "bf16")
    )
    assert half.dtype == torch.float32 and F.cosine_similarity(full, half).min() > 0.99
    assert torch.equal(half, half.bfloat16().float())  # what `degrees` counts on


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_keys_of_another_network(tmp_path, name):
    with pytest.raises(InputError, match=rf"features\.model={name}.*timm ViT.*qkv"):
        random_extractor(tmp_path, name).keys(photos(64))


@pytest.mark.parametrize("name, layer", [("test_vit", None), ("vit_tiny_patch16_224", 3)])
def test_a_size_that_patches_do_not_divide_is_padded(tmp_path, name, layer):
    """As the paper's code pads: zeros on the right and below, after normalisation; the tower is made for it."""
    g = random_extractor(tmp_path, name, size=50, layer=layer)
    whole = random_extractor(tmp_path, name, size=64, layer=layer)
    images = photos(50)
    prepared = g.prepare(images)
    assert prepared.shape == (2, 3, 64, 64) and prepared[..., 50:].eq(0).all() and prepared[:, :, 50:].eq(0).all()
    mean, std = (torch.tensor(g.manifest[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(prepared[..., :50, :50], (images * 0.5 + 0.5 - mean) / std)
    canvas = mean.mul(2).sub(1).expand(2, 3, 64, 64).clone()  # the mean colour
    canvas[..., :50, :50] = images
    assert torch.allclose(g(images), whole(canvas), atol=1e-4)
    assert torch.allclose(g.keys(images), whole.keys(canvas), atol=1e-4)
    assert torch.allclose(g.keys(images, mirrored=True), whole.keys(canvas.flip(-1)).flip(-1), atol=1e-4)
    assert (g.size, g.grid, g.manifest["size"]) == (50, 50 / 16, 50)
    assert g.keys(images).shape[2:] == g.patches(images)[1].shape[2:] == (4, 4)


def test_a_size_that_patches_divide_is_left_alone(tmp_path):
    g = random_extractor(tmp_path, "test_vit", size=48)
    mean, std = (torch.tensor(g.manifest[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(g.prepare(photos(48)), (photos(48) * 0.5 + 0.5 - mean) / std)
    assert g.grid == 3


@pytest.mark.parametrize("layer", [None, 1])
def test_the_mirror_images_patches_lie_where_the_images_are(tmp_path, layer):
    g = random_extractor(tmp_path, "test_vit", size=48, layer=layer)
    images = photos(48)
    for read in (g.keys, lambda *args, **kwargs: g.patches(*args, **kwargs)[1]):
        assert torch.allclose(read(images, mirrored=True), read(images.flip(-1)).flip(-1), atol=1e-5)
        assert not torch.allclose(read(images, mirrored=True), read(images), atol=1e-2)
