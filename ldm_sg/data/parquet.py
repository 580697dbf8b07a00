"""Parquet tables of images as source shards: those of Hugging Face datasets, whose images are {bytes, path}, or columns of bytes."""

from collections.abc import Iterator, Mapping
from typing import IO, Any

from ldm_sg.data.tars import Damaged, Member, is_remote
from ldm_sg.errors import InputError, one_line

LABELS = ("label", "cls", "class", "fine_label", "labels")  # of integers: the first that there is
ROWS = 32  # in memory at once


def read_rows(url: str, wanted: Mapping[str, int]) -> Iterator[Member]:
    """Each row's image as a file KEY.jpg, where KEY is its number, and its class, if there is one, as KEY.cls, as
    `tars.read_members` gives those of a tar. InputError where there is no such table, Damaged where it cannot be read."""
    parquet = _pyarrow()
    try:
        with _seekable(url) as file:
            table = parquet.ParquetFile(file)
            image, label = _columns(table.schema_arrow, url)
            row = 0
            for batch in table.iter_batches(ROWS, columns=[image, label] if label else [image]):
                labels = batch[label].to_pylist() if label else [None] * len(batch)
                for value, cls in zip(batch[image].to_pylist(), labels):
                    data = value.get("bytes") if isinstance(value, dict) else value
                    yield _member(f"{row:08d}", data, wanted.get("jpg", 0))
                    if cls is not None and cls >= 0 and "cls" in wanted:
                        yield Member(f"{row:08d}", "cls", str(cls).encode())
                    row += 1
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as err:  # pyarrow's own errors are ValueErrors and OSErrors
        raise Damaged(one_line(err)[:200]) from err


def count_rows(path: str) -> int:
    """Rows of a local table, by its footer; 0 where that is damaged."""
    try:
        return _pyarrow().ParquetFile(path).metadata.num_rows
    except (OSError, ValueError):
        return 0


def _member(key: str, data: bytes | None, most: int) -> Member:
    if not data:
        return Member(key, "jpg", problem="no image in this row")
    if most and len(data) > most:
        return Member(key, "jpg", problem=f"image: {len(data):,} bytes, more than {most:,}")
    return Member(key, "jpg", data)


def _columns(schema: Any, url: str) -> tuple[str, str | None]:
    """The image's column, and the label's."""
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_images(field.type)]
    if not images:
        raise InputError(
            f"shard {url!r}: no column of images ({{bytes, path}} or bytes) among {', '.join(schema.names[:9])}"
        )
    ints = [field.name for field in schema if types.is_integer(field.type)]
    return next((name for name in ("image", "img") if name in images), images[0]), next(
        (name for name in LABELS if name in ints), None
    )


def _seekable(url: str) -> IO[bytes]:
    import fsspec

    try:
        return fsspec.open(url, "rb").open() if is_remote(url) else open(url, "rb")  # noqa: PTH123
    except (OSError, ValueError, ImportError) as err:
        raise InputError(f"shard {url!r} cannot be opened: {one_line(err)}") from err


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as err:
        raise InputError("parquet shards need pyarrow: pip install 'ldm-sg[parquet]'") from err
    return parquet
