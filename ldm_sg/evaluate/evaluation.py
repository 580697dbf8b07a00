"""An evaluation: subject -> judges -> features -> figures."""

import json
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_sg.errors import InputError
from ldm_sg.evaluate import edits, figures, memory, sources, statistics
from ldm_sg.evaluate.collect import Look, Passes
from ldm_sg.evaluate.judges import guide, is_guide, networks_of, open_judges, parse_features
from ldm_sg.evaluate.options import DRAWING, Options
from ldm_sg.evaluate.reference import Reference
from ldm_sg.evaluate.subjects import Subject, open_subject
from ldm_sg.hardware import pick_device, use_bf16


def assess(options: Options) -> tuple[dict[str, Any], Path, memory.Rows]:
    """The figures of every judge, with all that is needed to make them again, the file that they belong into, and the samples that
    are nearest to training images.

    Figures stand under the space that they were judged in: result["metrics"]["inception"]["fd"]. Samples pass once through
    all judges and are dropped: memory grows with the features only."""
    started, device, skipped = time.perf_counter(), pick_device(options.device), dict[str, str]()
    options.check()
    wanted = figures.parse_metrics(options.metrics) if options.metrics is not None else None
    known = statistics.read(options.reference)
    real = sources.ImageSet(options.reference, (), False) if known else sources.open_images(options.reference)
    subject = open_subject(options, list(parse_features(options.features)))
    made_by = guide(subject.pipe)
    wanted = wanted or (["fd"] if known else _default(subject, made_by))
    figures.check_enough(wanted, subject.total, subject.where)
    held_out = _check_extras(wanted, options, known is not None)
    figures.check_enough(wanted, None if known else real.total, options.reference)
    labels = sources.labels(real) if "nmi" in wanted else None
    asked = {"metrics": wanted, "run": str(options.run) if options.run else None}
    asked |= {name: getattr(options, name) for name in ("reference", "features", "resize", "size", "n")}
    asked |= {name: given for name in ("prior", "held_out") if (given := getattr(options, name)) is not None}
    if options.statistics:
        figures.prepare(Path(options.statistics))
    made = json.loads(json.dumps({"asked": asked, "sampling": subject.sampling}))  # as a file says it
    file = figures.prepare(Path(options.out) if options.out is not None else figures.free(subject.out, made))
    if options.statistics and Path(options.statistics).resolve() == file.resolve():
        raise InputError(f"out={file}: the figures are JSON, and the statistics go there: name another file")
    judges = open_judges(wanted, options, subject, device)
    for judge in judges if known else ():
        statistics.check_fits(options.reference, *known, judge.manifest, wanted)
    look = Look(subject, networks_of(judges), device)
    passes = Passes(look, partial(_worker, _resolved(options, subject), wanted), options, skipped)
    bf16 = use_bf16(options.precision or DRAWING["precision"], device)
    reference = Reference(real, passes, bf16, labels=labels, statistics=known and known[0])
    if held_out and "memory" in wanted:
        reference.held_out = Reference(held_out, passes, bf16)
    values, edited = edits.examine(options, subject, real, device) if "edit" in wanted else ({}, {})
    places, seen = passes(None, list(look.networks)) if judges else (range(min(options.n, edits.MOST)), {})
    edited_photos = min(len(places), real.total or len(places)) if edited else 0
    for judge in judges:
        try:
            found = judge.measure(seen[judge.key], places, reference)
        except InputError as err:
            raise InputError("; ".join([str(err), *figures.unread(skipped)])) from err
        values[judge.key[0]] = values.get(judge.key[0], {}) | found
    if options.statistics:
        statistics.write(Path(options.statistics), reference.moments, judges[0].manifest, reference.used)
    manifests = edited | {judge.key[0]: judge.manifest for judge in judges}
    result = {
        "source": options.source,
        "reference": options.reference,
        "asked": asked,
        "metrics": values,
        "details": reference.details,
        "judges": {space: found | {"guide": is_guide(found, made_by)} for space, found in manifests.items()},
        "run": str(subject.run) if subject.run else None,
        "samples": len(places),
        "reference_images": known[1].get("images") if known else reference.used or edited_photos,
        "sampling": subject.sampling,
        "preprocessing": {"size": subject.size, **sources.PREPROCESSING},
        "seconds": round(time.perf_counter() - started, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in ("ldm-sg", "torch", "diffusers", "torch-fidelity")},
    }
    for images in (real, subject.images):
        skipped |= dict.fromkeys(images.strays if images else (), "not one of the images of its folder")
    smallest = subject.size if known else sources.first_size(real)
    unguided = "trained without guidance (guidance.drop=1): w is 0, whatever was asked"
    result["notes"] = [unguided] * (not subject.guided) + list(figures.remarks(result, smallest, skipped))
    if options.out is None:  # another evaluation may have taken the name meanwhile
        file = figures.free(subject.out, made)
    return result, file, memory.gallery(subject, real, reference.details)


def _check_extras(wanted: list[str], options: Options, known: bool) -> sources.ImageSet | None:
    """The held-out images, if there are any; InputError for what does not go together. known: the reference is statistics."""
    other = [name for name in wanted if known and name not in figures.OF_STATISTICS]
    if other:
        raise InputError(f"{options.reference}: statistics are enough for fd, sfid and is; {other[0]} needs the images")
    if options.statistics and (known or not {"fd", "sfid"} & {*wanted} or len(parse_features(options.features)) > 1):
        raise InputError("statistics are written of reference images, for fd or sfid, and of one judge in features")
    if (options.held_out is None) == ("memory" in wanted or options.prior == "held-out"):
        given = f"held_out={options.held_out!r}"
        raise InputError(f"{given}: images that training did not see are for, and needed by, memory and prior=held-out")
    held_out = sources.open_images(options.held_out) if options.held_out else None
    if held_out and held_out.total is not None and "memory" in wanted and held_out.total < memory.LEAST:
        raise InputError(f"{held_out.where}: {held_out.total} images are too few for memory: at least {memory.LEAST}")
    return held_out


def _resolved(options: Options, subject: Subject) -> Options:
    """What was said of it once need not be said by every worker, and is the same in all."""
    if subject.pipe is None or subject.asked is None:
        return options
    step = subject.pipe.checkpoint
    return replace(options, w=subject.sampling["w"], checkpoint=None if step is None else str(step))


def _worker(options: Options, wanted: list[str], on: str) -> Look:
    """What a worker looks with."""
    options, device = replace(options, device=on), pick_device(on)
    subject = open_subject(options, [])
    return Look(subject, networks_of(open_judges(wanted, options, subject, device)), device)


def _default(subject: Subject, made_by: dict[str, Any] | None) -> list[str]:
    """fd and prdc, and what the run's signals allow."""
    spec = subject.pipe.spec if subject.pipe and subject.guided and made_by else None
    own = ["consistency"] * bool(spec and spec.one_id) + ["layout"] * bool(spec and spec.spatial_channels)
    return ["fd", "prdc", *own]
