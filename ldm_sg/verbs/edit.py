"""edit: what a run draws, or photos -> the same with concepts moved, resized, or taken from other images."""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ldm_sg.autoencoder import psnr
from ldm_sg.commands import EditOptions
from ldm_sg.configfile import load
from ldm_sg.data.images import to_float
from ldm_sg.errors import InputError, need_within
from ldm_sg.folder import claim, locked, write_text
from ldm_sg.guidance import selfguide
from ldm_sg.pipeline import open_pipeline
from ldm_sg.report import html
from ldm_sg.report.grids import labelled_rows, save
from ldm_sg.sampling.edit import Edit, check, check_strength
from ldm_sg.sampling.editor import Editor, Source, Taken
from ldm_sg.sampling.options import MOST_W
from ldm_sg.sampling.request import read_photo
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
        if not self.take:
            raise InputError("recipe: take is empty: it needs at least one source with its concepts")
        for i, part in enumerate(self.take):
            if (part.photo is None) == (part.seed is None) or not part.concepts:
                what = "name one source, photo: FILE or seed: NUMBER, and its concepts: [5, 8]"
                raise InputError(f"recipe: take[{i}]: {what}")
        taken = [k for part in self.take for k in part.concepts]
        if (twice := next((k for k in taken if taken.count(k) > 1), None)) is not None:
            raise InputError(f"recipe: concept {twice} is taken twice: an image has one token of each concept")


def edit(run: str | Path, **options: Any) -> Path:
    """`options`: the other fields of EditOptions. Writes source-N.png, edited-N.png (of the last strength), edits.png (source,
    attention, edited by each strength) and report.html and settings.yaml into `out`; returns it."""
    asked = EditOptions(str(run), **options)
    if asked.w is None:
        asked.w = 7.5 if asked.prompt else 2.0
    edits, seed = edits_of(asked), asked.seed
    lpips = perceptual_distance(asked.lpips) if asked.lpips else None
    editor = _editor(asked, edits)
    folder = Path(asked.out) if asked.out else Path(run) / "edits" / _name(asked)
    source = _source(editor, "--like", asked.like, asked.n, seed)
    others: list[Taken] = []
    if asked.layout_from:
        other = _source(editor, "--layout-from", asked.layout_from, 1, seed)
        others = [(other, other.observed[-1].there[0].nonzero()[:, 0].tolist(), False)]
    for part in load(Recipe, asked.compose).take if asked.compose else ():
        own = seed if part.seed is None else part.seed
        other = _source(editor, "take.photo", part.photo, len(source.images), own)
        check([Edit(k) for k in part.concepts], other.observed[-1])
        others.append((other, part.concepts, True))
    aims, guidance = editor.aims(source, edits, others)
    with locked(folder):
        settings = {name: value for name, value in asdict(asked).items() if name != "out"}
        claim(folder, "settings.yaml", settings, free=("device",))
        made = {f"strength {s:g}": editor.solve(source.noise, guidance, aims, edits, s) for s in asked.strength}
        maps = {}
        for edit in edits:
            seen = selfguide.soft(source.observed[-1].maps[:, edit.concept])  # at the last step
            maps[f"attention of {edit.name}"] = _grey(seen, source.images)
            maps[f"asked of {edit.name}"] = _grey(edit.of(seen), source.images)
        rows, facts = {"source": source.images} | maps | made, {}
        if asked.like:
            rows["unedited"] = editor.edit(source, (), asked.strength[-1])
            facts = _likeness(rows["unedited"], source.images, lpips)
        save(labelled_rows(list(rows), list(rows.values()), scale=1), folder / "edits.png")
        write_text(folder / "report.html", _report(folder, edits, settings, facts))
        for name, images in (("source", source.images), ("edited", made[f"strength {asked.strength[-1]:g}"])):
            for i, image in enumerate(images):
                save(to_pil_image(image), folder / f"{name}-{i:03d}.png")
    print(folder / "edits.png")
    return folder


def _editor(asked: EditOptions, edits: list[Edit]) -> Editor:
    """Of a run of ours, or with a prompt of a diffusers folder."""
    if asked.prompt is None:
        if is_text_to_image(asked.run):
            raise InputError(f"{asked.run}: a text-to-image pipeline: give it a --prompt, whose words are its concepts")
        return Editor(open_pipeline(asked.run, asked.device, asked.checkpoint), asked.w, asked.steps)
    if other := next((o for o in ("like", "layout_from", "compose", "checkpoint") if getattr(asked, o)), None):
        raise InputError(f"--{other.replace('_', '-')}: of runs of ldm_sg only, not with --prompt")
    pipe = open_text_to_image(Path(asked.run), asked.device)
    return WordEditor(pipe, asked.prompt, [edit.name for edit in edits], asked.w, asked.steps)


def _source(editor: Editor, flag: str, photo: str | None, n: int, seed: int) -> Source:
    """The photo that `flag` names, or where there is none n images of the run's own."""
    return editor.drawn(n, seed) if photo is None else editor.photo(read_photo(flag, photo), seed)


def edits_of(asked: EditOptions) -> list[Edit]:
    """One of each concept that is named. InputError where there is nothing to do, or a value that cannot be."""
    if not (asked.move or asked.resize or asked.layout_from or asked.compose):
        raise InputError(
            "nothing to edit: give --move CONCEPT=DX,DY, --resize CONCEPT=TIMES, --layout-from PHOTO or --compose RECIPE"
        )
    need_within("n", asked.n, 1, MOST)
    need_within("steps", asked.steps, 2)
    need_within("w", asked.w, -MOST_W, MOST_W)
    for flag in ("like", "layout_from", "compose", "lpips"):
        if getattr(asked, flag) == "":
            raise InputError(f"--{flag.replace('_', '-')} '': a file is needed")
    if len({f"{s:g}" for s in asked.strength}) < len(asked.strength):
        raise InputError(f"--strength {asked.strength}: give each once")
    for strength in asked.strength:
        check_strength(strength)
    found = []
    for i, concept in enumerate(dict.fromkeys([*asked.move, *asked.resize])):
        if asked.prompt is None and isinstance(concept, str):
            raise InputError(f"{concept[:40]!r}: concepts of a run are numbers; words are those of a --prompt")
        dx, dy = asked.move.get(concept, (0.0, 0.0))
        times = asked.resize.get(concept, 1.0)
        need_within(f"--resize {concept}", times, 0.01, 100)
        number = concept if asked.prompt is None else i  # WordEditor counts the words that it is given
        found.append(Edit(number, dx, dy, times**0.5, str(concept)))
    return found


def _name(asked: EditOptions) -> str:
    """The folder of these edits, where none is named."""
    parts = [f"{Path(file).stem[:30]}" for file in (asked.like, asked.layout_from, asked.compose) if file]
    parts += [re.sub(r"\W+", "-", asked.prompt)[:40]] if asked.prompt else []
    parts += [f"move{k}_{dx:g}_{dy:g}" for k, (dx, dy) in asked.move.items()]
    parts += [f"resize{k}_{times:g}" for k, times in asked.resize.items()]
    parts += [] if asked.like else [f"n{asked.n}"]
    how = f"seed{asked.seed}_w{asked.w:g}_{asked.steps}_strength{'-'.join(f'{s:g}' for s in asked.strength)}"
    name = re.sub(r"[^\w.,=+-]", "-", "_".join([*parts, how]))
    return name if len(name) < 120 else f"{name[:110]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _grey(maps: Tensor, images: Tensor) -> Tensor:
    """Maps [B, h, w] in [0, 1] as uint8 [B, 3, H, W] of the images' size."""
    grey = nn.functional.interpolate(maps[:, None], images.shape[2:], mode="bilinear")
    return (grey.expand(-1, 3, -1, -1) * 255).byte()


def _likeness(made: Tensor, images: Tensor, lpips: nn.Module | None) -> dict[str, str]:
    """How near uint8 images [B, 3, H, W] are to those that they should be."""
    pair = to_float(made), to_float(images)
    found = {"unedited, PSNR": f"{float(psnr(*pair).mean()):.1f} dB"}
    if lpips:
        found["unedited, LPIPS"] = f"{float(lpips(*pair).mean()):.3f}"
    return found


def _report(folder: Path, edits: list[Edit], settings: dict[str, Any], facts: dict[str, str]) -> str:
    asked = [(e.name, f"{e.dx:+g}, {e.dy:+g}", f"{e.scale**2:g}") for e in edits]
    return html.page(
        "Edits of {}".format(settings["prompt"] or settings["like"] or f"seed {settings['seed']}"),
        "The source, where the network sees each edited concept and where it is asked for, and what came of it.",
        [
            html.section("Edits", "", html.facts(facts), html.picture(folder / "edits.png")),
            html.section("Asked for", "", html.table(["concept", "right, down", "times its area"], asked)),
            html.folded("Settings", html.yaml_code(settings)),
        ],
    )
