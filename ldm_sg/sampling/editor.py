"""Sources of edits, drawn by a run or photos, and the images that edits make of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_sg.annotate.kinds import LoadedAnnotator, load_annotator
from ldm_sg.errors import InputError
from ldm_sg.guidance.compose import Strategy, cfg
from ldm_sg.guidance.signal import Guidance
from ldm_sg.guidance.spatial import concept_ids, present
from ldm_sg.models.unet import GuidedUNet
from ldm_sg.sampling import draw
from ldm_sg.sampling.edit import Edit, Observed, check, check_strength, noised, record, remembering, selfguided
from ldm_sg.sampling.solvers import Grid, make_grid

if TYPE_CHECKING:
    from PIL import Image

    from ldm_sg.data.signals import Signals
    from ldm_sg.pipeline import SelfGuidedPipeline


@dataclass(frozen=True)
class Source:
    """B images as the network sees them: `images` uint8 [B, 3, H, W], the signals and the noise that they are made from, and what
    was `observed` at each step."""

    images: Tensor
    guidance: Guidance
    noise: Tensor
    observed: list[Observed]


# an image, the concepts that are taken from it, and whether with their looks
Taken = tuple[Source, Sequence[int], bool]


class Editor:
    """>>> editor = Editor(pipe)
    >>> source = editor.drawn(4, seed=3)
    >>> images = editor.edit(source, [Edit(5, dx=0.2)])

    InputError where the run has no concepts that could be told apart."""

    def __init__(self, pipe: "SelfGuidedPipeline", w: float = 2.0, steps: int = 25, strategy: Strategy = cfg) -> None:
        self.pipe, self.w, self.strategy = pipe, pipe.strength(w), strategy
        self._check(pipe)
        self.network, self.count = GuidedUNet(pipe.unet, pipe.conditioner), pipe.spec.num_concepts
        self.steps, self.grid = steps, make_grid(pipe.objective, steps)

    def _check(self, pipe: "SelfGuidedPipeline") -> None:
        own = pipe.conditioner.config
        told_apart = own.tokens == "concepts" and own.tokens_only  # a background's token stands beside them
        if not pipe.spec.num_concepts or not told_apart:
            raise InputError(
                "this run has no token of its own for each concept, which editing reads: train with model.tokens=concepts, "
                "model.inject=none, guidance.parts=[concepts] and guidance.attention=0.1 on segments, as "
                "configs/train/camvid256-concepts.yaml does"
            )
        if self.w == 1:
            raise InputError(
                "w=1: edits are as strong as the step of classifier-free guidance, which is none at w = 1: give another w, of a run "
                "that was trained with guidance.drop above 0"
            )

    @cached_property
    def annotator(self) -> LoadedAnnotator:
        """The run's own g and f."""
        return load_annotator(self.pipe.annotator_folder, self.pipe.device)

    @torch.no_grad()
    def drawn(self, n: int, seed: int = 0, first_index: int = 0) -> Source:
        """Images first_index, ... of `seed`, those of `ldm-sg sample`."""
        pipe, states = self.pipe, list[Tensor]()
        guidance = pipe.guidance(pipe.draw(n, seed, first_index))
        noise = draw.unit_noise(pipe.latent_shape, pipe.generators(n, seed, first_index))
        images = self._solve(guidance, noise, remembering(self.strategy, states))
        return self._source(images, guidance, noise, states)

    @torch.no_grad()
    def photos(self, images: Tensor, signals: "Signals", seed: int = 0) -> Source:
        """Squares [B, 3, H, W] in [-1, 1] of real photos, and their signals; no inversion: at each step they are noised."""
        pipe, n = self.pipe, len(images)
        guidance = pipe.guidance(signals.replace(spec=pipe.spec))
        noise = draw.unit_noise(pipe.latent_shape, pipe.generators(n, seed))
        latents = pipe.autoencoder.encode(images.to(pipe.device))
        return self._source(pipe.decode(latents), guidance, noise, noised(latents, noise.to(latents), self.grid))

    def photo(self, image: "Image.Image", seed: int = 0) -> Source:
        """A photo, of which the run's own g and f say what is where."""
        squares, views = self.annotator.see([image], self.pipe.image_size, self.pipe.source_size)
        return self.photos(squares, self.annotator(views), seed)

    def edit(
        self, source: Source, edits: Sequence[Edit] = (), strength: float = 20.0, others: Sequence[Taken] = ()
    ) -> Tensor:
        """uint8 [B, 3, H, W]: the source with `edits`; without them, of photos, their reconstruction. others: as in `aims`."""
        aims, guidance = self.aims(source, edits, others)
        return self.solve(source.noise, guidance, aims, edits, strength)

    def aims(
        self, source: Source, edits: Sequence[Edit], others: Sequence[Taken] = ()
    ) -> tuple[list[Observed], Guidance]:
        """What is wanted at each step, before the edits, and the signal. `others`: sources, and the concepts that are taken from them.
        InputError for edits that cannot be."""
        aims, guidance = source.observed, source.guidance
        for other, concepts, looks in others:
            aims = [mine.but(theirs, concepts, looks) for mine, theirs in zip(aims, other.observed)]
            guidance = replace(guidance, concepts=concept_ids(aims[-1].there.float()))  # a token for each that is there
        check(edits, aims[-1])
        return aims, guidance

    @torch.no_grad()
    def solve(
        self, noise: Tensor, guidance: Guidance, aims: list[Observed], edits: Sequence[Edit], strength: float
    ) -> Tensor:
        """uint8 [B, 3, H, W], drawn towards the aims and edits."""
        check_strength(strength)
        return self._solve(guidance, noise, selfguided(self.network, aims, edits, strength, base=self.strategy))

    @torch.no_grad()
    def redrawn(self, source: Source, images: Tensor, share: float) -> Tensor:
        """uint8 [B, 3, H, W]: images [B, 3, H, W] in [-1, 1], noised to where `share` of the steps are done and gone on with from there
        under the source's condition (SDEdit, Meng et al., 2022)."""
        pipe, grid, start = self.pipe, self.grid, round(share * self.steps)
        rest = Grid(grid.times[start:], grid.alpha[start:], grid.sigma[start:])
        latents = pipe.autoencoder.encode(images.to(pipe.device))
        [noise, *_] = noised(latents, source.noise.to(latents), rest)
        return pipe.decode(pipe.solve(source.guidance, noise, self.w, rest, self.strategy))

    def _solve(self, guidance: Guidance, noise: Tensor, strategy: Strategy) -> Tensor:
        return self.pipe.decode(self.pipe.solve(guidance, noise, self.w, self.grid, strategy))

    def _source(self, images: Tensor, guidance: Guidance, noise: Tensor, states: list[Tensor]) -> Source:
        guidance = guidance.to(self.pipe.device)
        times = self.grid.times.to(self.pipe.device)
        return Source(images, guidance, noise, record(self.network, states, times, guidance, self.count))


class MaskEditor(Editor):
    """The plain way, to compare with, of a run that is told by a mask where everything is (k_s): the mask is edited, and the same
    noise drawn again."""

    def _check(self, pipe: "SelfGuidedPipeline") -> None:
        assert pipe.spec.spatial == "mask" and pipe.spec.spatial_channels

    def edit(
        self, source: Source, edits: Sequence[Edit] = (), strength: float = 20.0, others: Sequence[Taken] = ()
    ) -> Tensor:
        """uint8 [B, 3, H, W]; nothing has a strength here, and nothing is taken from others."""
        check(edits, source.observed[-1])
        spatial = source.guidance.spatial
        for edit in edits:
            spatial = relaid(spatial, edit)
        return self._solve(replace(source.guidance, spatial=spatial), source.noise, self.strategy)

    def _source(self, images: Tensor, guidance: Guidance, noise: Tensor, states: list[Tensor]) -> Source:
        asked = guidance.spatial
        return Source(images, guidance, noise, [Observed(present(asked) > 0, asked, [])])


def relaid(coverage: Tensor, edit: Edit) -> Tensor:
    """[B, K, h, w] with one class edited; where it was now lies, mirrored, what else there is, and where it is nothing else."""
    own = coverage[:, [edit.concept]]
    rest = coverage.index_fill(1, torch.tensor([edit.concept], device=coverage.device), 0)
    after = edit.of(own)
    laid = (rest + own * rest.flip(3)) * (1 - after)
    laid[:, [edit.concept]] = after
    return laid
