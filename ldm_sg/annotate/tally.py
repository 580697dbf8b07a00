"""What is added up over the shards of a set, so that more can follow them: its sums, and the finished set that it was before."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_sg.annotate.stage import Stage
from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping, write_bytes, write_json

TALLY = "tally.npz"  # what is added up over the shards of a set, for more of them: counts, table, classes, total/NAME
BEFORE = "before.json"  # in OUT/work: the finished set that shards are added to

# how often each of K labels occurs [K], and where images have one each, how often it meets each of C classes and, last, none
Labels = tuple[np.ndarray, np.ndarray]


@dataclass
class Summary:
    sources: list[dict[str, Any]]  # of each shard: its url, its images, its fingerprint
    images: int
    classes: np.ndarray  # the class numbers that occur, sorted
    skipped: list[dict[str, str]]  # shard, key, reason
    latent_shape: list[int]  # [C, h, w], of buckets that of the most images
    shapes: list[list[int] | None]  # of each shard, None where it has no image


def total(all_stages: list[Stage]) -> dict[str, np.ndarray]:
    """What f observed, added up over the shards."""
    sums: dict[str, np.ndarray] = {}
    for stage in all_stages:
        for name, value in stage.read_observed().totals.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def write_tally(out: Path, labels: Labels, classes: np.ndarray, totals: dict[str, np.ndarray]) -> None:
    """OUT/tally.npz."""
    sums = {"counts": labels[0], "table": labels[1], "classes": classes}
    np.savez_compressed(tally := io.BytesIO(), **sums, **{f"total/{name}": value for name, value in totals.items()})
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

    def with_more(
        self, labels: Labels, classes: np.ndarray, totals: dict[str, np.ndarray]
    ) -> tuple[Labels, dict[str, np.ndarray]]:
        """The sums over all shards, of those over the new ones; `classes`: of all."""
        (counts, table), old = labels, self.tally
        table[:, [*np.searchsorted(classes, old["classes"]), -1]] += old["table"]
        names = {*totals, *(name.removeprefix("total/") for name in old if name.startswith("total/"))}
        return (counts + old["counts"], table), {
            name: totals.get(name, 0) + old.get(f"total/{name}", 0) for name in sorted(names)
        }
