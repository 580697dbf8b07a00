"""Parquet tables of images as source shards: those of Hugging Face datasets, whose images are {bytes, path}, or columns of bytes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ldm_sg.data.tars import Damaged, Member, is_remote, open_by_fsspec
from ldm_sg.errors import InputError, need_package, one_line

LABELS = ("label", "cls", "class", "fine_label", "labels")  # of integers: the first that there is
ROWS, BYTES = 32, 2**26  # in memory at once, by the mean size that the footer gives


def read_rows(url: str, wanted: Mapping[str, int]) -> Iterator[Member]:
    """Each row's image as a file KEY.jpg, where KEY is its number, and its class, if there is one, as KEY.cls, as
    `tars.read_members` gives those of a tar. InputError where there is no such table, Damaged where it cannot be read."""
    parquet, most = pyarrow(), wanted.get("jpg", 0)
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        with _seekable(url) as file:
            table = parquet.ParquetFile(file)
            image, label = _columns(table.schema_arrow, url)
            row = 0
            for batch in table.iter_batches(_at_once(table.metadata), columns=[image, label] if label else [image]):
                values = batch[image]
                values = pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
                values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
                labels = batch[label] if label else [None] * len(batch)
                for value, length, cls in zip(values, pc.binary_length(values), labels):
                    key, size = f"{row:08d}", length.as_py()
                    if not size:
                        yield Member(key, "jpg", problem="no image in this row")
                    elif most and size > most:
                        yield Member(key, "jpg", problem=f"image: {size:,} bytes, more than {most:,}")
                    else:
                        yield Member(key, "jpg", value.as_py())
                    number = None if cls is None else cls.as_py()
                    if number is not None and number >= 0 and "cls" in wanted:
                        yield Member(key, "cls", str(number).encode())
                    row += 1
    except InputError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, pa.ArrowException) as err:
        raise Damaged(one_line(err)[:200]) from err


def count_rows(path: str) -> int:
    """Rows of a local table, by its footer; 0 where that is damaged."""
    try:
        return pyarrow().ParquetFile(path).metadata.num_rows
    except (OSError, ValueError):
        return 0


def _at_once(meta: Any) -> int:
    """Rows that make no more than BYTES."""
    size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    return max(1, min(ROWS, BYTES * meta.num_rows // max(1, size)))


def _columns(schema: Any, url: str) -> tuple[str, str | None]:
    """The image's column, and the label's."""
    import pyarrow.types as types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            parts = map(kind.field, range(kind.num_fields))
            return any(part.name == "bytes" and holds_images(part.type) for part in parts)
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_images(field.type)]
    ints = [field.name for field in schema if types.is_integer(field.type)]
    image = next((name for name in ("image", "img") if name in images), images[0] if images else None)
    label = next((name for name in LABELS if name in ints), None)
    if image is None:
        there = ", ".join(f"{field.name!r:.40} ({str(field.type)[:40]})" for field in list(schema)[:9])
        raise InputError(f"shard {url!r}: no column of images ({{bytes, path}} or bytes) among {there}")
    if twice := next((name for name in (image, label) if name and schema.names.count(name) > 1), None):
        raise InputError(f"shard {url!r}: it has two columns named {twice!r}")
    return image, label


def _seekable(url: str) -> IO[bytes]:
    try:
        return open_by_fsspec(url) if is_remote(url) else Path(url).open("rb")
    except (OSError, ValueError, ImportError) as err:
        raise InputError(f"shard {url!r} cannot be opened: {one_line(err)}") from err


def pyarrow() -> Any:
    return need_package("pyarrow.parquet", "a parquet table", "'ldm-sg[parquet]'")
