"""Segments without labels: STEGO, and k-means on g's patch features as its baseline.

Spherical k-means on the codes of many patches (with STEGO's head) or on the features themselves (without) gives classes."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_sg.annotate.clusters import kmeans, normalise
from ldm_sg.annotate.stage import subset
from ldm_sg.annotate.stego_head import Head, fit_head
from ldm_sg.annotate.stego_official import official
from ldm_sg.config import SegmentsConfig
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import write_bytes
from ldm_sg.guidance.spatial import VOID
from ldm_sg.weights import read_finite

WEIGHTS = "segments.safetensors"
PROBE = 200_000  # about this many patches at most for k-means
SCORES = 2**24  # scores of classes held at once while masks are made: 64 MB


class Segmenter:
    """K classes for the pixels of an image, from its patch features: STEGO's head, or none, and K centroids."""

    def __init__(self, k: int, cfg: SegmentsConfig, seed: int):
        cfg.check("annotator.segments.")
        if not 1 <= k <= VOID:
            raise InputError(f"annotator.k={k}: segments have 1 to {VOID} classes")
        self.k, self.cfg, self.seed = k, cfg, seed
        self.head: Head | None = None
        self.centroids = torch.empty(0, 1)  # [K, C] of unit length, once fitted
        self.prototypes: Tensor | None = None  # [K, D], each class's mean direction of patch features

    def fit(
        self, patches: np.ndarray, image_features: np.ndarray, folder: Path, device: torch.device | str
    ) -> "Segmenter":
        """Patch features float16 [N, D, h, w] and image-level features [N, D'] of images to learn from; the checkpoint of
        the head's fit lies in FOLDER."""
        if self.cfg.method == "stego":
            self.head = fit_head(patches, image_features, self.cfg, self.seed, device, folder)
        settings = {"niter": 30, "nredo": 3, "spherical": True, "seed": self.seed}
        self.centroids = F.normalize(kmeans(self._points(patches, device), self.k, "patches", **settings), dim=1)
        self.prototypes = self._prototypes(patches, device)
        return self

    def take_official(self, path: Path, tower: nn.Module) -> None:
        """Head and classes of an official STEGO checkpoint, instead of a fit; `tower` is the network of g."""
        self.head, centres = official(path, tower)
        if len(centres) != self.k:
            raise InputError(f"annotator.k={self.k}: {path} has {len(centres)} classes")
        self.centroids = F.normalize(centres, dim=1)

    def _points(self, patches: np.ndarray, device: torch.device | str) -> np.ndarray:
        """Codes of unit length [P, C], as many of every image, at random places."""
        chosen, places = subset(len(patches), self.cfg.images, self.seed), patches.shape[2] * patches.shape[3]
        generator, each = np.random.default_rng(self.seed), min(places, -(-PROBE // len(chosen)))
        points = []
        for start in range(0, len(chosen), 32):
            codes = self.codes(torch.from_numpy(patches[chosen[start : start + 32]]).to(device)).flatten(2)
            order = generator.permuted(np.tile(np.arange(places), (len(codes), 1)), axis=1)[:, None, :each]
            drawn = codes.gather(2, torch.from_numpy(order).to(device).expand(-1, codes.shape[1], -1))
            points.append(normalise(drawn.transpose(1, 2).flatten(0, 1)))
        return np.concatenate(points)

    def _prototypes(self, patches: np.ndarray, device: torch.device | str) -> Tensor:
        total = torch.zeros(self.k, patches.shape[1], device=device)
        for start in range(0, len(patches), 32):
            part = torch.from_numpy(np.array(patches[start : start + 32])).to(device).float()
            ids = torch.einsum("bchw,kc->bkhw", self.codes(part), self.centroids.to(device)).argmax(1).flatten()
            total.index_add_(0, ids, F.normalize(part, dim=1).transpose(0, 1).flatten(1).T)
        return F.normalize(total, dim=1).cpu()

    @torch.no_grad()
    def codes(self, patches: Tensor) -> Tensor:
        """Patch features [B, D, h, w] -> codes float32 [B, C, h, w], which without a head are the features themselves."""
        return patches.float() if self.head is None else self.head.to(patches.device)(patches.float())

    def segment(self, patches: Tensor, mirrored: Tensor | None, size: int) -> Tensor:
        """Patch features [B, D, h, w] of images and, to average their codes, those of the same patches in the mirror images
        (`FeatureExtractor.patches`) -> the class of every pixel, uint8 [B, size, size]: the centroid with the largest cosine to the code, upsampled bilinearly."""
        codes = self.codes(patches)
        if mirrored is not None:
            codes = codes + self.codes(mirrored)
        # Upsampling is linear and the length of a code moves no argmax, so the products with K centroids are upsampled.
        scores = torch.einsum("bchw,kc->bkhw", codes, self.centroids.to(codes.device))
        parts = scores.split(max(1, SCORES // (self.k * size**2)))
        return torch.cat([F.interpolate(p, (size, size), mode="bilinear").argmax(1).to(torch.uint8) for p in parts])

    def save(self, folder: Path) -> None:
        """FOLDER/segments.safetensors."""
        head = {} if self.head is None else {f"head.{name}": value for name, value in self.head.state_dict().items()}
        own = {"centroids": self.centroids.contiguous(), "prototypes": self.prototypes}
        write_bytes(folder / WEIGHTS, save({name: value for name, value in own.items() if value is not None} | head))

    @staticmethod
    def fitted(folder: Path) -> bool:
        """Whether `save` has finished there."""
        return (folder / WEIGHTS).is_file()

    def restore(self, folder: Path) -> "Segmenter":
        """What `save` wrote."""
        path = folder / WEIGHTS
        tensors = read_finite(path, {"centroids": (self.k, 0)})
        self.centroids, self.prototypes = tensors.pop("centroids"), tensors.pop("prototypes", None)
        try:
            with torch.device("meta"):  # of a size that the file itself has
                self.head = Head(tensors["head.linear.weight"].shape[1], self.centroids.shape[1]) if tensors else None
            if self.head is not None:
                own = {name.removeprefix("head."): value for name, value in tensors.items()}
                self.head.requires_grad_(False).load_state_dict(own, assign=True)
        except (KeyError, IndexError, RuntimeError) as err:
            raise InputError(f"{path}: its head is damaged: {one_line(err)[:200]}") from err
        dim = self.centroids.shape[1] if self.head is None else self.head.linear.in_channels
        if self.prototypes is not None and self.prototypes.shape != (self.k, dim):
            raise InputError(f"{path}: prototypes is {list(self.prototypes.shape)}; {self.k} x {dim} is expected")
        return self
