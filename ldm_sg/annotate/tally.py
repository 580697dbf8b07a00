"""What is added up over the shards of a set, so that more can follow them: its sums, and the finished set that it was before."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_sg.annotate.stage import Sums
from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping, write_bytes, write_json

# The sums of a set, for more shards of it, and its `classes`: how often each of K labels occurs, `counts` [K]; where images have
# one each, how often it meets each of C classes and, last, none, `table` [K, C + 1]; and after TOTAL the names of what f observed.
TALLY = "tally.npz"
TOTAL = "total/"
BEFORE = "before.json"  # in OUT/work: the finished set that shards are added to


@dataclass
class Summary:
    shards: list[dict[str, Any]]  # of each its images, its url, its fingerprint (`source`) and its latent_shape
    images: int
    classes: np.ndarray  # the class numbers that occur, sorted
    skipped: list[dict[str, str]]  # shard, key, reason
    latent_shape: list[int]  # [C, h, w], of buckets that of the most images


def write_tally(out: Path, sums: Sums, classes: np.ndarray) -> None:
    """OUT/tally.npz."""
    np.savez_compressed(tally := io.BytesIO(), **sums, classes=classes)
    write_bytes(out / TALLY, tally.getvalue())


def put_aside(out: Path, manifest: dict[str, Any]) -> None:
    """Makes the finished set OUT an unfinished one, whose first shards are known: until the manifest goes it is finished."""
    if not (out / TALLY).is_file():
        raise InputError(
            f"{out} was made by an older version, which kept no {TALLY} to add shards to: annotate all of them into another out=, "
            f"with annotator.reuse={out} autoencoder={out / 'autoencoder'}"
        )
    lines = (out / "skipped.jsonl").read_text().splitlines()
    write_bytes(out / "work" / TALLY, (out / TALLY).read_bytes())
    write_json(out / "work" / BEFORE, {"manifest": manifest, "skipped": [json.loads(line) for line in lines]})
    (out / "report.html").unlink(missing_ok=True)
    (out / "manifest.yaml").unlink()


@dataclass
class Before:
    """The finished set that shards are added to."""

    manifest: dict[str, Any]
    skipped: list[dict[str, str]]
    tally: dict[str, np.ndarray]

    @classmethod
    def read(cls, out: Path) -> "Before":
        found = read_mapping(
            out / "work" / BEFORE, {"manifest": {"shards": [dict], "latent_shape": [int]}, "skipped": [dict]}
        )
        with np.load(out / "work" / TALLY, allow_pickle=False) as arrays:
            return cls(found["manifest"], found["skipped"], dict(arrays))

    def aligned(self, classes: np.ndarray) -> Sums:
        """Its sums, with the columns of the table those of `classes`, which may be more."""
        sums = {name: values for name, values in self.tally.items() if name != "classes"}
        table = np.zeros((len(sums["table"]), len(classes) + 1), np.int64)
        table[:, [*np.searchsorted(classes, self.tally["classes"]), -1]] = sums["table"]
        return sums | {"table": table}
