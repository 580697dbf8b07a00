"""STEGO against plain k-means on the same patch features, on CamVid road scenes with 11 classes:

    python benchmarks/camvid_miou.py SHARED [key=value ...] [--size 224] [--layer 10] [--k 11,27] [--seeds 3] [--picture FILE]

SHARED holds data/camvid_256 and weights/dinov2_small. Both methods learn from the training images, without their masks, and
are matched with the true classes and measured on the validation images, centre squares of 192 px. key=value sets fields of
SegmentsConfig. One JSON line for each method, k, seed, and segmentation with and without the mirrored image."""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.matching import confusion, match
from ldm_sg.annotate.segments import Segments
from ldm_sg.config import SEGMENT_METHODS, AnnotatorConfig, FeaturesConfig, SegmentsConfig
from ldm_sg.configfile import load
from ldm_sg.data.images import crop_resize, crop_resize_index, to_float, to_tensor
from ldm_sg.guidance.spatial import VOID
from ldm_sg.hardware import pick_device

SIZE, CLASSES, SHOWN = 192, 11, 6
COLOURS = np.array(  # sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, cyclist, none of them
    [
        *[(130, 180, 230), (140, 70, 60), (190, 190, 130), (130, 70, 130), (240, 110, 220), (80, 140, 40)],
        *[(230, 200, 0), (90, 90, 150), (0, 0, 140), (220, 30, 60), (0, 130, 140), (0, 0, 0)],
    ],
    np.uint8,
)


def read(folder: Path, split: str) -> tuple[Tensor, np.ndarray]:
    """Images uint8 [N, 3, 192, 192] and index masks uint8 [N, 192, 192], 11 = VOID."""
    files = sorted((folder / split).glob("*.jpg"))
    images = [to_tensor(crop_resize(Image.open(file).convert("RGB"), SIZE)) for file in files]
    masks = [crop_resize_index(Image.open(folder / f"{split}_masks" / f"{f.stem}.png"), SIZE) for f in files]
    truth = np.stack([np.asarray(mask) for mask in masks])
    return torch.stack(images), np.where(truth == CLASSES, np.uint8(VOID), truth)


def extract(g: FeatureExtractor, images: Tensor, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Image-level features float32 [N, D'] and patch features float16 [N, D, h, w] of the images, or
    of their mirror images where `mirrored` (turned back)."""
    image_level, patches = [], []
    for batch in images.split(16):
        features = g.patches(to_float(batch).to(g.mean.device), mirrored)
        image_level.append(features[0].cpu().numpy())
        patches.append(features[1].half().cpu().numpy())
    return np.concatenate(image_level), np.concatenate(patches)


def segment(segmenter: Segments, patches: np.ndarray, mirrored: np.ndarray | None) -> np.ndarray:
    """Index masks uint8 [N, 192, 192]."""
    masks = []
    for start in range(0, len(patches), 16):
        ours, theirs = (None if p is None else torch.from_numpy(p[start : start + 16]) for p in (patches, mirrored))
        masks.append(segmenter.segment(ours, theirs, SIZE))
    return torch.cat(masks).numpy()


def picture(images: Tensor, truth: np.ndarray, predicted: list[np.ndarray]) -> Image.Image:
    """A row for each of SHOWN images: the image, the true classes, and the matched classes of each method."""
    chosen = np.linspace(0, len(images) - 1, SHOWN).astype(int)
    columns = [images[chosen].permute(0, 2, 3, 1).numpy()]
    for masks in [truth, *predicted]:
        columns.append(COLOURS[np.minimum(masks[chosen], CLASSES)])
    return Image.fromarray(np.concatenate([np.concatenate(list(column), 0) for column in columns], 1))


def main(heads: Path) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--k", default="11,27")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    cfg, device, start = load(SegmentsConfig, None, args.settings), pick_device("auto"), time.perf_counter()
    weights = str(args.shared / "weights" / "dinov2_small" / "model.safetensors")
    features = FeaturesConfig("vit_small_patch14_dinov2", weights, layer=args.layer, size=args.size)
    g, camvid = load_extractor(features, device), args.shared / "data" / "camvid_256"
    (train, _), (val, truth) = read(camvid, "train"), read(camvid, "val")
    (image_level, patches), (_, ours) = extract(g, train), extract(g, val)
    _, mirrored = extract(g, val, mirrored=True)
    settings = {"size": args.size, "layer": args.layer, "seconds": round(time.perf_counter() - start)}
    print(json.dumps({"images": [len(train), len(val)], **settings}), flush=True)
    shown = {}
    for seed, k, method in itertools.product(range(args.seeds), map(int, args.k.split(",")), reversed(SEGMENT_METHODS)):
        start = time.perf_counter()
        segmenter = Segments(AnnotatorConfig("segments", k, seed=seed, segments=replace(cfg, method=method)))
        segmenter.learn(patches, image_level, heads / str(seed), device)  # a seed's head is the same for all k
        settings = {"method": method, "k": k, "seed": seed, "seconds": round(time.perf_counter() - start)}
        for flips in (False, True):
            masks = segment(segmenter, ours, mirrored if flips else None)
            found = match(confusion(masks, truth, k, CLASSES))
            figures = {name: round(found[name], 4) for name in ("miou", "accuracy")}
            print(json.dumps({**settings, "flips": flips, **figures}), flush=True)
            if (k, seed, flips) == (CLASSES, 0, cfg.flips):
                shown[method] = np.where(found["assignment"] < 0, CLASSES, found["assignment"])[masks]
    if args.picture:
        picture(val, truth, [shown[method] for method in reversed(SEGMENT_METHODS)]).save(args.picture)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
