"""edit: what a run draws, or photos -> the same with concepts moved, resized, or taken from other images."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ldm_sg.autoencoder import psnr
from ldm_sg.configfile import load
from ldm_sg.data.images import to_float
from ldm_sg.errors import InputError
from ldm_sg.folder import claim, locked, whole, write_text
from ldm_sg.guidance import selfguide
from ldm_sg.pipeline import open_pipeline
from ldm_sg.report import html
from ldm_sg.report.grids import labelled_rows, save
from ldm_sg.sampling.edit import Edit, check, check_strength
from ldm_sg.sampling.editor import Editor
from ldm_sg.sampling.request import MOST_W, read_photo
from ldm_sg.sampling.words import WordEditor, is_text_to_image, open_text_to_image
from ldm_sg.training.autoencoder import perceptual_distance

MOST = 64  # images, which are edited together


@dataclass
class Ingredient:
    """Concepts of a photo, or of what the run draws with `seed`."""

    concepts: list[int]
    photo: str | None = None
    seed: int | None = None


@dataclass
class Recipe:
    """What --compose reads: concepts of other images, shape and look, that go into the source."""

    take: list[Ingredient]

    def check(self) -> None:
        """InputError for an ingredient without one source, or without concepts, and a concept that two are to give."""
        taken: list[int] = []
        for i, part in enumerate(self.take):
            if (part.photo is None) == (part.seed is None):
                raise InputError(f"recipe: take[{i}]: name one source, photo: FILE or seed: NUMBER")
            if not part.concepts:
                raise InputError(f"recipe: take[{i}].concepts is empty: name the concepts to take, for example [5, 8]")
            taken += part.concepts
        if not self.take:
            raise InputError("recipe: take is empty: it needs at least one source with its concepts")
        if (twice := next((k for k in taken if taken.count(k) > 1), None)) is not None:
            raise InputError(f"recipe: concept {twice} is taken twice: an image has one token of each concept")


@dataclass
class EditOptions:
    """What a person asks for."""

    move: dict[int | str, tuple[float, float]] = field(default_factory=dict)  # concept -> right, down, in sides
    resize: dict[int | str, float] = field(default_factory=dict)  # concept -> times its size
    prompt: str | None = None  # of a text-to-image pipeline, whose concepts are words of it
    like: str | None = None  # a photo to edit, in place of images that the run draws
    layout_from: str | None = None  # a photo whose shapes are taken
    compose: str | None = None  # YAML of a Recipe
    n: int = 4
    seed: int = 0
    strength: list[float] = field(default_factory=lambda: [20.0])
    w: float = 2.0
    steps: int = 25
    device: str = "auto"
    checkpoint: str | None = None
    lpips: str | None = None  # weights that judge the unedited reconstruction of a photo


def edit(run: str, options: EditOptions, out: str | None = None) -> Path:
    """Writes source-N.png, edited-N.png (of the last strength), edits.png (source, attention, edited by each strength) and
    report.html and settings.yaml into `out`; returns it."""
    edits = edits_of(options)
    lpips = perceptual_distance(options.lpips) if options.lpips else None
    editor = _editor(run, options, edits)
    folder = Path(out) if out else Path(run) / "edits" / _name(options)
    like, seed = options.like, options.seed
    source = editor.photo(read_photo("--like", like), seed) if like else editor.drawn(options.n, seed)
    others = []
    if options.layout_from:
        other = editor.photo(read_photo("--layout-from", options.layout_from), seed)
        others = [(other, other.observed[-1].there[0].nonzero()[:, 0].tolist(), False)]
    for part in load(Recipe, options.compose).take if options.compose else ():
        other = (
            editor.photo(read_photo("take.photo", part.photo), seed)
            if part.photo is not None
            else editor.drawn(len(source.images), part.seed)
        )
        check([Edit(k) for k in part.concepts], other.observed[-1])
        others.append((other, part.concepts, True))
    aims, guidance = editor.aims(source, edits, others)
    with locked(folder):
        moves = {concept: list(way) for concept, way in options.move.items()}  # as YAML gives them back
        claim(folder, "settings.yaml", asdict(options) | {"move": moves, "run": str(run)}, free=("device",))
        made = {f"strength {s:g}": editor.solve(source.noise, guidance, aims, edits, s) for s in options.strength}
        maps = {}
        for edit in edits:
            seen = selfguide.soft(source.observed[-1].maps[:, edit.concept])  # at the last step
            maps[f"attention of {edit.name}"] = _grey(seen, source.images)
            maps[f"asked of {edit.name}"] = _grey(edit.of(seen), source.images)
        rows, facts = {"source": source.images} | maps | made, {}
        if options.like:
            rows["unedited"] = editor.edit(source, (), options.strength[-1])
            facts = _likeness(rows["unedited"], source.images, lpips)
        save(labelled_rows(list(rows), list(rows.values()), scale=1), folder / "edits.png")
        write_text(folder / "report.html", _report(folder, edits, options, facts))
        for name, images in (("source", source.images), ("edited", made[f"strength {options.strength[-1]:g}"])):
            for i, image in enumerate(images):
                with whole(folder / f"{name}-{i:03d}.png") as new:
                    to_pil_image(image).save(new, "PNG")
    return folder


def _editor(run: str, options: EditOptions, edits: list[Edit]) -> Editor:
    """Of a run of ours, or with a prompt of a diffusers folder."""
    if options.prompt is None:
        if is_text_to_image(run):
            raise InputError(f"{run}: a text-to-image pipeline: give it a --prompt, whose words are its concepts")
        return Editor(open_pipeline(run, options.device, options.checkpoint), options.w, options.steps)
    if other := next((o for o in ("like", "layout_from", "compose", "checkpoint") if getattr(options, o)), None):
        raise InputError(f"--{other.replace('_', '-')}: of runs of ldm_sg only, not with --prompt")
    pipe = open_text_to_image(Path(run), options.device)
    return WordEditor(pipe, options.prompt, [edit.name for edit in edits], options.w, options.steps)


def edits_of(options: EditOptions) -> list[Edit]:
    """One of each concept that is named. InputError where there is nothing to do, or a value that cannot be."""
    if not (options.move or options.resize or options.layout_from or options.compose):
        raise InputError(
            "nothing to edit: give --move CONCEPT=DX,DY, --resize CONCEPT=TIMES, --layout-from PHOTO or --compose RECIPE"
        )
    for name, least in (("n", 1), ("steps", 2)):
        if getattr(options, name) < least:
            raise InputError(f"{name}={getattr(options, name)}: at least {least}")
    if options.n > MOST:
        raise InputError(f"n={options.n}: at most {MOST} at once; others by another --seed")
    if not abs(options.w) <= MOST_W:
        raise InputError(f"w={options.w}: a finite number, at most {MOST_W}")
    for flag in ("like", "layout_from", "compose", "lpips"):
        if getattr(options, flag) == "":
            raise InputError(f"--{flag.replace('_', '-')} '': a file is needed")
    if len({f"{s:g}" for s in options.strength}) < max(1, len(options.strength)):
        raise InputError(f"--strength {options.strength}: give each once")
    for strength in options.strength:
        check_strength(strength)
    for concept, times in options.resize.items():
        if not 0.01 <= times <= 100:
            raise InputError(f"--resize {concept}={times:g}: from 0.01 to 100 times its area")
    found = []
    for i, concept in enumerate(dict.fromkeys([*options.move, *options.resize])):
        dx, dy = options.move.get(concept, (0.0, 0.0))
        number = concept if isinstance(concept, int) else i  # WordEditor counts the words that it is given
        found.append(Edit(number, dx, dy, options.resize.get(concept, 1.0) ** 0.5, str(concept)))
    return found


def _name(options: EditOptions) -> str:
    parts = [f"{Path(file).stem[:30]}" for file in (options.like, options.layout_from, options.compose) if file]
    parts += [re.sub(r"\W+", "-", options.prompt)[:40]] if options.prompt else []
    parts += [f"move{k}_{dx:g}_{dy:g}" for k, (dx, dy) in options.move.items()]
    parts += [f"resize{k}_{times:g}" for k, times in options.resize.items()]
    how = f"{'' if options.like else f'n{options.n}_'}seed{options.seed}_w{options.w:g}_{options.steps}_strength{'-'.join(map('{:g}'.format, options.strength))}"
    name = re.sub(r"[^\w.,=+-]", "-", "_".join([*parts, how]))
    return name if len(name) < 120 else f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _grey(maps: Tensor, images: Tensor) -> Tensor:
    """Maps [B, h, w] in [0, 1] as uint8 [B, 3, H, W] of the images' size."""
    grey = torch.nn.functional.interpolate(maps[:, None], images.shape[2:], mode="bilinear")
    return (grey.expand(-1, 3, -1, -1) * 255).byte()


def _likeness(made: Tensor, images: Tensor, lpips: nn.Module | None) -> dict[str, str]:
    """How near uint8 images [B, 3, H, W] are to those that they should be."""
    pair = to_float(made), to_float(images)
    found = {"unedited, PSNR": f"{float(psnr(*pair).mean()):.1f} dB"}
    if lpips:
        found["unedited, LPIPS"] = f"{float(lpips(*pair).mean()):.3f}"
    return found


def _report(folder: Path, edits: list[Edit], options: EditOptions, facts: dict[str, str]) -> str:
    asked = [(e.name, f"{e.dx:+g}, {e.dy:+g}", f"{e.scale**2:g}") for e in edits]
    return html.page(
        f"Edits of {options.prompt or options.like or f'seed {options.seed}'}",
        "The source, where the network sees each edited concept and where it is asked for, and what came of it.",
        [
            html.section("Edits", "", html.facts(facts), html.picture(folder / "edits.png")),
            html.section("Asked for", "", html.table(["concept", "right, down", "times its area"], asked)),
            html.folded("Settings", html.yaml_code(asdict(options))),
        ],
    )
