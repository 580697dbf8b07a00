"""The files of a tar in their order: opened from anywhere, none larger in memory than it may be, damage told from the end."""

import re
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import BadStatusLine, HTTPException
from pathlib import Path
from typing import IO, NamedTuple

from ldm_sg.errors import InputError, one_line

MOST_IMAGE, MOST_TEXT = 64 * 2**20, 2**20  # bytes of one file
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)  # webdataset's: a key ends at its name's first dot
_PATIENCE = 60  # seconds for a server's next answer
_HEADERS = b"xgXLK"  # types of entries that hold names: pax's of one file, of all, Solaris's; GNU's of files and links


class Command(str):
    """A `pipe:COMMAND` that a person named, on the command line or in a config. What comes out of any other file is a plain
    string, and never run."""


class Damaged(Exception):
    """A tar that is cut off, or no tar, or whose connection broke."""


class Member(NamedTuple):
    """A file of a tar. `data` is empty where nobody wants it, and where there is a `problem` with it."""

    key: str
    ext: str  # lower case
    data: bytes = b""
    problem: str = ""


def is_remote(url: str) -> bool:
    """True for what is not a local path: `scheme://...` and `pipe:COMMAND`."""
    return "://" in url or url.startswith("pipe:")


def open_shard(url: str) -> IO[bytes]:
    """A readable stream of a local file, a `Command`, or any URL that fsspec can open. InputError where there is none; Damaged
    where a server may have one later."""
    if url.startswith("pipe:") and not isinstance(url, Command):
        raise InputError(f"shard {url!r} is a command out of a file: only one that you name yourself is run")
    try:
        if not is_remote(url):
            return Path(url).open("rb")
        if isinstance(url, Command):
            from webdataset.gopen import gopen

            return gopen(url, "rb")
        if not url.startswith(("http://", "https://")):
            return open_by_fsspec(url)
        response = urllib.request.urlopen(url, timeout=_PATIENCE)
        if "html" in response.headers.get_content_type():
            raise Damaged("the server answers with an HTML page")
        return response
    except (OSError, ValueError, ImportError, HTTPException) as err:
        status = err.code if isinstance(err, urllib.error.HTTPError) else 0
        broken = isinstance(getattr(err, "reason", err), TimeoutError | ConnectionResetError | BadStatusLine)
        if broken or status in (408, 429) or status >= 500:
            raise Damaged(one_line(err)) from err
        raise InputError(f"shard {url!r} cannot be opened: {one_line(err)}") from err


def open_by_fsspec(url: str) -> IO[bytes]:
    import fsspec

    try:
        return fsspec.open(url, "rb").open()
    except Exception as err:  # of whatever class a store's own library has
        raise err if isinstance(err, OSError) else ValueError(one_line(err)) from err


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header after the first member for the end of the archive; a cut-off shard
    must be told from a whole one, so here only the proper end mark ends it. Long names have bounds."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as err:
            raise tarfile.ReadError(f"{err} at byte {tar.offset}") from err

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > MOST_TEXT:
            raise tarfile.ReadError(f"a name of {self.size:,} bytes at byte {tar.offset}")
        return super()._proc_member(tar)  # type: ignore[misc]


def read_members(url: str, wanted: Mapping[str, int]) -> Iterator[Member]:
    """A shard's files in order; of those whose extension is `wanted` the content, up to so many bytes. Raises Damaged after
    everything before the damage, InputError where there is no shard."""
    try:
        with open_shard(url) as stream, tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # memory stays flat
                match = _NAME.match(member.name)
                if match and member.isfile():
                    yield _read(tar, member, match[1], match[2].lower(), wanted)
    except InputError:
        raise
    except (tarfile.TarError, OSError, EOFError, HTTPException, ValueError, RecursionError) as err:
        raise Damaged(one_line(err)[:200]) from err


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str, ext: str, wanted: Mapping[str, int]) -> Member:
    if ext not in wanted:
        return Member(key, ext)
    if member.issparse():
        return Member(key, ext, problem=f"{ext}: a sparse file")
    if member.size > wanted[ext]:
        return Member(key, ext, problem=f"{ext}: {member.size:,} bytes, more than {wanted[ext]:,}")
    content = tar.extractfile(member)
    data = content.read() if content else b""
    if len(data) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut off after {len(data)} of {member.size} bytes")
    return Member(key, ext, data)
