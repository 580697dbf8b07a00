"""Parquet tables as source shards, as Hugging Face datasets write them, and folders that img2dataset fills."""

import io
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from test_annotate import config, png

from ldm_sg.annotate.run import annotate_shards
from ldm_sg.data import shards
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter, count_images, expand, holds_shards, read_shard
from ldm_sg.errors import InputError
from ldm_sg.evaluate.sources import open_images

pa = pytest.importorskip("pyarrow", reason="pip install 'ldm-sg[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet")


def table(path: Path, images: list[bytes | None], labels: list[int] | None = None, column: str = "image") -> str:
    structs = pa.array([image and {"bytes": image, "path": None} for image in images],
                       pa.struct({"bytes": pa.binary(), "path": pa.string()}))  # fmt: skip
    columns = {"caption": pa.array(["a photo"] * len(images)), column: structs}
    parquet.write_table(pa.table(columns | ({"label": pa.array(labels)} if labels else {})), path, row_group_size=7)
    return str(path)


def read(url: str) -> tuple[list[shards.Sample], list[tuple[str, str, str]]]:
    skipped: list[tuple[str, str, str]] = []
    return list(read_shard(url, lambda *entry: skipped.append(entry))), skipped


def test_rows_are_samples(tmp_path: Path) -> None:
    images = [png(i) for i in range(40)]
    path = table(tmp_path / "train-00000-of-00001.parquet", images, [i % 3 for i in range(39)] + [-1])
    samples, skipped = read(path)
    assert [s.image for s in samples] == images and not skipped and count_images(path) == 40
    assert [s.cls for s in samples] == [i % 3 for i in range(39)] + [None] and samples[39].key == "00000039"
    plain = pa.table({"jpeg": pa.array(images), "n": pa.array([2.5] * 40)})
    parquet.write_table(plain, tmp_path / "plain.parquet")
    assert [(s.image, s.cls) for s in read(str(tmp_path / "plain.parquet"))[0]] == [(image, None) for image in images]


def test_rows_without_an_image_are_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shards.WANTED, "jpg", 100_000)
    path = table(tmp_path / "a.parquet", [png(0), None, b"x" * 100_001, png(3)])
    samples, skipped = read(path)
    assert [s.key for s in samples] == ["00000000", "00000003"]
    assert [(key, reason) for _, key, reason in skipped] == [
        ("00000001", "no image in this row"), ("00000002", "image: 100,001 bytes, more than 100,000")
    ]  # fmt: skip


def test_damage_and_tables_without_images(tmp_path: Path) -> None:
    whole = Path(table(tmp_path / "a.parquet", [png(i) for i in range(30)])).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    samples, skipped = read(str(tmp_path / "cut.parquet"))
    assert not samples and isinstance(skipped[0][2], shards.Damage) and count_images(str(tmp_path / "cut.parquet")) == 0
    (tmp_path / "torn.parquet").write_bytes(whole[:50] + bytes(len(whole) // 2) + whole[50 + len(whole) // 2 :])
    assert isinstance(read(str(tmp_path / "torn.parquet"))[1][-1][2], shards.Damage)
    parquet.write_table(pa.table({"url": ["a"], "width": [3]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"no column of images .* among 'url' .string., 'width' .int64."):
        read(str(tmp_path / "b.parquet"))
    with pytest.raises(InputError, match="cannot be opened"):
        read("memory://nowhere/a.parquet")


def test_what_is_named(tmp_path: Path) -> None:
    """A folder of tables; img2dataset's, whose tables hold no images; globs of what fsspec can list."""
    one = table(tmp_path / "00000.parquet", [png(0)])
    assert expand(str(tmp_path)) == [one] and holds_shards(str(tmp_path)) and open_images(str(tmp_path)).total == 1
    for number in ("00000", "00002"):  # one was lost on the way
        (tmp_path / f"{number}.tar").touch()
    (tmp_path / "00000_stats.json").write_text("{}")
    assert expand(str(tmp_path)) == [str(tmp_path / "00000.tar"), str(tmp_path / "00002.tar")]
    files = fsspec.filesystem("memory")
    for name in ("b", "a"):
        with files.open(f"/bucket/{name}.parquet", "wb") as file:
            file.write(Path(one).read_bytes())
    assert expand("memory://bucket/*.parquet") == ["memory:///bucket/a.parquet", "memory:///bucket/b.parquet"]
    assert len(read("memory://bucket/a.parquet")[0]) == 1
    with pytest.raises(InputError, match="shards found at"):
        expand("memory://bucket/*.tar")


def test_a_table_is_annotated_as_a_tar_of_the_same_images_is(tmp_path: Path) -> None:
    images = [png(i) for i in range(20)]
    assert Image.open(io.BytesIO(images[0])).size
    with ShardWriter(tmp_path / "a.tar") as writer:
        for i, image in enumerate(images):
            writer.write(f"{i:08d}", {"png": image})
    sets = [
        LatentSet(annotate_shards(config(tmp_path, source, out=str(tmp_path / f"set{i}"))))
        for i, source in enumerate([str(tmp_path / "a.tar"), table(tmp_path / "a.parquet", images)])
    ]
    assert sets[0].hash == sets[1].hash and len(sets[0]) == 20


def test_odd_tables(tmp_path: Path) -> None:
    """Two columns of a name, bytes that are none, names with newlines; images in a dictionary are read."""
    images = [png(i) for i in range(6)]
    for columns, message in (
        (pa.table([pa.array(images), pa.array(images)], ["image", "image"]), "two columns named 'image'"),
        (pa.table([pa.array(images), pa.array([1] * 6), pa.array([1] * 6)], ["image", "label", "label"]), "two columns named 'label'"),
        (pa.table({"image": pa.array([{"bytes": 3}])}), r"no column of images .* 'image' .struct<bytes: int64>"),
        (pa.table({"image": pa.array(["a"]), "b\n": pa.array([1])}), r"'image' .string., 'b.n' .int64.$"),
    ):  # fmt: skip
        parquet.write_table(columns, tmp_path / "odd.parquet")
        with pytest.raises(InputError, match=message):
            read(str(tmp_path / "odd.parquet"))
    encoded = pa.table({"image": pa.array(images).dictionary_encode(), "label": [0, 1, 2, 0, 1, 2]})
    parquet.write_table(encoded, tmp_path / "encoded.parquet")
    assert [(s.image, s.cls) for s in read(str(tmp_path / "encoded.parquet"))[0]] == list(zip(images, [0, 1, 2] * 2))


def test_few_large_rows_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = pa.table({"image": [bytes(2**23)] * 24})  # 8 MiB each, a few kB packed
    parquet.write_table(large, tmp_path / "large.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    monkeypatch.setitem(shards.WANTED, "jpg", 2**20)
    samples, skipped = read(str(tmp_path / "large.parquet"))
    assert not samples and len(skipped) == 25 and (tmp_path / "large.parquet").stat().st_size < 2**20
    assert pool.max_memory() - before < 2**29
