"""annotate from source shards to annotation set: content, resuming, refusals, memory, report."""

import dataclasses
import errno
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from ldm_sg.annotate import run, stage, stream
from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.annotate.stage import Stage, sample_features
from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.config import AnnotateConfig, AnnotatorConfig, FeaturesConfig
from ldm_sg.data.images import to_float
from ldm_sg.data.latents import LatentSet, read_manifest
from ldm_sg.data.photos import images_at
from ldm_sg.data.shards import ShardWriter, image_batches
from ldm_sg.data.signals import npy
from ldm_sg.errors import InputError
from ldm_sg.folder import write_bytes
from ldm_sg.report import annotation as report
from ldm_sg.verbs.annotate import annotate

SIZE = 32
COLOURS = [(220, 30, 30), (30, 200, 40), (40, 60, 230)]


def png(index: int) -> bytes:
    """A noisy picture whose colour is its class, index mod 3."""
    rng = np.random.default_rng(index)
    pixels = (
        np.array(COLOURS[index % 3]) + rng.normal(0, 25, (SIZE, SIZE, 3)) + np.linspace(-30, 30, SIZE)[None, :, None]
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_shards(folder: Path, shards: int = 2, each: int = 9, cls: bool = True) -> str:
    for s in range(shards):
        with ShardWriter(folder / f"{s:06d}.tar") as writer:
            for i in range(s * each, (s + 1) * each):
                writer.write(f"image{i:04d}", {"png": png(i)} | ({"cls": str(i % 3).encode()} if cls else {}))
    return str(folder / "*.tar")


def config(tmp_path: Path, shards: str, **changes) -> AnnotateConfig:
    defaults = {
        "shards": shards,
        "out": str(tmp_path / "set"),
        "autoencoder": "patch4",
        "features": FeaturesConfig(batch_size=4, precision="fp32"),
        "annotator": AnnotatorConfig(k=3),
        "workers": 0,
        "device": "cpu",
    }
    return AnnotateConfig(**{**defaults, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[AnnotateConfig, Path]:
    """A finished set of 2 x 9 images with mirrored latents, decoded in another process."""
    folder = tmp_path_factory.mktemp("finished")
    cfg = config(folder, make_shards(folder / "source"), flips=True, workers=1)
    return cfg, annotate(cfg)


@pytest.fixture
def no_leftovers(tmp_path):
    """Nothing half-written stays, whatever happens."""
    yield
    assert not list(tmp_path.rglob("*.tmp*"))


def all_images(cfg: AnnotateConfig) -> tuple[list[str], torch.Tensor]:
    """Keys and images [N, 3, H, W] in [-1, 1] of the source shards."""
    shards = sorted(str(p) for p in Path(cfg.shards).parent.glob("*.tar"))
    batches = list(image_batches(shards, SIZE, 64, 0, lambda *_: None))
    return [key for batch in batches for key in batch.keys], to_float(torch.cat([batch.images for batch in batches]))


def test_latents_are_the_autoencoders_and_mirrored_ones_too(finished):
    cfg, out = finished
    latents, (keys, images) = LatentSet(out), all_images(cfg)
    autoencoder = load_autoencoder(out / "autoencoder")
    assert len(latents) == len(keys) == 18 and latents.latent_shape == (48, 8, 8)
    everything = torch.arange(18)
    assert torch.allclose(latents.latents(everything), autoencoder.encode(images), atol=4e-3)
    mirrored = latents.latents(everything, torch.ones(18, dtype=torch.bool))
    assert torch.allclose(mirrored, autoencoder.encode(images.flip(-1)), atol=4e-3)
    plain = latents.latents(everything)
    assert plain.mean().abs() < 0.05 and abs(plain.std() - 1) < 0.05  # patch4 comes without mean and std: measured here


def test_signals_are_what_the_saved_annotator_says_of_the_images(finished, tmp_path):
    cfg, out = finished
    moved = shutil.copytree(out / "annotator", tmp_path / "elsewhere" / "annotator")  # stands alone
    annotator = load_annotator(moved)
    _, images = all_images(cfg)
    latents = LatentSet(out)
    assert torch.equal(annotator(images).k, latents.signals.k)
    stored = np.concatenate([np.load(path) for path in sorted((out / "features").iterdir())])
    assert stored.dtype == np.float16
    assert torch.allclose(annotator.features(images), torch.from_numpy(stored).float(), atol=2e-2)


@pytest.mark.parametrize("name", ["annotator.yaml", "centroids.safetensors"])
def test_a_damaged_annotator_is_told(name, finished, tmp_path):
    folder = Path(shutil.copytree(finished[1] / "annotator", tmp_path / "annotator"))
    (folder / name).write_text("{")
    with pytest.raises(InputError, match="is damaged") as caught:
        load_annotator(folder)
    assert "\n" not in str(caught.value)


def test_manifest_tells_what_made_it(finished):
    _, out = finished
    manifest = yaml.safe_load((out / "manifest.yaml").read_text())
    assert manifest["features"]["name"] == "demo-g" and len(manifest["features"]["sha256"]) == 64
    assert sum(manifest["annotator"]["counts"]) == manifest["num_images"] == 18
    classes, ids = [i % 3 for i in range(18)], LatentSet(out).signals.k.tolist()
    assert manifest["annotator"]["classes"] == 3
    assert manifest["annotator"]["nmi"] == pytest.approx(normalized_mutual_info_score(classes, ids), abs=1e-4)
    assert manifest["annotator"]["ari"] == pytest.approx(adjusted_rand_score(classes, ids), abs=1e-4)
    assert manifest["guidance"]["num_labels"] == 3 and manifest["size"] == SIZE
    assert [entry["images"] for entry in read_manifest(out)["shards"]] == [9, 9]
    assert [Path(folder).name for folder in manifest["source"]] == ["source"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["annotator", "autoencoder", "clusters", "config.yaml", "features", "index", "manifest.yaml", "report.html",
         "shards", "shards.jsonl", "skipped.jsonl", "tally.npz"]
    )  # fmt: skip


def test_report_is_self_contained(finished):
    _, out = finished
    text = (out / "report.html").read_text()
    assert (
        not re.search(r"""(src|href)=["']?http""", text)
        and text.count("data:image/webp;base64,") == 3
        and "<script" not in text
    )
    assert "ldm-sg sample RUN --cluster 2" in text and 'href="#what-each-cluster-holds"' in text
    strips = sorted(path.name for path in (out / "clusters").iterdir())
    assert strips == ["000000.webp", "000001.webp", "000002.webp"]


def test_the_wall_shows_who_is_nearest_and_who_is_farthest(finished, monkeypatch):
    _, out = finished
    monkeypatch.setattr(report, "NEAR", 2)
    monkeypatch.setattr(report, "FAR", 1)
    features = np.concatenate([np.load(out / "features" / f"{i:06d}.npy") for i in range(2)]).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    centroids, ids = load_file(out / "annotator" / "centroids.safetensors")["centroids"], LatentSet(out).signals.k
    for k, groups in report.extremes(LatentSet(out), [0, 1, 2]).items():
        own = (ids == k).nonzero()[:, 0].tolist()
        order = sorted(own, key=lambda i: float(np.linalg.norm(features[i] - centroids[k].numpy())))
        assert groups == [group for group in (order[:2], order[2:][-1:]) if group]
    photos = images_at(LatentSet(out), [17, 0, 9], SIZE)
    assert list(photos) == [17, 0, 9]
    for i, photo in photos.items():
        assert np.array_equal(photo.permute(1, 2, 0), Image.open(io.BytesIO(png(i))))


def test_a_finished_set_returns_at_once(finished, monkeypatch):
    cfg, out = finished
    monkeypatch.setattr(run, "load_extractor", lambda *_: pytest.fail("did work again"))
    before = (out / "manifest.yaml").stat().st_mtime_ns
    assert annotate(cfg) == out and (out / "manifest.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"annotator": AnnotatorConfig(k=4)}, r"annotator\.k is 3 there and 4 here"),
        ({"features": FeaturesConfig(layer=2, precision="fp32")}, r"features\.layer"),
        ({"autoencoder": "patch2"}, "autoencoder is 'patch4' there and 'patch2' here"),
        ({"flips": False}, "flips"),
    ],
)
def test_a_folder_of_another_config_is_refused(finished, changes, key):
    cfg, _ = finished
    with pytest.raises(InputError, match=key):
        annotate_shards(AnnotateConfig(**{**vars(cfg), **changes}))


def test_other_shards_and_foreign_folders_are_refused(finished, tmp_path):
    cfg, _ = finished
    other = make_shards(tmp_path / "source")
    with pytest.raises(InputError, match="belongs to another config: shards"):
        annotate_shards(AnnotateConfig(**{**vars(cfg), "shards": other}))
    with pytest.raises(InputError, match="choose another folder"):
        annotate_shards(AnnotateConfig(**{**vars(cfg), "out": str(tmp_path / "source")}))


def test_resume_does_only_what_is_missing_and_gives_the_same_set(tmp_path, monkeypatch, no_leftovers):
    shards = make_shards(tmp_path / "source", shards=3)
    whole = annotate_shards(config(tmp_path, shards, out=str(tmp_path / "whole")))
    cfg = config(tmp_path, shards)
    finish = stage.StageWriter.finish

    def killed(self, skipped):
        if self.stage.index == 2:
            raise KeyboardInterrupt
        finish(self, skipped)

    monkeypatch.setattr(stage.StageWriter, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        annotate_shards(cfg)
    out = Path(cfg.out)
    assert Stage(out, 1).done and not Stage(out, 2).done and not (out / "manifest.yaml").exists()
    monkeypatch.setattr(stage.StageWriter, "finish", finish)
    seen = []
    monkeypatch.setattr(
        stream, "image_batches", lambda urls, *rest, **looks: seen.extend(urls) or image_batches(urls, *rest, **looks)
    )
    annotate_shards(cfg)
    assert [Path(url).name for url in seen] == ["000002.tar"]
    assert LatentSet(out).hash == LatentSet(whole).hash
    assert not (out / "work").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_replaced_source_shard_is_told(tmp_path, finished, monkeypatch, no_leftovers):
    cfg = config(tmp_path, make_shards(tmp_path / "source"))
    if finished:
        annotate_shards(cfg)
    else:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(run, "summarise", lambda *_: 1 / 0)
            annotate_shards(cfg)
    path = tmp_path / "source" / "000001.tar"
    data = path.read_bytes()
    path.write_bytes(data)  # another time, the same content
    annotate_shards(cfg) if finished else None
    path.write_bytes(data.replace(b"image0010", b"image0999"))
    with pytest.raises(InputError, match=r"source shard '.*000001\.tar' has changed since it was annotated"):
        annotate_shards(cfg)


def test_resume_while_writing_shards(tmp_path, monkeypatch, no_leftovers):
    shards = make_shards(tmp_path / "source")
    whole = annotate_shards(config(tmp_path, shards, out=str(tmp_path / "whole")))
    cfg = config(tmp_path, shards)
    write = run.write_shard

    def killed(which, *rest):
        if which.index == 1:
            raise KeyboardInterrupt
        write(which, *rest)

    monkeypatch.setattr(run, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        annotate_shards(cfg)
    first = Stage(Path(cfg.out), 0).tar.stat().st_mtime_ns
    monkeypatch.setattr(run, "write_shard", write)
    monkeypatch.setattr(stream, "image_batches", lambda *_, **__: pytest.fail("decoded again"))
    assert LatentSet(annotate_shards(cfg)).hash == LatentSet(whole).hash
    assert Stage(Path(cfg.out), 0).tar.stat().st_mtime_ns == first


def test_k_too_large_says_so_and_keeps_the_features(tmp_path, monkeypatch, no_leftovers):
    cfg = config(tmp_path, make_shards(tmp_path / "source"), annotator=AnnotatorConfig(k=19))
    with pytest.raises(InputError, match=r"annotator\.k=19: only 18 images"):
        annotate_shards(cfg)
    assert not (Path(cfg.out) / "manifest.yaml").exists()
    monkeypatch.setattr(stream, "image_batches", lambda *_, **__: pytest.fail("decoded again"))
    cfg.annotator.k = 18
    assert len(LatentSet(annotate_shards(cfg)).signals.k.unique()) == 18
    assert yaml.safe_load((Path(cfg.out) / "config.yaml").read_text())["annotator.k"] == 18


def test_bad_images_are_listed_and_fail_only_above_the_share(tmp_path, no_leftovers):
    with ShardWriter(tmp_path / "source" / "a.tar") as writer:
        for i in range(9):
            writer.write(f"good{i}", {"png": png(i)})
        writer.write("text", {"jpg": b"hello"})
    cfg = config(tmp_path, str(tmp_path / "source" / "*.tar"), max_skipped=0.05)
    with pytest.raises(InputError, match=r"1 of 10 images .* max_skipped=0\.05.*text: not an image"):
        annotate_shards(cfg)
    cfg.max_skipped = 0.1
    out = annotate_shards(cfg)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], Path(line["shard"]).name) for line in lines] == [("text", "a.tar")]
    assert len(LatentSet(out)) == 9


def test_a_cut_off_shard_keeps_its_good_members(tmp_path, no_leftovers):
    make_shards(tmp_path / "source")
    path = tmp_path / "source" / "000000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cfg = config(tmp_path, str(tmp_path / "source" / "*.tar"), max_skipped=0.2, allow_damaged=True)
    out = annotate_shards(cfg)
    assert 9 < len(LatentSet(out)) < 18
    assert "000000.tar" in (out / "skipped.jsonl").read_text()


def test_a_shard_without_images(tmp_path, no_leftovers):
    with ShardWriter(tmp_path / "source" / "a.tar") as writer:
        writer.write("note", {"txt": b"hello"})
    with pytest.raises(InputError, match="no image in"):
        annotate_shards(config(tmp_path, str(tmp_path / "source" / "*.tar")))
    make_shards(tmp_path / "source")
    with ShardWriter(tmp_path / "source" / "b.tar"):
        pass  # as img2dataset leaves it where no download succeeded
    wanted = config(tmp_path, str(tmp_path / "source" / "*.tar"), out=str(tmp_path / "two"), max_skipped=0.06)
    out = annotate_shards(wanted)  # 1 of 19: the note, which was to be an image
    assert len(LatentSet(out)) == 18 and (out / "skipped.jsonl").read_text().count("no image in this shard") == 2
    assert len(list((out / "shards").iterdir())) == 4  # one for each source shard


def test_missing_shards_and_devices(tmp_path):
    with pytest.raises(InputError, match="shards found at"):
        annotate_shards(config(tmp_path, str(tmp_path / "*.tar")))
    shards = make_shards(tmp_path / "source", shards=1)
    with pytest.raises(InputError, match="device"):
        annotate_shards(config(tmp_path, shards, device="gpu"))
    with pytest.raises(InputError, match=r"annotator\.kind.*clusters"):
        annotate_shards(config(tmp_path, shards, out=str(tmp_path / "b"), annotator=AnnotatorConfig(kind="cluster")))


def test_a_config_that_came_to_nothing_does_not_bind_the_folder(tmp_path, no_leftovers):
    shards = make_shards(tmp_path / "source", shards=1)
    with pytest.raises(InputError, match=r"features\.layer=7"):
        annotate_shards(config(tmp_path, shards, features=FeaturesConfig(layer=7)))
    assert len(LatentSet(annotate_shards(config(tmp_path, shards)))) == 9


def test_oracle_reads_classes_and_needs_no_g(tmp_path, monkeypatch, no_leftovers):
    monkeypatch.setattr(run, "load_extractor", lambda *_: pytest.fail("loaded g"))
    cfg = config(tmp_path, make_shards(tmp_path / "source"), annotator=AnnotatorConfig(kind="oracle"))
    out = annotate(cfg)
    latents = LatentSet(out)
    assert latents.signals.k.tolist() == [i % 3 for i in range(18)]
    assert latents.spec.kind == "oracle" and latents.spec.num_labels == 3
    with pytest.raises(InputError, match="reads no image"):
        load_annotator(out / "annotator")


def test_oracle_without_classes(tmp_path, no_leftovers):
    shards = make_shards(tmp_path / "source", cls=False)
    with pytest.raises(InputError, match=r"image0000 has no \.cls"):
        annotate_shards(config(tmp_path, shards, annotator=AnnotatorConfig(kind="oracle")))


def test_images_without_class_do_not_count_in_nmi(tmp_path):
    with ShardWriter(tmp_path / "source" / "a.tar") as writer:
        for i in range(12):
            writer.write(f"image{i:02d}", {"png": png(i)} | ({"cls": str(100 + i % 3).encode()} if i < 9 else {}))
    out = annotate_shards(config(tmp_path, str(tmp_path / "source" / "a.tar")))
    manifest, ids = yaml.safe_load((out / "manifest.yaml").read_text()), LatentSet(out).signals.k[:9].tolist()
    assert manifest["annotator"]["classes"] == 3 and sum(manifest["annotator"]["counts"]) == 12
    expected = normalized_mutual_info_score([i % 3 for i in range(9)], ids)
    assert manifest["annotator"]["nmi"] == pytest.approx(expected, abs=1e-4)


def test_reading_ahead_keeps_order_hands_on_errors_and_stops(tmp_path):
    def numbers():
        yield from range(5)
        raise InputError("broken")

    found = []
    with pytest.raises(InputError, match="broken"):
        found.extend(stream.ahead(numbers()))
    source = numbers()
    reader = stream.ahead(source, depth=1)
    next(reader)
    reader.close()
    assert list(source) == []  # closed with it
    assert threading.active_count() == 1 or not any(t.name.endswith("(run)") for t in threading.enumerate())


def test_number_of_images_is_guessed_from_the_first_shard(tmp_path):
    make_shards(tmp_path / "source", 3, 10)
    shards = sorted(str(path) for path in (tmp_path / "source").iterdir())
    assert abs(stream.expected_images(shards) - 30) <= 3
    assert stream.expected_images([*shards, "https://example.org/a.tar"]) is None


def test_full_disk(tmp_path, monkeypatch, no_leftovers):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    shards = make_shards(tmp_path / "source")
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Full() if ".latent.f16" in self.name else opened(self, *a, **k)
    )
    with pytest.raises(InputError, match=r"000000\.latent\.f16: .*No space left on device; .* left on its disk"):
        annotate_shards(config(tmp_path, shards))


def test_same_images_in_one_or_two_shards_give_the_same_latents(tmp_path):
    one = annotate_shards(config(tmp_path, make_shards(tmp_path / "a", 1, 18), out=str(tmp_path / "one")))
    two = annotate_shards(config(tmp_path, make_shards(tmp_path / "b", 2, 9), out=str(tmp_path / "two")))
    everything = torch.arange(18)
    assert torch.equal(LatentSet(one).latents(everything), LatentSet(two).latents(everything))


def test_features_for_the_fit_are_bounded_and_spread_over_shards(tmp_path):
    parts = [Stage(tmp_path, i) for i in range(4)]
    for i, part in enumerate(parts):
        write_bytes(part.features, npy(np.full((100, 2), i, np.float16)))
    assert len(sample_features(parts, [100] * 4, 1000, 0)) == 400
    some = sample_features(parts, [100] * 4, 80, 0)
    assert some.shape == (80, 2) and set(some[:, 0]) == {0, 1, 2, 3}
    assert np.array_equal(some, sample_features(parts, [100] * 4, 80, 0))


MEASURED = """
import resource, sys
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.config import AnnotateConfig, AnnotatorConfig, FeaturesConfig
annotate_shards(AnnotateConfig(shards=sys.argv[1] + "/*.tar", out=sys.argv[2], autoencoder="patch1", workers=0, device="cpu",
    features=FeaturesConfig(batch_size=32), annotator=AnnotatorConfig(k=3, sample=100)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    peaks = []
    for shards in (3, 30):
        source, out = tmp_path / f"source{shards}", tmp_path / f"set{shards}"
        make_shards(source, shards, 100)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(source), str(out)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]))
        assert len(LatentSet(out)) == 100 * shards
    assert peaks[1] < 1.1 * peaks[0], f"peak RSS in KiB: {peaks}"


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> tuple[Path, AnnotateConfig, Path, Path]:
    """Four shards; a finished set of the first two; the set of all four with its f and its first stage."""
    folder = tmp_path_factory.mktemp("more")
    shards = make_shards(folder / "source", 4)
    with ShardWriter(
        folder / "source" / "000002.tar"
    ) as writer:  # a class that the first ones lack, and a broken image
        for i in range(18, 26):
            writer.write(f"image{i:04d}", {"png": png(i), "cls": b"7"})
        writer.write("image0026", {"png": b"none", "cls": b"0"})
    cfg = config(folder, shards, max_skipped=0.1)
    first = annotate_shards(
        dataclasses.replace(cfg, shards=str(folder / "source" / "00000[01].tar"), out=str(folder / "two"))
    )
    own = dataclasses.replace(cfg.annotator, reuse=str(first))
    anew = dataclasses.replace(cfg, out=str(folder / "four"), annotator=own, autoencoder=str(first / "autoencoder"))
    return folder, cfg, first, annotate_shards(anew)


@pytest.mark.parametrize("stop", ["pass_over", "write_shards", "write_text", "finish_set", "nowhere"])
def test_shards_are_added_to_a_set_by_the_f_that_it_has(more, stop: str, tmp_path: Path, monkeypatch) -> None:
    """Byte for byte what annotating all of them with that f gives, though it is killed on the way; the old shards are not
    even opened for writing."""
    _, cfg, first, four = more
    out = shutil.copytree(first, tmp_path / "set")
    times = [path.stat().st_mtime_ns for path in sorted((out / "shards").iterdir())]
    cfg = dataclasses.replace(cfg, out=str(out))
    if stop != "nowhere":
        with monkeypatch.context() as patch:
            patch.setattr(run, stop, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                annotate_shards(cfg)
        with pytest.raises(InputError, match="not finished"):
            LatentSet(out)
        with pytest.raises(InputError, match="belongs to another config"):  # there is no way back
            annotate_shards(dataclasses.replace(cfg, shards=str(Path(cfg.shards).parent / "00000[01].tar")))
    assert annotate(cfg) == out and (out / "report.html").is_file() and not (out / "work").exists()
    names = [f"{i:06d}.tar" for i in range(4)]
    assert all((out / "shards" / n).read_bytes() == (four / "shards" / n).read_bytes() for n in names)
    assert [path.stat().st_mtime_ns for path in sorted((out / "shards").iterdir())][:2] == times
    ours, theirs = read_manifest(out), read_manifest(four)
    for manifest in (ours, theirs):
        for key in ("files", "features"):
            manifest.pop(key)
        manifest["annotator"].pop("reuse", None)
        manifest["autoencoder"] = None
    assert ours == theirs and ours["annotator"]["classes"] == 4 and ours["num_skipped"] == 1
    assert (out / "skipped.jsonl").read_bytes() == (four / "skipped.jsonl").read_bytes()
    again = dict(np.load(out / "tally.npz")), dict(np.load(four / "tally.npz"))
    assert again[0].keys() == again[1].keys() and all(
        np.array_equal(again[0][name], again[1][name]) for name in again[0]
    )
    assert np.array_equal(LatentSet(out).features(torch.arange(35)), LatentSet(four).features(torch.arange(35)))


def test_shards_are_not_added_where_signals_depend_on_all_images(more, tmp_path: Path) -> None:
    _, cfg, first, _ = more
    for kind in (AnnotatorConfig(kind="oracle"), AnnotatorConfig(k=3, shuffle=0.5)):
        small = dataclasses.replace(cfg, shards=str(Path(cfg.shards).parent / "000000.tar"), annotator=kind)
        out = annotate_shards(dataclasses.replace(small, out=str(tmp_path / kind.kind)))
        with pytest.raises(InputError, match="has the first 1 of these 4 shards"):
            annotate_shards(dataclasses.replace(cfg, out=str(out), annotator=kind))
        assert len(LatentSet(out)) == 9
    old = shutil.copytree(first, tmp_path / "old")
    (old / "tally.npz").unlink()
    with pytest.raises(InputError, match=r"older version.*annotator\.reuse="):
        annotate_shards(dataclasses.replace(cfg, out=str(old)))
