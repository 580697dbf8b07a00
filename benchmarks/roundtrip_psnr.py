"""PSNR of images through a first stage and back: python benchmarks/roundtrip_psnr.py AUTOENCODER SHARDS [-n 64] [--size 256]

AUTOENCODER: a name, a folder, or the autoencoder/ of an annotation set (as annotate normalised it)."""

import argparse
import itertools

import torch

from ldm_sg.autoencoder import load_autoencoder, measure_normalisation
from ldm_sg.data.images import to_float
from ldm_sg.data.shards import expand, image_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("autoencoder")
    parser.add_argument("shards")
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args()
    autoencoder = load_autoencoder(args.autoencoder)
    batches = image_batches(expand(args.shards), args.size, 8, 0, lambda *_: None)
    images = torch.cat([to_float(b.images) for b in itertools.islice(batches, -(-args.n // 8))])[: args.n]
    if not autoencoder.normalised:
        measure_normalisation(autoencoder, images.split(8))
    with torch.no_grad():
        errors = [(autoencoder.decode(autoencoder.encode(b)) - b).square().mean((1, 2, 3)) for b in images.split(8)]
    psnr = 10 * torch.log10(4 / torch.cat(errors))
    print(
        f"{autoencoder.name}: {psnr.mean():.2f} dB (median {psnr.median():.2f}) over {len(images)} images of {args.size} px"
    )


if __name__ == "__main__":
    main()
