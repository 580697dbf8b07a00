"""NMI and speed of g by its input size and by the pixels that it is given, a JSON line each:

    python benchmarks/g_size.py SHARED [--per-class 40] [--sizes 224 252 518] [--source 224] [--layer 10]

SHARED: folder with data/imagenette10_224 (train/CLASS/*) and weights/dinov2_small. k-means with k = number of classes, mean
of 5 seeds. `source`: images are first made this many pixels wide, as a set packed at that size holds them."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_sg.annotate.clusters import Clusters, contingency, nmi
from ldm_sg.annotate.features import load_extractor
from ldm_sg.config import AnnotatorConfig, FeaturesConfig
from ldm_sg.data.images import crop_resize, decode, to_float, to_tensor

BATCH, SEEDS = 16, 5


def mean_nmi(features: Tensor, classes: np.ndarray) -> float:
    k = int(classes.max()) + 1
    fits = (Clusters(AnnotatorConfig(k=k, seed=seed)).fit_features(features) for seed in range(SEEDS))
    return float(np.mean([nmi(contingency(f.assign(features).numpy(), classes, (k, k))) for f in fits]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--per-class", type=int, default=40)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 252, 518])
    parser.add_argument("--source", type=int, nargs="+", default=[224])
    parser.add_argument("--layer", type=int, default=10)
    args = parser.parse_args()
    folders = sorted((args.shared / "data" / "imagenette10_224" / "train").iterdir())
    files = [(file, i) for i, folder in enumerate(folders) for file in sorted(folder.iterdir())[: args.per_class]]
    classes = np.array([i for _, i in files])
    weights = str(args.shared / "weights" / "dinov2_small" / "model.safetensors")
    for source in args.source:
        images = torch.stack([to_tensor(crop_resize(decode(file.read_bytes()), source)) for file, _ in files])
        for size in args.sizes:
            g = load_extractor(FeaturesConfig("vit_small_patch14_dinov2", weights, layer=args.layer, size=size))
            start, cpu = time.perf_counter(), time.process_time()
            features = torch.cat([g(to_float(batch)) for batch in images.split(BATCH)])
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            found = {
                "source": source,
                "size": size,
                "images": len(images),
                "nmi": round(mean_nmi(features, classes), 3),
            }
            found |= {"images_per_second": round(len(images) / seconds, 2), "cpu_ms": round(1000 * cpu / len(images))}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
