"""Folders that verbs write: whose they are (`claim`), who works in them now (`locked`), and files that appear whole or not at
all (`whole`); the files in them that are read back, schema-checked (`read_mapping`)."""

import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from safetensors import SafetensorError

from ldm_sg.errors import InputError, one_line

LOCK = ".lock"
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of libyaml, three times as fast
HOST = socket.gethostname()
FORGOTTEN = 24 * 3600  # seconds after which a temporary of another machine is a dead one's
WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a part in diffusers' format: the name that it downloads
Result = TypeVar("Result")
_held: dict[Path, IO[str]] = {}  # locks of this process, by their files
# a worker must not outlive us with one
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held.values()])


@contextmanager
def locked(folder: str | Path, part: str | None = None, ranks: bool = False) -> Iterator[None]:
    """Nobody else writes in `folder` meanwhile: another process is refused at once with an InputError that names this one. A
    kernel lock, so it ends with its owner, however that ends. With `ranks`, those of one job share the first one's; with
    `part`, those of other parts may hold it too, but nobody else."""
    folder = Path(folder).expanduser()
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    if (ranks and rank != "0") or (folder.exists() and not folder.is_dir()):  # a file is `claim`'s to refuse
        yield
        return
    made = not folder.exists()
    try:
        with ExitStack() as locks:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(_holding(folder / LOCK, shared=part is not None))
                if part:
                    locks.enter_context(_holding(folder / f"{LOCK}-{part.replace('/', '-of-')}"))
            yield
    finally:
        if made:
            with suppress(OSError):  # not empty: it was worth making
                folder.rmdir()


def others_work_in(folder: Path) -> bool:
    """Whether parts that are not of this process hold `folder`."""
    others = (path for path in folder.glob(f"{LOCK}-*") if path not in _held and path.name != f"{LOCK}-turn")
    return any(map(_is_held, others))


def _is_held(path: Path) -> bool:
    with suppress(FileNotFoundError), path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def turn(folder: str | Path) -> Iterator[None]:
    """One after the other, of those that share the lock of `folder`."""
    folder = Path(folder).expanduser()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _holding(folder / f"{LOCK}-turn", wait=True):
        yield


@contextmanager
def _holding(path: Path, shared: bool = False, wait: bool = False) -> Iterator[None]:
    file = _held[path] = _lock(path, shared, wait)
    try:
        yield
    finally:
        with suppress(OSError):  # others share it: the last one removes it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_open(file, path):
                path.unlink()
        del _held[path]
        file.close()


def _lock(path: Path, shared: bool, wait: bool) -> IO[str]:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            if not wait:
                file.close()
                said = f"{path.parent} is in use by {owner}"
                raise InputError(f"{said}: wait until it ends, or choose another folder") from None
            print(f"note: waiting for {owner}, which prepares {path.parent}", file=sys.stderr)
            fcntl.flock(file, kind)
        if _is_open(file, path):
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {HOST} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            file.flush()
            return file
        file.close()  # its owner has just ended and removed it: what was locked is nobody's file any more


def _is_open(file: IO[str], path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def holds_out(verb: Callable[..., Result], ranks: bool = False) -> Callable[..., Result]:
    """A verb of a config, which holds its `out` locked while it runs; `ranks` as in `locked`."""

    @functools.wraps(verb)
    def holding(config: Any, **more: Any) -> Result:
        with locked(config.out, str(more["part"]) if more.get("part") else None, ranks):
            return verb(config, **more)

    return holding


def claim(
    folder: Path, file: str, wanted: Mapping[str, Any], free: Container[str] = (), stale: Sequence[str] = ()
) -> None:
    """Makes `folder` the home of `wanted`, kept in FOLDER/`file` as YAML, or checks that it already is: a folder never mixes
    two configs. Values of the (dotted) keys `free` may change. With `stale` all may: nothing but these sub-folders was made
    so far, and they go. Leftovers of killed runs go.

    Raises InputError naming the first key that differs, and for a folder that holds something else."""
    path, there = folder / file, {}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another folder")
    if path.is_file():
        there = read_mapping(path)
        here, before = flat(wanted), flat(there)
        for key in {**here, **before}:
            bound = not stale or (key in here) != (key in before)  # other keys: of another verb
            bound &= key not in free and key.partition(".")[0] not in free
            if bound and here.get(key) != before.get(key):
                said = f"{key} {_difference(before.get(key), here.get(key))}"
                raise InputError(f"{folder} belongs to another config: {said}; choose another folder, or remove it")
    elif folder.is_dir() and any(not entry.name.startswith(LOCK) for entry in folder.iterdir()):
        raise InputError(f"{folder} is not empty and has no {file}: choose another folder")
    if folder / LOCK in _held:
        sweep(folder)
    kept = {key: value for key, value in there.items() if key in free} | dict(wanted)
    if kept != there or not path.is_file():
        for name in stale:
            shutil.rmtree(folder / name, ignore_errors=True)
        write_text(path, yaml.safe_dump(kept, sort_keys=False))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one with dotted keys."""
    pairs: dict[str, Any] = {}
    for key, value in tree.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, list) and isinstance(here, list):
        old, new = next((pair for pair in itertools.zip_longest(there, here) if pair[0] != pair[1]), (None, None))
        return f"has {len(there)} entries there and {len(here)} here; the first that differs is {old!r}, here {new!r}"
    return f"is {there!r} there and {here!r} here"


def sweep(folder: Path) -> None:
    """Removes the temporaries of processes that are gone."""
    for left in list(folder.rglob("*.tmp-*")):
        name = re.search(r"\.tmp-(\d+)(?:@(.+))?$", left.name)
        with suppress(FileNotFoundError):  # its owner lives, and has just given it its name
            young = time.time() - left.stat().st_mtime < FORGOTTEN
            if name is None or (_runs(int(name[1])) if name[2] in (None, HOST) else young):
                continue
            if left.is_file():
                left.unlink()
            elif left.parent == folder:
                shutil.rmtree(left)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def temporary(path: Path) -> Path:
    """Where what will be `path` grows until it is whole."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}@{HOST}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """`with whole(path) as new`: the file or folder that is made as `new` appears as `path` when the block ends; of a block
    that fails nothing is left. A folder takes the place of the one before it. InputError where the disk is full, ..."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: a device or a pipe: give a plain file")
    new = temporary(path)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield new
            if new.is_dir() and path.is_dir():
                old = temporary(path.with_name(f"{path.name}.old"))
                path.rename(old)
                new.rename(path)
                shutil.rmtree(old)
            else:
                new.replace(path)
    except BaseException:
        with suppress(OSError):  # where there is none, or it could not even begin
            shutil.rmtree(new) if new.is_dir() else new.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """A file, whole or not at all."""
    with whole(path) as new:
        new.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """UTF-8; whole or not at all."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, whole or not at all; ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A disk that is full, read-only or gone while `path` is written (as OSError, or as shutil and safetensors wrap it):
    InputError with the path and the space left."""
    try:
        yield
    except (OSError, SafetensorError) as err:
        why = getattr(err, "strerror", None) or one_line(err)
        if isinstance(err, shutil.Error) and err.args and isinstance(err.args[0], list):
            why = str(err.args[0][0][-1])  # of copytree: [(source, destination, why), ...]
        raise InputError(f"{path}: cannot be written: {why}; {space_left(path)}") from err


def space_left(path: Path) -> str:
    """'1.2 GB left on its disk', for messages."""
    folder = next(p for p in path.absolute().parents if p.exists())
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB left on its disk"


def copy_plain(source: Path, to: Path, without: str = "") -> None:
    """The files of a folder, and of its folders, but those called `without`; InputError for links and pipes: a folder may be
    somebody's, and what they name another's. The links of a hub's cache, which lead to its blobs, are files."""
    home = next((parent.parent.resolve() for parent in source.parents if parent.name == "snapshots"), None)
    for entry in sorted(source.rglob("*")):
        led_out = entry.is_symlink() and not (home and entry.resolve().is_relative_to(home))
        if led_out or not (entry.is_file() or entry.is_dir()):
            raise InputError(f"{entry}: a link, or no plain file: it is not copied")
        path = entry.relative_to(source)
        if entry.is_file() and path.parts[0] != without:
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(entry, to / path)


def cache_home() -> Path:
    """$XDG_CACHE_HOME/ldm_sg, or the same under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm_sg"


def copy_of(kind: str, url: str) -> Path:
    """The folder of this machine that holds what lies at `url`."""
    return cache_home() / kind / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def pipeline_of(run: str | Path) -> Path | None:
    """The pipeline folder of a run, or `run` where it is one itself; None where there is none."""
    return next((p for p in (Path(run) / "pipeline", Path(run)) if (p / "model_index.json").is_file()), None)


def annotator_folder(source: str | Path) -> Path:
    """The annotator/ of an annotation set, a run or a pipeline, or that folder itself."""
    folders = (Path(source) / sub for sub in ("annotator", "pipeline/annotator"))
    return next((folder for folder in folders if folder.is_dir()), Path(source))


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_sha256(of: Any) -> str:
    """Hex digest of settings, in whatever order their keys come."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()


def read_mapping(
    path: Path, schema: Mapping[str, Any] | None = None, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    """A mapping out of a JSON file (.json, or any that is read by `pairs`, json's object_pairs_hook) or YAML; InputError naming
    file and key where it is not one, or lacks what `schema` asks for: key -> a type, a tuple of types, {nested schema}, or
    [schema of each entry]."""
    kind = "JSON" if pairs or path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=pairs) if kind == "JSON" else yaml.load(text, YAML)
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror or err}") from err
    except (ValueError, yaml.YAMLError, RecursionError) as err:
        raise InputError(f"{path} is damaged: not readable {kind}: {one_line(err)[:200]}") from err
    check(content, dict(schema or {}), str(path))
    return content


def check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise InputError(f"{where}: a mapping of keys to values is expected, not {value!r:.60}")
        for key, inner in schema.items():
            if key not in value:
                raise InputError(f"{where}: no {key} in it: not a file of this version of ldm_sg, or damaged")
            check(value[key], inner, f"{where}: {key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise InputError(f"{where}: a list is expected, not {value!r:.60}")
        for number, entry in enumerate(value):
            check(entry, schema[0], f"{where}[{number}]")
    else:
        kinds = schema if isinstance(schema, tuple) else (schema,)
        if not any(type(value) is kind for kind in kinds):  # not isinstance: True is no count
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise InputError(f"{where}: {names} is expected, not {value!r:.60}")
