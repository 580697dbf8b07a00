"""f: what turns images and their features into guidance signals. One class a kind; `kinds` has the table."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.torch import save
from torch import Tensor

from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.stage import Observed, Stage
from ldm_sg.annotate.views import Views
from ldm_sg.config import AnnotateConfig, AnnotatorConfig
from ldm_sg.data.images import to_float
from ldm_sg.data.shards import ImageBatch, image_batches
from ldm_sg.data.signals import Columns, Signals
from ldm_sg.errors import InputError
from ldm_sg.folder import write_bytes
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.weights import read_finite


@dataclass(frozen=True)
class Study:
    """What an annotator may learn from."""

    config: AnnotateConfig
    shards: list[str]
    stages: list[Stage]
    size: int  # pixels
    extractor: FeatureExtractor | None
    counts: list[int]  # images a shard; empty before the pass

    def some_images(self, limit: int, zoom: int = 1, whole: bool = False) -> Iterator[Views]:
        """At most about `limit` images in batches, as g sees them or, with `zoom`, from so many times nearer: the first
        ones of every shard, or of `limit` shards evenly spread; `whole` as in `images.show`. InputError where there is none."""
        shards = self.shards[:: -(-len(self.shards) // limit)]
        each, found, g = limit // len(shards), 0, self.extractor
        assert g is not None
        for shard in shards:
            left, together = each, min(each, self.config.features.batch_size)
            looks = {"view": g.size * zoom, "whole": whole}
            for batch in image_batches([shard], self.size, together, 0, lambda *_: None, **looks):
                yield Views.of(to_float(batch.images[:left].to(g.mean.device)), batch.shown[:left])
                left, found = left - len(batch.keys), found + 1
                if left <= 0:
                    break
        if not found:
            raise InputError(f"shards={self.config.shards!r}: no usable image to learn from")


class Annotator(ABC):
    """Its life: `prepare` before the streaming pass, `observe` in it, `fit` after it, then `say`, of what was observed, shard
    by shard; saved and loaded again, both for new images."""

    kind: ClassVar[str]
    reads_g: ClassVar[bool] = True  # needs g at all
    reads_truth: ClassVar[bool] = False  # looks at labels, boxes and masks of the shards, where there are any
    whole: ClassVar[bool] = False  # looks at uncropped images, where shards hold them and g reads any shape
    gives_ids: ClassVar[bool] = True  # one cluster id an image, which `annotator.shuffle` can shuffle
    grows: ClassVar[bool] = True  # an image's signal does not depend on what other images there are, once f is fitted
    # settings that only `fit` and what follows it read: another value needs no second look at the images
    late: ClassVar[frozenset[str]] = frozenset(
        {"k", "niter", "restarts", "seed", "sample", "fit", "shuffle", "neighbours", "extend"}
    )

    def __init__(self, cfg: AnnotatorConfig):
        self.cfg, self.k = cfg, cfg.k
        self.fitted: dict[str, Any] = {}  # how k-means found the centroids, where it did: fit, images, passes, inertia
        self.dim = 0  # width of g's features, where it is known
        self.known: Tensor | None = None  # prototypes of labels that it must keep, with annotator.extend

    def prepare(self, study: Study) -> None:
        """Learns what `observe` needs."""

    def observe(self, g: FeatureExtractor | None, seen: Views, batch: ImageBatch | None = None) -> Observed:
        """Looks at images: those of a batch as they pass, which stays on disk, or new ones, of which no truth is known."""
        return Observed(features=None if g is None else g(seen.squares))

    def fit(self, study: Study) -> None:
        """Learns from the features that the pass left on disk."""

    @abstractmethod
    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        """The signals (`data.signals.columns`) of `count` images."""

    def signals(self, stage: Stage) -> Columns:
        """Those of a shard."""
        generator = np.random.default_rng([self.cfg.seed, stage.index])
        return self.say(stage.read_observed(), len(stage.read_meta().keys), generator)

    @property
    @abstractmethod
    def spec(self) -> GuidanceSpec:
        """What the signals look like."""

    def prototypes(self) -> Tensor | None:
        """What its labels stand for in g's feature space, [K, D], to tell labels of two annotators alike; None = not known."""
        return None

    def figures(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
        """What the manifest says of the fit, and of `observe`'s totals over the set."""
        return {"kmeans": self.fitted} if self.fitted else {}

    def annotate(self, g: FeatureExtractor, seen: Views) -> Signals:
        """The signals of new images."""
        count = len(seen.squares)
        columns = self.say(self.observe(g, seen), count, np.random.default_rng(self.cfg.seed))
        return Signals.from_columns(self.spec, columns, count)

    def state(self) -> dict[str, Any]:
        """The small part of what was learnt: attributes that annotator.yaml keeps beside the config."""
        return {"k": self.k, "fitted": self.fitted}

    def kept(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """The large part: attributes that are tensors, and of each its file, its name there, and its shape (0 = any)."""
        return {}

    def save(self, folder: Path) -> None:
        """What is `kept`, as files in FOLDER."""
        for attribute, (file, name, _) in self.kept().items():
            write_bytes(folder / file, save({name: getattr(self, attribute).contiguous()}))

    def restore(self, folder: Path) -> None:
        """What `save` wrote."""
        for attribute, (file, name, shape) in self.kept().items():
            setattr(self, attribute, read_finite(folder / file, {name: shape})[name])
