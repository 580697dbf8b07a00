"""LOST for a whole batch beside a loop over its images, microseconds an image in one CPU thread, a JSON line each:
`python benchmarks/bench_lost.py [SHARED]`.

`public` takes each image through the steps of LOST's public code, `lean` through those that its box depends on. Keys
of Penn-Fudan's photos where SHARED (data/pennfudan_256, weights/dinov2_small) is given, else random ones, rounded to
bf16 numbers as a g in bf16 gives them: the loops always read them as float32, `lost` as either. CPU time, best of
several alternating rounds; `same_boxes` is the share of images on which all agree (sums in another order move
near-zeros)."""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from ldm_sg.annotate.features import load_extractor
from ldm_sg.annotate.lost import lost
from ldm_sg.config import FeaturesConfig
from ldm_sg.data.images import crop_resize, decode, to_float, to_tensor

IMAGES, K_PATCHES, ROUNDS = 32, 100, 7


def looped(keys: Tensor, lean: bool) -> Tensor:
    """Keys [B, D, h, w] -> boxes [B, 4], image by image."""
    h, w = keys.shape[2:]
    boxes = []
    for image in keys.flatten(2).mT:  # [N, D]
        similarity = image @ image.T
        if lean:
            degree = (similarity > 0).sum(1) - (similarity.diagonal() > 0).long()
        else:
            positive = similarity.clone()
            positive.fill_diagonal_(0)
            positive[positive < 0] = 0
            positive + positive.T  # computed there and not used
            degree = (positive > 0).sum(1)
        order = degree.argsort(stable=True)
        lowest = order[:K_PATCHES]
        expanded = lowest[similarity[order[0], lowest] > 0]
        mask = similarity[expanded].sum(0).view(h, w) > 0
        parts, _ = ndimage.label(mask.numpy())
        rows, columns = np.nonzero(parts == parts.flat[int(order[0])])
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return torch.tensor(np.array(boxes), dtype=torch.float32)


def real(shared: Path, size: int) -> Tensor:
    files = sorted((shared / "data" / "pennfudan_256" / "images").iterdir())[:IMAGES]
    images = torch.stack([to_tensor(crop_resize(decode(file.read_bytes()), 256)) for file in files])
    weights = str(shared / "weights" / "dinov2_small" / "model.safetensors")
    g = load_extractor(FeaturesConfig(model="vit_small_patch14_dinov2", weights=weights, size=size))
    keys = torch.cat([g.keys(to_float(batch)) for batch in images.split(8)])
    return keys - keys.mean((2, 3), keepdim=True)  # as they are, all of them look alike to LOST


def random(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    side = size // 14
    smooth, noise = (torch.randn(IMAGES, 384, n, n, generator=generator) for n in (4, side))
    keys = F.interpolate(smooth, (side, side), mode="bilinear") + noise / 3
    return keys.to(memory_format=torch.channels_last)  # as g gives them


def measure(keys: Tensor) -> dict[str, object]:
    single = keys.float()
    runs = {
        "public": lambda: looped(single, lean=False),
        "lean": lambda: looped(single, lean=True),
        "fp32": lambda: lost(single, K_PATCHES)[0],
        "bf16": lambda: lost(keys, K_PATCHES)[0],
    }
    expected = runs["public"]()
    same = {name: round((run() == expected).all(1).float().mean().item(), 3) for name, run in runs.items()}
    times = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name] = min(times[name], 1e6 * (time.process_time() - start) / len(keys))
    pairs = itertools.product(("public", "lean"), ("fp32", "bf16"))
    ratios = {f"{loop}/{ours}": round(times[loop] / times[ours], 1) for loop, ours in pairs}
    return {
        "grid": keys.shape[2],
        **{name: round(t) for name, t in times.items()},
        **ratios,
        "same_boxes": min(same.values()),
    }


def main() -> None:
    torch.set_num_threads(1)
    for size in (112, 224, 448):
        keys = real(Path(sys.argv[1]), size) if len(sys.argv) > 1 else random(size)
        print(json.dumps(measure(keys.bfloat16())), flush=True)


if __name__ == "__main__":
    main()
