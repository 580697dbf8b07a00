"""Output folders: one owner, one process at a time, whole files; files read back are checked."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from ldm_sg.errors import InputError
from ldm_sg.folder import LOCK, claim, holds_out, locked, others_work_in, read_mapping, whole, write_bytes, write_json

HOLD = """
import os, sys, time
from ldm_sg.folder import locked
with locked(sys.argv[1]):
    if os.fork() == 0:  # a worker that outlives its parent for a while; it says when it runs, and so holds the lock no more
        print("held", flush=True)
        time.sleep(20)
        os._exit(0)
    time.sleep(20)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_ends(tmp_path):
    out = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(InputError, match=rf"out is in use by pid {holder.pid} on \S+ since 20\d\d-.*: wait"),
            locked(out),
        ):
            pass
        holder.kill()
        holder.wait()
        with locked(out):  # though the worker still lives
            assert f"pid {os.getpid()} on" in (out / LOCK).read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    assert out.is_dir() and not list(out.iterdir())  # it was there before


def test_a_lock_leaves_no_folder_that_nobody_needed(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with locked(tmp_path / "a", ranks=True):  # another rank of a job whose first one holds it
        assert not (tmp_path / "a").exists()


def test_parts_share_a_folder_that_nobody_else_may_have(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # which excuses nobody from the lock but the ranks of a training
    held, out = "import sys, time\nfrom ldm_sg.folder import locked\n", tmp_path / "out"
    body = "with locked(sys.argv[1], '0/2'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", held + body, str(out)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with locked(out, "1/2"):
            assert others_work_in(out)
            with pytest.raises(InputError, match="in use by pid"), locked(out):
                pass
        with pytest.raises(InputError, match=f"in use by pid {other.pid}"), locked(out, "0/2"):
            pass
        other.kill()
        other.wait()
    with locked(out, "0/2"):
        assert not others_work_in(out)
    with locked(out):
        pass
    assert not list(out.iterdir())


def test_a_verb_holds_its_out(tmp_path):
    class Config:
        out = str(tmp_path / "run")

    @holds_out
    def verb(config):
        with pytest.raises(InputError, match="in use by pid"), locked(config.out):
            pass
        return "done"

    assert verb(Config()) == "done"


def test_claim(tmp_path):
    out = tmp_path / "out"
    wanted = {"size": 8, "net": {"k": 3, "w": [1, 2]}, "steps": 5}
    claim(out, "c.yaml", wanted, ("steps",))
    claim(out, "c.yaml", wanted | {"steps": 6}, ("steps",))
    wanted |= {"steps": 6}
    assert yaml.safe_load((out / "c.yaml").read_text()) == wanted
    for changed, said in (
        ({"size": 9}, r"belongs to another config: size is 8 there and 9 here"),
        ({"net": {"k": 4, "w": [1, 2]}}, r"net\.k is 3 there and 4 here"),
        ({"net": {"k": 3, "w": [1]}}, r"net\.w has 2 entries there and 1 here; the first that differs is 2, here None"),
        ({"new": 1}, r"new is None there and 1 here"),
    ):
        with pytest.raises(InputError, match=said):
            claim(out, "c.yaml", wanted | changed, ("steps",))
    (out / "work").mkdir()
    claim(out, "c.yaml", wanted, stale=("work",))
    assert (out / "work").is_dir()  # the same config goes on with what it has
    with pytest.raises(InputError, match="new is None there"):
        claim(out, "c.yaml", {"new": 1}, stale=("work",))
    claim(out, "c.yaml", wanted | {"size": 9}, stale=("work",))
    assert not (out / "work").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        claim(tmp_path / "file", "c.yaml", {})
    with pytest.raises(InputError, match=r"not empty and has no c\.yaml"):
        claim(tmp_path, "c.yaml", {})
    (out / "c.yaml").write_text("[" * 5000)
    with pytest.raises(InputError, match=r"c\.yaml is damaged"):
        claim(out, "c.yaml", wanted)


def test_only_the_owner_sweeps_and_only_what_the_dead_left(tmp_path):
    out = tmp_path / "out"
    claim(out, "c.yaml", {})
    dead, living = f"x.tmp-{2**22 + 1}", f"x.tmp-{os.getppid()}"
    for name in (dead, living, "x.tmp-mine"):
        (out / "deep").mkdir(exist_ok=True)
        (out / "deep" / name).touch()
    (out / f"pipeline.tmp-{2**22 + 1}").mkdir()
    claim(out, "c.yaml", {})
    assert len(list(out.rglob("*.tmp-*"))) == 4
    with locked(out):
        claim(out, "c.yaml", {})
    assert sorted(p.name for p in out.rglob("*.tmp-*")) == sorted([living, "x.tmp-mine"])


def test_files_and_folders_appear_whole(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"ä": 1})
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"ä": 1}
    for content in ("1", "2"):
        with whole(tmp_path / "set") as new:
            new.mkdir()
            (new / content).touch()
            assert not (tmp_path / "set" / content).exists()
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["2"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a device or a pipe"):
        write_json(tmp_path / "pipe", {})
    (tmp_path / "pipe").unlink()
    for kind in (Path.mkdir, Path.touch):
        with pytest.raises(KeyboardInterrupt), whole(tmp_path / "set") as new:
            kind(new)
            raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "set"] and (tmp_path / "set" / "2").exists()


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """The system lets no file grow beyond `size` bytes: what any library's own writing then raises."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_with_the_path_whoever_writes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "x").write_bytes(b"1" * 20_000)
    big = {"x": np.zeros(9_000)}
    for write in (
        lambda new: new.write_bytes(b"1" * 20_000),
        lambda new: save_file(big, new),
        lambda new: shutil.copytree(source, new),
        lambda new: Image.fromarray(np.random.default_rng(0).integers(0, 256, (199, 199), np.uint8)).save(new, "PNG"),
    ):
        with (
            pytest.raises(InputError, match=r"/a: cannot be written: .*File too large.*; [\d.]+ GB left on its disk$"),
            disk_of(10_000),
            whole(tmp_path / "a") as new,
        ):
            write(new)
        assert [p.name for p in tmp_path.iterdir()] == ["source"]
    with pytest.raises(InputError, match="a: cannot be written: "):
        write_bytes(source / "x" / "a", b"")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "", "a.json is damaged: not readable JSON"),
        ("a.json", "[" * 200_000, "not readable JSON"),
        ("a.yaml", "[" * 20_000, "not readable YAML"),
        ("a.yaml", "\x00", "not readable YAML"),
        ("a.yaml", "- 1", "a mapping of keys to values is expected, not"),
        ("a.yaml", "n: 1", "no hash in it"),
        ("a.yaml", "{n: 1, hash: 5, each: []}", "hash: str is expected, not 5"),
        ("a.yaml", "{n: true, hash: x, each: []}", "n: int or null is expected, not True"),
        ("a.yaml", "{n: 1, hash: x, each: {}}", "each: a list is expected, not {}"),
        ("a.yaml", "{n: 1, hash: x, each: [{file: a}, {file: 3}]}", r"each\[1\]: file: str is expected, not 3"),
    ],
)
def test_damaged_and_foreign_files_are_told(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said) as told:
        read_mapping(tmp_path / name, {"n": (int, type(None)), "hash": str, "each": [{"file": str}]})
    assert "\n" not in str(told.value)


def test_read_mapping_reads(tmp_path):
    (tmp_path / "a.yaml").write_text("n: 1\n")
    write_json(tmp_path / "a.json", {"n": None})
    assert read_mapping(tmp_path / "a.yaml", {"n": int}) == {"n": 1} and read_mapping(tmp_path / "a.json")["n"] is None
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_mapping(tmp_path / "b.yaml")
