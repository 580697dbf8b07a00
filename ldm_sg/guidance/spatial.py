"""Boxes and index masks -> soft coverage on the latent grid (k_s of Eq. 8), and the concepts that a mask holds."""

from dataclasses import dataclass

import torch
from torch import Tensor

VOID = 255  # in an index mask: belongs to no class
MOST_CONCEPTS = 32  # tokens that cross-attention reads at most


def box_coverage(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, M, 4] (x0, y0, x1, y1) as shares of the image's sides -> [B, 1, h, w]: which share of each cell lies in the box
    that covers most of it."""

    def along(low: Tensor, high: Tensor, cells: int) -> Tensor:  # [B, M] -> [B, M, cells]
        left = torch.arange(cells, device=boxes.device, dtype=boxes.dtype)
        return (torch.minimum(high[..., None] * cells, left + 1) - torch.maximum(low[..., None] * cells, left)).clamp(
            0, 1
        )

    x0, y0, x1, y1 = boxes.unbind(2)
    return (along(y0, y1, grid[0])[..., None] * along(x0, x1, grid[1])[..., None, :]).amax(1, keepdim=True)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Boxes [..., N, 4] and [..., M, 4] (x0, y0, x1, y1, any unit) -> intersection over union [..., N, M]; 0 for two
    empty boxes."""
    sides = torch.minimum(a[..., None, 2:], b[..., None, :, 2:]) - torch.maximum(a[..., None, :2], b[..., None, :, :2])
    both = sides.clamp(min=0).prod(-1)  # [..., N, M]
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return torch.nan_to_num(both / (areas[0][..., None] + areas[1][..., None, :] - both))


def mask_coverage(masks: Tensor, classes: int, grid: tuple[int, int]) -> Tensor:
    """Index masks uint8 [B, H, W], H and W multiples of the grid's h and w -> [B, classes, h, w]: which share of each cell
    belongs to which class. The classes of a cell add up to one, less what is VOID in it."""
    (b, height, width), (h, w) = masks.shape, grid
    assert height % h == 0 and width % w == 0, (masks.shape, grid)
    blocks = masks.reshape(b, h, height // h, w, width // w).long().clamp(max=classes)  # VOID -> one class more
    cells = torch.arange(b * h * w, device=masks.device).view(b, h, 1, w, 1) * (classes + 1)
    counts = torch.bincount((cells + blocks).flatten(), minlength=b * h * w * (classes + 1)).view(b, h, w, classes + 1)
    return counts[..., :classes].permute(0, 3, 1, 2).float() / (height // h * (width // w))


@dataclass(frozen=True)
class Crops:
    """A square of each of B images: `side` cells of the latent grid from row and column `corners` [B, 2] on."""

    corners: Tensor
    side: int

    def __call__(self, maps: Tensor) -> Tensor:
        """Maps [B, C, h, w] -> [B, C, side, side]."""
        rows = zip(maps, self.corners.tolist(), strict=True)
        return torch.stack([m[:, y : y + self.side, x : x + self.side] for m, (y, x) in rows])


def present(coverage: Tensor) -> Tensor:
    """Coverage [B, S, h, w] -> the multi-hot [B, S] of the classes that occur (spatial max-pool)."""
    return (coverage.amax((2, 3)) > 0).float()


def concept_ids(multi_hot: Tensor) -> Tensor:
    """Multi-hot [B, K] -> ids [B, T] of what is present, in rising order, then -1; T = min(K, MOST_CONCEPTS)."""
    k = multi_hot.shape[1]
    ids = torch.arange(k, device=multi_hot.device).expand_as(multi_hot)
    ordered = torch.where(multi_hot > 0, ids, k).sort(1).values[:, :MOST_CONCEPTS]
    return torch.where(ordered < k, ordered, -1)
