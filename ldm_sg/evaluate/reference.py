"""The real images that samples are compared with: their features, and what the run's own autoencoder leaves of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.stream import encode
from ldm_sg.data.images import to_float, to_uint8
from ldm_sg.evaluate import sources
from ldm_sg.evaluate.collect import Network, cached, collect
from ldm_sg.evaluate.inception import Inception
from ldm_sg.evaluate.subjects import Subject
from ldm_sg.hardware import use_bf16

MOST = 50_000  # images, spread over the whole set
CEILING = 1_000  # of them pass through the autoencoder, for the best that a sample can reach
IDENTITY = ("name", "sha256", "layer", "pool", "size", "precision", "resize")  # of a network, in its manifest


@dataclass
class Reference:
    """What networks give is remembered on disk for these files, their preprocessing and the network's weights."""

    images: sources.ImageSet
    subject: Subject
    batch_size: int
    device: torch.device
    precision: str  # of the autoencoder
    on_skip: sources.OnSkip
    used: int = 0  # images that figures were made of

    def features(self, network: Inception | FeatureExtractor) -> Tensor:
        """[M, D] of up to MOST images, seen as the subject's are."""
        identity = {key: network.manifest.get(key) for key in IDENTITY}
        return self._read({"real": network}, self.subject.size, self.subject.within, MOST, network=identity)[0]

    def ceiling(self, judge: Network, **identity: Any) -> tuple[Tensor, Tensor]:
        """What `judge`, named by `identity`, says of real images before and after the run's autoencoder, [M, X] each: of
        CEILING images, or as many as there are samples."""
        pipe, bf16 = self.subject.pipe, use_bf16(self.precision, self.device)
        assert pipe is not None

        def rebuilt(images: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                pixels = to_uint8(pipe.autoencoder.decode(encode(pipe.autoencoder, images, flips=False)["latent"]))
            return judge(to_float(pixels))

        networks: dict[str, Network] = {"real": judge, "rebuilt": rebuilt}
        identity |= {"autoencoder": pipe.autoencoder.manifest.get("sha256"), "bf16": bf16}
        limit = min(CEILING, self.subject.total)
        before, after = self._read(networks, pipe.image_size, pipe.source_size, limit, **identity)
        return before, after

    def _read(
        self, networks: Mapping[str, Network], size: int, within: int | None, limit: int, **identity: Any
    ) -> Tensor:
        """[networks, M, X] of up to `limit` images of `size` pixels; `within` as in crop_resize."""

        def compute() -> Tensor:
            batches = sources.batches(self.images, size, self.batch_size, limit, self.on_skip, within)
            total = sources.count(self.images)
            found = collect(batches, networks, self.device, total and min(total, limit), ", ".join(networks))[1]
            return torch.stack(list(found.values()))

        made = {"size": size, "within": within, "limit": limit, "device": self.device.type, **identity}
        found = cached(sources.fingerprint(self.images, **made), compute)
        self.used = max(self.used, found.shape[1])
        return found
