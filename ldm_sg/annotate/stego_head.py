"""STEGO's head (Hamilton et al., ICLR 2022): patch features -> codes whose cosine similarities repeat the features', only
sharper. Pairs of patches that are more alike than a threshold b attract each other, all others are pushed apart."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ldm_sg.annotate.clusters import normalise
from ldm_sg.annotate.stage import subset
from ldm_sg.config import SegmentsConfig
from ldm_sg.errors import InputError
from ldm_sg.folder import write_bytes

CHECKPOINT = "stego.pt"
SAMPLES, DROPOUT = 11, 0.1  # the official code's: random places along each side of an image, and channels not shown
WINDOW = 50  # steps between checkpoints, whose mean loss decides when to stop


class Head(nn.Module):
    """Patch features [B, D, h, w] -> codes [B, C, h, w]: a linear map plus a two-layer one, both of 1x1 convolutions."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.linear = nn.Conv2d(dim, width, 1)
        self.nonlinear = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.ReLU(), nn.Conv2d(dim, width, 1))

    def forward(self, patches: Tensor) -> Tensor:
        return self.linear(patches) + self.nonlinear(patches)


def correspondences(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 1: maps [B, D, ...] and [B, D, ...] -> cosines of all pairs of their places, [B, P, Q]."""
    return F.normalize(a.flatten(2), dim=1).transpose(1, 2) @ F.normalize(b.flatten(2), dim=1)


def correspondence_loss(
    features_a: Tensor,
    features_b: Tensor,
    codes_a: Tensor,
    codes_b: Tensor,
    shift: float,
    centre: bool = True,
    zero_clamp: bool = True,
) -> Tensor:
    """Eq. 4: - mean (F - b) max(S, 0), with F of features [B, D, ...], S of codes [B, C, ...] and b = `shift`.

    `centre` is Eq. 3, F less its mean over the places of b; the official code then adds the batch's mean F again, so its b
    are larger than ours by that mean. Without `zero_clamp` S itself takes the place of max(S, 0), Eq. 2."""
    with torch.no_grad():
        f = correspondences(features_a, features_b)  # [B, P, Q]
        if centre:
            f = f - f.mean(2, keepdim=True)
    s = correspondences(codes_a, codes_b)  # [B, P, Q]
    return -((f - shift) * (s.clamp(min=0) if zero_clamp else s)).mean()


def stego_loss(head: Head, a: Tensor, b: Tensor, cfg: SegmentsConfig, generator: torch.Generator) -> Tensor:
    """Eq. 5, of features a [B, D, h, w] of images and b of a neighbour each: a with itself, with b, and with the b of
    another image."""
    both, turn = torch.cat([a, b]), int(torch.randint(1, len(a), (), generator=generator))
    shown = (torch.rand(*both.shape[:2], 1, 1, generator=generator) >= DROPOUT) / (1 - DROPOUT)
    codes_a, codes_b = head(both * shown.to(both.device)).chunk(2)
    terms = [
        (cfg.self_weight, cfg.self_shift, a, codes_a),
        (cfg.knn_weight, cfg.knn_shift, b, codes_b),
        (cfg.random_weight, cfg.random_shift, b.roll(turn, 0), codes_b.roll(turn, 0)),
    ]
    losses = [
        weight * correspondence_loss(a, other, codes_a, codes, shift, cfg.centre, cfg.zero_clamp)
        for weight, shift, other, codes in terms
    ]
    return torch.stack(losses).sum()


def sample_points(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Maps [B, D, h, w] at random places of each image, [B, D, 11, 11]; all of them, [B, D, h, w], when there are no more.

    The official code interpolates features and codes; ours are the codes of interpolated features, for less work."""
    if maps.shape[2] * maps.shape[3] <= SAMPLES**2:
        return maps
    places = torch.rand(len(maps), SAMPLES, SAMPLES, 2, generator=generator) * 2 - 1
    return F.grid_sample(maps, places.to(maps.device), padding_mode="border", align_corners=True)


def nearest_images(features: np.ndarray, n: int) -> Tensor:
    """Image-level features [N, D] -> the n most similar other images of each by cosine, [N, n], nearest first."""
    unit = torch.from_numpy(normalise(features))
    rows = []
    for start in range(0, len(unit), 1024):
        similar = unit[start : start + 1024] @ unit.T
        similar.diagonal(start).fill_(-2)  # not the image itself
        rows.append(similar.topk(min(n, len(unit) - 1), dim=1).indices)
    return torch.cat(rows)


class Fit:
    """The state of a head's fit. A step is a function of (seed, its number), so a resumed fit is one that never stopped.

    It ends when `patience` windows in a row have not lowered the lowest mean loss of a window by `min_improvement` of it:
    codes that go on contracting for little loss make worse classes."""

    def __init__(self, dim: int, cfg: SegmentsConfig, seed: int, device: torch.device | str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = Head(dim, cfg.width).to(device)
        self.optimizer = torch.optim.Adam(self.head.parameters(), cfg.lr)
        self.cfg, self.seed, self.device = cfg, seed, device
        self.steps, self.best, self.stale, self.total = 0, float("inf"), 0, torch.zeros((), device=device)

    @property
    def done(self) -> bool:
        return self.steps >= self.cfg.steps or self.stale >= self.cfg.patience

    def step(self, patches: np.ndarray, chosen: np.ndarray, neighbours: Tensor) -> None:
        """One update on random images patches[chosen[i]], each with one of its neighbours chosen[neighbours[i]]."""
        generator = torch.Generator().manual_seed(self.seed * 2**32 + self.steps)
        batch = torch.randperm(len(chosen), generator=generator)[: self.cfg.batch_size]
        partners = neighbours[batch, torch.randint(neighbours.shape[1], (len(batch),), generator=generator)]
        a, b = (
            sample_points(torch.from_numpy(patches[chosen[images.numpy()]]).to(self.device).float(), generator)
            for images in (batch, partners)
        )
        loss = stego_loss(self.head, a, b, self.cfg, generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.total += loss.detach()

    def end_window(self) -> float:
        """The mean loss of the window that ends here."""
        mean = float(self.total) / WINDOW
        better = self.best == float("inf") or mean < self.best - self.cfg.min_improvement * abs(self.best)
        self.best, self.stale = (mean, 0) if better else (self.best, self.stale + 1)
        self.total.zero_()
        return mean

    def state(self) -> dict[str, Any]:
        """At the end of a window: tensors and plain values."""
        counts = {"steps": self.steps, "best": self.best, "stale": self.stale}
        return counts | {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def take(self, state: dict[str, Any]) -> None:
        self.steps, self.best, self.stale = state["steps"], state["best"], state["stale"]
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def fit_head(
    patches: np.ndarray,
    image_features: np.ndarray,
    cfg: SegmentsConfig,
    seed: int,
    device: torch.device | str,
    folder: Path,
) -> Head:
    """Patch features float16 [N, D, h, w], which may be mapped from a file, and image-level ones [N, D'] -> a trained head.

    FOLDER/stego.pt is written every WINDOW steps; the same fit, started again, goes on from there."""
    chosen = subset(len(patches), cfg.images, seed)
    if len(chosen) < 2:
        raise InputError(f"annotator.segments.method=stego compares images with others: {len(chosen)} is too few")
    neighbours = nearest_images(image_features[chosen], cfg.neighbours)
    fit, path = Fit(patches.shape[1], cfg, seed, device), folder / CHECKPOINT
    of = repr((sorted(asdict(cfg).items()), seed, patches.shape))  # a checkpoint of anything else is written over
    if path.is_file():
        there = torch.load(path, device, weights_only=True)
        if there["of"] == of:
            fit.take(there)
    with tqdm(desc="STEGO", total=cfg.steps, initial=fit.steps, unit=" steps", mininterval=1) as bar:
        while not fit.done:
            fit.step(patches, chosen, neighbours)
            bar.update()
            if fit.steps % WINDOW == 0:
                bar.set_postfix(loss=f"{fit.end_window():.4f}")
                buffer = io.BytesIO()
                torch.save(fit.state() | {"of": of}, buffer)
                write_bytes(path, buffer.getvalue())
    return fit.head.requires_grad_(False)
