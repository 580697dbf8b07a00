"""annotate: source shards -> annotation set. One streaming pass decodes each image once for g and the autoencoder; then f
is fitted on the features and the annotated shards are written; the manifest comes last."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from ldm_sg import executor
from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.baselines import corrupted
from ldm_sg.annotate.clusters import contingency
from ldm_sg.annotate.describe import describe
from ldm_sg.annotate.features import load_extractor
from ldm_sg.annotate.kinds import check_same_g, late, load_f, make_annotator, save_annotator
from ldm_sg.annotate.stage import ShardMeta, Stage, Sums, added, check_unchanged
from ldm_sg.annotate.stream import extract, first_size, prepare_autoencoder
from ldm_sg.annotate.tally import BEFORE, TOTAL, Before, Summary, put_aside, write_tally
from ldm_sg.config import AnnotateConfig, AnnotatorConfig
from ldm_sg.configfile import to_mapping
from ldm_sg.data.latents import finish as finish_set
from ldm_sg.data.latents import read_manifest
from ldm_sg.data.shards import EMPTY, ShardWriter, expand
from ldm_sg.data.signals import Columns, Signals, files_of, npy
from ldm_sg.data.sources import digest
from ldm_sg.errors import InputError
from ldm_sg.executor import Part
from ldm_sg.folder import claim, file_sha256, flat, others_work_in, read_mapping, sweep, turn, write_text
from ldm_sg.hardware import pick_device

# what may change between two starts of one annotation without making it another one
FREE = (
    "out", "workers", "device", "max_skipped", "allow_damaged", "features.batch_size", "executor", "processes", "address"
)  # fmt: skip
EARLY = ("autoencoder", "annotator", "work", "features")  # folders that are made before the first shard is done
LEARNT = "work/learnt"  # which shards the early folders are of
SEEN_BY = "work/g.yaml"  # whose features the shards that are through have
BUCKET = re.compile(r"-(\d+x\d+)\.tar$")
TRIES = 3  # of a shard whose worker is lost
MOST_SHARDS = 16  # that a worker is handed at once


def annotate_shards(cfg: AnnotateConfig, part: Part | None = None, finish: bool = False) -> Path:
    """Make (or finish) the annotation set `cfg.out`. Raises InputError for anything wrong with the input; what is done
    until then stays, and the same command goes on from there. `part`: only the pass over its shards, beside other parts;
    `finish`: only what follows when all shards are through."""
    out = Path(cfg.out)
    with turn(out) if part else nullcontext():  # the first one makes what all of them read
        opened = open_set(cfg)
        if (out / "manifest.yaml").is_file():
            return out
        mine = [stage.index for stage in opened.fresh if not stage.done and (part is None or stage.index in part)]
        if finish and mine:
            raise InputError(
                f"{out}: {len(mine)} of {len(opened.stages)} shards are not through, the first is {opened.shards[mine[0]]}: give the "
                "command of the parts that have them again, or this one without --finish"
            )
        opened.prepare()
    note_buckets(opened)
    pass_over(opened, mine, out / (f"failed-{part.index}-of-{part.of}.jsonl" if part else "failed.jsonl"))
    if part:
        left = sum(not stage.done for stage in opened.fresh)
        print(
            f"part {part} of {out} is done"
            + (f"; {left} shards of others are not" if left else "; so are all others: --finish")
        )
        return out
    return complete(opened)


class Opened:
    """An annotation set in the making."""

    def __init__(self, cfg: AnnotateConfig, shards: list[str]) -> None:
        self.cfg, self.out, self.shards = cfg, Path(cfg.out), shards
        self.stages = [Stage(self.out, index) for index in range(len(shards))]
        self.annotator = make_annotator(cfg.annotator)
        self.before: Before | None = None

    @property
    def fitted(self) -> bool:
        return (self.out / "annotator" / "annotator.yaml").is_file()

    @property
    def fresh(self) -> list[Stage]:
        """Of the shards that no finished set has."""
        return self.stages[len(self.before.manifest["shards"]) if self.before else 0 :]

    def prepare(self) -> None:
        """g, the first stage, and what f must know before the pass; what takes long is kept in OUT."""
        cfg, device = self.cfg, pick_device(self.cfg.device)
        source = first_size(self.shards, cfg.buckets) if cfg.size is None or cfg.features.size is None else None
        size = cfg.size or source
        self.autoencoder = prepare_autoencoder(cfg, self.shards, size, device)
        extractor = load_extractor(cfg.features, device, source) if self.annotator.reads_g else None
        self.study = Study(cfg, self.shards, self.stages, size, extractor, [])
        if source_of_f := str(self.out) if self.fitted else cfg.annotator.reuse or cfg.annotator.extend:
            check_same_g(source_of_f, extractor)
        elif extractor:
            self.check_g(extractor.manifest)
        if self.fitted:
            self.annotator, _ = load_f(self.out / "annotator")
        elif cfg.annotator.reuse:
            save_annotator(self.out / "annotator", self.annotator, extractor)
        else:
            self.annotator.prepare(self.study)

    def check_g(self, manifest: Mapping[str, Any]) -> None:
        """InputError where shards are through that another g looked at: its weights' file was replaced."""
        own = {key: manifest[key] for key in ("sha256", "layer", "pool", "size")}
        path = self.out / SEEN_BY
        if path.is_file() and any(stage.done for stage in self.fresh) and (seen := read_mapping(path)) != own:
            key = next(key for key in own if seen.get(key) != own[key])
            raise InputError(
                f"{self.out}: another g has looked at some of its shards, of {key} {seen.get(key)}, not {own[key]}: give "
                "that one, or another out="
            )
        write_text(path, yaml.safe_dump(own))


def open_set(cfg: AnnotateConfig) -> Opened:
    """OUT, which becomes this config's; what is there is of the shards that are there now."""
    opened = Opened(cfg, expand(cfg.shards))
    if cfg.annotator.shuffle and not opened.annotator.gives_ids:
        raise no_ids(cfg.annotator)
    if cfg.buckets and opened.annotator.spec.spatial:
        raise InputError(
            f"buckets=true: annotator.kind={cfg.annotator.kind} says where things are, which is for square images; with buckets "
            "clusters, or what else says what an image shows"
        )
    take(opened)
    if (opened.out / "manifest.yaml").is_file():
        manifest = read_manifest(opened.out)
        for entry in manifest["shards"]:
            check_unchanged(entry["url"], entry["source"])
        if len(manifest["shards"]) == len(opened.shards):
            return opened
        put_aside(opened.out, manifest)
    if (opened.out / "work" / BEFORE).is_file():
        opened.before = Before.read(opened.out)
    for stage in opened.fresh:
        if stage.done:
            check_unchanged(opened.shards[stage.index], stage.read_meta().source)
    return opened


def note_buckets(opened: Opened) -> None:
    """Says so where images that were packed in their own shapes are about to be cut to squares."""
    shapes = {m[1] for url in opened.shards if (m := BUCKET.search(url))}
    if shapes and not opened.cfg.buckets:
        print(
            f"note: shards of `pack --buckets` ({', '.join(sorted(shapes))}): of each image its centre square is taken, "
            f"{opened.study.size} pixels wide; buckets=true keeps their shapes",
            file=sys.stderr,
        )


def worker(study: Study, annotator: Annotator, device: str) -> Callable[[list[int]], list[tuple[int, str]]]:
    """The pass over shards beside others, by what the first one has prepared, of which `study` lacks g alone."""
    cfg = study.config
    extractor = load_extractor(cfg.features, device) if annotator.reads_g else None
    autoencoder = prepare_autoencoder(cfg, study.shards, study.size, torch.device(device))
    return partial(extract, replace(study, extractor=extractor), autoencoder, annotator)


def pass_over(opened: Opened, mine: list[int], failures: Path) -> None:
    """The shards `mine` by all workers. What fails is written to `failures` when the others are done, and InputError names it;
    the same command then tries that only."""
    device, failed = pick_device(opened.cfg.device), dict[int, str]()
    if not executor.alone(opened.cfg, device):
        failed = by_workers(opened, mine, device)
    elif mine:
        failed = dict(extract(opened.study, opened.autoencoder, opened.annotator, mine))
    if not failed:
        failures.unlink(missing_ok=True)
        return
    lines = [{"shard": opened.shards[i], "index": i, "reason": failed[i]} for i in sorted(failed)]
    write_text(failures, "".join(json.dumps(line) + "\n" for line in lines))
    raise InputError(
        f"{len(failed)} of {len(opened.shards)} shards failed, the others are done; the first: {lines[0]['shard']}: "
        f"{lines[0]['reason']}; {failures.name} lists them; give the same command again: mend first what is damaged, or go on "
        "without what is lost by allow_damaged=true"
    )


def by_workers(opened: Opened, mine: list[int], device: torch.device) -> dict[int, str]:
    """What failed of the shards `mine`, and why. One whose worker is lost is tried again, up to TRIES times."""
    cfg, g, damaged, lost = opened.cfg, opened.study.extractor, dict[int, str](), dict.fromkeys(mine, "")
    processes = len(executor.devices(cfg, device))
    own = replace(cfg, processes=processes, features=replace(cfg.features, size=g.size if g else None))
    make = partial(worker, replace(opened.study, config=own, extractor=None), opened.annotator)
    for attempt in range(TRIES):
        if not lost:
            break
        todo, lost = sorted(lost), {}
        each = 1 if attempt else min(MOST_SHARDS, max(1, len(todo) // (4 * processes)))
        chunks = [todo[i : i + each] for i in range(0, len(todo), each)]
        with tqdm(desc="annotate", total=len(todo), unit=" shards") as bar:
            now = partial(_progress, bar, [opened.stages[i] for i in todo])
            for chunk, found in executor.run(make, chunks, cfg, device, now):
                if isinstance(found, executor.Lost):
                    lost |= {i: f"failed {TRIES} times: {found.why}" for i in chunk if not opened.stages[i].done}
                else:
                    damaged |= found
    return damaged | lost


def _progress(bar: tqdm, passing: list[Stage]) -> None:
    bar.update(sum(stage.done for stage in passing) - bar.n)


def complete(opened: Opened) -> Path:
    """What follows when all shards are through: f, the annotated shards, the manifest."""
    out, annotator = opened.out, opened.annotator
    summary = summarise(opened)
    if not opened.fitted:
        annotator.fit(replace(opened.study, counts=[shard["images"] for shard in summary.shards]))
        save_annotator(out / "annotator", annotator, opened.study.extractor)
    annotator, _ = load_f(out / "annotator")
    sums, files = write_shards(opened, annotator, summary)
    totals = added(stage.read_observed().totals for stage in opened.fresh)
    sums |= {f"{TOTAL}{name}": total for name, total in totals.items()}
    if opened.before:
        sums = added([sums, opened.before.aligned(summary.classes)])
        files = opened.before.manifest["shards"] + files
    write_text(out / "skipped.jsonl", "".join(json.dumps(entry) + "\n" for entry in summary.skipped))
    write_tally(out, sums, summary.classes)
    manifest = describe(opened.study, annotator, opened.autoencoder, summary, sums, files)
    sweep(out)  # what a killed start left whose processes were still dying when this one began
    finish_set(out, manifest)
    shutil.rmtree(out / "work")
    return out


def take(opened: Opened) -> None:
    """Makes OUT this config's. As long as no shard is done the folder binds nobody, and until f is fitted its `late` settings
    stay free: features are kept when k was too large. More shards may follow those that it has."""
    out, cfg, shards = opened.out, opened.cfg, list(map(str, opened.shards))
    wanted = flat(to_mapping(cfg)) | {"shards": shards}
    for key in FREE:
        wanted.pop(key)
    begun = (out / "manifest.yaml").is_file() or any((out / "work").glob("*.json")) or others_work_in(out)
    free = set() if opened.fitted else late(cfg.annotator)
    there = read_mapping(out / "config.yaml").get("shards") if (out / "config.yaml").is_file() else None
    if isinstance(there, list) and there == shards[: len(there)] != shards:
        free.add("shards")
        if opened.fitted and (cfg.annotator.shuffle or not opened.annotator.grows):
            raise InputError(
                f"{out} has the first {len(there)} of these {len(shards)} shards, and its signals depend on all of them "
                f"(annotator.kind={cfg.annotator.kind}, shuffle={cfg.annotator.shuffle}): annotate into another out="
            )
    # what was learnt before the first shard was done may be of other images or settings
    claim(out, "config.yaml", wanted, free, () if begun else EARLY)
    if not begun:
        local = [(path, path.stat()) for path in map(Path, shards) if path.is_file()]
        now = digest(*zip(*((path, stat.st_size, stat.st_mtime_ns) for path, stat in local)))
        learnt = out / LEARNT
        if learnt.is_file() and learnt.read_text() != now:
            for name in EARLY:
                shutil.rmtree(out / name, ignore_errors=True)
        write_text(learnt, now)


def summarise(opened: Opened) -> Summary:
    """Counts over all shards; InputError when there is no image, or too large a share was skipped."""
    max_skipped, before = opened.cfg.max_skipped, opened.before
    shards: list[dict[str, Any]] = []
    skipped, classes = [], np.empty(0, np.int64)
    if before:
        shape = {"latent_shape": before.manifest["latent_shape"]}
        shards = [shape | entry for entry in before.manifest["shards"]]
        skipped, classes = [*before.skipped], before.tally["classes"]
    for stage in opened.fresh:
        meta = stage.read_meta()
        source = {"images": len(meta.keys), "url": meta.url, "source": meta.source}
        shards.append(source | {"latent_shape": meta.latent_shape})
        skipped += [dict(zip(("shard", "key", "reason"), entry)) for entry in meta.skipped]
        classes = np.union1d(classes, np.array(meta.cls, np.int64))
    example = "; the first: {shard} {key}: {reason}".format(**skipped[0]) if skipped else ""
    often = Counter[tuple[int, ...]]()
    for shard in shards:
        often[tuple(shard["latent_shape"] or ())] += shard["images"]
    if not (images := often.total()):
        raise InputError(f"shards={opened.cfg.shards!r}: no usable image in {len(shards)} shards{example}")
    lost = sum(entry["reason"] != EMPTY for entry in skipped)  # a shard of downloads that all failed has none to lose
    if lost > max_skipped * (images + lost):
        raise InputError(
            f"{lost} of {images + lost} images cannot be used, more than max_skipped={max_skipped} of them{example}"
        )
    return Summary(shards, images, classes[classes >= 0], skipped, list(often.most_common(1)[0][0]))


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


def write_shards(opened: Opened, annotator: Annotator, summary: Summary) -> tuple[Sums, list[dict[str, Any]]]:
    """Annotated shards in source order, those that are missing, by all workers; `counts` and `table` over them, and the
    manifest's entry of each."""
    cfg, device, all_stages = opened.cfg, pick_device(opened.cfg.device), opened.fresh
    ids, own = corrupted_ids(all_stages, annotator), [shard["images"] for shard in summary.shards[-len(all_stages) :]]
    parts = [None] * len(all_stages) if ids is None else np.split(ids, np.cumsum(own)[:-1])
    tasks = [(stage.index, part) for stage, part in zip(all_stages, parts)]
    make = partial(Writing, opened.out, cfg.flips, summary.classes)
    bar = tqdm(executor.in_order(make, tasks, cfg, device), desc="write", unit=" shards", total=len(tasks))
    sums, files = zip(*bar)
    return added(sums), list(files)


class Writing:
    """Writes one annotated shard at a call."""

    def __init__(self, out: Path, flips: bool, classes: np.ndarray, device: str) -> None:
        self.out, self.flips, self.classes = out, flips, classes
        self.annotator, _ = load_f(out / "annotator")

    def __call__(self, task: tuple[int, np.ndarray | None]) -> tuple[Sums, dict[str, Any]]:
        """The shard's number and ids that stand for the annotator's, if any -> its `counts` and `table`, and its entry in the
        manifest."""
        (index, ids), spec, classes = task, self.annotator.spec, self.classes
        stage = Stage(self.out, index)
        meta = stage.read_meta()
        n = len(meta.keys)
        columns = self.annotator.signals(stage) if n else {}
        if ids is not None and n:
            columns["k"] = ids
        counts = np.zeros(spec.num_labels, np.int64)
        table = np.zeros((spec.num_labels, len(classes) + 1), np.int64)
        if n and spec.num_labels:
            signals, cls = Signals.from_columns(spec, columns, n), np.array(meta.cls, np.int64)
            counts += signals.counts()
            if signals.k is not None and signals.k.ndim == 1:
                known = np.where(cls < 0, len(classes), np.searchsorted(classes, cls))
                table += contingency(signals.k.numpy(), known, table.shape)
        if not stage.tar.is_file():
            write_shard(stage, meta, columns, self.flips)
        for path in stage.latents.values():
            path.unlink(missing_ok=True)
        entry = {"file": stage.tar.name, "bytes": stage.tar.stat().st_size, "sha256": file_sha256(stage.tar)}
        return {"counts": counts, "table": table}, entry


def write_shard(stage: Stage, meta: ShardMeta, signals: Columns, flips: bool) -> None:
    """KEY.latent.npy, KEY.flip.npy with flips, and the signals' files for each key."""
    kinds = ["latent"] + ["flip"] * flips if meta.keys else []
    arrays = {which: stage.read_latents(which, meta) for which in kinds}
    with ShardWriter(stage.tar) as writer:
        for i, key in enumerate(meta.keys):
            files = {f"{which}.npy": npy(np.asarray(values[i])) for which, values in arrays.items()}
            writer.write(key, files | files_of({name: column[i] for name, column in signals.items()}))
