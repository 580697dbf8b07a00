"""Editing by the model's own attention (Epstein et al., 2023): where the concepts of a source image are and what they look like is
recorded at each step; the sampler is then drawn towards the same, but for what is edited."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_sg.errors import InputError
from ldm_sg.guidance import selfguide
from ldm_sg.guidance.compose import Denoiser, Strategy, cfg
from ldm_sg.guidance.signal import Guidance
from ldm_sg.models.attention import Seen, reading
from ldm_sg.objective import Objective
from ldm_sg.sampling.solvers import Grid

SMALLEST, TYPICAL = 0.01, 0.2  # shares of the image that a concept covers


@dataclass(frozen=True)
class Edit:
    """What becomes of one concept: it moves by dx, dy (shares of the sides, right and down) after growing by `scale`."""

    concept: int
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0  # of the sides
    name: str = ""  # of the concept, for messages, where it is not its number

    def of(self, maps: Tensor, around: Tensor | None = None) -> Tensor:
        """Maps of the concept [..., h, w], edited around their centroids, or those of `around`."""
        return selfguide.transformed(maps, (self.dx, self.dy), self.scale, around)


@dataclass(frozen=True)
class Weights:
    """Of the energies: of the edited concepts, and of all others that are there."""

    shape: float = 1.0
    centroid: float = 1.0
    size: float = 1.0  # of those that are resized
    look: float = 0.3
    others_shape: float = 1.0
    others_look: float = 0.1


@dataclass(frozen=True)
class Observed:
    """Of B images at one step, by the ids of K concepts: which are `there` [B, K]; attention `maps` [B, K, h, w]; `looks` [B, K, C], in
    each of the decoder's activations."""

    there: Tensor
    maps: Tensor
    looks: list[Tensor]

    def but(self, other: "Observed", concepts: Sequence[int], looks: bool = True) -> "Observed":
        """The same with these concepts as they are in `other`; without `looks` those that are here too keep their own."""
        theirs = torch.zeros(self.there.shape[1], dtype=torch.bool, device=self.there.device)
        theirs[list(concepts)] = True
        replaced = theirs if looks else theirs & ~self.there

        def pick(which: Tensor, mine: Tensor, new: Tensor) -> Tensor:
            return torch.where(which.expand_as(self.there).unflatten(1, (-1, *[1] * (mine.ndim - 2))), new, mine)

        found = [pick(replaced, a, b) for a, b in zip(self.looks, other.looks)]
        return Observed(pick(theirs, self.there, other.there), pick(theirs, self.maps, other.maps), found)


def observe(seen: Seen, guidance: Guidance, count: int) -> Observed:
    """What was seen of `count` concepts, on the finest grid, averaged over the layers."""
    assert guidance.concepts is not None
    grid = max((m.shape[2:] for m in seen.maps), key=lambda shape: shape.numel())
    tokens = torch.stack([selfguide.resized(m.float(), grid) for m in seen.maps]).mean(0)[:, 1:]  # but the background's
    which = guidance.concepts[..., None] == torch.arange(count, device=tokens.device)  # [B, T, K]
    maps = torch.einsum("btk,bthw->bkhw", which.to(tokens), tokens)
    return Observed(which.any(1), maps, [selfguide.look(maps, psi.float()[:, None]) for psi in seen.activations])


def record(
    network: nn.Module, states: Sequence[Tensor], times: Tensor, guidance: Guidance, count: int
) -> list[Observed]:
    """Of the states x_t [B, C, h, w] of each time: what the network sees of them under its own condition."""
    found = []
    for x, t in zip(states, times):
        with torch.no_grad(), reading(network.unet) as seen:
            network(x, t.expand(len(x)), guidance)
        found.append(observe(seen, guidance, count))
    return found


def noised(latents: Tensor, noise: Tensor, grid: Grid) -> list[Tensor]:
    """The states of real images: noised to each time; no inversion."""
    return [alpha * latents + sigma * noise for alpha, sigma in zip(grid.alpha[:-1], grid.sigma[:-1])]


def remembering(strategy: Strategy, states: list[Tensor]) -> Strategy:
    """`strategy`, which leaves in `states` the x_t of each step."""

    def guided_by(denoiser: Denoiser, w: float, objective: Objective) -> Denoiser:
        inside = strategy(denoiser, w, objective)

        def guided(x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
            states.append(x)
            return inside(x, t, guidance)

        return guided

    return guided_by


def active(step: int, steps: int) -> bool:
    """The paper's schedule: all of the first 3/16 of the steps, then every other, not in the last 1/32."""
    return step < steps * 3 / 16 or (step % 2 == 0 and step < steps * 31 / 32)


def energy(now: Observed, aim: Observed, edits: Sequence[Edit], weights: Weights) -> Tensor:
    """[B], >= 0: how far the concepts that are there are from `aim`, edited; 0 where nothing is edited and all is as in it. Others need
    not be as they were where an edited one was and where it shall be, for somebody must fill the place and make room."""
    masks, centroids = selfguide.soft(aim.maps), selfguide.centroid(aim.maps)
    edited, sized = torch.zeros_like(now.there), torch.zeros_like(now.there)
    free, sizes = torch.zeros_like(masks[:, :1]), masks.mean((-2, -1))
    for edit in edits:
        k, before = edit.concept, masks[:, edit.concept]
        after = edit.of(before)
        free = torch.maximum(free, torch.maximum(before, after)[:, None])
        masks = masks.index_copy(1, torch.tensor([k], device=masks.device), after[:, None])
        centroids[:, k] += centroids.new_tensor([edit.dx, edit.dy])
        sizes[:, k] *= edit.scale**2  # as asked, whatever of the mask the borders cut off
        edited[:, k], sized[:, k] = True, edit.scale != 1
    there = now.there & aim.there
    edited, others, sized = there & edited, there & ~edited, there & sized
    own, rest = selfguide.shape_energy(now.maps, masks), selfguide.shape_energy(now.maps, masks, 1 - free)
    size = sizes.clamp(SMALLEST, 1)
    own = torch.where(sized, own * TYPICAL / size, own)  # of a resized one as a share of what it shall be
    total = weights.shape * edited * own + weights.others_shape * others * rest
    total = total + weights.centroid * edited * selfguide.centroid_energy(now.maps, centroids)
    total = total + weights.size * sized * selfguide.size_energy(now.maps, size) / size
    for look, wanted in zip(now.looks, aim.looks):
        far = (look - wanted).abs().mean(-1) / wanted.abs().mean(-1).clamp(min=1e-6)  # whatever the block's scale
        total = total + far * (weights.look * edited + weights.others_look * others) / len(aim.looks)
    return total.sum(1)


def selfguided(
    network: nn.Module, aims: Sequence[Observed], edits: Sequence[Edit], strength: float,
    weights: Weights = Weights(), base: Strategy = cfg,
) -> Strategy:  # fmt: skip
    """`base`, drawn towards the edits at each active step: eps + strength * |CFG's step| * grad energy / |grad energy|."""
    count = aims[0].there.shape[1]

    def guided_by(denoiser: Denoiser, w: float, objective: Objective) -> Denoiser:
        inside, steps = base(denoiser, w, objective), iter(range(len(aims)))
        sign = -1.0 if objective.kind == "x0" else 1.0

        def guided(x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
            step, prediction = next(steps), inside(x, t, guidance)
            if not strength or not active(step, len(aims)):
                return prediction
            with torch.enable_grad(), reading(network.unet) as seen:
                conditional = denoiser(x := x.detach().requires_grad_(), t, guidance)
                total = energy(observe(seen, guidance, count), aims[step], edits, weights)
                [grad] = torch.autograd.grad(total.sum(), x)
            if not grad.isfinite().all():
                raise InputError(f"strength={strength:g}: the gradient is not finite at step {step}; give less")
            size = _norm(prediction - conditional.detach())
            return prediction + sign * strength * size * grad / _norm(grad).clamp(min=1e-12)

        return guided

    return guided_by


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def check(edits: Sequence[Edit], source: Observed) -> None:
    """InputError where an edit names a concept that is not in every image, names it twice, or leads out of the image."""
    present = {k: float(source.maps[:, k].mean()) for k in source.there.all(0).nonzero()[:, 0].tolist()}
    named = [edit.concept for edit in edits]
    if (twice := next((k for k in named if named.count(k) > 1), None)) is not None:
        raise InputError(f"concept {twice}: edited twice; give one --move and one --resize of it at most")
    for edit in edits:
        if edit.concept not in present:
            there = ", ".join(f"{k} ({share:.0%})" for k, share in sorted(present.items(), key=lambda item: -item[1]))
            raise InputError(
                f"concept {edit.concept} is not in the source; there are (with their share of the image) {there}"
            )
        centre = selfguide.centroid(source.maps[:, edit.concept])
        centre = centre + centre.new_tensor([edit.dx, edit.dy])
        if not ((centre > 0) & (centre < 1)).all():
            raise InputError(
                f"--move {edit.name or edit.concept}={edit.dx:g},{edit.dy:g}: leads out of the image, whose sides are 1"
            )
        if not 0.1 <= edit.scale <= 10:
            raise InputError(
                f"concept {edit.name or edit.concept}: scale={edit.scale:g}: its sides between 0.1 and 10 times as long"
            )


def check_strength(strength: float) -> None:
    """InputError outside 0 to 1000."""
    if not 0 <= strength <= 1000:
        raise InputError(f"strength={strength:g}: from 0 to 1000")
