"""inspect: an annotation set -> a page to explore its clusters, their names, and a table for embedding-atlas."""

import shlex
from pathlib import Path
from typing import Any

from ldm_sg.annotate import names
from ldm_sg.commands import InspectOptions
from ldm_sg.configfile import ASSETS
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.folder import check, locked, read_mapping, write_text
from ldm_sg.hardware import pick_device
from ldm_sg.report import annotation, explore
from ldm_sg.report.run import annotation_folder

TAKEN = 3  # clusters of a text


def inspect(annotations: str | Path, **options: Any) -> Path:
    """Writes the page, and the table where one is asked for; returns the page's path. `options`: the other fields of
    InspectOptions; clusters are named first."""
    folder = Path(annotations)
    asked = InspectOptions(folder, **options)
    if asked.describe != bool(asked.clip) or (asked.vocabulary and not asked.describe):
        raise InputError("--describe, --clip MODEL/TAG (or MODEL:FILE) and, if you like, --vocabulary FILE go together")
    out, place = asked.out or folder / "inspect.html", explore.find_layout(asked.layout)
    for flag, path, suffix in (("--out", out, ".html"), ("--parquet", asked.parquet, ".parquet")):
        if path and (path.suffix != suffix or path.is_dir()):
            raise InputError(f"{flag} {str(path)!r}: give a file NAME{suffix}")
    words = names.read_vocabulary(asked.vocabulary or ASSETS / "nouns.txt") if asked.describe else []
    latents = LatentSet(folder)
    said = {"annotator": {"kind": str, **({"counts": [int]} if latents.spec.one_id else {})}, "autoencoder": dict}
    check(latents.manifest, said, f"{folder / 'manifest.yaml'}")
    if asked.clip:
        if not latents.spec.one_id:
            raise InputError(f"--describe: images of {folder} have no single cluster each that could be named")
        with locked(folder):
            model, every = names.Clip(asked.clip, pick_device(asked.device)), list(range(latents.spec.num_labels))
            typical = {k: groups[0] for k, groups in annotation.extremes(latents, every).items()}
            names.describe(latents, typical, model, words)
        print(f"{len(typical):,} clusters named by {len(words):,} words: {folder / names.NAMES}")
    if asked.parquet:
        rows = explore.write_atlas(latents, asked.parquet, place)
        print(f"{rows:,} of {len(latents):,} images, for")
        print(f"embedding-atlas {shlex.quote(str(asked.parquet))} --image image --x x --y y --neighbors neighbors")
    if not (folder / "report.html").is_file():  # the pictures of the sections
        annotation.write_report(folder)
    sections = [explore.section(latents, asked.layout, place), *annotation.sections(latents)]
    write_text(out, annotation.document(folder, latents.manifest, sections))
    print(out)
    return out


def clusters_named(run: str, text: str, device: str = "auto") -> list[int]:
    """The clusters of a run whose images are most like `text`; says which. InputError where they have not been described."""
    asked, path = f"--name {text!r}", Path(run) / "config.yaml"
    config = read_mapping(path) if path.is_file() else {}
    if not text.strip() or (folder := annotation_folder(Path(run), config)) is None:
        raise InputError(f"{asked}: needs a text, and a run whose annotation set is at hand; that of {run} is not")
    hash = read_mapping(folder / "manifest.yaml", {"hash": str})["hash"]
    if (said := names.read_names(folder, hash)) is None:
        way = f"ldm-sg inspect {shlex.quote(str(folder))} --describe --clip MODEL/TAG"
        raise InputError(f"{asked}: the clusters of {folder} have not been described: {way}")
    learnt = Path(run) / "annotation.json"
    if learnt.is_file() and not config.get("leave_out") and read_mapping(learnt, {"hash": str})["hash"] != hash:
        raise InputError(f"{asked}: {folder} has been annotated anew since {run} learnt from it: give --cluster ids")
    found = names.nearest(folder, said, text, TAKEN, pick_device(device))
    shown = [" ".join([str(k), *said["names"][k][:1], f"({cosine:.3f})"]) for k, cosine in found]
    print(f"{asked}: clusters {', '.join(shown)}")
    return [k for k, _ in found]
