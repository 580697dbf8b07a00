"""f = ground truth that lies in the shards: labels, boxes or masks (the paper's upper bounds), or nothing at all."""

from typing import Any

import numpy as np

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.stage import Observed
from ldm_sg.annotate.views import Views
from ldm_sg.config import AnnotatorConfig
from ldm_sg.data.shards import ImageBatch
from ldm_sg.data.signals import Columns, PackedMasks
from ldm_sg.errors import InputError, need_choice
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.guidance.spatial import VOID

MOST = 32  # boxes and labels of an image that are kept, the largest boxes first
TRUTHS = ("labels", "boxes", "masks", "none")


class Oracle(Annotator):
    """`annotator.truth` names what is handed on: `labels` (the class number of KEY.cls, or where images have several the
    multi-hot of KEY.json's), `boxes` (their union, beside the multi-hot of their labels), `masks` (KEY.mask.png), `none`
    (the no-guidance baseline). K is the highest number that occurs plus one."""

    kind = "oracle"
    reads_g = False
    reads_truth = True
    grows = False  # K is the highest number that occurs

    def __init__(self, cfg: AnnotatorConfig):
        need_choice("annotator.truth", cfg.truth, TRUTHS)
        super().__init__(cfg)
        self.k, self.multi_hot = 0, False

    def observe(self, g: FeatureExtractor | None, seen: Views, batch: ImageBatch | None = None) -> Observed:
        assert batch is not None
        if self.cfg.truth == "none":
            return Observed()
        if self.cfg.truth == "masks":
            void = np.full((seen.size, seen.size), VOID, np.uint8)
            masks = [void if truth.mask is None else truth.mask for truth in batch.truth]
            seen = np.bincount(np.concatenate([np.unique(mask) for mask in masks]), minlength=256)
            return Observed({"mask": PackedMasks.of(masks)}, {"classes": seen})
        labels = np.full((len(batch.keys), MOST), -1, np.int64)
        boxes = np.zeros((len(batch.keys), MOST, 4), np.float32)
        for i, (cls, truth) in enumerate(zip(batch.cls, batch.truth, strict=True)):
            own = truth.labels if truth.labels is not None else [cls]
            labels[i, : len(own)] = own[:MOST]
            if own == [-1] and self.cfg.truth == "labels":
                raise InputError(
                    f"{batch.keys[i]} has no .cls, nor labels in a .json, which annotator.kind=oracle reads; pack a "
                    "folder with class folders, or use annotator.kind=clusters"
                )
            if truth.boxes is not None:
                area = (truth.boxes[:, 2:] - truth.boxes[:, :2]).prod(1)
                largest = truth.boxes[np.argsort(-area, kind="stable")][:MOST]
                boxes[i, : len(largest)] = largest
        several = sum(truth.labels is not None for truth in batch.truth)
        return Observed({"labels": labels, "box": boxes}, {"several": np.int64(several), "boxes": (boxes > 0).sum()})

    def fit(self, study: Study) -> None:
        """K, from what occurs; InputError where the shards do not carry what was asked for."""
        if self.cfg.truth == "none":
            return
        seen = [stage.read_observed() for stage in study.stages if stage.read_meta().keys]
        if self.cfg.truth == "masks":
            classes = sum(observed.totals["classes"] for observed in seen)[:VOID]
            if not classes.any():
                raise InputError("annotator.truth=masks: no image of these shards has a class in a KEY.mask.png")
            self.k = int(np.flatnonzero(classes)[-1]) + 1
            return
        if self.cfg.truth == "boxes" and not any(observed.totals["boxes"] for observed in seen):
            raise InputError("annotator.truth=boxes: no image of these shards has boxes in its KEY.json")
        labels = {int(label) for observed in seen for label in np.unique(observed.columns["labels"])} - {-1}
        self.k = max(labels, default=-1) + 1
        if self.k > 1000 * max(1, len(labels)):
            raise InputError(
                f"annotator.kind=oracle: only {len(labels)} classes up to {self.k - 1:,}: number them from 0"
            )
        self.multi_hot = self.cfg.truth == "boxes" or any(observed.totals["several"] for observed in seen)

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        if self.cfg.truth in ("none", "masks"):
            return seen.columns
        labels = seen.columns["labels"]
        if not self.multi_hot:
            return {"k": labels[:, 0]}
        hot = np.zeros((len(labels), self.k + 1), np.uint8)
        np.put_along_axis(hot, labels, 1, axis=1)  # -1 marks the last column, which goes
        parts = {"k": hot[:, : self.k]} if self.k else {}
        return parts | ({"box": seen.columns["box"]} if self.cfg.truth == "boxes" else {})

    @property
    def spec(self) -> GuidanceSpec:
        spatial = {"boxes": "box", "masks": "mask"}.get(self.cfg.truth)
        return GuidanceSpec(self.kind, self.k, bool(self.k) and (self.multi_hot or spatial == "mask"), spatial)

    def state(self) -> dict[str, Any]:
        return {"k": self.k, "multi_hot": self.multi_hot}
