"""JPEG -> 256-pixel square, images/s of one core, by the decoders that are installed (pip install simplejpeg opencv-python-headless):

    python benchmarks/bench_decode.py

The embedded photos, enlarged to the sizes of web images. `reduced`: scaled by 1/2, 1/4 or 1/8 while decoding, to at least 512
pixels; its difference from the plain way is the mean of absolute values, of 255."""

import importlib.util
import io
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from ldm_sg.configfile import ASSETS
from ldm_sg.data.images import crop_resize, decode
from ldm_sg.data.shards import expand, read_shard

SIZE, FEW = 256, 16


def reduced(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * SIZE, 2 * SIZE))
    return image


def decoders() -> dict[str, Callable[[bytes], Image.Image]]:
    found: dict[str, Callable[[bytes], Image.Image]] = {"ours": decode, "Pillow reduced": reduced}
    if importlib.util.find_spec("simplejpeg"):
        from simplejpeg import decode_jpeg

        found["simplejpeg"] = lambda data: Image.fromarray(decode_jpeg(data))
        twice = {"min_height": 2 * SIZE, "min_width": 2 * SIZE}
        found["simplejpeg reduced"] = lambda data: Image.fromarray(decode_jpeg(data, **twice))
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: Image.fromarray(
            cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        )
    return found


def jpegs(width: int, height: int) -> list[bytes]:
    samples = read_shard(expand(str(ASSETS / "fruit64"))[0], lambda *_: None)
    files = []
    for _, sample in zip(range(FEW), samples):
        file = io.BytesIO()
        decode(sample.image).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def main() -> None:
    for width, height, repeats in ((341, 256, 6), (640, 480, 6), (1280, 960, 4), (4000, 3000, 2)):
        files, ways = jpegs(width, height), decoders()
        seconds = dict.fromkeys(ways, float("inf"))
        for _ in range(repeats):
            for name, way in ways.items():  # in turns, as machines are noisy
                start = time.process_time()
                for data in files:
                    crop_resize(way(data), SIZE)
                seconds[name] = min(seconds[name], time.process_time() - start)
        plain = [np.asarray(crop_resize(decode(data), SIZE), np.float32) for data in files]
        for name, way in ways.items():
            other = [np.asarray(crop_resize(way(data), SIZE), np.float32) for data in files]
            differs = np.mean([np.abs(a - b).mean() for a, b in zip(plain, other)])
            print(f"{width} x {height}  {name:20} {len(files) / seconds[name]:7.0f} images/s  differs by {differs:.2f}")


if __name__ == "__main__":
    main()
