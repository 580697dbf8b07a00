"""CorLoc of LOST's boxes, a JSON line each: the share of images whose box meets a true one, IoU >= 0.5.

    python benchmarks/corloc.py SHARED [--data pennfudan_256] [--layers 8 9 10 11] [--sizes 224] [--k-patches 100] [--flips]

SHARED: folder with data/DATA (images/, boxes.json) and weights/dinov2_small. Images are cropped to their
centre square as `pack` crops them, true boxes with them. `centred`: the mean key of each image, of all images, or the
one half way to their mean at each place (annotator.centre_place=0.5) is subtracted first. Attention does not see a
constant (the same logit for every key), but LOST does."""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.lost import correct_localisation, lost, to_relative, typical_key
from ldm_sg.config import FeaturesConfig
from ldm_sg.data.boxes import crop_meta, read_json
from ldm_sg.data.images import crop_resize, decode, to_float, to_tensor

PIXELS, BATCH = 256, 16
FIXED = {"whole image": [0.0, 0.0, 1.0, 1.0], "centre, half the sides": [0.25, 0.25, 0.75, 0.75]}


def read(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [3, H, H] and their true boxes [M, 4] in units of the image; none without a box after the crop."""
    for name, boxes in read_json(folder / "boxes.json").images.items():
        image = decode(next((folder / "images").glob(f"{name}.*")).read_bytes())
        kept = crop_meta(boxes.meta(), image.size, PIXELS)["boxes"]
        if kept:
            yield to_tensor(crop_resize(image, PIXELS)), torch.tensor(kept)[:, :4] / PIXELS


def corloc(boxes: Tensor, truths: list[Tensor]) -> float:
    return round(sum(map(correct_localisation, boxes, truths)) / len(truths), 3)


def measure(
    g: FeatureExtractor, layer: int, images: Tensor, truths: list[Tensor], k_patches: list[int], flips: bool
) -> Iterator[dict[str, object]]:
    keys = torch.cat([g.keys(to_float(batch), layer) for batch in images.split(BATCH)])
    if flips:
        keys = (keys + torch.cat([g.keys(to_float(batch), layer, mirrored=True) for batch in images.split(BATCH)])) / 2
    means = {"no": torch.zeros(()), "image": keys.mean((2, 3), keepdim=True)}
    means |= {name: typical_key(keys.mean(0), place) for name, place in {"all": 0.0, "half place": 0.5}.items()}
    for (centred, mean), k in itertools.product(means.items(), k_patches):
        boxes, found = lost(keys - mean, k)
        boxes = to_relative(boxes, g.grid)
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
    args = parser.parse_args()
    samples = list(read(args.shared / "data" / args.data))
    images, truths = torch.stack([image for image, _ in samples]), [truth for _, truth in samples]
    for name, box in FIXED.items():
        boxes = torch.tensor([box]).expand(len(truths), -1)
        print(json.dumps({"boxes": name, "images": len(truths), "corloc": corloc(boxes, truths)}), flush=True)
    weights = str(args.shared / "weights" / "dinov2_small" / "model.safetensors")
    for size in args.sizes:
        g = load_extractor(FeaturesConfig(model="vit_small_patch14_dinov2", weights=weights, size=size))
        for layer in args.layers:
            for found in measure(g, layer, images, truths, args.k_patches, args.flips):
                print(json.dumps({"boxes": "LOST", "size": size, "layer": layer, **found}), flush=True)


if __name__ == "__main__":
    main()
