"""LOST (Simeoni et al., BMVC 2021): a self-supervised ViT's keys -> one class-agnostic box an image, without labels.

A whole batch at a time. Where the paper writes >= 0 its public code, which made the published boxes, has > 0, leaves
a patch out of its own degree and does not normalise the keys: so do we. Among equals the first patch in reading order
counts, which that code leaves to the sort."""

import itertools

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ldm_sg.guidance.spatial import iou

IMAGES = 8  # compared at once: on a CPU their keys stay in its cache
TILE = 128  # patches compared at once: bounds memory, and up to 256 ones add up exactly in bf16
SIDES = np.stack([np.zeros((3, 3)), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3))])  # each image for itself


def lost(keys: Tensor, k_patches: int = 100) -> tuple[Tensor, Tensor]:
    """Keys [B, D, h, w] -> boxes [B, 4] (x0, y0, x1, y1, float, in patches, right and bottom exclusive), found [B].

    Sec. 3.2: of the `k_patches` patches of lowest degree, those like the lowest one vote on which patches are the
    object; its connected part around that patch is boxed. The box is the whole grid, and found is False, where
    nothing stands out: the object would be every patch or none, or keys are not finite.

    The paper takes DINO's keys as they are. A constant in every key moves no attention, but here it makes all patches
    alike: DINOv2's key bias does, so subtract the `typical_key` of many images first (benchmarks/corloc.py).

    Where images were padded to whole patches, each patch of `FeatureExtractor.keys` still holds a part of the image:
    all take part, as in the public code, and `to_relative` clips the box to the image."""
    assert k_patches >= 1, k_patches
    h, w = keys.shape[2:]
    seeds, votes = zip(*(_vote(part.flatten(2).mT, k_patches) for part in keys.split(IMAGES)))
    seed, vote = torch.cat(seeds), torch.cat(votes)  # [B], [B, N]
    part = connected(vote.gt(0).unflatten(1, (h, w)), seed)  # [B, h, w]
    size = part.sum((1, 2))  # [B]
    found = (size > 0) & (size < h * w) & vote.isfinite().all(1)
    boxes = torch.where(found[:, None], bounds(part), torch.tensor([0.0, 0.0, w, h], device=keys.device))
    return boxes, found


def typical_key(here: Tensor, place: float) -> Tensor:
    """Mean keys of many images [D, h, w] -> what to take off every image's keys [D, h, w]: the mean over all places
    (place = 0), that of each place (1) or something between. What is common where it lies, such as the ground, then
    stands out less. A mirror image is as likely: both halves have the same keys."""
    here = (here + here.flip(-1)) / 2
    return here.mean((1, 2), keepdim=True).lerp(here, place)


def _vote(keys: Tensor, k_patches: int) -> tuple[Tensor, Tensor]:
    """Keys [B, N, D] -> the seed [B], and each patch's summed similarity to the expanded seeds [B, N]."""
    order = degrees(keys).argsort(dim=1, stable=True)  # [B, N] lowest first: an object has few friends
    votes = []
    for image, lowest in zip(keys, order[:, :k_patches]):  # one by one: a few products of a vector each
        image = image.float()
        friends = image[lowest]  # [k_patches, D], the seed first
        voters = (friends @ friends[0]).gt(0)
        votes.append(image @ (voters.float() @ friends))  # the sum of similarities is the similarity to the sum
    return order[:, 0], torch.stack(votes)


def degrees(keys: Tensor) -> Tensor:
    """Keys [B, N, D] -> with how many other patches each one correlates positively, [B, N] float32 (Eq. 1).

    The similarity matrix is symmetric: its tiles below the diagonal ones are not computed. Similarities are in the
    keys' dtype and only their signs are read: keys of a g in bf16 are bf16 numbers, and as such lose nothing and take
    a fraction of the time."""
    tiles = [tile.contiguous() for tile in keys.split(TILE, dim=1)]  # [B, TILE, D] each
    degree = [torch.zeros(tile.shape[:2], device=keys.device) for tile in tiles]
    for i, j in itertools.combinations_with_replacement(range(len(tiles)), 2):
        friends = (tiles[i] @ tiles[j].mT).gt_(0)  # [B, TILE, TILE]
        if i == j:
            friends.diagonal(dim1=1, dim2=2).zero_()
        else:
            degree[j] += friends.sum(1)
        degree[i] += friends.sum(2)
    return torch.cat(degree, dim=1)


def connected(mask: Tensor, seed: Tensor) -> Tensor:
    """The 4-connected component of `mask` [B, h, w] bool that holds patch `seed` [B] (counted by rows), of the same
    shape; empty where the seed is outside the mask."""
    labels = torch.from_numpy(ndimage.label(mask.cpu().numpy(), SIDES)[0]).to(mask.device)  # [B, h, w], 0 outside
    own = labels.flatten(1).gather(1, seed[:, None])  # [B, 1]
    return (labels == own[:, :, None]) & mask


def bounds(part: Tensor) -> Tensor:
    """Masks [B, h, w] bool -> their bounding boxes [B, 4]; of an empty one the whole grid."""
    edges = []
    for line in (part.any(1).byte(), part.any(2).byte()):  # columns [B, w], rows [B, h]
        edges.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))  # argmax: the first of equals
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], 1).float()


def to_relative(boxes: Tensor, grid: float | Tensor) -> Tensor:
    """Boxes [..., 4] in patches -> as shares of the image's sides, clipped to [0, 1]. The image spans `grid` patches
    (`FeatureExtractor.grid`), or [..., 4] of them along (x, y, x, y): fractions where the last ones are partly padding."""
    return (boxes / grid).clamp(0, 1)


def to_crop(boxes: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [B, 4] as shares of the sides of whole images, and the parts of them [B, 4] that are trained on -> the boxes as
    shares of the parts' sides, clipped, [B, 4], and which have no area there [B]: they become the whole part."""
    start, extent = crops[:, :2].repeat(1, 2), (crops[:, 2:] - crops[:, :2]).repeat(1, 2)
    moved = ((boxes - start) / extent).clamp(0, 1)
    outside = (moved[:, 2:] - moved[:, :2] < 1e-5).any(1)  # edges that touch leave a rounding error of area
    return torch.where(outside[:, None], torch.tensor([0.0, 0, 1, 1]), moved), outside


def correct_localisation(box: Tensor, truth: Tensor) -> bool:
    """Whether `box` [4] meets one of `truth` [M, 4] with an IoU of at least 0.5; the mean is CorLoc (Sec. 4.1)."""
    return bool((iou(box[None], truth) >= 0.5).any())
