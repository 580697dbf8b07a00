"""What the tests of `pack` share: packing, reading what came out, small pictures and masks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_sg.data.shards import Sample, read_shard
from ldm_sg.data.sources import make_key
from ldm_sg.verbs.pack import pack


def run(src, dst, **options):
    return pack(src, dst, **{"size": 8, "shard_size": 4, "workers": 0, "format": "png", "max_skipped": 0, **options})


def samples(dst: Path) -> list[Sample]:
    refuse = lambda *entry: pytest.fail(str(entry))  # noqa: E731
    return [sample for shard in sorted(dst.glob("*.tar")) for sample in read_shard(str(shard), refuse)]


def by_key(dst: Path) -> dict[str, Sample]:
    return {sample.key: sample for sample in samples(dst)}


def skips(dst: Path) -> list[dict]:
    return [json.loads(line) for line in (dst / "skipped.jsonl").read_text().splitlines()]


def meta(dst: Path, name: str) -> dict:
    return by_key(dst)[make_key(name)].meta


def mask_of(sample: Sample) -> np.ndarray:
    with Image.open(io.BytesIO(sample.mask)) as image:
        assert image.mode == "L"
        return np.asarray(image)


def reasons(dst: Path) -> dict[str, str]:
    return {line["source"]: line["reason"] for line in skips(dst)}


def classes(dst: Path) -> dict:
    return json.loads((dst / "classes.json").read_text())


def pictures(folder: Path, *names: str, size: tuple[int, int] = (32, 16)) -> Path:
    """32 x 16: the square that is packed is x 8 to 24; at 8 pixels two become one."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * i, 90, 200)).save(folder / name)
    return folder


def index_png(path: Path, indices: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray(indices.astype(np.uint8))
    if palette:
        mask = Image.frombytes("P", mask.size, mask.tobytes())
        mask.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    mask.save(path)


def halves(left: int, right: int) -> np.ndarray:
    """A mask 32 x 16: `left` up to x = 16, `right` from there."""
    return np.where(np.arange(32) < 16, left, right) * np.ones((16, 1), int)


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
