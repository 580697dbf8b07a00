"""f = LOST beside k-means: one object box an image (k_s) and its cluster (k), the paper's self-boxed guidance."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ldm_sg.annotate.annotator import Study
from ldm_sg.annotate.clusters import Clusters
from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.lost import correct_localisation, lost, to_relative, typical_key
from ldm_sg.annotate.stage import Observed, Stage
from ldm_sg.data.shards import ImageBatch
from ldm_sg.data.signals import Signals
from ldm_sg.folder import write_bytes
from ldm_sg.guidance.signal import GuidanceSpec

MEAN = "mean_key.safetensors"
CENTRED = 512  # images whose keys the mean is taken over


class Boxes(Clusters):
    """LOST on the patch keys of g, a ViT, while images pass; where it finds nothing the box is the whole image. Shards with
    boxes of their own give CorLoc too."""

    kind = "boxes"
    reads_truth = True

    def prepare(self, study: Study) -> None:
        """The mean keys, from the first images of every shard, where `annotator.centre` asks for them."""
        assert study.extractor is not None
        blank = torch.zeros(1, 3, study.size, study.size)
        self.mean = torch.zeros_like(study.extractor.keys(blank, self.cfg.keys_layer)[0], device="cpu")  # [Dk, h, w]
        if self.cfg.centre:
            total, count = torch.zeros(()), 0
            for images in study.some_images(CENTRED):
                total = total + self._read(study.extractor, images)[1].double().sum(0).cpu()
                count += len(images)
            self.mean = typical_key((total / count).float(), self.cfg.centre_place)

    def observe(self, g: FeatureExtractor | None, images: Tensor, batch: ImageBatch) -> Observed:
        assert g is not None
        features, keys = self._read(g, images)
        boxes, found = self._boxes(g, keys)
        true = [
            (box, torch.from_numpy(t.boxes))
            for box, t in zip(boxes, batch.truth)
            if t.boxes is not None and len(t.boxes)
        ]
        totals = {
            "images": len(boxes),
            "not_found": int((~found).sum()),
            "with_boxes": len(true),
            "located": sum(correct_localisation(box, those) for box, those in true),
        }
        counts = {name: np.int64(n) for name, n in totals.items()}
        return Observed({"box": boxes[:, None].numpy()}, counts, features)

    def _read(self, g: FeatureExtractor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> image-level features [B, D] and the keys [B, Dk, h, w] that LOST reads."""
        features, keys = g.features_and_keys(images, self.cfg.keys_layer)
        if self.cfg.keys_flips:
            keys = (keys + g.keys(images, self.cfg.keys_layer, mirrored=True)) / 2
        return features, keys

    def _boxes(self, g: FeatureExtractor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, D, h, w] -> boxes [B, 4] as shares of the sides, and whether LOST found something [B]."""
        boxes, found = lost(keys - self.mean.to(keys.device), self.cfg.k_patches)
        return to_relative(boxes, g.grid).cpu(), found.cpu()

    def signals(self, stage: Stage) -> dict[str, Sequence[np.ndarray]]:
        return super().signals(stage) | {"box": stage.read_observed().columns["box"]}

    def annotate(self, g: FeatureExtractor, images: Tensor) -> Signals:
        features, keys = self._read(g, images)
        return Signals(self.spec, self.assign(features), self._boxes(g, keys)[0][:, None], count=len(images))

    def figures(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
        found: dict[str, Any] = {"not_found": int(totals["not_found"])}
        if totals["not_found"] > totals["images"] / 2:
            print(
                f"note: LOST found no box in {totals['not_found']:,} of {totals['images']:,} images, which got the whole image: "
                "some extractors (DINOv2) need annotator.centre=true",
                file=sys.stderr,
            )
        if totals["with_boxes"]:
            found["corloc"] = round(float(totals["located"] / totals["with_boxes"]), 4)
            found["corloc_images"] = int(totals["with_boxes"])
        return found

    def save(self, folder: Path) -> None:
        super().save(folder)
        write_bytes(folder / MEAN, save({"key": self.mean.contiguous()}))

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        self.mean = load_file(folder / MEAN)["key"]

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, num_labels=self.k, spatial="box")
