"""f together with its g: fitted from the features on disk, kept in OUT/annotator, loaded again to annotate new images."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ldm_sg.annotate.clusters import Clusters
from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.oracle import Oracle
from ldm_sg.annotate.stage import Stage, sample_features, write_text
from ldm_sg.config import AnnotatorConfig, FeaturesConfig
from ldm_sg.errors import InputError, choices
from ldm_sg.guidance.signal import Guidance

Annotator = Clusters | Oracle
KINDS: dict[str, type[Clusters] | type[Oracle]] = {Clusters.kind: Clusters, Oracle.kind: Oracle}
SMALL = 16 * 2**20  # bytes of a shipped g that are still copied beside f


def fit(cfg: AnnotatorConfig, all_stages: list[Stage], counts: list[int], classes: np.ndarray) -> Annotator:
    """f of a config, fitted on the features that the streaming pass left on disk."""
    fitters: dict[str, Callable[[], Annotator]] = {
        "clusters": lambda: Clusters(cfg).fit(sample_features(all_stages, counts, cfg.sample, cfg.seed)),
        "oracle": lambda: Oracle.of_classes(classes),
    }
    return fitters[cfg.kind]()


@dataclass
class LoadedAnnotator:
    """g and f of an annotation set or a run, ready for new images [B, 3, H, W] in [-1, 1]."""

    extractor: FeatureExtractor
    f: Clusters

    def __call__(self, images: Tensor) -> Guidance:
        return self.f(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """[B, D] float32."""
        return self.extractor(images)


def save_annotator(folder: Path, annotator: Annotator, extractor: FeatureExtractor | None) -> None:
    """FOLDER/annotator.yaml (written last), what f learnt, and a small shipped g itself in FOLDER/g."""
    folder.mkdir(parents=True, exist_ok=True)
    annotator.save(folder)
    own = extractor.folder if extractor else None
    if own and sum(file.stat().st_size for file in own.iterdir()) <= SMALL:
        shutil.copytree(own, folder / "g", dirs_exist_ok=True)
    settings: dict[str, Any] = annotator.settings | {"features": extractor.manifest if extractor else None}
    write_text(folder / "annotator.yaml", yaml.safe_dump(settings, sort_keys=False, width=118, default_flow_style=None))


def load_f(folder: Path) -> tuple[Annotator, dict[str, Any]]:
    """What `save_annotator` wrote, without g: f and the settings."""
    path = folder / "annotator.yaml"
    if not path.is_file():
        raise InputError(f"{folder}: no annotator.yaml there; give the annotator/ folder of an annotation set or a run")
    settings = yaml.safe_load(path.read_text())
    if settings.get("kind") not in KINDS:
        raise InputError(f"{path}: kind {settings.get('kind')!r}; {choices(settings.get('kind'), KINDS)}")
    return KINDS[settings["kind"]].load(folder, settings), settings


def load_annotator(folder: str | Path, device: torch.device | str = "cpu") -> LoadedAnnotator:
    """`annotator(images) -> Guidance` of FOLDER, an annotation set's or a run's annotator/.

    InputError when it is not complete, when it reads ground truth (new images have none), or when its g cannot be had
    or is not the one that made the set."""
    folder = Path(folder)
    f, settings = load_f(folder)
    if not isinstance(f, Clusters):
        raise InputError(
            f"{folder}: annotator.kind={f.kind} reads ground truth from shards; it cannot annotate new images"
        )
    own = settings["features"]
    model = str(folder / "g") if (folder / "g" / "manifest.yaml").is_file() else own["model"]
    chosen = {key: own[key] for key in ("weights", "layer", "pool", "size", "precision")}
    extractor = load_extractor(FeaturesConfig(model=model, **chosen), device)
    if extractor.manifest["sha256"] != own["sha256"]:
        raise InputError(f"{folder}: features.model={own['model']} has other weights now than when it made this set")
    return LoadedAnnotator(extractor, f)
