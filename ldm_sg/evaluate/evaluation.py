"""An evaluation: subject -> judges -> features -> figures."""

import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_sg.evaluate import edits, figures, sources
from ldm_sg.evaluate.collect import Look, Passes
from ldm_sg.evaluate.judges import guide, open_judges, parse_features
from ldm_sg.evaluate.options import DRAWING, Options
from ldm_sg.evaluate.reference import Reference
from ldm_sg.evaluate.subjects import Subject, open_subject
from ldm_sg.hardware import pick_device


def assess(options: Options) -> tuple[dict[str, Any], Path]:
    """The figures of every judge, with all that is needed to make them again, and the file that they belong into.

    Figures stand under the space that they were judged in: result["metrics"]["inception"]["fd"]. Samples pass once through
    all judges and are dropped: memory grows with the features only."""
    started, device, skipped = time.perf_counter(), pick_device(options.device), dict[str, str]()
    options.check()
    wanted = figures.parse_metrics(options.metrics) if options.metrics is not None else None
    real = sources.open_images(options.reference)
    subject = open_subject(options, list(parse_features(options.features)))
    precision = options.precision or DRAWING["precision"]
    made_by = guide(subject.pipe)
    wanted = wanted or _default(subject, made_by)
    figures.check_enough(wanted, subject.total, subject.where)
    figures.check_enough(wanted, real.total, options.reference)
    asked = {"metrics": wanted, "run": str(options.run) if options.run else None}
    asked |= {name: getattr(options, name) for name in ("reference", "features", "resize", "size", "n")}
    file = figures.prepare(Path(options.out) if options.out is not None else figures.free(subject.out, asked))
    judges = open_judges(wanted, options, subject, device)

    look = Look(subject, real, {(judge.space, judge.sees): judge.network for judge in judges}, device)
    passes = Passes(look, partial(_look, _resolved(options, subject), wanted, real), options, skipped)
    reference = Reference(real, subject, passes, device, precision)
    values, edited = edits.examine(options, subject, real, device) if "edit" in wanted else ({}, {})
    places, seen = passes(False, list(look.networks)) if judges else (range(min(options.n, edits.MOST)), {})
    for judge in judges:
        found = judge.measure(seen[judge.space, judge.sees], places, reference)
        values[judge.space] = values.get(judge.space, {}) | found
    manifests = edited | {judge.space: judge.manifest for judge in judges}
    result = {
        "source": options.source,
        "reference": options.reference,
        "asked": asked,
        "metrics": values,
        "judges": {space: found | {"guide": found["sha256"] == made_by} for space, found in manifests.items()},
        "run": str(subject.run) if subject.run else None,
        "samples": len(places),
        "reference_images": reference.used,
        "sampling": subject.sampling,
        "preprocessing": {"size": subject.size, **sources.PREPROCESSING},
        "seconds": round(time.perf_counter() - started, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {name: version(name) for name in ("ldm-sg", "torch", "diffusers", "torch-fidelity")},
    }
    result["notes"] = subject.notes + figures.remarks(result, sources.first_size(real), skipped)
    return result, file


def _resolved(options: Options, subject: Subject) -> Options:
    """What was said of it once need not be said by every worker, and is the same in all."""
    if subject.pipe is None or subject.asked is None:
        return options
    step = subject.pipe.checkpoint
    return replace(options, w=subject.sampling["w"], checkpoint=None if step is None else str(step))


def _look(options: Options, wanted: list[str], real: sources.ImageSet, on: str) -> Look:
    """What a worker looks with."""
    options, device = replace(options, device=on), pick_device(on)
    subject = open_subject(options, [])
    judges = open_judges(wanted, options, subject, device)
    return Look(subject, real, {(judge.space, judge.sees): judge.network for judge in judges}, device)


def _default(subject: Subject, made_by: str | None) -> list[str]:
    """fd and prdc, and what the run's signals allow."""
    spec = subject.pipe.spec if subject.pipe and subject.guided and made_by else None
    own = ["consistency"] * bool(spec and spec.one_id) + ["layout"] * bool(spec and spec.spatial)
    return ["fd", "prdc", *own]
