"""What all tests share: one thread, photos of one colour, and a tiny annotation set as `annotate` writes it (four clusters
of flat colours, 16x16 latents of 2x2 pixels)."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_sg import hardware

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the hub fails at once instead of waiting
if DEVICE := os.environ.get(
    "LDM_SG_TEST_DEVICE"
):  # before anything imports it: what asks for the CPU gets this instead
    pick_device = hardware.pick_device
    hardware.pick_device = lambda name: pick_device(DEVICE if name in ("auto", "cpu") else name)
os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses; the nets are tiny, threads would only wait for each other
torch.set_num_threads(1)


SHARED = Path(__file__).parents[2] / "shared"
COLOURS = torch.tensor([[-0.8, -0.8, 0.8], [0.8, -0.8, -0.8], [-0.8, 0.8, -0.8], [0.8, 0.8, 0.8]])

TINY = {  # a network that trains in seconds
    "channels": 16,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention": [2],
    "heads": 2,
    "hidden": 16,
    "token_width": 8,
}


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def photo(value: int, side: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    """An image file of one colour."""
    out = io.BytesIO()
    Image.new("RGB", side, (value, 255 - value, 40)).save(out, kind)
    return out.getvalue()


def folder_of(path: Path, n: int = 8) -> Path:
    """n photos."""
    path.mkdir(parents=True)
    for i in range(n):
        (path / f"{i:03d}.png").write_bytes(photo(i * 20))
    return path


def write_annotation_set(folder: Path, images: torch.Tensor, k: list[int], labels: int, each: int = 10**6) -> Path:
    """Images [N, 3, H, H] in [-1, 1] through `patch2` -> an annotation set with ids k, `each` images a shard."""
    from ldm_sg.annotate.clusters import Clusters
    from ldm_sg.annotate.kinds import save_annotator
    from ldm_sg.autoencoder import load_autoencoder, measure_normalisation
    from ldm_sg.config import AnnotatorConfig
    from ldm_sg.data.latents import file_sha256, finish, set_hash
    from ldm_sg.data.shards import ShardWriter

    autoencoder = load_autoencoder("patch2")
    measure_normalisation(autoencoder, [images])
    latents = autoencoder.encode(images).numpy().astype(np.float16)
    (folder / "shards").mkdir(parents=True)
    f = Clusters(AnnotatorConfig(k=labels))
    f.centroids = torch.eye(labels)
    save_annotator(folder / "annotator", f, None)
    autoencoder.save(folder / "autoencoder")
    entries = []
    for start in range(0, len(images), each):
        path = folder / "shards" / f"{start // each:06d}.tar"
        with ShardWriter(path) as writer:
            for i in range(start, min(start + each, len(images))):
                writer.write(f"{i:06d}", {"latent.npy": npy(latents[i]), "k.npy": npy(np.int64(k[i]))})
        sizes = {"images": writer.written, "bytes": path.stat().st_size}
        entries.append({"file": path.name, "sha256": file_sha256(path)} | sizes)
    manifest = {
        "version": 1,
        "size": images.shape[-1],
        "num_images": len(images),
        "latent_shape": list(latents.shape[1:]),
        "flips": False,
        "guidance": {"kind": "clusters", "num_labels": labels, "multi_hot": False},
        "shards": entries,
        "hash": set_hash(entry["sha256"] for entry in entries),
    }
    finish(folder, manifest)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of reference images are remembered for one test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images of 16x16 pixels, one flat colour a cluster, a little noise."""
    generator = torch.Generator().manual_seed(0)
    k = [i % 4 for i in range(64)]
    noise = 0.05 * torch.randn(64, 3, 16, 16, generator=generator)
    images = (COLOURS[k][:, :, None, None] + noise).clamp(-1, 1)
    return write_annotation_set(tmp_path_factory.mktemp("sets") / "colours", images, k, 4)
