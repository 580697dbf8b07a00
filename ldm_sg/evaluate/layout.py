"""Layout faithfulness: do samples, annotated again by the run's own g and f, show the box or mask that they were asked for?

Layouts are compared on the latent grid, where guidance acts: boxes as they are, masks as each cell's most frequent class."""

import torch
from torch import Tensor

from ldm_sg.data.signals import Signals
from ldm_sg.guidance.spatial import iou

VOID = -1.0  # a cell of which at least half belongs to no class


def layout(signals: Signals, grid: tuple[int, int]) -> Tensor:
    """Signals of B images -> [B, h * w] class of each cell, or [B, M * 4] boxes as shares of the sides."""
    if signals.spec.spatial == "box":
        assert signals.box is not None
        return signals.box.flatten(1)
    coverage = signals.guidance(grid).spatial
    assert coverage is not None
    best = coverage.argmax(1).float()  # [B, h, w]
    return torch.where(coverage.sum(1) > 0.5, best, VOID).flatten(1)


def faithfulness(asked: Tensor, samples: Tensor, real: Tensor, rebuilt: Tensor, spatial: str) -> dict[str, float]:
    """Layouts asked for [N, X], of the samples [N, X], of real images before and after the autoencoder [M, X].

    -> what samples reach, what real images after the autoencoder do (the ceiling), and what the samples reach when compared
    with the layouts of other samples (shuffled: no control at all)."""
    measure = {"box": box_figures, "mask": mask_figures}[spatial]
    found = {}
    other = asked.roll(max(1, len(asked) // 2), 0)
    for suffix, pair in (("", (asked, samples)), ("_real", (real, rebuilt)), ("_shuffled", (other, samples))):
        found |= {f"layout_{name}{suffix}": value for name, value in measure(*pair).items()}
    return found


def box_figures(asked: Tensor, found: Tensor) -> dict[str, float]:
    """Boxes [N, M * 4] and [N, M' * 4] -> the mean over images of the IoU of the first asked box with the best found one."""
    asked, found = asked.view(len(asked), -1, 4)[:, :1], found.view(len(found), -1, 4)  # [N, 1, 4], [N, M', 4]
    return {"iou": float(iou(asked, found).amax(2).mean())}


def mask_figures(asked: Tensor, found: Tensor) -> dict[str, float]:
    """Classes of cells [N, X] twice -> the share of cells that agree, and the mean over classes of IoU; void is left out."""
    valid = (asked >= 0) & (found >= 0)
    a, b = asked[valid].long(), found[valid].long()
    if not len(a):
        return {"agreement": 0.0, "miou": 0.0}
    k = int(torch.maximum(a.max(), b.max())) + 1
    table = torch.bincount(a * k + b, minlength=k * k).view(k, k).double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    ious = table.diagonal()[union > 0] / union[union > 0]
    return {"agreement": float((a == b).float().mean()), "miou": float(ious.mean())}
