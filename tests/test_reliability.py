"""kill -9 at random moments, and files that are damaged at random: what docs/reliability.md counts. KILLS and FUZZ say how many."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_annotate import config, make_shards, png
from test_executor import contents
from test_train import config as train_config
from test_train import weights

from ldm_sg.annotate.kinds import load_f
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.config import AnnotateConfig, AnnotatorConfig
from ldm_sg.configfile import load, to_yaml
from ldm_sg.data.images import BadImage, decode
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter, read_shard
from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping
from ldm_sg.training.checkpoint import read_checkpoint
from ldm_sg.weights import read_weights

pytestmark = pytest.mark.slow
KILLS, FUZZ = int(os.environ.get("KILLS", 5)), int(os.environ.get("FUZZ", 100))


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen]:
    command = [sys.executable, str(Path(__file__).with_name("zygote.py")), "zygote"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


def survives(zygote: subprocess.Popen, args: list[str], out: Path, look: Callable[[], object]) -> tuple[int, int]:
    """The command into `out`, killed at KILLS random moments, until it is through; again from the start where that takes fewer.
    What it makes is always what it makes undisturbed. Returns the kills and how often it came through."""

    def run(after: float | None) -> dict:
        asked = {"args": args, "after": after, "log": str(out.with_suffix(".log"))}
        print(json.dumps(asked), file=zygote.stdin, flush=True)
        return json.loads(zygote.stdout.readline())

    whole = run(None)
    assert whole["code"] == 0, out.with_suffix(".log").read_text()[-2000:]
    wanted, chance, kills, through = look(), random.Random(0), 0, 0
    shutil.rmtree(out)
    while kills < KILLS or out.exists():
        done = run(chance.uniform(0, whole["seconds"]) if kills < KILLS else None)
        kills += done["killed"]
        if not done["killed"]:
            assert done["code"] == 0, out.with_suffix(".log").read_text()[-2000:]
            assert look() == wanted
            through += 1
            shutil.rmtree(out)
    print(
        f"{out.name}: {kills} kills, {through} times through, each equal to the undisturbed one of {whole['seconds']:.1f} s"
    )
    return kills, through


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fit", ["sample", "stream"])
def test_annotate_is_killed(zygote: subprocess.Popen, processes: int, fit: str, tmp_path: Path) -> None:
    shards, out = make_shards(tmp_path / "source", 12, 20), tmp_path / "set"
    f = AnnotatorConfig(k=3, fit=fit, sample=1000 if fit == "sample" else 50, niter=20)
    wanted = config(tmp_path, shards, out=str(out), processes=processes, annotator=f)
    (tmp_path / "c.yaml").write_text(to_yaml(wanted))
    assert survives(zygote, ["annotate", str(tmp_path / "c.yaml")], out, lambda: contents(out))[0] == KILLS


@pytest.mark.parametrize("ranks", [1, 2])
def test_train_is_killed(zygote: subprocess.Popen, ranks: int, colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wanted = train_config(colours, out, steps=60, checkpoint_every=7, val_every=30, devices=ranks)
    (tmp_path / "c.yaml").write_text(to_yaml(wanted))

    def look() -> dict[str, bytes]:
        return {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "pipeline").rglob("*")) if p.is_file()}

    assert survives(zygote, ["train", str(tmp_path / "c.yaml")], out, look)[0] == KILLS


def test_ranks_that_come_and_go_train_what_one_does(zygote: subprocess.Popen, colours: Path, tmp_path: Path) -> None:
    """200 steps as one rank, as two, and as 1 -> 2 -> 1 with a kill at each change: the same weights, up to the order of sums."""

    def go(out: str, ranks: int, until: int) -> None:
        wanted = train_config(colours, tmp_path / out, steps=200, checkpoint_every=10, val_every=100, devices=ranks)
        (tmp_path / "c.yaml").write_text(to_yaml(wanted))
        with (tmp_path / "log").open("a") as log:
            command = [sys.executable, str(Path(__file__).with_name("zygote.py")), "train", str(tmp_path / "c.yaml")]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        last, deadline = tmp_path / out / "checkpoints" / "last.ckpt", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if until < 200 and last.is_file() and read_checkpoint(last)["global_step"] >= until:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)
        assert process.wait() == (-signal.SIGKILL if until < 200 else 0), (tmp_path / "log").read_text()[-2000:]

    for out, stages in {"one": [(1, 200)], "two": [(2, 200)], "changing": [(1, 60), (2, 130), (1, 200)]}.items():
        for ranks, until in stages:
            go(out, ranks, until)
    one, *others = (weights(tmp_path / out) for out in ("one", "two", "changing"))
    for other in others:
        gaps = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
        print(
            f"200 steps: largest gap {gaps.max():.1e}, mean {gaps.mean():.1e} of weights of {torch.cat([w.abs().flatten() for w in one.values()]).mean():.1e}"
        )
        assert gaps.max() < 2e-2 and gaps.mean() < 1e-4


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bits turned, a piece cut out, doubled, blanked or cut off."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(found) or 1), chance.choice([1, 4, 64, 1024])
        kind = chance.randrange(5)
        if kind == 0 and found:
            for _ in range(length // 4 + 1):
                found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = found[at : at + length]
        elif kind == 3:
            found[at : at + length] = bytes(min(length, len(found) - at))
        else:
            del found[max(1, at) :]
    return bytes(found)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bytes, Callable[[Path], object]]]:
    """What is read -> name, good content, and what reads it."""
    folder = tmp_path_factory.mktemp("fuzz")
    made = annotate_shards(config(folder, make_shards(folder / "source", 1, 6), out=str(folder / "set")))
    for kind in ("JPEG", "WEBP", "PNG"):
        photo = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(photo).save(folder / f"a.{kind.lower()}")
    with ShardWriter(folder / "a.tar") as writer:
        for i in range(6):
            meta = json.dumps({"boxes": [[0, 0, 4, 4]]}).encode()
            writer.write(f"{i:03d}", {"png": png(i), "cls": b"3", "json": meta})
    torch.save({"state_dict": {"a": torch.ones(3, 4)}}, folder / "a.ckpt")

    (folder / "a.json").write_text(json.dumps({"a": [{"b": i} for i in range(9)]}))
    (folder / "a.yaml").write_text(to_yaml(config(folder, "a", out="b")))

    def image(path: Path) -> None:
        decode(path.read_bytes(), "a")

    def shard(path: Path) -> None:
        skipped: list[str] = []
        for sample in read_shard(str(path), lambda *entry: skipped.append(entry[2])):
            decode(sample.image, sample.key)
        if skipped:
            raise BadImage(skipped[0], "")

    def beside(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
        """Of a whole annotation set or annotator one file is damaged."""

        def reads(path: Path) -> object:
            copy = path.with_name("copy")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(made, copy)
            shutil.copy(path, copy / name)
            return read(copy)

        return reads

    def whole_set(copy: Path) -> None:
        latents = LatentSet(copy)
        latents.latents(torch.arange(len(latents)))
        latents.features()

    readers: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "jpeg": (folder / "a.jpeg", image),
        "webp": (folder / "a.webp", image),
        "png": (folder / "a.png", image),
        "tar": (folder / "a.tar", shard),
        "yaml": (folder / "a.yaml", lambda p: load(AnnotateConfig, p)),
        "json": (folder / "a.json", lambda p: read_mapping(p, {"a": [{"b": int}]})),
        "safetensors": (made / "annotator" / "centroids.safetensors", read_weights),
        "torch file": (folder / "a.ckpt", lambda p: (read_weights(p), read_weights(p, inert=True), read_checkpoint(p))),
        "manifest": (made / "manifest.yaml", beside("manifest.yaml", whole_set)),
        "shards.jsonl": (made / "shards.jsonl", beside("shards.jsonl", whole_set)),
        "features": (next((made / "features").glob("*.npy")), beside("features/000000.npy", whole_set)),
        "annotator": (made / "annotator" / "annotator.yaml", beside("annotator/annotator.yaml", lambda c: load_f(c / "annotator"))),
        "centroids": (made / "annotator" / "centroids.safetensors", beside("annotator/centroids.safetensors", lambda c: load_f(c / "annotator"))),
    }  # fmt: skip
    return {kind: (path.name, path.read_bytes(), read) for kind, (path, read) in readers.items()}


@pytest.mark.parametrize(
    "kind",
    ["jpeg", "webp", "png", "tar", "yaml", "json", "safetensors", "torch file", "manifest", "shards.jsonl", "features",
     "annotator", "centroids"],
)  # fmt: skip
def test_damaged_files_are_refused_or_read(kind: str, files: dict, tmp_path: Path) -> None:
    name, good, read = files[kind]
    read_it = refused = 0
    (tmp_path / name).write_bytes(good)
    read(tmp_path / name)
    for seed in range(FUZZ):
        (tmp_path / name).write_bytes(bad := damaged(good, random.Random(f"{kind} {seed}")))
        try:
            read(tmp_path / name)
            read_it += 1
        except (InputError, BadImage) as err:
            assert len(str(err)) < 2000 and "\n" not in str(err), (seed, err)
            refused += 1
        except BaseException as err:
            raise AssertionError(f"{kind}, seed {seed}: {type(err).__name__}: {err}; {bad[:200]!r}") from err
    assert refused > FUZZ // 20
    print(f"{kind}: {FUZZ} damaged files, {refused} refused, {read_it} read")
