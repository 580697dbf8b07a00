"""annotate: source shards -> annotation set. One streaming pass decodes each image once for g and the autoencoder; then f
is fitted on the features and the annotated shards are written; the manifest comes last."""

import io
import itertools
import json
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from ldm_sg.annotate.annotator import KINDS, Annotator, fit, load_f, save_annotator
from ldm_sg.annotate.clusters import ari, contingency, entropy, nmi
from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.oracle import check_classes
from ldm_sg.annotate.stage import ShardMeta, Stage, StageWriter, stages, write_text
from ldm_sg.autoencoder import Autoencoder, load_autoencoder, measure_normalisation
from ldm_sg.config import AnnotateConfig, to_yaml
from ldm_sg.data.images import decode, to_float
from ldm_sg.data.latents import file_sha256, set_hash
from ldm_sg.data.pool import decoder_pool
from ldm_sg.data.shards import ShardWriter, expand, image_batches, read_shard
from ldm_sg.errors import InputError, choices
from ldm_sg.hardware import pick_device

CALIBRATION_IMAGES = 1000  # that an autoencoder without mean and std of its own is measured on
T = TypeVar("T")


def annotate_shards(cfg: AnnotateConfig) -> Path:
    """Make (or finish) the annotation set `cfg.out`. Raises InputError for anything wrong with the input; what is done
    until then stays, and the same command goes on from there."""
    if cfg.annotator.kind not in KINDS:
        raise InputError(f"annotator.kind={cfg.annotator.kind!r}; {choices(cfg.annotator.kind, KINDS)}")
    out, shards = Path(cfg.out), expand(cfg.shards)
    claim(out, cfg, shards)
    if (out / "manifest.yaml").is_file():
        return out
    all_stages = list(stages(out, len(shards)))
    device = pick_device(cfg.device)
    size = cfg.size or first_size(shards)
    autoencoder = prepare_autoencoder(cfg, out, shards, size, device)
    extractor = None if cfg.annotator.kind == "oracle" else load_extractor(cfg.features, device)
    extract(cfg, shards, all_stages, size, extractor, autoencoder)
    summary = summarise(all_stages, cfg.max_skipped, cfg.shards)
    if not (out / "annotator" / "annotator.yaml").is_file():
        fitted = fit(cfg.annotator, all_stages, summary.counts, summary.classes)
        save_annotator(out / "annotator", fitted, extractor)
    annotator, _ = load_f(out / "annotator")
    table = write_shards(all_stages, annotator, cfg.flips, summary.classes)
    write_text(out / "skipped.jsonl", "".join(skipped_lines(all_stages)))
    manifest = describe(cfg, out, all_stages, annotator, extractor, autoencoder, size, summary, table)
    write_text(out / "manifest.yaml", yaml.safe_dump(manifest, sort_keys=False, width=118, default_flow_style=None))
    shutil.rmtree(out / "work")
    return out


def claim(out: Path, cfg: AnnotateConfig, shards: list[str]) -> None:
    """Write OUT/config.yaml, or check that the one there is ours: InputError naming the first key that differs.

    As long as no shard is done the folder binds nobody, and until f is fitted its settings stay free: features are kept
    when k was too large."""
    wanted = flat(yaml.safe_load(to_yaml(cfg)))
    for free in ("out", "shards", "workers", "device", "max_skipped", "features.batch_size"):
        wanted.pop(free)
    wanted["shards"] = shards
    path, finished = out / "config.yaml", (out / "manifest.yaml").is_file()
    if not path.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out={str(out)!r} holds something that annotate did not make: choose another folder")
    found = yaml.safe_load(path.read_text()) if path.is_file() else None
    if found == wanted:
        return
    if finished or any((out / "work").glob("*.json")):
        fitted = (out / "annotator" / "annotator.yaml").is_file()
        for key, value in wanted.items():
            free = key.startswith("annotator.") and key != "annotator.kind" and not fitted
            if found.get(key) != value and not free:
                raise InputError(
                    f"out={str(out)!r} belongs to another config: {key} {difference(found.get(key), value)}; "
                    "choose another out="
                )
    else:
        shutil.rmtree(out / "autoencoder", ignore_errors=True)  # its mean and std may be those of other images
    write_text(path, yaml.safe_dump(wanted, sort_keys=False))


def difference(found: Any, value: Any) -> str:
    if isinstance(value, list) and isinstance(found, list):
        other = next((pair for pair in itertools.zip_longest(found, value) if pair[0] != pair[1]), (None, None))
        return f"has {len(found)} entries there and {len(value)} here; the first that differs is {other[0]!r}, here {other[1]!r}"
    return f"is {found!r} there and {value!r} here"


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one with dotted keys."""
    pairs: dict[str, Any] = {}
    for key, value in tree.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs


def first_size(shards: list[str]) -> int:
    """Short side of the first image of the first shard that has one."""
    for url in shards:
        for sample in read_shard(url, lambda *_: None):
            try:
                return min(decode(sample.image, sample.key).size)
            except Exception:  # BadImage: the pass will report it
                continue
    raise InputError(f"no image in {shards[0]!r}" + (f" or the {len(shards) - 1} others" if len(shards) > 1 else ""))


def prepare_autoencoder(
    cfg: AnnotateConfig, out: Path, shards: list[str], size: int, device: torch.device
) -> Autoencoder:
    """The first stage with its normalisation, kept in OUT/autoencoder from the first run on."""
    folder = out / "autoencoder"
    if (folder / "manifest.yaml").is_file():
        return load_autoencoder(str(folder)).to(device)
    autoencoder = load_autoencoder(cfg.autoencoder).to(device)
    if not autoencoder.normalised:
        batches = itertools.islice(
            image_batches(shards, size, cfg.features.batch_size, 0, lambda *_: None),
            -(-CALIBRATION_IMAGES // cfg.features.batch_size),
        )
        measure_normalisation(autoencoder, (to_float(images) for _, images, _ in batches))
    autoencoder.save(folder)
    return autoencoder


@dataclass
class Batch:
    """Decoded images of shard number `shard`, or its end when `images` is None."""

    shard: int
    keys: list[str]
    images: Tensor | None
    cls: Tensor
    skipped: list[tuple[str, str, str]]


def batches_of(shards: list[str], todo: list[int], size: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """Batches of the shards `todo`, one after the other, each followed by its end mark."""
    skipped: list[tuple[str, str, str]] = []
    with nullcontext(0) if workers == 0 else decoder_pool(workers) as pool:
        for index in todo:
            on_skip = lambda *entry: skipped.append(entry)  # noqa: E731
            for keys, images, cls in image_batches([shards[index]], size, batch_size, pool, on_skip):
                yield Batch(index, keys, images, cls, [])
            yield Batch(index, [], None, torch.empty(0), skipped.copy())
            skipped.clear()


def ahead(source: Iterable[T], depth: int = 4) -> Iterator[T]:
    """`source` run in a thread of its own, at most `depth` items ahead: reading goes on while the networks compute."""
    items: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in source:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as err:  # handed to the thread that asked
            put((None, err, True))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, err, last = items.get()
            if err is not None:
                raise err
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def extract(
    cfg: AnnotateConfig,
    shards: list[str],
    all_stages: list[Stage],
    size: int,
    extractor: FeatureExtractor | None,
    autoencoder: Autoencoder,
) -> None:
    """The streaming pass over the shards that are not done: features and latents to disk."""
    todo = [stage.index for stage in all_stages if not stage.done]
    if not todo:
        return
    source = ahead(batches_of(shards, todo, size, cfg.features.batch_size, cfg.workers))
    with tqdm(desc="annotate", unit=" images", mininterval=1, smoothing=0.1) as bar:
        for done, index in enumerate(todo):
            with StageWriter(all_stages[index], shards[index], cfg.flips) as writer:
                for batch in iter(lambda: next(source), None):
                    if batch.images is None:
                        writer.meta.skipped = batch.skipped
                        break
                    images = to_float(batch.images.to(autoencoder.mean.device))
                    features = None if extractor is None else extractor(images)
                    writer.add(batch.keys, batch.cls, features, encode(autoencoder, images, cfg.flips))
                    bar.update(len(batch.keys))
                if extractor is None:
                    check_classes(shards[index], writer.meta.keys, np.array(writer.meta.cls))
                writer.finish()
            bar.total = round(bar.n / (done + 1) * len(todo))  # shards are taken to be of about one length


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, flips: bool) -> dict[str, Tensor]:
    """Normalised latents [B, C, h, w] of the images and, with flips, of their mirror images."""
    latents = {"latent": autoencoder.encode(images)}
    return latents | ({"flip": autoencoder.encode(images.flip(-1))} if flips else {})


@dataclass
class Summary:
    counts: list[int]  # images a shard
    urls: list[str]
    classes: int  # highest class number plus one; 0 when any image has none
    skipped: int
    latent_shape: list[int]


def summarise(all_stages: list[Stage], max_skipped: float, shards: str) -> Summary:
    """Counts over all shards; InputError when there is no image, or too large a share was skipped."""
    counts, urls, skipped, classes, unknown, shape, first = [], [], 0, 0, False, None, None
    for stage in all_stages:
        meta = stage.read_meta()
        counts.append(len(meta.keys))
        urls.append(meta.url)
        skipped += len(meta.skipped)
        first = first or next(iter(meta.skipped), None)
        classes = max(classes, max(meta.cls, default=-1) + 1)
        unknown |= any(c < 0 for c in meta.cls)
        shape = meta.latent_shape or shape
    total = sum(counts)
    example = f"; the first: {first[0]} {first[1]}: {first[2]}" if first else ""
    if shape is None:
        raise InputError(f"shards={shards!r}: no usable image in {len(counts)} shards{example}")
    if skipped > max_skipped * (total + skipped):
        raise InputError(
            f"{skipped} of {total + skipped} images cannot be used, more than max_skipped={max_skipped} of them{example}"
        )
    return Summary(counts, urls, 0 if unknown else classes, skipped, shape)


def write_shards(all_stages: list[Stage], annotator: Annotator, flips: bool, classes: int) -> np.ndarray:
    """Annotated shards in source order, those that are missing. Returns how often id and class meet, [K, max(classes, 1)]."""
    table = np.zeros((annotator.k, max(classes, 1)), np.int64)
    for stage in tqdm(all_stages, desc="write", unit=" shards"):
        meta = stage.read_meta()
        if not meta.keys:
            ids = np.empty(0, np.int64)
        else:
            features = stage.read_features() if stage.features.is_file() else None
            ids = annotator.of_shard(features, np.array(meta.cls))
            other = np.array(meta.cls) if classes else np.zeros(len(ids), np.int64)
            table += contingency(ids, other, table.shape)
        if not stage.tar.is_file():
            write_shard(stage, meta, ids, flips)
    return table


def write_shard(stage: Stage, meta: ShardMeta, ids: np.ndarray, flips: bool) -> None:
    """KEY.latent.npy, KEY.flip.npy with flips, KEY.k.npy for each key."""
    arrays = {
        which: stage.read_latents(which, meta) for which in (["latent", "flip"] if flips else ["latent"]) if meta.keys
    }
    with ShardWriter(stage.tar) as writer:
        for i, key in enumerate(meta.keys):
            files = {f"{which}.npy": npy(np.asarray(values[i])) for which, values in arrays.items()}
            writer.write(key, files | {"k.npy": npy(np.int64(ids[i]))})


def npy(array: np.ndarray | np.generic) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def skipped_lines(all_stages: list[Stage]) -> Iterator[str]:
    for stage in all_stages:
        for shard, key, reason in stage.read_meta().skipped:
            yield json.dumps({"shard": shard, "key": key, "reason": reason}) + "\n"


def describe(
    cfg: AnnotateConfig,
    out: Path,
    all_stages: list[Stage],
    annotator: Annotator,
    extractor: FeatureExtractor | None,
    autoencoder: Autoencoder,
    size: int,
    summary: Summary,
    table: np.ndarray,
) -> dict[str, Any]:
    """manifest.yaml: what made the set, how many of what, and the hash of its content."""
    sizes = table.sum(1)
    found: dict[str, Any] = {
        "empty": int((sizes == 0).sum()),
        "entropy": round(entropy(sizes), 4),
        "max_entropy": round(float(np.log(annotator.k)), 4),
    }
    if summary.classes:
        found |= {"classes": summary.classes, "nmi": round(nmi(table), 4), "ari": round(ari(table), 4)}
    files = [
        {"file": stage.tar.name, "images": n, "bytes": stage.tar.stat().st_size, "sha256": file_sha256(stage.tar)}
        for stage, n in zip(all_stages, summary.counts)
    ]
    first_stage = {key: autoencoder.manifest.get(key) for key in ("name", "kind", "channels", "factor", "sha256")}
    return {
        "version": 1,
        "features": extractor.manifest if extractor else None,
        "annotator": annotator.settings | found | {"counts": sizes.tolist()},
        "autoencoder": first_stage,
        "size": size,
        "source": [{"url": url, "images": n} for url, n in zip(summary.urls, summary.counts)],
        "num_images": sum(summary.counts),
        "num_skipped": summary.skipped,
        "latent_shape": summary.latent_shape,
        "flips": cfg.flips,
        "guidance": annotator.spec.to_dict(),
        "hash": set_hash(entry["sha256"] for entry in files),
        "shards": files,
    }
