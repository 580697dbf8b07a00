"""inspect: an annotation set -> a page to explore its clusters, their names, and a table for embedding-atlas."""

import shlex
from pathlib import Path

from ldm_sg.annotate import names
from ldm_sg.configfile import ASSETS
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.folder import locked, read_mapping, write_text
from ldm_sg.hardware import pick_device
from ldm_sg.report import annotation, explore
from ldm_sg.report.run import annotation_folder

TAKEN = 3  # clusters of a text


def inspect(
    annotations: Path,
    out: Path | None = None,
    layout: str = "pca",
    describe: bool = False,
    clip: str | None = None,
    vocabulary: Path | None = None,
    parquet: Path | None = None,
    device: str = "auto",
) -> Path:
    """Writes the page, and the table where one is asked for; returns the page's path. `describe`: clusters are named first."""
    if describe != bool(clip) or (vocabulary and not describe):
        raise InputError("--describe, --clip MODEL/TAG (or MODEL:FILE) and, if you like, --vocabulary FILE go together")
    out, place = out or annotations / "inspect.html", explore.find_layout(layout)
    for flag, path, suffix in (("--out", out, ".html"), ("--parquet", parquet, ".parquet")):
        if path and (path.suffix != suffix or path.is_dir()):
            raise InputError(f"{flag} {str(path)!r}: give a file NAME{suffix}")
    words = names.read_vocabulary(vocabulary or ASSETS / "nouns.txt") if describe else []
    latents = LatentSet(annotations)
    if clip:
        if not latents.spec.one_id:
            raise InputError(f"--describe: images of {annotations} have no single cluster each that could be named")
        with locked(annotations):
            model, every = names.Clip(clip, pick_device(device)), list(range(latents.spec.num_labels))
            typical = {k: groups[0] for k, groups in annotation.extremes(latents, every).items()}
            names.describe(latents, typical, model, words)
        print(f"{len(typical):,} clusters named by {len(words):,} words: {annotations / names.NAMES}")
    if parquet:
        rows = explore.write_atlas(latents, parquet, place)
        print(f"{rows:,} of {len(latents):,} images, for")
        print(f"embedding-atlas {shlex.quote(str(parquet))} --image image --x x --y y --neighbors neighbors")
    if not (annotations / "report.html").is_file():  # the pictures of the sections
        annotation.write_report(annotations)
    sections = [explore.section(latents, layout, place), *annotation.sections(latents)]
    write_text(out, annotation.document(annotations, latents.manifest, sections))
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
