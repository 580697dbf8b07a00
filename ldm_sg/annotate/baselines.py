"""What the paper's signals are compared with: random ids, and conditioning on features themselves."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
from safetensors.numpy import load_file, save

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.clusters import Clusters, normalise
from ldm_sg.annotate.stage import Observed, sample_features
from ldm_sg.data.signals import Columns
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

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return {"k": generator.integers(0, self.k, count)}

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

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return {"feature": normalise(seen.features).astype(np.float16)}

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, feature_dim=self.dim)

    def state(self) -> dict[str, Any]:
        return super().state() | {"dim": self.dim}


class Centroids(Features):
    """The signal is the L2-normalised centroid of the image's cluster."""

    kind = "centroids"

    def fit(self, study: Study) -> None:
        self.clusters = Clusters(self.cfg)
        self.clusters.fit(study)
        self.fitted = self.clusters.fitted
        super().fit(study)

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return {"feature": normalise(self.clusters.centroids[self.clusters.assign(seen.features)]).astype(np.float16)}

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

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        index = faiss.IndexFlatIP(self.dim)
        index.add(self.bank)
        _, near = index.search(normalise(seen.features), min(self.cfg.neighbours, len(self.bank)))
        drawn = near[np.arange(count), generator.integers(0, near.shape[1], count)]
        return {"feature": self.bank[drawn].astype(np.float16)}

    def save(self, folder: Path) -> None:
        write_bytes(folder / BANK, save({"features": self.bank.astype(np.float16)}))

    def restore(self, folder: Path) -> None:
        self.bank = load_file(folder / BANK)["features"].astype(np.float32)
