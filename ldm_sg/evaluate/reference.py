"""The real images that samples are compared with: their features, and what the run's own autoencoder leaves of them."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_sg.annotate.kinds import LoadedAnnotator
from ldm_sg.annotate.stream import encode
from ldm_sg.data.images import to_float, to_uint8
from ldm_sg.evaluate import sources
from ldm_sg.evaluate.collect import Key, Network, Passes
from ldm_sg.evaluate.metrics import Moments

CEILING = 1_000  # of them pass through the autoencoder, for the best that a sample can reach
IDENTITY = (
    "name",
    "sha256",
    "layer",
    "pool",
    "size",
    "precision",
    "resize",
    "spatial",
    "mean",
    "std",
    "unit",
)  # of a network, in its manifest


@dataclass
class Reference:
    """What networks give is remembered on disk for these files, their preprocessing and the network's weights."""

    images: sources.ImageSet
    passes: Passes  # of the subject, as whose images these are seen
    bf16: bool  # in the autoencoder
    held_out: "Reference | None" = None  # images that training did not see
    labels: Tensor | None = None  # classes [N] by position, -1 = not known
    statistics: Mapping[str, Moments] | None = None  # from a file, in place of images
    used: int = 0  # images that figures were made of
    moments: Mapping[str, Moments] = field(default_factory=dict)  # of the features asked for last
    details: dict[str, dict[str, Any]] = field(default_factory=dict)  # by space, what stands beside the figures

    def __post_init__(self) -> None:
        self.subject, self.device = self.passes.look.subject, self.passes.look.device

    def features(self, of: Key, manifest: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Positions [M] and features [M, D] of up to sources.MOST images by the network `of`, whose `manifest` this is."""

        skipped = self.passes.skipped

        def compute() -> dict[str, Tensor]:
            before = {*skipped}
            places, found = self.passes(self.images, [of])
            lost = json.dumps({name: why for name, why in skipped.items() if name not in before})
            return {"features": found[of], "places": places, "lost": torch.tensor(list(lost.encode()))}

        network = {key: manifest.get(key) for key in IDENTITY}
        sizes = {"size": self.subject.size, "within": self.subject.within, "limit": sources.MOST, "view": 3}
        found = self._remembered(compute, "places", network=network, **sizes)
        skipped.update(json.loads(bytes(found["lost"].tolist())))
        return found["places"], found["features"]

    def clusters(self, space: str, own: LoadedAnnotator) -> tuple[Tensor, Tensor]:
        """Positions [M] and clusters [M], by the run's own g, called `space`, and f."""
        places, features = self.features((space, "features"), own.extractor.manifest)
        return places, own.f.assign(features)

    def ceiling(self, own: LoadedAnnotator, judge: Network, what: str) -> tuple[Tensor, Tensor]:
        """What `judge`, which is `what` of the run's own g and f, says of real images, seen as annotate saw them, and of their
        reconstructions by the run's autoencoder, [M, X] each: of CEILING images, or as many as there are samples."""
        pipe = self.subject.pipe
        assert pipe is not None
        limit = min(CEILING, self.subject.total)

        @torch.no_grad()
        def compute() -> dict[str, Tensor]:
            photos, before, after = sources.pictures(self.images, limit), [], []
            with tqdm(desc="real, rebuilt", total=min(self.images.total or limit, limit), unit="image") as bar:
                while batch := list(itertools.islice(photos, self.subject.at_once)):
                    squares, seen = own.see(batch, pipe.image_size, pipe.source_size)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                        latents = encode(pipe.autoencoder, squares, flips=False)["latent"]
                        pixels = to_uint8(pipe.autoencoder.decode(latents))
                    before.append(judge(seen).float().cpu())
                    after.append(judge(to_float(pixels)).float().cpu())
                    bar.update(len(batch))
            return {"before": torch.cat(before), "after": torch.cat(after)}

        identity = {"what": what, "annotator": own.digest, "autoencoder": pipe.autoencoder.manifest.get("sha256")}
        sizes = {"size": pipe.image_size, "within": pipe.source_size, "limit": limit, "view": 3}
        found = self._remembered(compute, "before", bf16=self.bf16, **identity, **sizes)
        return found["before"], found["after"]

    def _remembered(
        self, compute: Callable[[], Mapping[str, Tensor]], rows: str, **identity: Any
    ) -> Mapping[str, Tensor]:
        """`compute()`, or what it gave before for the same files and `identity`; `rows`: what has one for each image."""
        found = sources.remembered(self.images, compute, device=self.device.type, **identity)
        self.used = max(self.used, len(found[rows]))
        return found
