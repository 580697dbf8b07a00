"""f = STEGO (or plain k-means on patches): an index mask of K classes, the paper's self-segmented guidance.

Spherical k-means on the codes of many patches (with STEGO's head) or on the features themselves (without) gives classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import five_crop
from tqdm import tqdm

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.clusters import kmeans, normalise
from ldm_sg.annotate.distill import jitter
from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.matching import confusion, match
from ldm_sg.annotate.stage import Observed, subset
from ldm_sg.annotate.stego import Head, fit_head, official
from ldm_sg.annotate.views import Views
from ldm_sg.config import AnnotatorConfig, SegmentsConfig
from ldm_sg.data.shards import ImageBatch
from ldm_sg.data.signals import Columns, PackedMasks
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import write_bytes
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.guidance.spatial import VOID
from ldm_sg.weights import read_finite

WEIGHTS = "segments.safetensors"
CROPS = 5
PROBE = 200_000  # about this many patches at most for k-means
SCORES = 2**24  # scores of classes held at once while masks are made: 64 MB


class Segments(Annotator):
    """K classes for the pixels of an image, from its patch features: STEGO's head, or none, and K centroids. They are fitted
    on a part of the images before the streaming pass, in which all are segmented. Shards with masks of their own give mIoU
    and pixel accuracy too, after Hungarian matching."""

    kind = "segments"
    reads_truth = True
    gives_ids = False
    late = frozenset()

    def __init__(self, cfg: AnnotatorConfig):
        super().__init__(cfg)
        cfg.segments.check("annotator.segments.")
        if not 1 <= cfg.k <= VOID:
            raise InputError(f"annotator.k={cfg.k}: segments have 1 to {VOID} classes")
        self.head: Head | None = None
        self.centroids = torch.empty(0, 1)  # [K, C] of unit length, once fitted
        self.means: Tensor | None = None  # [K, D], each class's mean direction of patch features

    def prepare(self, study: Study) -> None:
        """Fits, or takes what an earlier start has fitted into OUT/annotator."""
        folder, work, cfg = Path(study.config.out) / "annotator", Path(study.config.out) / "work", self.cfg.segments
        if (folder / WEIGHTS).is_file():
            self.restore(folder)
            return
        assert study.extractor is not None
        if cfg.weights:
            self.head, centres = official(Path(cfg.weights), study.extractor.tower)
            if len(centres) != self.k:
                raise InputError(f"annotator.k={self.k}: {cfg.weights} has {len(centres)} classes")
            self.centroids = F.normalize(centres, dim=1)
        else:
            patches, features = sample_patches(study, cfg, self.cfg.seed, work / "patches.f16")
            self.learn(patches, features, work, study.extractor.mean.device)
        self.save(folder)

    def learn(self, patches: np.ndarray, features: np.ndarray, folder: Path, device: torch.device | str) -> "Segments":
        """Patch features float16 [N, D, h, w] and image-level `features` [N, D'] of images to learn from; the checkpoint of
        the head's fit lies in FOLDER."""
        cfg, seed = self.cfg.segments, self.cfg.seed
        if cfg.method == "stego":
            self.head = fit_head(patches, features, cfg, seed, device, folder)
        settings = {"niter": 30, "nredo": 3, "spherical": True, "seed": seed}
        self.centroids = F.normalize(kmeans(self._points(patches, device), self.k, "patches", **settings), dim=1)
        self.means = self._means(patches, device)
        return self

    def _points(self, patches: np.ndarray, device: torch.device | str) -> np.ndarray:
        """Codes of unit length [P, C], as many of every image, at random places."""
        chosen, places = (
            subset(len(patches), self.cfg.segments.images, self.cfg.seed),
            patches.shape[2] * patches.shape[3],
        )
        generator, each = np.random.default_rng(self.cfg.seed), min(places, -(-PROBE // len(chosen)))
        points = []
        for start in range(0, len(chosen), 32):
            codes = self.codes(torch.from_numpy(patches[chosen[start : start + 32]]).to(device)).flatten(2)
            order = generator.permuted(np.tile(np.arange(places), (len(codes), 1)), axis=1)[:, None, :each]
            drawn = codes.gather(2, torch.from_numpy(order).to(device).expand(-1, codes.shape[1], -1))
            points.append(normalise(drawn.transpose(1, 2).flatten(0, 1)))
        return np.concatenate(points)

    def _means(self, patches: np.ndarray, device: torch.device | str) -> Tensor:
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

    def segment(self, patches: Tensor, mirrored: Tensor | None, size: int, grid: float | None = None) -> Tensor:
        """Patch features [B, D, h, w] of images and, to average their codes, those of the same patches in the mirror images
        (`FeatureExtractor.patches`) -> the class of every pixel, uint8 [B, size, size]: the centroid with the largest cosine to the
        code, upsampled bilinearly. `grid`: how many patches the image spans, where the last ones are padded."""
        codes = self.codes(patches)
        if mirrored is not None:
            codes = codes + self.codes(mirrored)
        # Upsampling is linear and the length of a code moves no argmax, so the products with K centroids are upsampled.
        scores = torch.einsum("bchw,kc->bkhw", codes, self.centroids.to(codes.device))
        whole = round(size * scores.shape[2] / (grid or scores.shape[2]))
        parts = scores.split(max(1, SCORES // (self.k * whole**2)))
        fine = (F.interpolate(part, (whole, whole), mode="bilinear")[..., :size, :size] for part in parts)
        return torch.cat([part.argmax(1).to(torch.uint8) for part in fine])

    def observe(self, g: FeatureExtractor | None, seen: Views, batch: ImageBatch | None = None) -> Observed:
        assert g is not None
        mirrored = g.patches(seen.squares, mirrored=True)[1] if self.cfg.segments.flips else None
        features, patches = g.patches(seen.squares)
        masks = self.segment(patches, mirrored, seen.size, g.grid if g.patch else None).cpu().numpy()
        table = np.zeros((self.k, VOID), np.int64)
        for mask, truth in zip(masks, batch.truth, strict=True) if batch else ():
            if truth.mask is not None:
                table += confusion(mask, truth.mask, self.k, VOID)
        return Observed({"mask": PackedMasks.of(masks)}, {"confusion": table}, features)

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return seen.columns

    def figures(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
        table = totals["confusion"]
        if not table.any():
            return {}
        classes = int(np.flatnonzero(table.sum(0))[-1]) + 1
        found = match(table[:, :classes])
        return {"true_classes": classes, "miou": round(found["miou"], 4), "accuracy": round(found["accuracy"], 4)}

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, num_labels=self.k, multi_hot=True, spatial="mask")

    def prototypes(self) -> Tensor | None:
        return self.means

    def save(self, folder: Path) -> None:
        """FOLDER/segments.safetensors."""
        tensors = {"centroids": self.centroids.contiguous()} | (
            {} if self.means is None else {"prototypes": self.means}
        )
        head = {} if self.head is None else {f"head.{name}": value for name, value in self.head.state_dict().items()}
        write_bytes(folder / WEIGHTS, save(tensors | head))

    def restore(self, folder: Path) -> None:
        path = folder / WEIGHTS
        tensors = read_finite(path, {"centroids": (self.k, 0)})
        self.centroids, self.means = tensors.pop("centroids"), tensors.pop("prototypes", None)
        dim = self.centroids.shape[1]
        try:
            if tensors:
                dim = tensors["head.linear.weight"].shape[1]
                with torch.device("meta"):  # of a size that the file itself has
                    self.head = Head(dim, self.centroids.shape[1]).requires_grad_(False)
                own = {name.removeprefix("head."): value for name, value in tensors.items()}
                self.head.load_state_dict(own, assign=True)
        except (KeyError, IndexError, RuntimeError) as err:
            raise InputError(f"{path}: its head is damaged: {one_line(err)[:200]}") from err
        if self.means is not None:
            read_finite(path, {"prototypes": (self.k, dim)})


def sample_patches(study: Study, cfg: SegmentsConfig, seed: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """g's patch features float16 [N, D, h, w], a file that is mapped, and image-level features float32 [N, D'] of at most
    about `cfg.images` images, or crops of images: the first ones of every shard."""
    g = study.extractor
    assert g is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    features, shape, generator = [], (0, 0, 0), torch.Generator().manual_seed(seed)
    with path.open("wb") as file, tqdm(desc="patches to learn from", unit=" images", mininterval=1) as bar:
        for seen in study.some_images(cfg.images // (CROPS if cfg.crops else 1), zoom=2 if cfg.crops else 1):
            for images in lessons(seen.squares, cfg, generator):
                image_level, patches = g.patches(images)
                features.append(image_level.cpu().numpy())
                file.write(patches.half().cpu().contiguous().numpy().data)
                shape = tuple(patches.shape[1:])
                bar.update(len(images))
    count = sum(map(len, features))
    return np.memmap(path, np.float16, "r", shape=(count, *shape)), np.concatenate(features)


def lessons(images: Tensor, cfg: SegmentsConfig, generator: torch.Generator) -> Iterator[Tensor]:
    """Images [B, 3, H, W] -> what is learnt from, in batches of B: with `cfg.crops` the four corners and the centre of each,
    of half its sides; with `cfg.augment` half of them mirrored, all with their colours a little changed."""
    crops = five_crop(images, [side // 2 for side in images.shape[2:]]) if cfg.crops else (images,)
    for crop in crops:
        if cfg.augment:
            mirror = torch.rand(len(crop), 1, 1, 1, generator=generator) < 0.5
            coloured = jitter(crop.cpu(), generator, pad=0).to(crop.device)
            crop = torch.where(mirror.to(crop.device), coloured.flip(-1), coloured)
        yield crop
