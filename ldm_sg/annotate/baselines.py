"""What the paper's signals are compared with: random ids, and conditioning on features themselves."""

from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.clusters import Clusters, normalise
from ldm_sg.annotate.stage import Observed, sample_features
from ldm_sg.data.signals import Columns
from ldm_sg.guidance.signal import GuidanceSpec


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

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return {"k": generator.integers(0, self.k, count)}

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, num_labels=self.k)


class Features(Annotator):
    """The signal is g's own vector, L2-normalised."""

    kind = "features"
    gives_ids = False

    def fit(self, study: Study) -> None:
        assert study.extractor is not None
        self.k, self.dim = 0, study.extractor.dim

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return {"feature": normalise(seen.features).astype(np.float16)}

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, feature_dim=self.dim)

    def state(self) -> dict[str, Any]:
        return super().state() | {"dim": self.dim}


class Centroids(Features, Clusters):
    """The signal is the L2-normalised centroid of the image's cluster."""

    kind = "centroids"

    def fit(self, study: Study) -> None:
        Clusters.fit(self, study)
        Features.fit(self, study)

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return {"feature": normalise(self.centroids[self.assign(seen.features)]).astype(np.float16)}

    def prototypes(self) -> Tensor | None:
        return None  # there are no labels


class Neighbours(Features):
    """The signal is the vector of one of the image's `annotator.neighbours` nearest neighbours in g's space, drawn at random
    (Casanova et al., 2021, Instance-Conditioned GAN): of at most `annotator.sample` images that are kept for it."""

    kind = "neighbours"

    def fit(self, study: Study) -> None:
        super().fit(study)
        sample = sample_features(study.stages, study.counts, self.cfg.sample, self.cfg.seed)
        self.bank = torch.from_numpy(normalise(sample)).half()

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        most = min(self.cfg.neighbours, len(self.bank))
        near = faiss.knn(normalise(seen.features), self.bank.numpy(), most, faiss.METRIC_INNER_PRODUCT)[1]
        drawn = near[np.arange(count), generator.integers(0, near.shape[1], count)]
        return {"feature": self.bank.numpy()[drawn].astype(np.float16)}

    def kept(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        return {"bank": ("bank.safetensors", "features", (0, self.dim))}
