"""Verbs whose `out` is a URL: what they make lies there, and another machine goes on from it."""

from pathlib import Path

import fsspec
import pytest
import torch
from test_annotate import config as annotate_config
from test_annotate import make_shards
from test_train import config, weights

from ldm_sg.errors import InputError
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.train import train


def files(url: str) -> set[str]:
    fs, path = fsspec.core.url_to_fs(url)
    return {file.removeprefix(path).lstrip("/") for file in fs.find(path)}


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another machine: another cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


@pytest.mark.parametrize("scheme", ["memory://runs", "file://{}/store"])
def test_a_run_goes_on_on_another_machine(
    scheme: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{scheme.format(tmp_path)}/run"
    whole = train(config(colours, tmp_path / "whole"))
    first = train(config(colours, url, steps=5, checkpoint_every=2))  # type: ignore[arg-type]
    assert {"checkpoints/last.ckpt", "config.yaml", "pipeline/model_index.json", "metrics.csv"} <= files(url)
    assert not any(".tmp-" in name or ".lock" in name for name in files(url))
    elsewhere(tmp_path, monkeypatch, "second")
    second = train(config(colours, url))  # type: ignore[arg-type]
    assert second != first
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    elsewhere(tmp_path, monkeypatch, "cache")  # the first one again: what it has is older than what lies there
    assert train(config(colours, url)) == first  # type: ignore[arg-type]
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(whole).items())


def test_each_checkpoint_is_copied(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_sg.mirror import Mirror

    pushed: list[bool] = []
    push = Mirror.push
    monkeypatch.setattr(
        Mirror, "push", lambda self: (push(self), pushed.append((Path(self.path) / "metrics.csv").is_file()))
    )
    train(config(colours, f"file://{tmp_path}/run", steps=6, checkpoint_every=2))  # type: ignore[arg-type]
    assert pushed == [True] * 4  # at 2, 4, 6 and the end


def test_a_set_made_there_can_be_learnt_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, source = f"file://{tmp_path}/store/set", make_shards(tmp_path / "source")
    here = annotate(annotate_config(tmp_path, source))
    annotate(annotate_config(tmp_path, source, out=url))
    mine = {str(p.relative_to(here)): p.read_bytes() for p in (here / "shards").iterdir()}
    assert {name: (tmp_path / "store" / "set" / name).read_bytes() for name in mine} == mine
    assert not any(name.startswith("work/") for name in files(url))
    elsewhere(tmp_path, monkeypatch, "second")
    again = annotate(annotate_config(tmp_path, source, out=url))  # is there already
    assert (again / "manifest.yaml").read_bytes() == (tmp_path / "store" / "set" / "manifest.yaml").read_bytes()
    small = {"batch_size": 4, "steps": 2, "block_shards": 1, "warmup": 0}
    runs = [train(config(place, tmp_path / name, **small)) for place, name in ((url, "afar"), (here, "near"))]  # type: ignore[arg-type]
    assert all(torch.equal(value, weights(runs[1])[name]) for name, value in weights(runs[0]).items())


@pytest.mark.parametrize(
    ("url", "message"),
    [("https://host/run", "cannot be written to"), ("s3://bucket/run", "s3fs"), ("nope://x/run", "not known"), ("pipe:cat", "cannot be written")],
)  # fmt: skip
def test_places_that_cannot_be_written_are_told_at_once(url: str, message: str, colours: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(config(colours, url))  # type: ignore[arg-type]


def test_several_processes_need_a_folder(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="several processes share one folder"):
        train(config(colours, "memory://runs/many"))  # type: ignore[arg-type]


def test_a_store_that_refuses_is_one_line(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=r"cannot be written: .*; what was made lies in .*the same command goes on"):
        train(config(colours, f"file://{tmp_path}/store/run"))  # type: ignore[arg-type]


def test_a_pull_that_is_cut_off_is_made_again_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, source = f"file://{tmp_path}/store/set", make_shards(tmp_path / "source")
    first = annotate(annotate_config(tmp_path, source, out=url))
    there = {name: (tmp_path / "store" / "set" / name).read_bytes() for name in files(url)}
    elsewhere(tmp_path, monkeypatch, "second")
    local = type(fsspec.filesystem("file"))
    with monkeypatch.context() as patch:
        whole = local.get_file

        def cut_off(self, rpath: str, lpath: str, **kwargs) -> None:
            if "shards" in rpath:
                Path(lpath).write_bytes(b"half")
                raise OSError("the network is gone")
            whole(self, rpath, lpath, **kwargs)

        patch.setattr(local, "get_file", cut_off)
        with pytest.raises(InputError, match="cannot be read: the network is gone"):
            annotate(annotate_config(tmp_path, source, out=url))
    again = annotate(annotate_config(tmp_path, source, out=url))
    assert again != first and all(
        (again / name).read_bytes() == data for name, data in there.items() if name != ".state"
    )
    assert {name: (tmp_path / "store" / "set" / name).read_bytes() for name in files(url)} == there
    fsspec.filesystem("file").rm(f"{tmp_path}/store/set", recursive=True)
    annotate(annotate_config(tmp_path, source, out=url))  # what was sent before is gone: it is sent again
    assert files(url) == there.keys()
