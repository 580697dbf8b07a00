"""CorLoc of LOST's boxes, a JSON line each: the share of images whose box meets a true one, IoU >= 0.5.

    python benchmarks/corloc.py SHARED [--data pennfudan_256] [--layers 8 9 10 11] [--sizes 224] [--k-patches 100] [--flips] [--whole]

SHARED: folder with data/DATA (images/, boxes.json) and weights/dinov2_small. Images are cropped to their
centre square as `pack` crops them, true boxes with them; or, with --whole, seen and judged uncropped, as LOST's authors do. `centred`: the mean key of each image, of all images, or the
one half way to their mean at each place (annotator.centre_place=0.5) is subtracted first. Attention does not see a
constant (the same logit for every key), but LOST does."""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldm_sg.annotate.boxes import on_grid
from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.lost import correct_localisation, lost, to_relative, typical_key
from ldm_sg.config import FeaturesConfig
from ldm_sg.data.boxes import crop_meta, read_json
from ldm_sg.data.images import crop_resize, decode, fit_resize, fitted, to_float, to_tensor

PIXELS = 256
FIXED = {"whole image": [0.0, 0.0, 1.0, 1.0], "centre, half the sides": [0.25, 0.25, 0.75, 0.75]}


def read(folder: Path, size: int, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [-1, 1], [3, 256, 256] or whole at g's scale, and their true boxes [M, 4] in units of the image; none without
    a box after the crop."""
    for name, boxes in read_json(folder / "boxes.json").images.items():
        image = decode(next((folder / "images").glob(f"{name}.*")).read_bytes())
        kept = crop_meta(boxes.meta(), image.size, PIXELS, crop=not whole)["boxes"]
        if kept:
            seen, sides = crop_resize(image, PIXELS), [PIXELS] * 4
            if whole:
                seen, sides = fit_resize(image, size), [*fitted(*image.size, PIXELS)] * 2
            yield to_float(to_tensor(seen)), torch.tensor(kept)[:, :4] / torch.tensor(sides)


def corloc(boxes: Tensor, truths: list[Tensor]) -> float:
    return round(sum(map(correct_localisation, boxes, truths)) / len(truths), 3)


def measure(
    g: FeatureExtractor,
    layer: int,
    seen: list[Tensor],
    truths: list[Tensor],
    k_patches: list[int],
    flips: bool,
    whole: bool,
) -> Iterator[dict[str, object]]:
    def read_keys(mirrored: bool) -> list[Tensor]:
        return [g.keys([image] if whole else image[None], layer, mirrored) for image in seen]

    keys = read_keys(False)  # [1, D, h, w] each
    if flips:
        keys = [(a + b) / 2 for a, b in zip(keys, read_keys(True))]
    here = torch.stack([on_grid(key, keys[0].shape[2:])[0] for key in keys]).mean(0)
    grids = [torch.tensor(image.shape[:0:-1] * 2) / g.patch if whole else torch.tensor(g.grid) for image in seen]
    ways = {"no": None, "image": None, "all": typical_key(here, 0.0), "half place": typical_key(here, 0.5)}
    for (centred, mean), k in itertools.product(ways.items(), k_patches):
        less = [key.mean((2, 3), keepdim=True) * (centred == "image") for key in keys]
        if mean is not None:
            less = [on_grid(mean[None], key.shape[2:]) for key in keys]
        boxes, found = (torch.cat(part) for part in zip(*(lost(key - off, k) for key, off in zip(keys, less))))
        boxes = torch.stack([to_relative(box, grid) for box, grid in zip(boxes, grids)])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1).median()
        yield {
            "centred": centred,
            "k_patches": k,
            "corloc": corloc(boxes, truths),
            "found": round(found.float().mean().item(), 3),
            "median_area": round(area.item(), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--data", default="pennfudan_256", help="or bccd_240")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 9, 10, 11])
    parser.add_argument("--sizes", type=int, nargs="+", default=[224])
    parser.add_argument("--k-patches", type=int, nargs="+", default=[100])
    parser.add_argument("--flips", action="store_true", help="average the keys with the mirrored image's")
    parser.add_argument("--whole", action="store_true", help="uncropped images, their short side as --sizes says")
    args = parser.parse_args()
    data = args.shared / "data" / args.data
    truths = [truth for _, truth in read(data, PIXELS, args.whole)]
    for name, box in FIXED.items():
        boxes = torch.tensor([box]).expand(len(truths), -1)
        print(json.dumps({"boxes": name, "images": len(truths), "corloc": corloc(boxes, truths)}), flush=True)
    weights = str(args.shared / "weights" / "dinov2_small" / "model.safetensors")
    for size in args.sizes:
        g = load_extractor(FeaturesConfig(model="vit_small_patch14_dinov2", weights=weights, size=size))
        seen = [image for image, _ in read(data, size, args.whole)]
        for layer in args.layers:
            for found in measure(g, layer, seen, truths, args.k_patches, args.flips, args.whole):
                print(
                    json.dumps({"boxes": "LOST", "whole": args.whole, "size": size, "layer": layer, **found}),
                    flush=True,
                )


if __name__ == "__main__":
    main()
