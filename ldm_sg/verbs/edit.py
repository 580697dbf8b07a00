"""edit: what a run draws, or photos -> the same with concepts moved, resized, or taken from other images."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.errors import InputError
from ldm_sg.folder import claim, locked, whole
from ldm_sg.guidance import selfguide
from ldm_sg.pipeline import open_pipeline
from ldm_sg.report.grids import labelled_rows, save
from ldm_sg.sampling.edit import Edit
from ldm_sg.sampling.editor import Editor, Source
from ldm_sg.sampling.request import read_photo


@dataclass
class EditOptions:
    """What a person asks for."""

    move: dict[int, tuple[float, float]] = field(default_factory=dict)  # concept -> right, down, as shares of the sides
    resize: dict[int, float] = field(default_factory=dict)  # concept -> times its size
    like: str | None = None  # a photo to edit, in place of images that the run draws
    layout_from: str | None = None  # a photo whose shapes are taken
    n: int = 4
    seed: int = 0
    strength: list[float] = field(default_factory=lambda: [20.0])
    w: float = 2.0
    steps: int = 25
    device: str = "auto"
    checkpoint: str | None = None


def edit(run: str, options: EditOptions, out: str | None = None) -> Path:
    """Writes source-N.png, edited-N.png (of the last strength), edits.png (source, attention, edited by each strength) and
    settings.yaml into `out`; returns it."""
    edits = edits_of(options)
    pipe = open_pipeline(run, options.device, options.checkpoint)
    editor = Editor(pipe, options.w, options.steps)
    folder = Path(out) if out else Path(run) / "edits" / _name(options)
    like, seed = options.like, options.seed
    source = _photo(editor, "--like", like, seed) if like else editor.drawn(options.n, seed)
    others = []
    if options.layout_from:
        other = _photo(editor, "--layout-from", options.layout_from, seed)
        others = [(other, other.observed[-1].there[0].nonzero()[:, 0].tolist())]
    aims, guidance = editor.aims(source, edits, others)
    with locked(folder):
        claim(folder, "settings.yaml", asdict(options) | {"run": str(run)}, free=("device",))
        made = {f"strength {s:g}": editor.solve(source.noise, guidance, aims, edits, s) for s in options.strength}
        rows = {"source": source.images} | {f"attention of {e.concept}": _maps(source, e.concept) for e in edits} | made
        if options.like:
            rows["unedited"] = editor.edit(source, (), options.strength[-1])
        save(labelled_rows(list(rows), list(rows.values()), scale=1), folder / "edits.png")
        for name, images in (("source", source.images), ("edited", made[f"strength {options.strength[-1]:g}"])):
            for i, image in enumerate(images):
                with whole(folder / f"{name}-{i:03d}.png") as new:
                    to_pil_image(image).save(new, "PNG")
    return folder


def edits_of(options: EditOptions) -> list[Edit]:
    """One of each concept that is named. InputError where there is nothing to do, or a value that cannot be."""
    if not options.move and not options.resize and not options.layout_from:
        raise InputError("nothing to edit: give --move CONCEPT=DX,DY, --resize CONCEPT=TIMES or --layout-from PHOTO")
    for name, least in (("n", 1), ("steps", 2)):
        if getattr(options, name) < least:
            raise InputError(f"{name}={getattr(options, name)}: at least {least}")
    if not options.strength or not all(0 <= s <= 1000 for s in options.strength):
        raise InputError(f"--strength {options.strength}: from 0 to 1000")
    found = []
    for concept in dict.fromkeys([*options.move, *options.resize]):
        dx, dy = options.move.get(concept, (0.0, 0.0))
        found.append(Edit(concept, dx, dy, options.resize.get(concept, 1.0) ** 0.5))
    return found


def _name(options: EditOptions) -> str:
    parts = [f"{Path(file).stem[:30]}" for file in (options.like, options.layout_from) if file]
    parts += [f"move{k}_{dx:g}_{dy:g}" for k, (dx, dy) in options.move.items()]
    parts += [f"resize{k}_{times:g}" for k, times in options.resize.items()]
    return "_".join([*parts, f"n{options.n}", f"seed{options.seed}"])[:120]


def _photo(editor: Editor, flag: str, file: str, seed: int) -> Source:
    pipe = editor.pipe
    annotator = load_annotator(pipe.annotator_folder, pipe.device)
    squares, views = annotator.see([read_photo(flag, file)], pipe.image_size, pipe.source_size)
    return editor.photos(squares, annotator(views), seed)


def _maps(source: Source, concept: int) -> Tensor:
    """Where the network sees a concept at the last step, as grey images."""
    maps = selfguide.minmax(source.observed[-1].maps[:, concept])
    grey = torch.nn.functional.interpolate(maps[:, None], source.images.shape[2:], mode="bilinear")
    return (grey.expand(-1, 3, -1, -1) * 255).byte()
