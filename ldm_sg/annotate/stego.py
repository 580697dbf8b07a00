"""STEGO's head (Hamilton et al., ICLR 2022): patch features -> codes whose cosine similarities repeat the features', only
sharper. Pairs of patches that are more alike than a threshold b attract each other, all others are pushed apart."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ldm_sg.annotate.clusters import normalise
from ldm_sg.annotate.stage import read_checkpoint, subset, write_checkpoint
from ldm_sg.config import SegmentsConfig
from ldm_sg.errors import InputError
from ldm_sg.weights import read_weights

CHECKPOINT = "stego.pt"
SAMPLES, DROPOUT = 11, 0.1  # the official code's: random places along each side of an image, and channels not shown
OFFICIAL = {
    "net.cluster1.0": "linear",
    "net.cluster2.0": "nonlinear.0",
    "net.cluster2.2": "nonlinear.2",
}  # names there: ours
CLASSES = "cluster_probe.clusters"
EMBEDDING = "net.model.patch_embed.proj.weight"  # of the ViT that the head was trained on
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


def fit_head(
    patches: np.ndarray,
    image_features: np.ndarray,
    cfg: SegmentsConfig,
    seed: int,
    device: torch.device | str,
    folder: Path,
) -> Head:
    """Patch features float16 [N, D, h, w], which may be mapped from a file, and image-level ones [N, D'] -> a trained head.

    It ends when `patience` windows in a row have not lowered the lowest mean loss of a window by `min_improvement` of it:
    codes that go on contracting for little loss make worse classes. FOLDER/stego.pt is written after every window; the same
    fit, started again, goes on from there, and as a step is a function of (seed, its number), ends with the same weights."""
    chosen = subset(len(patches), cfg.images, seed)
    if len(chosen) < 2:
        raise InputError(f"annotator.segments.method=stego compares images with others: {len(chosen)} is too few")
    neighbours = nearest_images(image_features[chosen], cfg.neighbours)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(patches.shape[1], cfg.width).to(device)
    optimizer = torch.optim.Adam(head.parameters(), cfg.lr)
    steps, best, stale = 0, float("inf"), 0
    path, of = folder / CHECKPOINT, repr((sorted(asdict(cfg).items()), seed, patches.shape))
    if there := read_checkpoint(path, of):
        head.load_state_dict(there["head"])
        optimizer.load_state_dict(there["optimizer"])
        steps, best, stale = there["steps"], there["best"], there["stale"]

    def features(images: Tensor, generator: torch.Generator) -> Tensor:
        return sample_points(torch.from_numpy(patches[chosen[images.numpy()]]).to(device).float(), generator)

    with tqdm(desc="STEGO", total=cfg.steps, initial=steps, unit=" steps", mininterval=1) as bar:
        while steps < cfg.steps and stale < cfg.patience:
            window, total = range(steps, min(steps + WINDOW, cfg.steps)), torch.zeros((), device=device)
            for step in window:  # on random images, each with one of its neighbours
                generator = torch.Generator().manual_seed(seed * 2**32 + step)
                batch = torch.randperm(len(chosen), generator=generator)[: cfg.batch_size]
                partners = neighbours[batch, torch.randint(neighbours.shape[1], (len(batch),), generator=generator)]
                loss = stego_loss(head, features(batch, generator), features(partners, generator), cfg, generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                bar.update()
            steps, mean = window.stop, float(total) / len(window)
            better = best == float("inf") or mean < best - cfg.min_improvement * abs(best)
            best, stale = (mean, 0) if better else (best, stale + 1)
            bar.set_postfix(loss=f"{mean:.4f}")
            state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
            write_checkpoint(path, of, state | {"steps": steps, "best": best, "stale": stale})
    return head.requires_grad_(False)


def official(path: Path, tower: nn.Module) -> tuple[Head, Tensor]:
    """An official STEGO checkpoint -> its head and the centres of its classes [K, C]; what else is pickled in it is left inert.
    InputError where it is none, or its head was trained on another g than `tower`."""
    state = {name: value.detach().float() for name, value in read_weights(path, inert=True).items()}
    renamed = {f"{new}.{part}": f"{old}.{part}" for old, new in OFFICIAL.items() for part in ("weight", "bias")}
    lacking = [name for name in (*renamed.values(), CLASSES, EMBEDDING) if name not in state]
    if lacking:
        raise InputError(f"annotator.segments.weights={path}: no {lacking[0]} in it, which STEGO's checkpoints have")
    theirs, ours = state[EMBEDDING], dict(tower.named_parameters()).get("patch_embed.proj.weight")
    if ours is None or ours.shape != theirs.shape or not torch.allclose(ours.cpu(), theirs, atol=2e-3):
        raise InputError(
            f"annotator.segments.weights={path}: its head was trained on another g: a ViT of width {theirs.shape[0]} with "
            f"patches of {theirs.shape[-1]} pixels, for example features.model=vit_base_patch8_224.dino"
        )
    width, dim = state["net.cluster1.0.weight"].shape[:2]
    head = Head(dim, width)
    head.load_state_dict({new: state[old] for new, old in renamed.items()})
    return head.requires_grad_(False), state[CLASSES]
