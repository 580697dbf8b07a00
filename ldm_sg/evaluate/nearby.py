"""Samples beside the images of an annotation set, whose features lie on disk: how far they are, and what each is nearest to."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm_sg.annotate.features import resize
from ldm_sg.annotate.kinds import LoadedAnnotator
from ldm_sg.data.images import squares, to_float, to_uint8
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.signals import Signals
from ldm_sg.evaluate.metrics import frechet_distance
from ldm_sg.pipeline import SelfGuidedPipeline

BATCH = 50


def drawn(pipe: SelfGuidedPipeline, asked: Signals) -> Tensor:
    """Samples of signals, of which the centre squares, uint8 [N, 3, H, H]: the same ones at every call."""
    parts = tqdm(torch.arange(len(asked)).split(BATCH), "judging", leave=False)
    images = [pipe.generate(asked[at], w=pipe.usual_w, first_index=int(at[0]), precision="auto") for at in parts]
    return squares(torch.cat(images))


def distance(pipe: SelfGuidedPipeline, asked: Signals, g: LoadedAnnotator, real: Tensor) -> float:
    """FD in g's features of samples of `asked` to images whose features are `real` [N, D]. As g made the signals, and as it depends
    on the counts, it compares networks of one run, not runs."""
    return frechet_distance(_features(g, drawn(pipe, asked)), real)


def _features(g: LoadedAnnotator, images: Tensor) -> Tensor:
    parts = [g.features(to_float(part).to(g.extractor.mean.device)).cpu() for part in images.split(BATCH)]
    return torch.cat(parts)


def nearest(pipe: SelfGuidedPipeline, g: LoadedAnnotator, latents: LatentSet, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """n samples, for each the image of the set that g finds most like it, as the first stage gives it back, and the cosines [n] of
    their features. A network that has learnt its images by heart shows pairs of twins."""
    samples = drawn(pipe, pipe.draw(n))
    best = (F.normalize(_features(g, samples), dim=1) @ F.normalize(latents.features(), dim=1).T).max(1)
    return samples, rebuilt(latents, best.indices, pipe.decode, samples.shape[-1]), best.values


def rebuilt(latents: LatentSet, indices: Tensor, decode: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Images of the set, of any shape, as a first stage gives them back, to look at: centre squares uint8 [B, 3, size, size];
    decode: latents -> uint8 images."""
    found = [squares(decode(latents.latents(at))) for at in indices.split(1)]
    return torch.cat([to_uint8(resize(to_float(image), size)) for image in found])
