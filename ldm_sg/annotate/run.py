"""annotate: source shards -> annotation set. One streaming pass decodes each image once for g and the autoencoder; then f
is fitted on the features and the annotated shards are written; the manifest comes last."""

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.baselines import corrupted
from ldm_sg.annotate.clusters import ari, contingency, entropy, nmi
from ldm_sg.annotate.features import load_extractor
from ldm_sg.annotate.kinds import check_same_g, load_f, make_annotator, save_annotator
from ldm_sg.annotate.stage import ShardMeta, Stage, check_unchanged, stages
from ldm_sg.annotate.stream import extract, first_size, prepare_autoencoder
from ldm_sg.autoencoder import Autoencoder
from ldm_sg.config import AnnotateConfig, AnnotatorConfig
from ldm_sg.configfile import to_mapping
from ldm_sg.data.latents import set_hash
from ldm_sg.data.shards import ShardWriter, expand
from ldm_sg.data.signals import Columns, Signals, files_of, npy
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
    if cfg.buckets and annotator.spec.spatial:
        raise InputError(
            f"buckets=true: annotator.kind={annotator.kind} says where things are, which is for square images; with buckets "
            "clusters, or what else says what an image shows"
        )
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
    source = first_size(shards, cfg.buckets) if cfg.size is None or cfg.features.size is None else None
    size = cfg.size or source
    autoencoder = prepare_autoencoder(cfg, shards, size, device)
    extractor = load_extractor(cfg.features, device, source) if annotator.reads_g else None
    study = Study(cfg, shards, all_stages, size, extractor, [])
    if source_of_f := cfg.annotator.reuse or cfg.annotator.extend:
        check_same_g(source_of_f, extractor)
    if cfg.annotator.reuse:
        save_annotator(out / "annotator", annotator, extractor)
    fitted = (out / "annotator" / "annotator.yaml").is_file()
    if not fitted:
        annotator.prepare(study)
    extract(study, autoencoder, annotator)
    summary = summarise(all_stages, cfg.max_skipped, cfg.shards)
    if not fitted:
        annotator.fit(replace(study, counts=[source["images"] for source in summary.sources]))
        save_annotator(out / "annotator", annotator, extractor)
    annotator, _ = load_f(out / "annotator")
    ids = corrupted_ids(all_stages, annotator)
    labels = write_shards(all_stages, annotator, cfg.flips, summary.classes, ids)
    write_text(out / "skipped.jsonl", "".join(json.dumps(entry) + "\n" for entry in summary.skipped))
    manifest = describe(study, annotator, autoencoder, summary, labels)
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
    sources: list[dict[str, Any]]  # of each shard: its url, its images, its fingerprint
    images: int
    classes: np.ndarray  # the class numbers that occur, sorted
    skipped: list[dict[str, str]]  # shard, key, reason
    latent_shape: list[int]  # [C, h, w], of buckets that of the most images
    shapes: list[list[int] | None]  # of each shard, None where it has no image


def summarise(all_stages: list[Stage], max_skipped: float, shards: str) -> Summary:
    """Counts over all shards; InputError when there is no image, or too large a share was skipped."""
    sources, skipped, shapes, classes = [], [], [], np.empty(0, np.int64)
    for stage in all_stages:
        meta = stage.read_meta()
        sources.append({"url": meta.url, "images": len(meta.keys)} | meta.source)
        skipped += [dict(zip(("shard", "key", "reason"), entry)) for entry in meta.skipped]
        classes = np.union1d(classes, np.array(meta.cls, np.int64))
        shapes.append(meta.latent_shape)
    total = sum(source["images"] for source in sources)
    example = "; the first: {shard} {key}: {reason}".format(**skipped[0]) if skipped else ""
    if not any(shapes):
        raise InputError(f"shards={shards!r}: no usable image in {len(sources)} shards{example}")
    seen = total + len(skipped)
    if len(skipped) > max_skipped * seen:
        raise InputError(
            f"{len(skipped)} of {seen} images cannot be used, more than max_skipped={max_skipped} of them{example}"
        )
    often = Counter[tuple[int, ...]]()
    for source, shape in zip(sources, shapes):
        often[tuple(shape or ())] += source["images"]
    return Summary(sources, total, classes[classes >= 0], skipped, list(often.most_common(1)[0][0]), shapes)


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


# how often each of K labels occurs [K], and where images have one each, how often it meets each of C classes and, last, none
Labels = tuple[np.ndarray, np.ndarray]


def write_shards(
    all_stages: list[Stage], annotator: Annotator, flips: bool, classes: np.ndarray, ids: np.ndarray | None
) -> Labels:
    """Annotated shards in source order, those that are missing; `ids` [N] instead of the annotator's, if given."""
    spec, start = annotator.spec, 0
    counts, table = np.zeros(spec.num_labels, np.int64), np.zeros((spec.num_labels, len(classes) + 1), np.int64)
    for stage in tqdm(all_stages, desc="write", unit=" shards"):
        meta = stage.read_meta()
        n = len(meta.keys)
        columns = annotator.signals(stage) if n else {}
        if ids is not None and n:
            columns["k"] = ids[start : start + n]
        start += n
        if n and spec.num_labels:
            signals, cls = Signals.from_columns(spec, columns, n), np.array(meta.cls, np.int64)
            counts += signals.counts()
            if signals.k is not None and signals.k.ndim == 1:
                known = np.where(cls < 0, len(classes), np.searchsorted(classes, cls))
                table += contingency(signals.k.numpy(), known, table.shape)
        if not stage.tar.is_file():
            write_shard(stage, meta, columns, flips)
    return counts, table


def write_shard(stage: Stage, meta: ShardMeta, signals: Columns, flips: bool) -> None:
    """KEY.latent.npy, KEY.flip.npy with flips, and the signals' files for each key."""
    kinds = ["latent"] + ["flip"] * flips if meta.keys else []
    arrays = {which: stage.read_latents(which, meta) for which in kinds}
    with ShardWriter(stage.tar) as writer:
        for i, key in enumerate(meta.keys):
            files = {f"{which}.npy": npy(np.asarray(values[i])) for which, values in arrays.items()}
            writer.write(key, files | files_of({name: column[i] for name, column in signals.items()}))


def describe(
    study: Study, annotator: Annotator, autoencoder: Autoencoder, summary: Summary, labels: Labels
) -> dict[str, Any]:
    """manifest.yaml: what made the set, how many of what, and the hash of its content."""
    cfg, extractor, size, (counts, table) = study.config, study.extractor, study.size, labels
    f = {"kind": annotator.kind, "k": annotator.k, **changes(cfg.annotator)} | annotator.figures(total(study.stages))
    known = table[:, :-1]
    if table.any():
        f |= {"entropy": round(entropy(counts), 4), "max_entropy": round(float(np.log(len(known))), 4)}
    if known.any():
        f |= {"classes": known.shape[1], "nmi": round(nmi(known), 4), "ari": round(ari(known), 4)}
    if len(counts):
        f |= {"empty": int((counts == 0).sum()), "counts": counts.tolist()}
    files = [
        {"file": tar.name, "images": source["images"], "bytes": tar.stat().st_size, "sha256": file_sha256(tar)}
        for tar, source in zip((stage.tar for stage in study.stages), summary.sources)
    ]
    if cfg.buckets:
        files = [entry | {"latent_shape": shape or summary.latent_shape} for entry, shape in zip(files, summary.shapes)]
    first_stage = {
        key: autoencoder.manifest.get(key) for key in ("name", "kind", "channels", "factor", "sha256", "round_trip")
    }
    seen = {}  # images.show, in words
    if extractor:
        more = "" if cfg.buckets else f", from the source's own where it has more than {size}"
        seen["g"] = f"the centre square at {extractor.size} pixels{more}"
    if extractor and annotator.whole and extractor.any_shape:
        seen["boxes"] = f"the uncropped image, its short side {extractor.size} pixels, padded to whole patches"
    return {
        "version": 2,
        "features": extractor.manifest if extractor else None,
        "annotator": f,
        "autoencoder": first_stage,
        "size": size,
        "source": summary.sources,
        "view": seen,
        "num_images": summary.images,
        "num_skipped": len(summary.skipped),
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
