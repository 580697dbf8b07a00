"""What a verb makes, kept at a URL: it works in a folder of this machine, and what is finished is copied there. The same command on
another machine goes on from what lies at the URL."""

import functools
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ldm_sg.data.tars import is_remote
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import LOCK, copy_of, write_json, write_text

Result = TypeVar("Result")
STATE, SENT = ".state", ".sent.json"  # names what was copied last, there and here; size and time of each file then
LAST = ("checkpoints/last.ckpt", "manifest.yaml")  # which say that the rest is there
OWN = {"work", "index/checked.json", SENT, STATE}  # of this machine alone
_open: dict[Path, "Mirror"] = {}


class Mirror:
    """FOLDER, the copy on this machine of what lies at `url`. InputError where it cannot be written."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, self.folder = url, copy_of("out", url)
        if url.startswith(("http://", "https://", "pipe:")):
            raise InputError(f"out={url!r} cannot be written to: give a folder, or a URL such as s3://BUCKET/RUN")
        try:
            self.fs, self.path = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as err:
            raise InputError(f"out={url!r}: {one_line(err)}") from err

    def pull(self) -> None:
        """Makes FOLDER what lies at the URL, unless that is what was copied there from here."""
        with self._errors("read"):
            there = self.fs.cat_file(f"{self.path}/{STATE}").decode() if self.fs.exists(f"{self.path}/{STATE}") else ""
            if not there:  # nothing is there, whatever was sent before
                (self.folder / SENT).unlink(missing_ok=True)
                return
            if (self.folder / STATE).is_file() and (self.folder / STATE).read_text() == there:
                return
            (self.folder / STATE).unlink(missing_ok=True)  # until all is here, this is no copy
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.iterdir():
                if not old.name.startswith(LOCK):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            for file in tqdm(self.fs.find(self.path), f"from {self.url}", unit=" files"):
                name = file.removeprefix(self.path).lstrip("/")
                if name == STATE:
                    continue
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(file, str(self.folder / name))
        write_json(self.folder / SENT, self._here())
        write_text(self.folder / STATE, there)

    def push(self) -> None:
        """Copies what has changed since the last time; what says that it is whole comes last."""
        known = json.loads((self.folder / SENT).read_text()) if (self.folder / SENT).is_file() else {}
        here = self._here()
        changed = sorted((name for name in here if known.get(name) != here[name]), key=lambda name: name in LAST)
        if not changed:
            return
        state = uuid.uuid4().hex
        with self._errors("written"):
            for name in changed:
                self.fs.makedirs(f"{self.path}/{name}".rpartition("/")[0], exist_ok=True)
                self.fs.put_file(str(self.folder / name), f"{self.path}/{name}")
            self.fs.pipe_file(f"{self.path}/{STATE}", state.encode())
        write_text(self.folder / STATE, state)
        write_json(self.folder / SENT, here)

    def _here(self) -> dict[str, list[int]]:
        found = {}
        for path in self.folder.rglob("*"):
            name, stat = path.relative_to(self.folder), path.stat()
            own = name.parts[0].startswith(LOCK) or {name.parts[0], str(name)} & OWN or ".tmp-" in path.name
            if path.is_file() and not own:
                found[str(name)] = [stat.st_size, stat.st_mtime_ns]
        return found

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """A store's refusals, which are of any class, as an InputError."""
        try:
            yield
        except Exception as err:
            where = f"; what was made lies in {self.folder}, and the same command goes on"
            raise InputError(f"{self.url} cannot be {what}: {one_line(err)[:200]}{where}") from err


def keep(folder: Path) -> None:
    """Copies what a verb has finished in `folder` so far, where its `out` is a URL."""
    if folder in _open:
        _open[folder].push()


def writes_anywhere(verb: Callable[..., Result]) -> Callable[..., Result]:
    """A verb of a config whose `out` may be a URL: it is given the folder on this machine. InputError for a job of several
    processes or parts, which work in one folder that all of them see."""

    @functools.wraps(verb)
    def writing(config: Any, **more: Any) -> Result:
        url = str(config.out)
        if not is_remote(url):
            return verb(config, **more)
        if more.get("part") or any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE", "SLURM_NTASKS")):
            raise InputError(f"out={url!r}: several processes share one folder: give one that all see, copy it after")
        mirror = Mirror(url)
        config = replace(config, out=str(mirror.folder))
        if os.environ.get("LOCAL_RANK", "0") != "0":  # started by the first, which copies
            return verb(config, **more)
        mirror.pull()
        _open[mirror.folder] = mirror
        try:
            made = verb(config, **more)
        except KeyboardInterrupt:
            mirror.push()
            raise
        finally:
            del _open[mirror.folder]
        mirror.push()
        print(f"{mirror.folder} is copied to {url}", file=sys.stderr)
        return made

    return writing
