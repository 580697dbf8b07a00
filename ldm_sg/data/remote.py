"""An annotation set behind a URL: its small files are copied once, its shards come when they are needed, each checked against the
sha256 that shards.jsonl has, and the oldest go when there is no room for more."""

import fcntl
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ldm_sg.data.shards import PAUSES, leads_elsewhere
from ldm_sg.data.tars import Damaged, open_shard
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import check, copy_of, file_sha256, read_mapping, sweep, whole

CHUNK = 2**20
SMALL = ("annotator", "autoencoder", "index")  # folders of a set that are copied, beside its manifest and shards.jsonl
FILE = {"file": str, "bytes": int, "sha256": str}  # of a file of a set; of a shard too what it was made of: url, source


def listing(folder: Path) -> list[dict[str, Any]]:
    """Of a set's small files what its manifest says, so that they can be had where nothing lists a folder."""
    files = sorted(path for name in SMALL for path in (folder / name).rglob("*") if path.is_file())
    return [
        {"file": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
        if path.name != "checked.json"
    ]


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Copies what lies at `url` to `path`, whole; tried again where it is cut off or another one. InputError when it stays so."""
    for pause in (*PAUSES, None):
        try:
            with whole(path) as new:
                digest = hashlib.sha256()
                with new.open("wb") as file:
                    for chunk in _chunks(url):
                        digest.update(chunk)
                        file.write(chunk)
                    found = file.tell()
                if size is not None and (found, digest.hexdigest()) != (size, sha256):
                    what = f"{found:,} bytes of {size:,}" if found != size else "another content"
                    raise Damaged(f"{what} than the set's manifest says")
            return
        except Damaged as err:
            if pause is None:
                said = f"{one_line(err)}, {len(PAUSES) + 1} times"
                raise InputError(f"{url}: {said}; the same command goes on where it was") from err
            print(f"note: {url}: {one_line(err)}: fetched again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def _chunks(url: str) -> Iterator[bytes]:
    with open_shard(url) as source:
        while True:
            try:
                chunk = source.read(CHUNK)
            except (OSError, HTTPException, ValueError) as err:  # the connection, not our disk
                raise Damaged(one_line(err)) from err
            if not chunk:
                return
            yield chunk


class RemoteSet:
    """The local copy of the set at `url`, FOLDER, with room for `room` bytes of its shards; shared by all processes of a machine."""

    def __init__(self, url: str, room: int) -> None:
        self.url, self.room = url.rstrip("/"), room
        self.folder = copy_of("sets", self.url)
        self.entries: list[Mapping[str, Any]] = []
        self._wanted: list[int] = []

    def copy(self) -> Path:
        """All but the shards, where they are not there yet or the set has another manifest than the copy."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone("copy"):
            sweep(self.folder)
            new = self.folder / "manifest.new.yaml"
            try:
                fetch(f"{self.url}/manifest.yaml", new)
            except InputError as err:
                raise InputError(f"{self.url}: no finished annotation set can be read there: {err}") from err
            here = self.folder / "manifest.yaml"
            if here.is_file() and here.read_bytes() == new.read_bytes():
                return self.folder
            files = read_mapping(new, {"hash": str}).get("files")
            if files is None:
                said = f"{self.url}: its manifest lists no files, as those of an older ldm_sg"
                raise InputError(f"{said}; annotate once more, which adds them, or copy the set to this machine")
            check(files, [FILE], f"{self.url}/manifest.yaml: files")
            for entry in files:
                if leads_elsewhere(entry["file"]):
                    raise InputError(f"{self.url}/manifest.yaml: file {entry['file']!r} leads out of the set")
            here.unlink(missing_ok=True)
            for name in SMALL:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for entry in files:
                fetch(f"{self.url}/{entry['file']}", self.folder / entry["file"], entry["bytes"], entry["sha256"])
            fetch(f"{self.url}/shards.jsonl", self.folder / "shards.jsonl")
            new.replace(here)
        return self.folder

    def open(self, shard: int) -> int:
        """A file descriptor of shard number `shard`, which stays readable when the file goes."""
        path = self.folder / "shards" / self.entries[shard]["file"]
        while True:
            with suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY)
                if os.fstat(file).st_size == self.entries[shard]["bytes"]:
                    os.utime(path)  # the newest
                    return file
                os.close(file)
            self._get(shard)

    def _get(self, shard: int) -> None:
        entry = self.entries[shard]
        path = self.folder / "shards" / entry["file"]
        with self._alone(entry["file"]):
            if path.is_file() and path.stat().st_size == entry["bytes"]:
                return  # another process has had it meanwhile
            with self._alone("room"):
                self._make_room(entry["bytes"])
            fetch(f"{self.url}/shards/{entry['file']}", path, entry["bytes"], entry["sha256"])

    def _make_room(self, size: int) -> None:
        """The files that were not opened for longest go, until there is room for `size` bytes."""
        there = [(path.stat(), path) for path in (self.folder / "shards").glob("*.tar")]
        used = sum(stat.st_size for stat, _ in there)
        for stat, path in sorted(there, key=lambda found: found[0].st_mtime_ns):
            if used + size <= self.room:
                break
            path.unlink(missing_ok=True)
            used -= stat.st_size

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process after the other; a kernel lock, which ends with its owner."""
        path = self.folder / "locks" / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def ahead(self, shards: Iterable[int]) -> None:
        """Fetches these in the background, in this order, in place of what was asked for before."""
        running, self._wanted = bool(self._wanted), list(shards)
        if not running:
            threading.Thread(target=self._fetch_wanted, daemon=True).start()

    def _fetch_wanted(self) -> None:
        while self._wanted:
            shard = self._wanted[0]
            with suppress(InputError):  # who reads it will say so
                os.close(self.open(shard))
            if self._wanted and self._wanted[0] == shard:
                self._wanted.pop(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wanted": []}
