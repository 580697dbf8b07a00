"""The weights of a trained network in one for other labels, on which training goes on."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.models.unet import GuidedUNet

TEMPERATURE = 0.1  # of cosines: a label one tenth nearer than another weighs e times as much
TABLES = ("conditioner.labels", "conditioner.token_labels")
CONV_IN = "unet.conv_in.weight"


def likeness(new: Tensor | None, old: Tensor | None, labels: tuple[int, int]) -> Tensor:
    """Prototypes [K, D] of the new labels and [L, D] of the old ones -> [K, L], of which old labels each new one is a mean:
    weights by cosine. A label that was there before is its old self. Without prototypes all old ones weigh the same."""
    if new is None or old is None or new.shape[1] != old.shape[1] or (len(new), len(old)) != labels:
        return torch.full(labels, 1 / labels[1])
    cosine = F.normalize(new, dim=1) @ F.normalize(old, dim=1).T
    same = (new[:, None] == old[None]).all(2)  # reused or extended: the very same numbers
    return torch.where(same.any(1, keepdim=True), same.float(), (cosine / TEMPERATURE).softmax(1))


def transfer(new: GuidedUNet, old: GuidedUNet, spec: GuidanceSpec, weights: Tensor | None) -> list[str]:
    """Fills `new`, made for signals of `spec`, with the weights of `old`: embeddings of labels, and channels of k_s that stand
    for one, by `weights` [K, L]. Signals that the old network did not have begin without effect on its input.

    Returns the parameters that keep their initial values, as the old network has none of their name and shape: the caller
    decides whether it may go on with them."""
    there, left, filled = old.state_dict(), [], {}
    for name, value in new.state_dict().items():
        source = there.get(name)
        if source is not None and weights is not None and name in TABLES:
            source = torch.einsum("kl,l...->k...", weights.to(source), source)
        elif source is not None and name == CONV_IN and source.shape[0] == value.shape[0]:
            source = _channels(source, value, new.unet.config.out_channels, weights if spec.spatial == "mask" else None)
        elif name == "conditioner.spatial_null" and (source is None or source.shape != value.shape):
            source = torch.zeros_like(value)
        if source is None or source.shape != value.shape:
            left.append(name)
        else:
            filled[name] = source
    new.load_state_dict(filled, strict=False)
    return left


def _channels(source: Tensor, value: Tensor, latent: int, weights: Tensor | None) -> Tensor:
    """The first convolution for other channels of k_s beside the `latent` ones of x_t."""
    own, spatial = source[:, :latent], source[:, latent:]
    if own.shape[1] != latent or value.shape[1] - latent == spatial.shape[1] == 0:
        return source
    if weights is not None and spatial.shape[1] == weights.shape[1]:
        spatial = torch.einsum("kl,olhw->okhw", weights.to(spatial), spatial)
    elif spatial.shape[1] != value.shape[1] - latent:
        spatial = torch.zeros_like(value[:, latent:])
    return torch.cat([own, spatial], 1)
