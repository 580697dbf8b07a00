"""Images a second of annotate's streaming pass (read, decode in worker processes, g, first stage, features and latents to disk)
beside both networks' bare forward passes on the same images already in memory: `python benchmarks/bench_annotate.py`.

The first stage is `patch4`, which costs next to nothing, so that the figure is g's. Runs alternate, best of 2 each. Decoding
shares the cores with g where there is no GPU, so the share grows with g. The paper's g is ViT-B/16."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import parent_process
from pathlib import Path

if parent_process() is None:  # decoding processes import this file again, and need none of it
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from ldm_sg.annotate.annotator import Study
    from ldm_sg.annotate.features import FeatureExtractor, load_extractor
    from ldm_sg.annotate.kinds import make_annotator
    from ldm_sg.annotate.stage import Stage
    from ldm_sg.annotate.stream import encode, extract, prepare_autoencoder
    from ldm_sg.config import AnnotateConfig, FeaturesConfig
    from ldm_sg.configfile import ASSETS
    from ldm_sg.data.images import decode, to_float
    from ldm_sg.data.shards import ShardWriter, expand, image_batches, read_shard
    from ldm_sg.hardware import pick_device, use_bf16

REPEATS, BATCH = 2, 64


def photos(size: int) -> Iterator[bytes]:
    """The embedded photos, enlarged to `size` pixels, as JPEG."""
    for url in expand(str(ASSETS / "fruit64" / "*.tar")):
        for sample in read_shard(url, lambda *_: None):
            buffer = io.BytesIO()
            decode(sample.image).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
            yield buffer.getvalue()


def make_shards(folder: Path, size: int, n: int) -> list[str]:
    images, shards = itertools.cycle(list(itertools.islice(photos(size), n))), []
    for s in range(2):
        shards.append(str(folder / f"{s:06d}.tar"))
        with ShardWriter(shards[-1]) as writer:
            for i in range(n // 2):
                writer.write(f"{i:06d}", {"jpg": next(images)})
    return shards


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(name: str, cfg: AnnotateConfig, g: FeatureExtractor, shards: list[str], size: int) -> dict[str, object]:
    out, device = Path(cfg.out), g.mean.device
    autoencoder = prepare_autoencoder(cfg, shards, size, device)
    each, bf16 = cfg.features.batch_size, use_bf16(cfg.precision, device)
    batches = [batch.images for batch in image_batches(shards, size, each, 0, lambda *_: None)]
    n = sum(map(len, batches))

    def bare(images: torch.Tensor) -> None:
        pixels = to_float(images.to(device))
        g(pixels)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            encode(autoencoder, pixels, flips=False)

    bare(batches[0])
    times: dict[str, list[float]] = {"bare": [], "annotate": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        for images in batches:
            bare(images)
        synchronise()
        times["bare"].append(time.perf_counter() - start)
        for folder in ("work", "features"):
            shutil.rmtree(out / folder, ignore_errors=True)
        start = time.perf_counter()
        study = Study(cfg, shards, [Stage(out, i) for i in range(2)], size, g, [])
        extract(study, autoencoder, make_annotator(cfg.annotator), list(range(2)))
        times["annotate"].append(time.perf_counter() - start)
    alone, whole = (n / min(times[which]) for which in ("bare", "annotate"))
    return {
        "g": name,
        "pixels": size,
        "images": n,
        "bare": round(alone),
        "annotate": round(whole),
        "share": round(whole / alone, 3),
    }


def main() -> None:
    device = pick_device("auto")
    few = device.type == "cpu"
    cases = [
        ("vit_base_patch16_224", 256, 768 if few else 16_000),
        ("vit_small_patch16_224", 256, 1920 if few else 16_000),
        ("demo-g", 64, 16_000),
    ]
    for name, size, n in cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            features = FeaturesConfig(model=name, batch_size=BATCH)
            if name != "demo-g":  # speed does not depend on the weights
                features.weights = str(folder / "random.safetensors")
                save_file(timm.create_model(name, num_classes=0).state_dict(), features.weights)
            cfg = AnnotateConfig(shards="", out=str(folder / "out"), autoencoder="patch4", features=features)
            found = measure(name, cfg, load_extractor(features, device), make_shards(folder, size, n), size)
            print(json.dumps(found | {"device": device.type, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
