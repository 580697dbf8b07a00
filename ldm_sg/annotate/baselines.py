"""What the paper's signals are compared with: random ids, and conditioning on features themselves."""

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.nn import functional as F

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.clusters import Clusters, normalise
from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.stage import Stage, sample_features
from ldm_sg.annotate.views import Views
from ldm_sg.data.signals import Signals
from ldm_sg.folder import write_bytes
from ldm_sg.guidance.signal import GuidanceSpec

BANK = "bank.safetensors"


def corrupted(ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Ids [N] of which a random `share` is shuffled among itself, so that clusters keep their sizes (paper, Figure 3)."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(ids))[: round(share * len(ids))]
    out = ids.copy()
    out[chosen] = ids[generator.permutation(chosen)]
    return out


class Random(Annotator):
    """Ids drawn evenly, without a look at the image."""

    kind = "random"
    reads_g = False

    def signals(self, stage: Stage) -> dict[str, Sequence[np.ndarray]]:
        generator = np.random.default_rng([self.cfg.seed, stage.index])
        return {"k": generator.integers(0, self.k, len(stage.read_meta().keys))}

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, num_labels=self.k)


class Features(Annotator):
    """The signal is g's own vector, L2-normalised."""

    kind = "features"
    gives_ids = False
    dim = 0

    def fit(self, study: Study) -> None:
        assert study.extractor is not None
        self.k, self.dim = 0, study.extractor.dim

    def signals(self, stage: Stage) -> dict[str, Sequence[np.ndarray]]:
        return {"feature": normalise(stage.read_features()).astype(np.float16)}

    def annotate(self, g: FeatureExtractor, seen: Views) -> Signals:
        return self._of(F.normalize(g(seen.squares), dim=1))

    def _of(self, features: Tensor) -> Signals:
        return Signals(self.spec, feature=features.half().cpu(), count=len(features))

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, feature_dim=self.dim)

    def state(self) -> dict[str, int]:
        return {"k": self.k, "dim": self.dim}


class Centroids(Features):
    """The signal is the L2-normalised centroid of the image's cluster."""

    kind = "centroids"

    def fit(self, study: Study) -> None:
        self.clusters = Clusters(self.cfg)
        self.clusters.fit(study)
        super().fit(study)

    def signals(self, stage: Stage) -> dict[str, Sequence[np.ndarray]]:
        return {"feature": self._centroids(stage.read_features()).half().numpy()}

    def annotate(self, g: FeatureExtractor, seen: Views) -> Signals:
        return self._of(self._centroids(g(seen.squares)))

    def _centroids(self, features: np.ndarray | Tensor) -> Tensor:
        return F.normalize(self.clusters.centroids[self.clusters.assign(features)], dim=1)

    def save(self, folder: Path) -> None:
        self.clusters.save(folder)

    def restore(self, folder: Path) -> None:
        self.clusters = Clusters(self.cfg)
        self.clusters.restore(folder)


class Neighbours(Features):
    """The signal is the vector of one of the image's `annotator.neighbours` nearest neighbours in g's space, drawn at random
    (Casanova et al., 2021, Instance-Conditioned GAN): of at most `annotator.sample` images that are kept for it."""

    kind = "neighbours"

    def fit(self, study: Study) -> None:
        super().fit(study)
        self.bank = normalise(sample_features(study.stages, study.counts, self.cfg.sample, self.cfg.seed))

    def signals(self, stage: Stage) -> dict[str, Sequence[np.ndarray]]:
        generator = np.random.default_rng([self.cfg.seed, stage.index])
        return {"feature": self._neighbours(stage.read_features(), generator).astype(np.float16)}

    def annotate(self, g: FeatureExtractor, seen: Views) -> Signals:
        return self._of(torch.from_numpy(self._neighbours(g(seen.squares), np.random.default_rng(self.cfg.seed))))

    def _neighbours(self, features: np.ndarray | Tensor, generator: np.random.Generator) -> np.ndarray:
        index = faiss.IndexFlatIP(self.dim)
        index.add(self.bank)
        _, near = index.search(normalise(features), min(self.cfg.neighbours, len(self.bank)))
        return self.bank[near[np.arange(len(near)), generator.integers(0, near.shape[1], len(near))]]

    def save(self, folder: Path) -> None:
        write_bytes(folder / BANK, save({"features": self.bank.astype(np.float16)}))

    def restore(self, folder: Path) -> None:
        self.bank = load_file(folder / BANK)["features"].astype(np.float32)
