"""Annotation sets behind a URL, and the order in blocks of shards that they are read in."""

import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_annotation_set
from test_train import config, weights

from ldm_sg.data import remote, tars
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.order import Blocks, drawn, split_shards
from ldm_sg.errors import InputError
from ldm_sg.training.data import LatentData, Steps
from ldm_sg.verbs.train import train

SHARDS, EACH = 12, 6


class Server(SimpleHTTPRequestHandler):
    """Serves a folder; `faults`: path -> what is done instead at its next requests: cut, 500, hang or a string of other bytes."""

    faults: dict[str, list[str]]
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        faults = self.faults.get(self.path) or [""]
        fault = faults.pop(0) if len(faults) > 1 else faults[0]
        data = Path(self.translate_path(self.path))
        if not fault:
            return super().do_GET()
        self.send_response(500 if fault == "500" else 200)
        self.send_header("Content-Length", str(data.stat().st_size))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data.read_bytes()[:1000])
        elif fault == "hang":
            time.sleep(3)
        elif fault == "other":
            self.wfile.write(bytes(data.stat().st_size))
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 images in 12 shards."""
    images = torch.rand(SHARDS * EACH, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    place = tmp_path_factory.mktemp("sets") / "set"
    return write_annotation_set(place, images, [i % 4 for i in range(len(images))], 4, each=EACH)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(remote, "PAUSES", (0, 0, 0))
    handler = type("Handler", (Server,), {"faults": {}, "requests": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    httpd.url, httpd.handler = f"http://127.0.0.1:{httpd.server_port}", handler  # type: ignore[attr-defined]
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def shard(number: int) -> str:
    return f"/shards/{number:06d}.tar"


def test_a_run_is_the_same_from_afar(folder: Path, server, tmp_path: Path) -> None:
    """With loader processes, and room for two of six blocks; the local copy never holds more than the room and a shard."""
    size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    room, most, stop = size * 5 // SHARDS, [0], threading.Event()
    cache = tmp_path / "cache" / "ldm_sg" / "sets"

    def watch() -> None:
        while not stop.wait(0.01):
            there = [p.stat().st_size for p in cache.rglob("shards/*.tar") if p.exists()]
            most[0] = max(most[0], sum(there))

    here = train(config(folder, tmp_path / "here", block_shards=2))
    threading.Thread(target=watch, daemon=True).start()
    there = train(config(server.url, tmp_path / "there", block_shards=2, cache_gb=room / 1e9, workers=2))  # type: ignore[arg-type]
    stop.set()
    assert most[0] <= room + 2 * size / SHARDS
    for name, value in weights(here).items():
        assert torch.equal(value, weights(there)[name]), name


def test_every_shard_is_fetched_once_where_there_is_room(folder: Path, server) -> None:
    here = LatentSet(folder)
    for there in (LatentSet(server.url), LatentSet(server.url)):
        every = torch.arange(len(here))
        assert torch.equal(there.latents(every), here.latents(every))
        assert torch.equal(there.guidance(every).k, here.guidance(every).k)
    fetched = [path for path in server.handler.requests if path.startswith("/shards/")]
    assert sorted(fetched) == [shard(i) for i in range(SHARDS)]


def test_a_cut_transfer_is_fetched_again(folder: Path, server, capsys: pytest.CaptureFixture[str]) -> None:
    server.handler.faults = {shard(0): ["cut", ""], shard(1): ["500", "other", ""], "/manifest.yaml": ["500", ""]}
    there, at = LatentSet(server.url), torch.arange(2 * EACH)
    assert torch.equal(there.latents(at), LatentSet(folder).latents(at))
    assert "fetched again" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["cut", "500", "hang", "other"])
def test_a_shard_that_stays_broken_is_named_in_bounded_time(fault: str, server, monkeypatch) -> None:
    monkeypatch.setattr(tars, "_PATIENCE", 0.2)
    server.handler.faults = {shard(3): [fault]}
    there, start = LatentSet(server.url), time.monotonic()
    with pytest.raises(InputError, match=r"000003\.tar.*4 times"):
        there.latents(torch.arange(3 * EACH, 4 * EACH))
    assert time.monotonic() - start < 10
    assert not list((there.folder / "shards").glob("*000003*"))


def test_what_is_no_set_is_refused(server, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing/manifest\.yaml.*404"):
        LatentSet(f"{server.url}/nothing")
    manifest = yaml.safe_load((folder / "manifest.yaml").read_text())
    for name, change, message in (
        ("old", {"files": None}, "lists no files"),
        ("escape", {"files": [{"file": "../../x", "bytes": 1, "sha256": "0"}]}, "leads out"),
        ("odd", {"files": [{"file": "annotator/annotator.yaml", "bytes": 1, "sha256": "0"}]}, "bytes of 1"),
    ):
        other = folder / name
        shutil.copytree(folder / "annotator", other / "annotator")
        (other / "manifest.yaml").write_text(yaml.safe_dump(manifest | change))
        with pytest.raises(InputError, match=message):
            LatentSet(f"{server.url}/{name}")
        shutil.rmtree(other)
    assert not (tmp_path / "x").exists()


def test_too_small_a_cache_is_refused(server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache_gb=1e-05: two blocks of block_shards=4"):
        train(config(server.url, tmp_path / "run", block_shards=4, cache_gb=1e-5))  # type: ignore[arg-type]


def test_another_set_at_the_same_place_is_noticed(server, folder: Path, tmp_path: Path) -> None:
    site = folder / "moving"
    shutil.copytree(folder, site, ignore=lambda at, names: ["moving"])
    run = train(config(f"{server.url}/moving", tmp_path / "run", steps=2, block_shards=2))  # type: ignore[arg-type]
    shutil.rmtree(site)
    write_annotation_set(site, torch.zeros(72, 3, 16, 16), [0] * 72, 4, each=EACH)
    with pytest.raises(InputError, match="changed under"):
        train(config(f"{server.url}/moving", run, steps=4, block_shards=2))  # type: ignore[arg-type]
    shutil.rmtree(site)


def blocks(counts: list[int], per: int) -> Blocks:
    sizes = np.array(counts)
    return Blocks(np.cumsum(sizes) - sizes, sizes, per)


@pytest.mark.parametrize(("counts", "per"), [([5] * 7, 2), ([1, 9, 0, 4, 4], 2), ([3], 4), ([2] * 9, 3), ([7, 1], 1)])
def test_blocks_have_every_image_once_an_epoch_and_few_shards_at_a_time(counts: list[int], per: int) -> None:
    pool, owner = blocks(counts, per), np.repeat(np.arange(len(counts)), counts)
    n = len(pool)
    stream = torch.cat([drawn(pool, 3, step, 4) for step in range(n)])  # four epochs
    assert torch.equal(pool[torch.arange(n)], torch.arange(n))
    epochs = stream.view(4, n)
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(n))
    assert n < 4 or not torch.equal(epochs[0], epochs[1])
    for place, image in enumerate(stream[: 3 * n].tolist()):
        now, after = pool.needed(place, 3)
        assert owner[image] in now and len(now) <= per and len(after) <= per
        if place + 1 < 3 * n:
            assert owner[stream[place + 1]] in {*now.tolist(), *after.tolist()}


def test_blocks_shared_out_to_ranks_that_change() -> None:
    pool = blocks([50] * 24, 4)
    alone = [request[2:] for request in Steps([(pool, 240)], 9, 10, 0, 0, 1)]
    for step, world in enumerate([1, 2, 120, 60, 3, 240, 8, 5, 16, 1]):
        ranks = [list(Steps([(pool, 240)], 9, step + 1, step, rank, world)) for rank in range(world)]
        assert sorted(i for [request] in ranks for i in request[2:]) == sorted(alone[step])


def test_held_out_images_of_blocks_are_whole_shards(folder: Path) -> None:
    mine, held_out = split_shards(np.array([EACH] * SHARDS), 0.2, 0)
    assert sorted([*mine, *held_out]) == list(range(SHARDS)) and len(held_out) == 3
    assert len(split_shards(np.array([4]), 0.5, 0)[1]) == 0 == len(split_shards(np.array([4, 4]), 0.0, 0)[1])
    data = LatentData(LatentSet(folder), config(folder, folder, block_shards=2, val_share=0.2), None)
    learnt = data.train_pool[torch.arange(len(data.train_pool))].tolist()
    assert sorted([*learnt, *data.val_pool.tolist()]) == list(range(SHARDS * EACH))
    assert {i // EACH for i in learnt}.isdisjoint({i // EACH for i in data.val_pool.tolist()})


def test_the_order_in_blocks_stays_what_it_is() -> None:
    """It may not change with a version of this project: resumed runs would see images twice."""
    assert drawn(blocks([100] * 10, 2), 0, 0, 6).tolist() == [313, 846, 865, 899, 890, 385]


def test_errors_of_a_stores_own_library_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class OfItsOwn(Exception): ...

    def refuse(*_: object, **__: object) -> None:
        raise OfItsOwn("no credentials")

    monkeypatch.setattr("fsspec.open", refuse)
    with pytest.raises(InputError, match=r"store://x: no finished annotation set.*no credentials"):
        train(config("store://x", tmp_path / "run"))  # type: ignore[arg-type]
