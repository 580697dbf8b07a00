"""f = ground truth: k is the class number that lies in the shards, the paper's upper bound."""

from pathlib import Path
from typing import Any

import numpy as np

from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import GuidanceSpec


class Oracle:
    """Hands on `cls`; num_labels is the highest class number plus one. It reads no features and needs no g."""

    kind = "oracle"

    def __init__(self, k: int):
        self.k = k

    @classmethod
    def of_classes(cls, classes: np.ndarray) -> "Oracle":
        """For the class numbers [C] that occur. InputError when they are so sparse that they cannot be class numbers."""
        k = int(classes.max()) + 1
        if k > 1000 * len(classes):
            raise InputError(
                f"annotator.kind=oracle: class numbers go up to {k - 1:,} but only {len(classes)} occur; number them from 0"
            )
        return cls(k)

    def of_shard(self, features: np.ndarray | None, cls: np.ndarray) -> np.ndarray:
        """Class numbers [N] of a shard (features are not looked at) -> ids [N]."""
        return cls

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(kind=self.kind, num_labels=self.k)

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "k": self.k}

    def save(self, folder: Path) -> None:
        """Nothing was learnt: annotator.yaml says it all."""

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> "Oracle":
        return cls(settings["k"])


def check_classes(shard: str, keys: list[str], cls: np.ndarray) -> None:
    """InputError naming the first sample of a shard that has no class number."""
    missing = np.flatnonzero(cls < 0)
    if len(missing):
        raise InputError(
            f"{shard}: {keys[missing[0]]} has no .cls, which annotator.kind=oracle reads; "
            "pack a folder with class folders, or use annotator.kind=clusters"
        )
