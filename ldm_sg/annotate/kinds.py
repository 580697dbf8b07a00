"""f by its name, kept in OUT/annotator together with its g, and loaded again to annotate new images."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.annotator import Annotator
from ldm_sg.annotate.baselines import Centroids, Features, Neighbours, Random
from ldm_sg.annotate.boxes import Boxes
from ldm_sg.annotate.clusters import Clusters
from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.oracle import Oracle
from ldm_sg.annotate.segments import Segments
from ldm_sg.annotate.views import Views
from ldm_sg.config import AnnotatorConfig, FeaturesConfig
from ldm_sg.configfile import from_mapping
from ldm_sg.data.images import show, to_float
from ldm_sg.data.latents import set_hash
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError, need_choice
from ldm_sg.folder import annotator_folder, file_sha256, read_mapping, whole, write_text

KINDS: dict[str, type[Annotator]] = {
    f.kind: f for f in (Clusters, Boxes, Segments, Oracle, Random, Features, Centroids, Neighbours)
}
SMALL = 16 * 2**20  # bytes of a shipped g that are still copied beside f


def make_annotator(cfg: AnnotatorConfig) -> Annotator:
    """The f of a config, not yet fitted unless it is another set's."""
    made, source = _unfitted(cfg), cfg.reuse or cfg.extend
    if source is None:
        return made
    old, _ = load_f(annotator_folder(source))
    if old.kind != cfg.kind or (cfg.reuse and cfg.extend):
        raise InputError(f"annotator.kind={cfg.kind}: {source} has {old.kind}; give either reuse= or extend=")
    if cfg.reuse:
        return old
    made.known = old.prototypes()
    return made


def late(cfg: AnnotatorConfig) -> set[str]:
    """The keys of a config of `annotate` that the pass over the images does not depend on."""
    return {f"annotator.{key}" for key in KINDS.get(cfg.kind, Annotator).late}


def _unfitted(cfg: AnnotatorConfig) -> Annotator:
    need_choice("annotator.kind", cfg.kind, KINDS)
    return KINDS[cfg.kind](cfg)


@dataclass
class LoadedAnnotator:
    """g and f of an annotation set or a run, ready for new images: `Views` of photos, or squares [B, 3, H, H] in [-1, 1] of
    which there is no more to see, such as samples."""

    extractor: FeatureExtractor
    f: Annotator
    digest: str  # sha256 over the files of its folder

    def __call__(self, images: Tensor | Views) -> Signals:
        return self.f.annotate(self.extractor, images if isinstance(images, Views) else Views.of_squares(images))

    def features(self, images: Tensor | Views) -> Tensor:
        """[B, D] float32."""
        return self.extractor(images.squares if isinstance(images, Views) else images)

    def see(self, images: Sequence[Image.Image], size: int, within: int | None = None) -> tuple[Tensor, Views]:
        """Photos -> the squares that the autoencoder sees, [B, 3, size, size] in [-1, 1], and what g and f see."""
        g = self.extractor
        shown = [show(image, size, within, g.size, self.f.whole and g.any_shape) for image in images]
        squares = to_float(torch.from_numpy(np.stack([image.square for image in shown])).to(g.mean.device))
        return squares, Views.of(squares, shown)

    def of_image(self, image: Image.Image, size: int, within: int | None = None) -> Signals:
        """The signals of one photo, as `annotate` would have given them to it; `size` and `within` as in `images.show`."""
        return self(self.see([image], size, within)[1])


def save_annotator(folder: Path, annotator: Annotator, extractor: FeatureExtractor | None) -> None:
    """FOLDER/annotator.yaml (written last), what f learnt, and a small shipped g itself in FOLDER/g."""
    folder.mkdir(parents=True, exist_ok=True)
    annotator.save(folder)
    own = extractor.folder if extractor else None
    if own and sum(file.stat().st_size for file in own.iterdir()) <= SMALL:
        with whole(folder / "g") as new:
            shutil.copytree(own, new)
    settings: dict[str, Any] = {"kind": annotator.kind, "state": annotator.state(), "config": asdict(annotator.cfg)}
    settings["features"] = extractor.manifest if extractor else None
    write_text(folder / "annotator.yaml", yaml.safe_dump(settings, sort_keys=False, width=118, default_flow_style=None))


def load_f(folder: Path) -> tuple[Annotator, dict[str, Any]]:
    """What `save_annotator` wrote, without g: f and the settings."""
    path = folder / "annotator.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: no annotator.yaml there; give the annotator/ folder of an annotation set or a run")
    settings = read_mapping(path, {"kind": str, "state": dict, "config": dict, "features": (dict, type(None))})
    annotator = _unfitted(from_mapping(AnnotatorConfig, settings["config"], str(path)))
    declared, annotator.dim = annotator.state(), (settings["features"] or {}).get("dim", 0)
    for name, value in settings["state"].items():
        wrong = name not in declared or type(value) is not type(declared[name])
        wrong = wrong or (isinstance(value, int) and value < 0)
        if wrong or (name == "dim" and annotator.dim not in (0, value)):
            raise InputError(f"{path}: state: {name}={value!r:.60}: not what {annotator.kind} keep there")
        setattr(annotator, name, value)
    try:
        annotator.restore(folder)
    except InputError as err:
        raise InputError(f"{err}; annotate again") from err
    return annotator, settings


def load_annotator(folder: str | Path, device: torch.device | str = "cpu") -> LoadedAnnotator:
    """`annotator(images) -> Signals` of FOLDER, an annotation set's or a run's annotator/.

    InputError when it is not complete, when it reads ground truth (new images have none), or when its g cannot be had
    or is not the one that made the set."""
    folder = Path(folder)
    f, settings = load_f(folder)
    extractor = load_extractor(features_of(folder, settings), device)
    if extractor.manifest["sha256"] != settings["features"]["sha256"]:
        model = settings["features"]["model"]
        raise InputError(f"{folder}: features.model={model} has other weights now than when it made this set")
    digest = set_hash(file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file())
    return LoadedAnnotator(extractor, f, digest)


def features_of(folder: Path, settings: dict[str, Any]) -> FeaturesConfig:
    """The config of the g that the f of FOLDER reads; `settings` as `load_f` gives them."""
    own = settings["features"]
    if own is None:
        raise InputError(f"{folder}: annotator.kind={settings['kind']} reads no image, so it cannot annotate new ones")
    model = str(folder / "g") if (folder / "g" / "manifest.yaml").is_file() else own["model"]
    return FeaturesConfig(model=model, **{key: own[key] for key in ("weights", "layer", "pool", "size", "precision")})


def check_same_g(source: str, extractor: FeatureExtractor | None) -> None:
    """InputError where the f of `source` was fitted on features of another g than this one."""
    own, here = load_f(annotator_folder(source))[1]["features"], extractor.manifest if extractor else None
    if own and here and any(own[key] != here[key] for key in ("sha256", "layer", "pool", "size")):
        said = [", ".join(f"{key}={m[key]}" for key in ("model", "layer", "pool", "size")) for m in (own, here)]
        raise InputError(
            f"{source} was annotated by g of {said[0]}, not by features.{said[1]}: give features.* of that g"
        )
