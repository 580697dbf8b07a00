"""f = STEGO (or plain k-means on patches): an index mask of K classes, the paper's self-segmented guidance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import five_crop
from tqdm import tqdm

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.distill import jitter
from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.matching import confusion, match
from ldm_sg.annotate.stage import Observed
from ldm_sg.annotate.stego import Segmenter
from ldm_sg.annotate.views import Views
from ldm_sg.config import AnnotatorConfig, SegmentsConfig
from ldm_sg.data.shards import ImageBatch
from ldm_sg.data.signals import Columns, PackedMasks
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.guidance.spatial import VOID

CROPS = 5


class Segments(Annotator):
    """The segmenter is fitted on a part of the images before the streaming pass, in which it then segments them all. Shards
    with masks of their own give mIoU and pixel accuracy too, after Hungarian matching."""

    kind = "segments"
    reads_truth = True
    gives_ids = False
    late = frozenset()

    def __init__(self, cfg: AnnotatorConfig):
        super().__init__(cfg)
        self.segmenter = Segmenter(cfg.k, cfg.segments, cfg.seed)

    def prepare(self, study: Study) -> None:
        """Fits, or takes what an earlier start has fitted into OUT/annotator."""
        folder, work = (Path(study.config.out) / name for name in ("annotator", "work"))
        if Segmenter.fitted(folder):
            self.restore(folder)
            return
        assert study.extractor is not None
        if self.cfg.segments.weights:
            self.segmenter.take_official(Path(self.cfg.segments.weights), study.extractor.tower)
        else:
            patches, features = sample_patches(study, self.cfg.segments, self.cfg.seed, work / "patches.f16")
            self.segmenter.fit(patches, features, work, study.extractor.mean.device)
        folder.mkdir(parents=True, exist_ok=True)
        self.segmenter.save(folder)

    def observe(self, g: FeatureExtractor | None, seen: Views, batch: ImageBatch | None = None) -> Observed:
        assert g is not None
        mirrored = g.patches(seen.squares, mirrored=True)[1] if self.cfg.segments.flips else None
        features, patches = g.patches(seen.squares)
        masks = self.segmenter.segment(patches, mirrored, seen.size).cpu().numpy()
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
        return self.segmenter.prototypes

    def save(self, folder: Path) -> None:
        self.segmenter.save(folder)

    def restore(self, folder: Path) -> None:
        self.segmenter.k = self.k
        self.segmenter.restore(folder)


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
