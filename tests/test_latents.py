"""LatentSet on annotation sets written here by hand, and the order of training."""

import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ldm_sg.data import latents as module
from ldm_sg.data.latents import SHARDS, LatentSet, file_sha256, read_manifest, set_hash, write_manifest
from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import GuidanceSpec

SHAPE = (4, 8, 8)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_set(folder: Path, latents: list[np.ndarray], ks: list[np.ndarray], flips: bool = True, **spec) -> Path:
    """`latents`: one array [n, C, h, w] a shard; the mirrored latent is the latent's own mirror image."""
    entries = []
    for i, (shard, k) in enumerate(zip(latents, ks)):
        path = folder / "shards" / f"{i:06d}.tar"
        with ShardWriter(path) as writer:
            for j, latent in enumerate(shard):
                files = {"latent.npy": npy(latent), "k.npy": npy(k[j])}
                if flips:
                    files["flip.npy"] = npy(np.ascontiguousarray(latent[..., ::-1]))
                writer.write(f"{'long-name-' * 12 if j % 3 == 0 else ''}{i}-{j}", files)
        entries.append(
            {"file": path.name, "images": len(shard), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        )
    manifest = {
        "version": 1,
        "shards": entries,
        "hash": set_hash(e["sha256"] for e in entries),
        "guidance": GuidanceSpec(**spec).to_dict(),
        "latent_shape": list(SHAPE),
        "flips": flips,
        "num_images": sum(map(len, latents)),
    }
    write_manifest(folder, manifest)
    return folder


def make(folder: Path, sizes=(5, 0, 7), **kwargs) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((n, *SHAPE)).astype(np.float16) for n in sizes]
    ks = [rng.integers(0, 9, n) for n in sizes]
    return write_set(folder, latents, ks, num_labels=9, **kwargs), np.concatenate(latents), np.concatenate(ks)


def test_reads_what_was_written_in_any_order(tmp_path):
    folder, latents, ks = make(tmp_path)
    data = LatentSet(folder)
    assert (len(data), data.latent_shape, data.flips) == (12, SHAPE, True)
    assert data.spec == GuidanceSpec(num_labels=9)
    assert data.signals.k.dtype == torch.long and data.signals.k.tolist() == ks.tolist()
    order = torch.tensor([11, 0, 5, 5, 3])
    assert torch.equal(data.latents(order), torch.from_numpy(latents[order]).float())
    latent, guidance = data[-1]
    assert torch.equal(latent, torch.from_numpy(latents[-1]).float()) and guidance.k.tolist() == [ks[-1]]
    with pytest.raises(IndexError):
        data[12]


def test_flips_are_chosen_by_sample(tmp_path):
    folder, latents, _ = make(tmp_path)
    got = LatentSet(folder).latents(torch.tensor([1, 9]), torch.tensor([True, False]))
    assert torch.equal(got[0], torch.from_numpy(latents[1, ..., ::-1].copy()).float())
    assert torch.equal(got[1], torch.from_numpy(latents[9]).float())
    (tmp_path / "plain").mkdir()
    plain = LatentSet(make(tmp_path / "plain", flips=False)[0])
    assert not plain.flips
    with pytest.raises(InputError, match="flips=true"):
        plain.latents(torch.tensor([0]), torch.tensor([True]))


def test_multi_hot_signals(tmp_path):
    k = np.eye(6, dtype=np.float16)[[0, 3]]
    folder = write_set(tmp_path, [np.zeros((2, *SHAPE), np.float16)], [k], num_labels=6, multi_hot=True)
    data = LatentSet(folder)
    assert data.signals.k.dtype == torch.float32 and torch.equal(data.signals.k, torch.from_numpy(k).float())


def test_second_opening_uses_the_index_and_gives_the_same(tmp_path, monkeypatch):
    folder, _, _ = make(tmp_path)
    first = LatentSet(folder)
    monkeypatch.setattr(LatentSet, "_index_shard", lambda *a: pytest.fail("indexed again"))
    second = LatentSet(folder)
    everything = torch.arange(12)
    assert torch.equal(first.latents(everything), second.latents(everything)) and torch.equal(
        first.signals.k, second.signals.k
    )
    third = pickle.loads(pickle.dumps(second))  # as a DataLoader worker gets it
    assert torch.equal(third.latents(everything), second.latents(everything))
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_few_open_files_are_enough(tmp_path):
    folder, latents, _ = make(tmp_path, sizes=(2,) * 10)
    data = LatentSet(folder)
    data._max_open = 3
    for _ in range(2):
        assert torch.equal(data.latents(torch.arange(20)), torch.from_numpy(latents).float())
    assert len(data._files) == 3


def test_unfinished_or_foreign_folder(tmp_path):
    with pytest.raises(InputError, match="not an annotation set"):
        LatentSet(tmp_path)
    folder, _, _ = make(tmp_path)
    (folder / "manifest.yaml").unlink()
    (folder / "config.yaml").write_text("shards: x.tar\n")
    with pytest.raises(InputError, match="has not finished"):
        LatentSet(folder)
    (folder / "manifest.yaml").write_text("- a list\n")
    with pytest.raises(InputError, match="a mapping of keys to values is expected"):
        LatentSet(folder)
    (folder / "manifest.yaml").write_text("a: [1,\n")
    with pytest.raises(InputError, match="not readable YAML"):
        LatentSet(folder)


@pytest.mark.parametrize("indexed", [False, True])
def test_changed_files_are_noticed(tmp_path, indexed):
    folder, _, _ = make(tmp_path)
    if indexed:
        LatentSet(folder)
    shard = folder / "shards" / "000002.tar"
    whole, when = shard.read_bytes(), shard.stat().st_mtime_ns
    shard.write_bytes(whole[:-512])  # another size: always noticed
    with pytest.raises(InputError, match=r"000002\.tar has changed"):
        LatentSet(folder)
    shard.write_bytes(
        whole.replace(b"long", b"LONG")
    )  # the same size: noticed at the next opening, whatever its time is
    os.utime(shard, ns=(when, when))
    with pytest.raises(InputError, match=r"000002\.tar has changed"):
        LatentSet(folder)
    shard.unlink()
    with pytest.raises(InputError, match="is missing"):
        LatentSet(folder)


def test_contents_are_checked_once(tmp_path, monkeypatch):
    folder, _, _ = make(tmp_path)
    LatentSet(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "file_sha256", lambda _: pytest.fail("read again"))
        LatentSet(folder)
    (folder / "index" / "checked.json").write_text("[1]")
    LatentSet(folder)
    moved = shutil.copytree(folder, tmp_path / "copy")  # with the times, as cp -a does
    (moved / "shards" / "000000.tar").write_bytes(
        (folder / "shards" / "000000.tar").read_bytes().replace(b"0", b"1", 1)
    )
    with pytest.raises(InputError, match=r"000000\.tar has changed"):
        LatentSet(moved)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"x" * 300, None])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    folder, _, _ = make(tmp_path)
    whole = LatentSet(folder)
    for name in ("where", "k"):
        (file,) = (folder / "index").glob(f"{name}-*.npy")
        content = file.read_bytes()
        file.unlink()  # `whole` goes on with what it has mapped
        file.write_bytes(npy(np.load(io.BytesIO(content))[:-1]) if damage is None else damage)
        again = LatentSet(folder)
        assert torch.equal(again.signals.k, whole.signals.k) and torch.equal(
            *(s.latents(torch.tensor([3])) for s in (again, whole))
        )
        assert file.read_bytes() == content


def test_an_index_is_mapped_and_of_as_many_images_as_the_manifest_says(tmp_path):
    folder, _, _ = make(tmp_path)
    for _ in range(2):  # written, and read again
        data = LatentSet(folder)
        assert isinstance(data._where, np.memmap) and data.signals.k.untyped_storage().nbytes() == 8 * 12
    manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
    shutil.rmtree(folder / "index")
    for images, word in ((11, "more images than its manifest says"), (13, "12 images, its manifest says 13")):
        (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest | {"num_images": images}))
        with pytest.raises(InputError, match=word):
            LatentSet(folder)
        assert not list(folder.rglob("*.npy*"))


@pytest.mark.parametrize(
    "change",
    [
        {"hash": 5},
        {"shards": "7"},
        {"shards": "{}"},
        {"shards": "{"},
        {"shards": [{"file": "a", "bytes": 1, "sha256": 5}]},
        {"shards": [{"file": "../../x.tar", "bytes": 1, "sha256": "a"}]},
        {"latent_shape": [4, 8]},
        {"latent_shape": ["4", 8, 8]},
        {"latent_shape": [-4, 8, 8]},
        {"num_images": "12"},
        {"guidance": []},
        {"guidance": {"kind": "clusters", "num_labels": "x"}},
        {"guidance": {"kind": "clusters", "spatial": ["box"]}},
        {"guidance": {"kind": "clusters", "num_labels": -3, "multi_hot": 1}},
    ],
)
def test_wrong_types_in_a_manifest_are_told(tmp_path, change):
    folder, _, _ = make(tmp_path)
    manifest, shards = read_manifest(folder), change.get("shards")
    write_manifest(folder, manifest | ({} if isinstance(shards, str) else change))
    if isinstance(shards, str):
        (folder / SHARDS).write_text(shards)
    with pytest.raises(InputError):
        LatentSet(folder)


def test_another_sets_manifest_is_noticed(tmp_path):
    folder, _, _ = make(tmp_path)
    manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
    manifest["hash"] = "0" * 64
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(InputError, match=r"manifest\.yaml has been changed"):
        LatentSet(folder)


def test_shards_that_disagree_with_the_manifest(tmp_path):
    wrong = write_set(tmp_path / "shape", [np.zeros((2, 3, 8, 8), np.float16)], [np.zeros(2, np.int64)])
    with pytest.raises(InputError, match="the manifest says float16"):
        LatentSet(wrong)
    wrong = write_set(tmp_path / "object", [np.zeros((1, *SHAPE), np.float16)], [np.array([{}], object)], num_labels=1)
    with pytest.raises(InputError, match="object array"):
        LatentSet(wrong)
    folder, _, _ = make(tmp_path / "count")
    manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest | {"num_images": 13}))
    with pytest.raises(InputError, match="hold 12 images"):
        LatentSet(folder)


def test_file_shortened_while_open(tmp_path):
    folder, _, _ = make(tmp_path)
    data = LatentSet(folder)
    os.truncate(folder / "shards" / "000002.tar", 1024)
    with pytest.raises(InputError, match="shorter since"):
        data.latents(torch.tensor([11]))
