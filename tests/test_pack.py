"""pack: every source, every kind of bad input, and what a killed run leaves."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SHARED
from packing import run, samples, skips
from PIL import Image

from ldm_sg.data import pack as module
from ldm_sg.data.datasets import open_source
from ldm_sg.data.images import crop_or_fit, crop_resize, decode
from ldm_sg.data.pack import Form, pack_source
from ldm_sg.data.shards import Sample, ShardWriter, read_shard
from ldm_sg.data.sources import Item, make_key
from ldm_sg.errors import InputError
from ldm_sg.verbs.pack import pack


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def folder_of(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root / name, "PNG")
    return root


def test_flat_folder(tmp_path, capsys):
    names = [f"im {i}.v1.PNG" for i in range(10)]
    src, dst = folder_of(tmp_path / "src", names), tmp_path / "dst"
    (src / "notes.md").write_text("not an image")
    (src / ".hidden.png").write_text("not an image")
    summary = run(src, dst)
    assert (summary.images, summary.skipped, summary.shards) == (10, 0, 3)
    assert (
        "10 images of 8 x 8 in 3 shards, 1 files that are not images left alone, 0 skipped" in capsys.readouterr().out
    )
    got = {s.key: s for s in samples(dst)}
    assert set(got) == {make_key(name) for name in names} and all(s.cls is None for s in got.values())
    for i, name in enumerate(names):
        want = crop_resize(picture(i), 8)
        assert np.array_equal(np.asarray(decode(got[make_key(name)].image)), np.asarray(want))
    assert {p.name for p in dst.iterdir()} == {
        *("000000.tar", "000001.tar", "000002.tar", "pack.yaml", "shards.jsonl", "skipped.jsonl")
    }
    assert yaml.safe_load((dst / "pack.yaml").read_text())["done"] == {"images": 10, "skipped": 0, "shards": 3}


def test_class_folders_give_cls(tmp_path):
    src = folder_of(tmp_path / "src", [f"{c}/{i}.png" for c in ("pear", "apple", "fig") for i in range(8)])
    run(src, tmp_path / "dst", shard_size=12)
    assert json.loads((tmp_path / "dst" / "classes.json").read_text()) == {"classes": ["apple", "fig", "pear"]}
    got = samples(tmp_path / "dst")
    assert sorted((s.key.split("_")[0], s.cls) for s in got) == sorted([("apple", 0), ("fig", 1), ("pear", 2)] * 8)
    assert len({s.cls for s in got[:12]}) == 3, "every shard mixes the classes"
    run(tmp_path / "dst", tmp_path / "again")
    assert [s.cls for s in samples(tmp_path / "again")] == [s.cls for s in got]
    assert (tmp_path / "again" / "classes.json").read_text() == (tmp_path / "dst" / "classes.json").read_text()


@pytest.mark.parametrize("names", [["a/1.png", "2.png"], ["a/x/1.png", "b/2.png"], ["a/1.png", "a/2.png"]])
def test_other_nested_folders_have_no_classes(tmp_path, names):
    run(folder_of(tmp_path / "src", names), tmp_path / "dst")
    assert [s.cls for s in samples(tmp_path / "dst")] == [None, None]
    assert not (tmp_path / "dst" / "classes.json").exists()


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    folder_of(tmp_path / "elsewhere", ["1.png"])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src" / "loop").symlink_to(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "dst").images == 1


def test_keys_are_safe_unique_and_of_the_path_alone():
    names = ["a/b.jpg", "a_b.jpg", "a_b.png", "a.b.jpg", "ü/日本.jpg", "日本/ü.jpg", "x" * 300 + ".jpg", " .jpg"]
    keys = [make_key(name) for name in names]
    assert len(set(keys)) == len(names) and keys == [make_key(name) for name in names]
    assert all(len(key) <= 80 and not set(key) & set("./ \\") and key.isascii() for key in keys)


def test_processes_and_this_process_write_the_same_bytes(tmp_path):
    src = folder_of(tmp_path / "src", [f"{i:03d}.png" for i in range(70)])
    for workers in (0, 2):
        run(src, tmp_path / str(workers), workers=workers, shard_size=32, format="jpg")
    for name in ("000000.tar", "000001.tar", "000002.tar"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="pip install 'ldm-sg[distributed]'")
    monkeypatch.chdir(tmp_path)
    src = folder_of(tmp_path / "src", [f"{i:03d}.png" for i in range(70)])
    (src / "bad.png").write_bytes(b"x")
    for dst, options in (("here", {}), ("ray", {"executor": "ray", "workers": 2})):
        run(src, dst, shard_size=32, max_skipped=0.1, **options)
    files = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir() if path.is_file()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "ray").iterdir() if path.is_file()}
    assert len(files) == 6


def test_whole_shards_by_other_workers_are_the_same(tmp_path):
    src = folder_of(tmp_path / "src", [f"{i:03d}.png" for i in range(10)])
    form, source = Form(8, "png", 95), open_source(str(src))
    asked = []

    def beside(make, names):
        asked.extend(names)
        return map(make("cpu"), names)

    run(src, tmp_path / "here")
    again = pack_source(source, tmp_path / "beside", form, 4, 0, 0, beside)
    assert asked == ["000000.tar", "000001.tar", "000002.tar"] and again.images == 10
    for name in (*asked, "shards.jsonl", "pack.yaml"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()
    (tmp_path / "beside" / "000001.tar").unlink()
    pack_source(source, tmp_path / "beside", form, 4, 0, 0, beside)
    assert asked[3:] == ["000001.tar"]


def test_list_file(tmp_path):
    folder_of(tmp_path, ["x/1.png", "x/2.png", "3.png"])
    (tmp_path / "list.txt").write_text(f"x/2.png\t5\n\n{tmp_path / '3.png'}\r\nx/1.png\t0\n")
    run(tmp_path / "list.txt", tmp_path / "dst")
    got = samples(tmp_path / "dst")
    assert [s.cls for s in got] == [5, None, 0], "in the list's order"
    assert np.array_equal(np.asarray(decode(got[0].image)), np.asarray(crop_resize(picture(1), 8)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "an empty list"),
        ("a.png\tcat\n", "line 1: label 'cat' is not an integer"),
        ("a.png\nb.png\na.png\n", "line 3: a.png is listed twice"),
        ("gone.png\n", "1 of 1 images could not be used"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "list.txt", tmp_path / "dst")


def write_lmdb(path: Path, records: dict[bytes, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="reading LSUN's LMDBs is optional")
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    return path


def test_lsun_lmdb(tmp_path):
    """As LSUN ships: 40-digit keys, WebP values."""
    keys = [f"{i:040x}".encode() for i in (7, 1, 300, 5, 6, 9)]
    src = write_lmdb(tmp_path / "church_lmdb", {key: encoded(picture(i), "WEBP") for i, key in enumerate(keys)})
    summary = run(src, tmp_path / "dst", workers=1)
    got = samples(tmp_path / "dst")
    assert summary.images == 6 and [s.key.encode() for s in got] == sorted(keys)
    want = crop_resize(decode(encoded(picture(2), "WEBP")), 8)
    assert np.array_equal(np.asarray(decode(got[-1].image)), np.asarray(want))
    shard = tmp_path / "dst" / "000000.tar"
    whole = shard.read_bytes()
    shard.unlink()
    assert run(src, tmp_path / "dst").images == 6 and shard.read_bytes() == whole, (
        "only that one, from the right key on"
    )


def test_bad_lmdbs(tmp_path, monkeypatch):
    src = write_lmdb(tmp_path / "odd", {b"a.b/c": encoded(picture(0)), b"x": b"no image"})
    with pytest.raises(InputError, match="1 of 2 images could not be used"):
        run(src, tmp_path / "dst")
    assert skips(tmp_path / "dst")[0]["source"] == "x"
    with pytest.raises(InputError, match="an empty LMDB"):
        run(write_lmdb(tmp_path / "none", {}), tmp_path / "dst2")
    with pytest.raises(InputError, match="an LMDB's folder"):
        run(src / "data.mdb", tmp_path / "dst2")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"x" * 10_000)
    with pytest.raises(InputError, match="not a readable LMDB"):
        run(tmp_path / "broken", tmp_path / "dst2")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(InputError, match="pip install lmdb"):
        run(tmp_path / "broken", tmp_path / "dst2")


def write_shard(path: Path, entries: list[tuple[str, dict[str, bytes]]]) -> Path:
    with ShardWriter(path) as shard:
        for key, files in entries:
            shard.write(key, files)
    return path


def test_shards_keep_labels_and_move_boxes_and_masks(tmp_path):
    image = picture(0, 32, 16)  # the crop is x 8..24, then halved
    mask = np.zeros((16, 32), np.uint8)
    mask[4:12, 10:20] = 3
    meta = {
        "labels": [1, 2, 4],
        "boxes": [[10, 4, 20, 12, 1], [0, 0, 6, 16, 2], [20, 0, 32, 16, 1]],
        "caption": "kept",
    }
    files = {
        "png": encoded(image),
        "cls": b"9",
        "json": json.dumps(meta).encode(),
        "mask.png": encoded(Image.fromarray(mask)),
    }
    for i in (0, 1):
        write_shard(tmp_path / "src" / f"{i}.tar", [(f"k{i}", files), (f"other{i}", {"jpg": encoded(image, "JPEG")})])
    for src, dst in (
        (f"{tmp_path}/src/{{0,1}}.tar", "braces"),
        (f"{tmp_path}/src", "folder"),
        (f"{tmp_path}/src/*.tar", "glob"),
    ):
        assert run(src, tmp_path / dst).shards == 2
    first, *_ = got = samples(tmp_path / "braces")
    assert [s.key for s in got] == ["k0", "other0", "k1", "other1"] and first.cls == 9
    assert first.meta == {"labels": [1, 4], "boxes": [[1, 2, 6, 6, 1], [6, 0, 8, 8, 1]], "caption": "kept"}
    small = np.asarray(Image.open(io.BytesIO(first.mask)))
    assert np.array_equal(small, mask[1::2, 9:24:2]) and small.max() == 3
    assert got[1].meta is None and got[1].mask is None


def test_bad_shards_are_named(tmp_path):
    good = {"png": encoded(picture(0))}
    odd_boxes = {**good, "json": b'{"boxes": [[1, 2, 3]]}'}
    write_shard(tmp_path / "src" / "0.tar", [("a", good), ("a", {"txt": b""}), ("b", good), ("b2", good), ("a", good)])
    cut = write_shard(tmp_path / "src" / "1.tar", [("c", good), ("d", good)])
    cut.write_bytes(cut.read_bytes()[: 2048 + 700])
    write_shard(tmp_path / "src" / "2.tar", [("e", {"txt": b"no image here"})])
    write_shard(tmp_path / "src" / "3.tar", [("f", odd_boxes), ("g", {**good, "mask.png": encoded(picture(0, 9, 9))})])
    with pytest.raises(InputError, match=r"1\.tar: damaged tar, 1 images .* not known.*--allow-damaged"):
        run(tmp_path / "src", tmp_path / "dst", max_skipped=0.9)
    summary = run(tmp_path / "src", tmp_path / "dst", max_skipped=0.9, allow_damaged=True)
    assert (summary.images, summary.shards) == (4, 2)
    reasons = [(s["shard"], s["source"].removeprefix(str(tmp_path)), s["reason"]) for s in skips(tmp_path / "dst")]
    assert [(shard, source) for shard, source, _ in reasons] == [
        ("000000.tar", "/src/0.tar: a"),
        ("000001.tar", "/src/1.tar"),
        ("000002.tar", "/src/2.tar: e"),
        ("000002.tar", "/src/2.tar"),
        ("000003.tar", "/src/3.tar: f"),
        ("000003.tar", "/src/3.tar: g"),
    ]
    for (_, _, reason), word in zip(reasons, ("duplicate", "damaged tar", "no image", "no image", "boxes", "mask")):
        assert word in reason


def test_bad_images_are_counted_and_limited(tmp_path):
    src = folder_of(tmp_path / "src", [f"{i}.png" for i in range(6)])
    (src / "text.jpg").write_text("no image")
    (src / "cut.png").write_bytes(encoded(picture(0, 200, 200))[:5000])
    (src / "empty.webp").touch()
    (src / "gone.png").symlink_to(src / "nowhere.png")
    with pytest.raises(
        InputError, match=r"more than max_skipped=0.01 allows; the first: \S+: [\w ]+; all are in .*skipped\.jsonl"
    ):
        run(src, tmp_path / "dst", max_skipped=0.01)
    assert all(p.suffix in (".tar", ".jsonl", ".yaml") for p in (tmp_path / "dst").iterdir())
    assert "done" not in yaml.safe_load((tmp_path / "dst" / "pack.yaml").read_text())
    samples(tmp_path / "dst")  # what is there is whole
    summary = run(src, tmp_path / "dst", max_skipped=0.4)  # goes on from there
    assert (summary.images, summary.skipped) == (6, 4)
    assert {s["source"]: s["reason"].split()[0] for s in skips(tmp_path / "dst")} == {
        **{"text.jpg": "not", "cut.png": "cannot", "empty.webp": "empty", "gone.png": "cannot"}
    }


def test_nothing_usable(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").touch()
    with pytest.raises(InputError, match="1 of 1 images could not be used"):
        run(tmp_path / "src", tmp_path / "dst", max_skipped=1)
    assert not list((tmp_path / "dst").glob("*.tar"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size=4: from 8"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"quality": 101}, "quality=101"),
        ({"max_skipped": 1.5}, "max_skipped=1.5"),
        ({"workers": -2}, "workers=-2"),
        ({"format": "jpeg"}, "did you mean 'jpg'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(folder_of(tmp_path / "src", ["a.png"]), tmp_path / "dst", **options)
    assert not (tmp_path / "dst").exists()


def test_bad_sources_and_targets(tmp_path):
    src = folder_of(tmp_path / "src", ["a.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.md").touch()
    for wrong, message in (
        (tmp_path / "none", "not found"),
        (tmp_path / "empty", "no images in .*empty .looked for"),
        (tmp_path / "texts", "no images in .*texts among 1 files"),
        (src / "a.png", "is a file: pack takes"),
        (tmp_path / "x-{0..3}.tar", "no .tar or .parquet shards found"),
    ):
        with pytest.raises(InputError, match=message):
            run(wrong, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    with pytest.raises(InputError, match=r"a\.png is a file: choose another folder"):
        run(src, src / "a.png")
    with pytest.raises(InputError, match=r"not empty and has no pack\.yaml"):
        run(src, src)
    with pytest.raises(InputError, match="cannot be written"):
        run(src, src / "a.png" / "dst")


def test_target_of_another_pack(tmp_path):
    src = folder_of(tmp_path / "src", ["a.png", "b.png"])
    run(src, tmp_path / "dst")
    for options, message in (
        ({"size": 16}, "size is 8 there and 16 here"),
        ({"format": "jpg"}, "format is 'png' there and 'jpg' here"),
        ({"shard_size": 9}, "shard_size is 4 there and 9 here"),
    ):
        with pytest.raises(InputError, match=message):
            run(src, tmp_path / "dst", **options)
    picture(0).save(src / "c.png")
    with pytest.raises(InputError, match=r"source\.images is 2 there and 3 here"):
        run(src, tmp_path / "dst")


def test_full_disk(tmp_path, monkeypatch):
    src, real = folder_of(tmp_path / "src", [f"{i}.png" for i in range(6)]), Path.open
    full = lambda p, *a, **k: real(Path("/dev/full") if "000001.tar.tmp-" in p.name else p, *a, **k)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(InputError, match=r"000001\.tar: cannot be written: No space left on device; .* GB left"):
            run(src, tmp_path / "dst")
    assert [p.name for p in (tmp_path / "dst").glob("*.tar*")] == ["000000.tar"]
    assert run(src, tmp_path / "dst").images == 6


def test_a_second_run_makes_only_what_is_missing(tmp_path, monkeypatch):
    src = folder_of(tmp_path / "src", [f"{i}.png" for i in range(11)])
    (src / "bad.png").touch()
    run(src, tmp_path / "dst", max_skipped=0.5)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "dst").iterdir()}
    monkeypatch.setattr(module, "pack_item", lambda *a: pytest.fail("made again"))
    assert run(src, tmp_path / "dst", max_skipped=0.5).images == 11
    monkeypatch.undo()
    (tmp_path / "dst" / "000001.tar").unlink()
    assert run(src, tmp_path / "dst", max_skipped=0.5).images == 11
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "dst").iterdir()}
    assert after["000000.tar"] == before["000000.tar"] and after["000001.tar"][1] == before["000001.tar"][1]
    assert len(skips(tmp_path / "dst")) == 1 and set(after) == set(before)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_killed_and_resumed(tmp_path):
    """kill -9 while an image is being read: whole shards only, workers gone; the same command ends with the same bytes."""
    src, dst = folder_of(tmp_path / "src", [f"{i:03d}.png" for i in range(60)]), tmp_path / "dst"
    run(src, tmp_path / "whole", shard_size=8)
    stop = src / max(sorted(p.name for p in src.iterdir()), key=lambda name: _position(tmp_path / "whole", name))
    content = stop.read_bytes()
    stop.unlink()
    os.mkfifo(stop)  # the last image is never delivered
    packed = yaml.safe_load((tmp_path / "whole" / "pack.yaml").read_text())
    same = packed["settings"]["source"]["digest"]  # though a pipe has no size
    code = f"from ldm_sg.data import sources; sources.files_digest = lambda *_: {same!r}; "
    code += f"from ldm_sg.verbs.pack import pack; pack({str(src)!r}, {str(dst)!r}, size=8, shard_size=8, workers=1, max_skipped=0, format='png')"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (dst / "000004.tar").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = [int(pid) for pid in tasks.read_text().split()]
        process.send_signal(signal.SIGKILL)
    samples(dst)
    assert "done" not in yaml.safe_load((dst / "pack.yaml").read_text())
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)
    stop.unlink()
    stop.write_bytes(content)
    with (dst / "shards.jsonl").open("a") as log:
        log.write('{"file": "0000')  # a line that the kill cut off
    (dst / "000007.tar.tmp-4194305").touch()
    run(src, dst, shard_size=8)
    assert {p.name: p.read_bytes() for p in dst.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def _position(dst: Path, name: str) -> int:
    return [s.key for s in samples(dst)].index(make_key(name))


def test_photos_at_256(tmp_path):
    source = SHARED / "data" / "church_224" / "val"
    if not source.is_dir():
        pytest.skip("needs the shared church photos")
    summary = pack(source, tmp_path / "dst", workers=1)
    assert summary.skipped == 0 and summary.images == len(list(source.glob("*.*")))
    assert {decode(s.image).size for s in samples(tmp_path / "dst")} == {(256, 256)}


def test_large_photos_are_made_smaller_while_they_are_decoded(tmp_path, monkeypatch):
    """Not those with boxes, whose places are of the whole image; and nobody sees it."""
    generator = np.random.default_rng(0)
    rough = Image.fromarray(generator.integers(0, 255, (30, 40, 3), np.uint8)).resize(
        (1600, 1200), Image.Resampling.BICUBIC
    )
    (tmp_path / "src").mkdir()
    rough.save(tmp_path / "src" / "a.jpg", quality=92)
    seen = []
    monkeypatch.setattr(
        module, "crop_or_fit", lambda image, *rest: seen.append(image.size) or crop_or_fit(image, *rest)
    )
    pack(str(tmp_path / "src"), tmp_path / "dst", size=64, workers=0, format="png")
    assert seen == [(200, 150)]  # an eighth, still above 128
    [sample] = read_shard(str(tmp_path / "dst" / "000000.tar"), lambda *_: None)
    plain = crop_resize(decode((tmp_path / "src" / "a.jpg").read_bytes()), 64)
    assert np.abs(np.asarray(decode(sample.image), float) - np.asarray(plain, float)).mean() < 1.5
    form = module.Form(64, "png", 90)
    for beside in ({"meta": {"boxes": [[0, 0, 400, 400]]}}, {}):
        marked = Sample("a", (tmp_path / "src" / "a.jpg").read_bytes(), **beside)
        module.pack_item(form, Item("a", "a", sample=marked))
    assert seen[1:] == [(1600, 1200), (200, 150)]


def test_other_pictures_of_the_same_names_are_another_source(tmp_path):
    for name, shade in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        for i in range(3):
            noise = np.random.default_rng(shade + i).integers(0, shade, (16, 16 + shade // 100, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{i}.png")
    pack(tmp_path / "a", tmp_path / "out", size=16, workers=0)
    with pytest.raises(InputError, match="belongs to another config"):
        pack(tmp_path / "b", tmp_path / "out", size=16, workers=0)
