"""f = LOST beside k-means: one object box an image (k_s) and its cluster (k), the paper's self-boxed guidance."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ldm_sg.annotate.annotator import Study
from ldm_sg.annotate.clusters import Clusters
from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.lost import correct_localisation, lost, to_crop, to_relative, typical_key
from ldm_sg.annotate.stage import Observed
from ldm_sg.annotate.views import Views
from ldm_sg.data.shards import ImageBatch
from ldm_sg.data.signals import Columns
from ldm_sg.errors import InputError
from ldm_sg.folder import whole
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.weights import read_weights

MEAN = "mean_key.safetensors"
CENTRED = 512  # images whose keys the mean is taken over


class Boxes(Clusters):
    """LOST on the patch keys of g, a ViT, while images pass: on uncropped images where shards hold them and g reads any shape.
    Its box is mapped through the crop to the square that is trained on; where it finds nothing, or nothing of it is in the
    square, the box is the whole square. Shards with boxes of their own give CorLoc too, on the image that LOST saw."""

    kind = "boxes"
    reads_truth = True
    whole = True

    def prepare(self, study: Study) -> None:
        """The mean keys, from the first images of every shard, where `annotator.centre` asks for them; or those that an earlier
        start has kept in OUT/annotator."""
        kept = Path(study.config.out) / "annotator" / MEAN
        if kept.is_file():
            self.mean = read_weights(kept)["key"]
            return
        assert study.extractor is not None
        blank = torch.zeros(1, 3, study.size, study.size)
        self.mean = torch.zeros_like(study.extractor.keys(blank, self.cfg.keys_layer)[0], device="cpu")  # [Dk, h, w]
        if self.cfg.centre:
            total, count = torch.zeros(()), 0
            for seen in study.some_images(CENTRED, whole=study.extractor.any_shape):
                for _, images in seen.by_shape(study.extractor.patch):
                    keys = on_grid(self._read(study.extractor, images)[1], self.mean.shape[1:])
                    total = total + keys.double().sum(0).cpu()
                count += len(seen.squares)
            self.mean = typical_key((total / count).float(), self.cfg.centre_place)
        with whole(kept) as new:
            save_file({"key": self.mean.contiguous()}, new)

    def observe(self, g: FeatureExtractor | None, seen: Views, batch: ImageBatch | None = None) -> Observed:
        assert g is not None
        features, there, found = self._locate(g, seen)
        boxes, outside = to_crop(there, seen.crops)
        known = zip(seen.wholes, batch.truth) if batch else ()
        truths = [truth.boxes if whole is None else truth.whole_boxes for whole, truth in known]
        true = [(box, torch.from_numpy(t)) for box, t in zip(there, truths) if t is not None and len(t)]
        totals = {
            "images": len(boxes),
            "not_found": int((~found).sum()),
            "outside": int(outside.sum()),
            "with_boxes": len(true),
            "located": sum(correct_localisation(box, those) for box, those in true),
        }
        counts = {name: np.int64(n) for name, n in totals.items()}
        return Observed({"box": boxes[:, None].numpy()}, counts, features)

    def _locate(self, g: FeatureExtractor, seen: Views) -> tuple[Tensor, Tensor, Tensor]:
        """-> image-level features of the squares [B, D]; boxes [B, 4] as shares of the sides of the image that LOST saw, the
        whole one where there is one; and whether it found something [B]."""
        count = len(seen.squares)
        boxes, found, features = torch.empty(count, 4), torch.empty(count, dtype=torch.bool), None
        for places, images in seen.by_shape(g.patch):
            features, keys = self._read(g, images)
            if len(self.mean) != keys.shape[1]:
                raise InputError(f"{MEAN}: {len(self.mean)} channels, where g has {keys.shape[1]}: annotate again")
            mean = on_grid(self.mean.to(keys.device)[None], keys.shape[2:])
            some, found_there = lost(keys - mean, self.cfg.k_patches)
            grid: float | Tensor = g.grid
            if not isinstance(images, Tensor):
                grid = torch.tensor([image.shape[:0:-1] * 2 for image in images], device=some.device) / g.patch
            boxes[places], found[places] = to_relative(some, grid).cpu(), found_there.cpu()
        alone = features is not None and all(whole is None for whole in seen.wholes)  # one pass gave both
        return features if alone else g(seen.squares), boxes, found

    def _read(self, g: FeatureExtractor, images: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
        """Images as g takes them -> image-level features [B, D] and the keys [B, Dk, h, w] that LOST reads."""
        features, keys = g.features_and_keys(images, self.cfg.keys_layer)
        if self.cfg.keys_flips:
            keys = (keys + g.keys(images, self.cfg.keys_layer, mirrored=True)) / 2
        return features, keys

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return super().say(seen, count, generator) | {"box": seen.columns["box"]}

    def figures(self, totals: dict[str, np.ndarray]) -> dict[str, Any]:
        found = super().figures(totals) | {"not_found": int(totals["not_found"])}
        if totals["not_found"] > totals["images"] / 2:
            print(
                f"note: LOST found no box in {totals['not_found']:,} of {totals['images']:,} images, which got the whole image: "
                "some extractors (DINOv2) need annotator.centre=true",
                file=sys.stderr,
            )
        if totals["outside"]:
            found["outside_crop"] = int(totals["outside"])
        if totals["with_boxes"]:
            found["corloc"] = round(float(totals["located"] / totals["with_boxes"]), 4)
            found["corloc_images"] = int(totals["with_boxes"])
        return found

    def kept(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        return super().kept() | {"mean": (MEAN, "key", (0, 0, 0))}

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, num_labels=self.k, spatial="box")


def on_grid(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Keys [B, D, h, w], or their means, on another grid."""
    return keys if keys.shape[2:] == shape else F.interpolate(keys, tuple(shape), mode="bilinear")
