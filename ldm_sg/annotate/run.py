"""annotate: source shards -> annotation set. One streaming pass decodes each image once for g and the autoencoder; then f
is fitted on the features and the annotated shards are written; the manifest comes last."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.baselines import corrupted
from ldm_sg.annotate.clusters import ari, contingency, entropy, nmi
from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.kinds import load_f, make_annotator, save_annotator
from ldm_sg.annotate.stage import ShardMeta, Stage, check_unchanged, stages
from ldm_sg.annotate.stream import extract, first_size, prepare_autoencoder
from ldm_sg.autoencoder import Autoencoder
from ldm_sg.config import AnnotateConfig, AnnotatorConfig
from ldm_sg.configfile import to_mapping
from ldm_sg.data.latents import set_hash
from ldm_sg.data.shards import ShardWriter, expand
from ldm_sg.data.signals import files_of, npy
from ldm_sg.errors import InputError
from ldm_sg.folder import claim, file_sha256, flat, read_mapping, write_text
from ldm_sg.hardware import pick_device

# what may change between two starts of one annotation without making it another one
FREE = ("out", "workers", "device", "max_skipped", "allow_damaged", "features.batch_size")


def annotate_shards(cfg: AnnotateConfig) -> Path:
    """Make (or finish) the annotation set `cfg.out`. Raises InputError for anything wrong with the input; what is done
    until then stays, and the same command goes on from there."""
    annotator = make_annotator(cfg.annotator)
    out, shards = Path(cfg.out), expand(cfg.shards)
    if cfg.annotator.shuffle and not annotator.gives_ids:
        raise no_ids(cfg.annotator)
    take(out, cfg, shards, annotator.late)
    if (out / "manifest.yaml").is_file():
        for entry in read_mapping(out / "manifest.yaml", {"source": [{"url": str}]})["source"]:
            check_unchanged(entry["url"], entry)
        return out
    all_stages = list(stages(out, len(shards)))
    for stage in all_stages:
        if stage.done:
            check_unchanged(shards[stage.index], stage.read_meta().source)
    device = pick_device(cfg.device)
    source = first_size(shards) if cfg.size is None or cfg.features.size is None else None
    size = cfg.size or source
    autoencoder = prepare_autoencoder(cfg, out, shards, size, device)
    extractor = load_extractor(cfg.features, device, source) if annotator.reads_g else None
    study = Study(cfg, shards, all_stages, size, extractor, [])
    fitted = (out / "annotator" / "annotator.yaml").is_file()
    if not fitted:
        annotator.prepare(study)
    if not all(stage.done for stage in all_stages):
        extract(cfg, shards, all_stages, size, extractor, autoencoder, annotator)
    summary = summarise(all_stages, cfg.max_skipped, cfg.shards)
    if not fitted:
        annotator.fit(replace(study, counts=summary.counts))
        save_annotator(out / "annotator", annotator, extractor)
    annotator, _ = load_f(out / "annotator")
    ids = corrupted_ids(all_stages, annotator)
    labels = write_shards(all_stages, annotator, cfg.flips, summary.classes, ids)
    write_text(out / "skipped.jsonl", "".join(skipped_lines(all_stages)))
    manifest = describe(cfg, out, all_stages, annotator, extractor, autoencoder, size, summary, labels)
    write_text(out / "manifest.yaml", yaml.safe_dump(manifest, sort_keys=False, width=118, default_flow_style=None))
    shutil.rmtree(out / "work")
    return out


def take(out: Path, cfg: AnnotateConfig, shards: list[str], late: frozenset[str]) -> None:
    """Makes OUT this config's. As long as no shard is done the folder binds nobody, and until f is fitted its `late` settings
    stay free: features are kept when k was too large."""
    wanted = flat(to_mapping(cfg)) | {"shards": list(map(str, shards))}
    for key in FREE:
        wanted.pop(key)
    begun = (out / "manifest.yaml").is_file() or any((out / "work").glob("*.json"))
    free = () if (out / "annotator" / "annotator.yaml").is_file() else {f"annotator.{key}" for key in late}
    # what was learnt before the first shard was done may be of other images or settings
    claim(out, "config.yaml", wanted, free, () if begun else ("autoencoder", "annotator", "work"))


@dataclass
class Summary:
    counts: list[int]  # images a shard
    urls: list[str]
    sources: list[dict[str, Any]]  # their fingerprints
    classes: np.ndarray  # the class numbers that occur, sorted
    skipped: int
    latent_shape: list[int]


def summarise(all_stages: list[Stage], max_skipped: float, shards: str) -> Summary:
    """Counts over all shards; InputError when there is no image, or too large a share was skipped."""
    counts, urls, sources, skipped, shape, first = [], [], [], 0, None, None
    classes = np.empty(0, np.int64)
    for stage in all_stages:
        meta = stage.read_meta()
        counts.append(len(meta.keys))
        urls.append(meta.url)
        sources.append(meta.source)
        skipped += len(meta.skipped)
        first = first or next(iter(meta.skipped), None)
        classes = np.union1d(classes, np.array(meta.cls, np.int64))
        shape = meta.latent_shape or shape
    total = sum(counts)
    example = f"; the first: {first[0]} {first[1]}: {first[2]}" if first else ""
    if shape is None:
        raise InputError(f"shards={shards!r}: no usable image in {len(counts)} shards{example}")
    if skipped > max_skipped * (total + skipped):
        raise InputError(
            f"{skipped} of {total + skipped} images cannot be used, more than max_skipped={max_skipped} of them{example}"
        )
    return Summary(counts, urls, sources, classes[classes >= 0], skipped, shape)


def no_ids(cfg: AnnotatorConfig) -> InputError:
    return InputError(f"annotator.shuffle={cfg.shuffle}: annotator.kind={cfg.kind} gives no ids that could be shuffled")


def corrupted_ids(all_stages: list[Stage], annotator: Annotator) -> np.ndarray | None:
    """The ids of all images after `annotator.shuffle`; None where nothing is shuffled."""
    cfg = annotator.cfg
    if cfg.shuffle == 0:
        return None
    parts = [annotator.signals(stage) for stage in all_stages if stage.read_meta().keys]
    if not all("k" in part and np.ndim(part["k"]) == 1 for part in parts):
        raise no_ids(cfg)
    return corrupted(np.concatenate([part["k"] for part in parts]), cfg.shuffle, cfg.seed)


@dataclass
class Labels:
    """How often each of the K labels occurs, and where images have one each, how often it meets each of the C classes and, in
    the last column, none."""

    counts: np.ndarray  # [K]
    table: np.ndarray  # [K, C + 1]


def write_shards(
    all_stages: list[Stage], annotator: Annotator, flips: bool, classes: np.ndarray, ids: np.ndarray | None
) -> Labels:
    """Annotated shards in source order, those that are missing; `ids` [N] instead of the annotator's, if given."""
    spec, start = annotator.spec, 0
    found = Labels(np.zeros(spec.num_labels, np.int64), np.zeros((spec.num_labels, len(classes) + 1), np.int64))
    for stage in tqdm(all_stages, desc="write", unit=" shards"):
        meta = stage.read_meta()
        n = len(meta.keys)
        signals = dict(annotator.signals(stage)) if n else {}
        if ids is not None and n:
            signals["k"] = ids[start : start + n]
        start += n
        if n and spec.num_labels:
            add_labels(found, signals, np.array(meta.cls, np.int64), classes)
        if not stage.tar.is_file():
            write_shard(stage, meta, signals, flips)
    return found


def add_labels(found: Labels, signals: dict[str, Sequence[np.ndarray]], cls: np.ndarray, classes: np.ndarray) -> None:
    """Counts the labels of one shard's signals."""
    if "mask" in signals:
        for mask in signals["mask"]:
            ids = np.unique(mask)
            found.counts[ids[ids < len(found.counts)]] += 1
    elif np.ndim(signals["k"]) == 2:
        found.counts += np.asarray(signals["k"], np.int64).sum(0)
    else:
        k = np.asarray(signals["k"])
        found.counts += np.bincount(k, minlength=len(found.counts))
        columns = np.where(cls < 0, len(classes), np.searchsorted(classes, cls))
        found.table += contingency(k, columns, found.table.shape)


def write_shard(stage: Stage, meta: ShardMeta, signals: dict[str, Sequence[np.ndarray]], flips: bool) -> None:
    """KEY.latent.npy, KEY.flip.npy with flips, and the signals' files for each key."""
    arrays = {
        which: stage.read_latents(which, meta) for which in (["latent", "flip"] if flips else ["latent"]) if meta.keys
    }
    with ShardWriter(stage.tar) as writer:
        for i, key in enumerate(meta.keys):
            files = {f"{which}.npy": npy(np.asarray(values[i])) for which, values in arrays.items()}
            writer.write(key, files | files_of({name: column[i] for name, column in signals.items()}))


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
    labels: Labels,
) -> dict[str, Any]:
    """manifest.yaml: what made the set, how many of what, and the hash of its content."""
    f = {"kind": annotator.kind, "k": annotator.k, **changes(cfg.annotator)} | annotator.figures(total(all_stages))
    known = labels.table[:, :-1]
    if labels.table.any():
        f |= {"entropy": round(entropy(labels.counts), 4), "max_entropy": round(float(np.log(len(known))), 4)}
    if known.any():
        f |= {"classes": known.shape[1], "nmi": round(nmi(known), 4), "ari": round(ari(known), 4)}
    if len(labels.counts):
        f |= {"empty": int((labels.counts == 0).sum()), "counts": labels.counts.tolist()}
    files = [
        {"file": stage.tar.name, "images": n, "bytes": stage.tar.stat().st_size, "sha256": file_sha256(stage.tar)}
        for stage, n in zip(all_stages, summary.counts)
    ]
    first_stage = {
        key: autoencoder.manifest.get(key) for key in ("name", "kind", "channels", "factor", "sha256", "round_trip")
    }
    seen = {}  # images.show, in words
    if extractor:
        seen["g"] = f"the centre square at {extractor.size} pixels, from the source's own where it has more than {size}"
    if extractor and annotator.whole and extractor.any_shape:
        seen["boxes"] = f"the uncropped image, its short side {extractor.size} pixels, padded to whole patches"
    return {
        "version": 2,
        "features": extractor.manifest if extractor else None,
        "annotator": f,
        "autoencoder": first_stage,
        "size": size,
        "source": [
            {"url": url, "images": n} | known for url, n, known in zip(summary.urls, summary.counts, summary.sources)
        ],
        "view": seen,
        "num_images": sum(summary.counts),
        "num_skipped": summary.skipped,
        "latent_shape": summary.latent_shape,
        "flips": cfg.flips,
        "guidance": annotator.spec.to_dict(),
        "hash": set_hash(entry["sha256"] for entry in files),
        "shards": files,
    }


def total(all_stages: list[Stage]) -> dict[str, np.ndarray]:
    """What f observed, added up over the shards."""
    sums: dict[str, np.ndarray] = {}
    for stage in all_stages:
        for name, value in stage.read_observed().totals.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def changes(cfg: AnnotatorConfig) -> dict[str, Any]:
    """The seed and the settings that are not the default ones."""
    here, default = (flat(asdict(c)) for c in (cfg, AnnotatorConfig()))
    changed = {key: value for key, value in here.items() if value != default[key]}
    return {"seed": cfg.seed} | {key: value for key, value in changed.items() if key not in ("kind", "k")}
