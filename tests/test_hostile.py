"""Shards and manifests of somebody else's: nothing is run, nothing is lost in silence, memory and folders have bounds."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
import threading
import time
import tracemalloc
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import photo
from safetensors.torch import load_file, save_file
from test_annotate import annotate, annotate_shards, config, make_shards

from ldm_sg.annotate.clusters import Clusters
from ldm_sg.annotate.kinds import KINDS, load_f, save_annotator
from ldm_sg.annotate.stego import Head
from ldm_sg.annotate.stream import ahead
from ldm_sg.config import AnnotatorConfig
from ldm_sg.data import images, shards, tars
from ldm_sg.data.latents import LatentSet, read_manifest, write_manifest
from ldm_sg.data.pool import decoder_pool
from ldm_sg.data.shards import INDEX, Damage, ShardWriter, expand, read_shard
from ldm_sg.errors import InputError
from ldm_sg.report.annotation import write_report
from ldm_sg.verbs.pack import pack


def read(url: str) -> tuple[list[str], list[tuple[str, str, str]]]:
    skipped: list[tuple[str, str, str]] = []
    return [sample.key for sample in read_shard(url, lambda *entry: skipped.append(entry))], skipped


def tar_of(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def server(monkeypatch):
    """`server(answers)` -> URL; answers[path] are bytes one a try (the last one stays), sent without a length; `requests`."""
    monkeypatch.setattr(shards, "PAUSES", (0, 0.01, 0))
    requests: list[str] = []
    answers: dict[str, list[bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            tries = answers.get(self.path)
            self.send_response(200 if tries else 404)
            html = bool(tries) and tries[0].startswith(b"<html>")
            self.send_header("Content-Type", "text/html; charset=utf-8" if html else "application/octet-stream")
            self.end_headers()
            if tries:
                self.wfile.write(tries.pop(0) if len(tries) > 1 else tries[0])

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()

    def serve(content: dict[str, list[bytes]]) -> str:
        answers.update(content)
        return f"http://127.0.0.1:{httpd.server_port}"

    serve.requests = requests  # type: ignore[attr-defined]
    yield serve
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    cfg = config(folder, make_shards(folder / "source"))
    return cfg, annotate(cfg)


def test_a_planted_command_is_never_run(finished, tmp_path):
    cfg, out = finished
    manifest, hit = read_manifest(out), tmp_path / "HIT"
    real = manifest["shards"][0]["url"]
    assert Path(real).is_file()
    for planted in (
        f"pipe:touch {hit}; cat {real}",
        f"http://127.0.0.1:9/x'; touch {hit}; '",
        f"gs://x'; touch {hit}; '",
    ):
        manifest["shards"][0]["url"] = planted
        write_manifest(out, manifest)
        (out / "report.html").unlink()
        with pytest.raises(InputError):
            write_report(out)
        annotate(cfg)  # the shards are those that its user names
        assert (out / "report.html").is_file() and not hit.exists()
    with pytest.raises(InputError, match="is a command out of a file: only one that you name yourself is run"):
        read(f"pipe:touch {hit}")
    assert read(*expand(f"pipe:touch {hit}; cat {real}"))[0] and hit.exists()  # a person's own


def test_a_piped_set_can_be_annotated(tmp_path):
    make_shards(tmp_path / "source", shards=1)
    cfg = config(tmp_path, f"pipe:cat {tmp_path}/source/000000.tar")
    out = annotate(cfg)
    assert len(LatentSet(out)) == 9 and (out / "clusters").is_dir()
    assert annotate(cfg) == out


def test_a_shard_that_breaks_off_is_fetched_again_and_nothing_is_lost_or_doubled(tmp_path, server, capsys):
    whole = Path(
        tar_of(tmp_path / "x.tar", {f"{i}.{e}": b"1" * 700 for i in range(9) for e in ("png", "mask.png")})
    ).read_bytes()
    good = read(str(tmp_path / "x.tar"))
    assert good == ([str(i) for i in range(9)], [])
    # within the fifth sample between its two files, then a page, then earlier than before, then whole
    url = server({"/x.tar": [whole[: 9 * 1536 + 100], b"<html>503</html>", whole[:3000], whole]}) + "/x.tar"
    assert read(url) == good
    assert capsys.readouterr().err.count("fetched again") == 3
    masks = [s.mask for s in read_shard(server({"/x.tar": [whole[: 9 * 1536], whole]}) + "/x.tar", lambda *_: None)]
    assert masks == [b"1" * 700] * 9


def test_a_shard_that_stays_cut_is_told_with_what_is_lost(tmp_path, server):
    whole = Path(tar_of(tmp_path / "x.tar", {f"{i}.png": b"1" * 700 for i in range(9)})).read_bytes()
    index = json.dumps({"file": "x.tar", "images": 9, "skipped": 0}).encode() + b"\n"
    base = server(
        {"/a/x.tar": [whole[:5500]], f"/a/{INDEX}": [index], "/b/x.tar": [whole[:5500]], "/c/x.tar": [b"<html>"]}
    )
    keys, skipped = read(f"{base}/a/x.tar")
    assert keys == ["0", "1", "2"] and len(skipped) == 6 and all(isinstance(reason, Damage) for *_, reason in skipped)
    assert "3 images before the damage are used, 6 of its 9 are lost: " in skipped[0][2]
    assert [len(server.requests), server.requests.count("/a/x.tar")] == [5, 4]
    keys, skipped = read(f"{base}/b/x.tar")
    assert keys == ["0", "1", "2"] and len(skipped) == 1 and "how many are lost is not known" in skipped[0][2]
    assert "HTML page" in read(f"{base}/c/x.tar")[1][0][2]
    with pytest.raises(InputError, match="cannot be opened: HTTP Error 404"):
        read(f"{base}/none.tar")
    (tmp_path / INDEX).write_bytes(index)  # a local one: not fetched again
    (tmp_path / "x.tar").write_bytes(whole[:-10240])
    assert len(read(str(tmp_path / "x.tar"))[1]) == 9 - len(read(str(tmp_path / "x.tar"))[0])
    (tmp_path / "x.tar").write_bytes(whole[: 9 * 1536])  # the end mark alone is missing
    assert read(str(tmp_path / "x.tar")) == ([str(i) for i in range(9)], [])


def test_annotate_fails_on_damage_after_the_other_shards_unless_allowed(tmp_path, server, monkeypatch):
    make_shards(tmp_path / "source", shards=3)
    files = sorted((tmp_path / "source").iterdir())
    half = files[0].read_bytes()[: files[0].stat().st_size // 2]
    index = "".join(json.dumps({"file": file.name, "images": 9}) + "\n" for file in files).encode()
    base = server(
        {f"/{files[0].name}": [half], f"/{INDEX}": [index]} | {f"/{f.name}": [f.read_bytes()] for f in files[1:]}
    )
    cfg = config(tmp_path, base + "/{000000..000002}.tar", max_skipped=0.3)
    with pytest.raises(
        InputError, match=r"1 of 3 shards failed, the others are done; .*/000000\.tar: damaged tar, 5 .*4 of its 9"
    ):
        annotate_shards(cfg)
    assert len(list((tmp_path / "set" / "work").glob("*.json"))) == 2 and not list(tmp_path.rglob("*.tmp-*"))
    cfg.allow_damaged = True
    out = annotate_shards(cfg)
    assert len(LatentSet(out)) == 23
    manifest = yaml.safe_load((out / "manifest.yaml").read_text())
    assert (manifest["num_images"], manifest["num_skipped"]) == (23, 4)
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 4
    cfg.out, cfg.max_skipped = str(tmp_path / "two"), 0.1
    with pytest.raises(InputError, match=r"4 of 27 images cannot be used, more than max_skipped=0\.1"):
        annotate_shards(cfg)


def test_pack_refuses_damage_unless_allowed(tmp_path, server):
    make_shards(tmp_path / "source", shards=1)
    data = (tmp_path / "source" / "000000.tar").read_bytes()
    url = server({"/a.tar": [data[: len(data) // 2]]}) + "/a.tar"
    with pytest.raises(InputError, match=r"a\.tar: damaged tar, 5 images .* --allow-damaged"):
        pack(url, tmp_path / "dst", size=16, workers=0)
    assert not list((tmp_path / "dst").glob("*.tar*"))
    assert pack(url, tmp_path / "dst", size=16, workers=0, allow_damaged=True, max_skipped=0.5).images == 5


def test_who_stops_does_not_wait_for_a_server_that_hangs():
    answered, read_on = threading.Event(), threading.Event()

    def hangs():
        yield 0
        answered.wait()
        read_on.set()

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), closing(ahead(hangs())) as source:
        next(source)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10
    answered.set()
    assert read_on.wait(10)


def test_no_file_is_larger_in_memory_than_it_may_be(tmp_path):
    sparse = tmp_path / "big"
    with sparse.open("wb") as file:
        file.truncate(5 * 2**30)
    subprocess.run(
        [
            "tar",
            "--sparse",
            "--format=gnu",
            "-cf",
            tmp_path / "s.tar",
            "--transform=s/big/a.png/",
            "-C",
            tmp_path,
            "big",
        ],
        check=True,
    )
    sparse.unlink()
    with (
        gzip.open(tmp_path / "b.tar.gz", "wb", compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for name, size in (("b.png", 2**26 + 1), ("c.cls", 2**21), ("c.png", 1), ("d.txt", 2**21), ("d.png", 1)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, Zeros())
    tracemalloc.start()
    keys, skipped = read(str(tmp_path / "s.tar"))
    assert keys == [] and skipped[0][1:] == ("a", "png: a sparse file")
    keys, skipped = read(str(tmp_path / "b.tar.gz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert keys == ["d"] and peak < 2**25
    assert skipped == [
        (str(tmp_path / "b.tar.gz"), "b", "png: 67,108,865 bytes, more than 67,108,864"),
        (str(tmp_path / "b.tar.gz"), "c", "cls: 2,097,152 bytes, more than 1,048,576"),
    ]
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 3 * 2**30
    (tmp_path / "n.tar").write_bytes(name.tobuf() + b"x" * 5000)
    assert "a name of 3,221,225,472 bytes" in read(str(tmp_path / "n.tar"))[1][0][2]
    (tmp_path / "r.tar").write_bytes(
        tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT).replace(b"0000644", b"0000644") + longlinks(3000)
    )
    assert "damaged tar" in read(str(tmp_path / "r.tar"))[1][0][2]  # names of names of names: no RecursionError


class Zeros(io.RawIOBase):
    def read(self, size=-1):
        return bytes(size)


def longlinks(n: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    return (info.tobuf() + b"a\0".ljust(512, b"\0")) * n


def test_keys_that_lead_elsewhere_are_refused(tmp_path):
    names = ["../../escape.png", "/etc/absolute.png", "a/../../b.png", "good/..hidden/x.png", "a..b/c.png"]
    url = tar_of(tmp_path / "x.tar", dict.fromkeys(names, b"1"))
    keys, skipped = read(url)
    assert keys == ["a..b/c"] or keys == ["good/..hidden/x", "a..b/c"]
    assert [key for _, key, _ in skipped] == ["../../escape", "/etc/absolute", "a/../../b"]
    assert all("leads out" in reason for *_, reason in skipped)
    with pytest.raises(InputError, match="leads out"), ShardWriter(tmp_path / "y.tar") as writer:
        writer.write("../y", {"png": b"1"})
    assert not (tmp_path / "y.tar").exists()


def test_odd_labels_are_told(tmp_path):
    files = {
        "a.png": b"1",
        "a.json": b"[" * 200_000,
        "b.png": b"1",
        "b.cls": b"9" * 20,
        "c.png": b"1",
        "c.cls": b"9" * 9999,
    }
    files |= {"d.png": b"1", "d.json": b"\xff", "e.png": b"1", "e.cls": b"-1"}
    keys, skipped = read(tar_of(tmp_path / "x.tar", files))
    assert keys == ["e"] and [key for _, key, _ in skipped] == ["a", "b", "c", "d"]
    assert all(reason.startswith("unreadable cls or json") and "\n" not in reason for *_, reason in skipped)
    assert tars.MOST_TEXT == 2**20


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    inside, most = [], []

    def slow(image):
        inside.append(me := object())  # two images would be compared, pixel by pixel and thread by thread
        time.sleep(0.02)
        most.append(len(inside))
        inside.remove(me)
        return image

    monkeypatch.setattr(images, "to_rgb", slow)
    large, small = photo(1, (90, 90)), photo(1, (40, 40))
    monkeypatch.setattr(images, "LARGE", 50 * 50)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(images.decode, [large] * 8))
        assert max(most) == 1
        list(pool.map(images.decode, [small] * 8))
    assert max(most) > 1


def test_the_lock_of_large_images_is_one_for_all_processes_of_a_pool():
    lock = "__import__('ldm_sg.data.images', fromlist=['images'])._large.__class__.__module__"
    with decoder_pool(1) as pool:
        assert pool.submit(eval, lock).result() == "multiprocessing.synchronize"


def test_an_annotators_state_sets_only_what_it_declares(finished, tmp_path):
    _, out = finished
    folder = shutil.copytree(out / "annotator", tmp_path / "annotator")
    settings = yaml.safe_load((folder / "annotator.yaml").read_text())
    for state in ({"k": 3, "annotate": 1}, {"k": -3}, {"k": "3"}, {"k": [3]}, {"__class__": 1}):
        (folder / "annotator.yaml").write_text(yaml.safe_dump(settings | {"state": state}))
        with pytest.raises(InputError, match=r"not what clusters keep there"):
            load_f(folder)


def damaged_f(kind: str, folder: Path) -> Path:
    """An annotator/ of 4 clusters or classes in 6 dimensions."""
    made = KINDS[kind](AnnotatorConfig(kind=kind, k=4))
    if isinstance(made, Clusters):
        made.centroids = torch.rand(4, 6)
    if kind == "boxes":
        made.mean = torch.rand(6, 2, 2)
    if kind == "neighbours":
        made.bank = torch.rand(5, 6)
    if kind in ("centroids", "neighbours"):
        made.k, made.dim = 0, 6
    if kind == "segments":
        made.centroids, made.head = torch.rand(4, 3), Head(6, 3)
        made.means = torch.rand(4, 6)
    save_annotator(folder, made, None)
    settings = yaml.safe_load((folder / "annotator.yaml").read_text())
    (folder / "annotator.yaml").write_text(yaml.safe_dump(settings | {"features": {"dim": 6}}))
    load_f(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("clusters", "centroids", "centroids"),
        ("boxes", "centroids", "centroids"),
        ("boxes", "mean_key", "key"),
        ("centroids", "centroids", "centroids"),
        ("neighbours", "bank", "features"),
        ("segments", "segments", "centroids"),
        ("segments", "segments", "prototypes"),
        ("segments", "segments", "head.linear.weight"),
    ],
)
def test_a_damaged_f_is_one_line(kind: str, file: str, name: str, tmp_path: Path) -> None:
    path = damaged_f(kind, tmp_path / "annotator") / f"{file}.safetensors"
    tensors, data = load_file(path), path.read_bytes()
    value = tensors.pop(name)
    changes = {"NaN": value * torch.nan, "flat": value[..., 0], "empty": value[:0]}
    changes |= {"wider": torch.cat([value, value[:, :1]], 1)} if name != "key" else {}
    changes |= {} if name.startswith(("head", "prototypes")) else {"whole": value.long(), "missing": None}
    for what, changed in changes.items():
        if what == "wider" and (name == "prototypes" or what == name):
            continue
        save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, path)
        with pytest.raises(InputError) as said:
            load_f(tmp_path / "annotator")
        assert path.name in str(said.value) and str(said.value).endswith("; annotate again"), what
    for cut in (b"", data[: len(data) // 2]):
        path.write_bytes(cut)
        with pytest.raises(InputError, match="damaged or not complete"):
            load_f(tmp_path / "annotator")


def test_pack_tells_what_it_enlarged(tmp_path, capsys):
    make_shards(tmp_path / "source", shards=1)
    pack(tmp_path / "source", tmp_path / "dst", size=48, workers=0)
    assert ", 9 enlarged: they were smaller" in capsys.readouterr().out
    pack(tmp_path / "source", tmp_path / "same", size=32, workers=0)
    assert "enlarged" not in capsys.readouterr().out
