"""What clusters show, in words: an open_clip model compares their most typical images with a list of words.

Kept beside an annotation set, which stays as it is: names.json, to be read and mended by hand, and names.safetensors, each
cluster's place in the model's space, by which a text finds clusters."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ldm_sg.annotate.features import FeatureExtractor, load_state, open_clip_model, weights_sha256
from ldm_sg.config import FeaturesConfig
from ldm_sg.data.images import to_float
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.photos import photos_at
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import read_mapping, write_bytes, write_json
from ldm_sg.hub import check_pinned
from ldm_sg.weights import read_finite, read_weights

NAMES, VECTORS = "names.json", "names.safetensors"
PROMPT = "a photo of {}"
BEST = 3  # words a cluster
BATCH = 64  # images or texts at once


class Clip:
    """A whole open_clip model, MODEL/TAG or MODEL:FILE: images and texts -> vectors of length 1 in one space."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        model, _, file = name.partition(":")
        cfg = FeaturesConfig(model=f"open_clip:{model}", weights=file or None, precision="fp32")
        try:
            self.model, view = open_clip_model(cfg)
            if file:
                load_state(self.model, read_weights(Path(file)), Path(file))
            self.name, self.sha256 = f"{model}:{Path(file).resolve()}" if file else name, weights_sha256(self.model)
            if not file:
                check_pinned(f"{name}, whole", self.sha256)
            view |= {"name": name, "layer": None, "pool": "auto", "precision": "fp32"}
            self.visual = FeatureExtractor(self.model.visual, view, device)
            from open_clip import get_tokenizer

            self.tokenizer = get_tokenizer(model.partition("/")[0])
        except (InputError, AttributeError, ImportError) as err:  # CoCa's tower; a tokenizer whose library is not here
            raise InputError(f"--clip {name!r}, which is MODEL/TAG or MODEL:FILE: {one_line(err)}") from err
        self.model.requires_grad_(False).eval().to(device)

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, D]."""
        return F.normalize(self.visual(images), dim=1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """What photos show -> [len(texts), D]."""
        tokens = self.tokenizer([PROMPT.format(text) for text in texts]).to(self.visual.mean.device)
        found = [self.model.encode_text(part).float() for part in tokens.split(BATCH)]
        return F.normalize(torch.cat(found), dim=1).cpu()


def read_vocabulary(path: Path) -> list[str]:
    """A word or phrase a line; empty lines and those after # are left out. InputError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"--vocabulary {path}: a text file (UTF-8), a word a line: {one_line(err)[:100]}") from err
    if not (words := list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))):
        raise InputError(f"--vocabulary {path}: no word in it")
    return words


def describe(latents: LatentSet, typical: Mapping[int, Sequence[int]], clip: Clip, words: Sequence[str]) -> None:
    """Writes names.json and names.safetensors: for each cluster of `typical`, by images that show what it is, the BEST words,
    nearest first; of other clusters none."""
    owner = {i: k for k, places in typical.items() for i in places}
    texts = clip.texts(words)
    vectors = torch.zeros(latents.spec.num_labels, texts.shape[1])
    photos = photos_at(latents, list(owner), clip.visual.size)
    while batch := list(islice(photos, BATCH)):
        seen = clip.images(to_float(torch.stack([image for _, image, _ in batch])))
        vectors.index_add_(0, torch.tensor([owner[i] for i, *_ in batch]), seen)
    vectors = F.normalize(vectors, dim=1)
    best = (vectors @ texts.T).topk(min(BEST, len(words)), dim=1).indices.tolist()
    names = [[words[i] for i in row] if vector.any() else [] for vector, row in zip(vectors, best)]
    write_bytes(latents.folder / VECTORS, save({"clusters": vectors}))
    said = {"set": latents.hash, "clip": clip.name, "sha256": clip.sha256, "names": names}
    write_json(latents.folder / NAMES, said)


def read_names(folder: Path, hash: str | None) -> dict[str, Any] | None:
    """What `describe` wrote: clip, its sha256, and names [K][words]; None where the set of this hash has not been described."""
    if not (path := folder / NAMES).is_file():
        return None
    found = read_mapping(path, {"set": str, "clip": str, "sha256": str, "names": [[str]]})
    return found if found["set"] == hash else None


def nearest(folder: Path, said: Mapping[str, Any], text: str, n: int, device: torch.device) -> list[tuple[int, float]]:
    """The n clusters whose images are most like `text`, and their cosines, nearest first; `said`: as `read_names` gave it."""
    clip = Clip(said["clip"], device)
    if clip.sha256 != said["sha256"]:
        raise InputError(f"{said['clip']}: not the model that described {folder}: describe it again")
    [vector] = clip.texts([text])
    clusters = read_finite(folder / VECTORS, {"clusters": (len(said["names"]), len(vector))})["clusters"]
    there = clusters.any(1).nonzero()[:, 0]
    cosines, order = (clusters[there] @ vector).sort(descending=True, stable=True)
    return list(zip(there[order][:n].tolist(), cosines[:n].tolist()))
