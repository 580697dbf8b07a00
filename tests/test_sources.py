"""Images to be judged: folders, shards, samples; what is unreadable, and what they are remembered by."""

import json
from pathlib import Path

import pytest
import torch
from conftest import folder_of, photo

from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError
from ldm_sg.evaluate import sources


def read(where: Path | str, limit: int = 100, size: int = 16) -> tuple[list[int], torch.Tensor, list[str]]:
    lost: list[str] = []
    parts = list(sources.batches(sources.open_images(str(where)), size, 3, limit, lambda *skip: lost.append(str(skip))))
    return [int(p) for places, _ in parts for p in places], torch.cat([images for _, images in parts]), lost


def test_folders_are_read_deeply_in_order_and_cropped(tmp_path: Path) -> None:
    folder_of(tmp_path / "a" / "deep", 4)
    (tmp_path / "b.JPEG").write_bytes(photo(200, (40, 20), "JPEG"))
    (tmp_path / "notes.txt").write_text("no image")
    places, images, lost = read(tmp_path)
    assert places == [0, 1, 2, 3, 4] and images.shape == (5, 3, 16, 16) and not lost
    assert images[:4, 0, 0, 0].tolist() == [0, 20, 40, 60] and abs(int(images[4, 0, 8, 8]) - 200) < 4
    assert sources.first_size(sources.open_images(str(tmp_path))) == 16


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    folder_of(tmp_path / "f", 4)
    (tmp_path / "f" / "001.png").write_bytes(b"not an image")
    (tmp_path / "f" / "002.png").write_bytes(photo(3)[:60])
    places, images, lost = read(tmp_path / "f")
    assert places == [0, 3] and len(images) == 2
    assert len(lost) == 2 and "001.png" in lost[0] and "002.png" in lost[1]


def test_a_limit_spreads_over_the_whole_set(tmp_path: Path) -> None:
    assert sources.spread(10, 4) == [0, 2, 5, 7] and list(sources.spread(3, 10)) == [0, 1, 2]
    for shard in range(2):
        with ShardWriter(tmp_path / f"{shard}.tar") as writer:
            for i in range(5):
                writer.write(f"{shard}-{i}", {"png": photo(100 * shard + i), "cls": b"1"})
    places, images, _ = read(tmp_path, limit=4)
    assert places == [0, 2, 5, 7] and images[:, 0, 0, 0].tolist() == [0, 2, 100, 102]
    assert sources.open_images(str(tmp_path / "*.tar")).total == 10


def test_a_cut_off_shard_gives_its_good_images(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for i in range(5):
            writer.write(str(i), {"png": photo(i)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 - 700])
    _, images, lost = read(tmp_path / "a.tar")
    assert 1 <= len(images) < 5 and "damaged tar" in lost[0]


@pytest.mark.parametrize(
    "make, wrong",
    [
        (lambda p: None, "no .tar or .parquet shards found"),
        (lambda p: p.mkdir(), "no images in this folder"),
        (lambda p: [(p / "shards").mkdir(parents=True), (p / "manifest.yaml").touch()], "annotation set holds latents"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").touch()], "is empty"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_text("{")], "line 1: not JSON"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_text("[1]")], "line 1: a mapping of keys"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_text('{"file": "../x.png"}')], "in this folder"),
        (lambda p: [p.mkdir(), (p / "samples.jsonl").write_bytes(b"\xff\xfe")], "line 1: not JSON in UTF-8"),
    ],
)
def test_sources_that_are_none_are_refused(make, wrong: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(InputError, match=wrong):
        sources.open_images(str(tmp_path / "x"))


def test_samples_are_what_their_records_say(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "s", 3)
    (folder / "grid.png").write_bytes(photo(9))
    lines = [{"file": f"{i:03d}.png", "k": 3 - i, "w": 2.0, "seed": 0, "steps": 25, "index": i} for i in range(3)]
    (folder / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    images = sources.open_images(str(folder))
    assert len(images.paths) == 3 and images.ids().tolist() == [3, 2, 1]
    assert images.sampling() == {"w": 2.0, "steps": 25, "seed": 0}
    for k in (None, [0, 1], "3", -1, True):
        (folder / "samples.jsonl").write_text(json.dumps({**lines[0], "k": k}))
        with pytest.raises(InputError, match="line 1"):
            sources.open_images(str(folder)).ids()
    with pytest.raises(InputError, match=r"samples\.jsonl"):
        sources.open_images(str(folder_of(tmp_path / "plain"))).ids()


def test_fingerprints_follow_files_and_settings(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "f", 2)
    first = sources.fingerprint(sources.open_images(str(folder)), size=16)
    assert first == sources.fingerprint(sources.open_images(str(folder)), size=16)
    assert first != sources.fingerprint(sources.open_images(str(folder)), size=32)
    (folder / "000.png").write_bytes(photo(77, (18, 18)))
    assert first != sources.fingerprint(sources.open_images(str(folder)), size=16)
    assert sources.fingerprint(sources.ImageSet("u", ("https://x/a.tar",), True)) is None
