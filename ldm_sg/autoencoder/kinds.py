"""One class a kind of first stage. Each maps images [B, 3, H, W] in [-1, 1] to raw latents [B, C, H/f, W/f] and back;
normalisation is not theirs."""

import contextlib
import inspect
import io
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor, nn

from ldm_sg.autoencoder.compvis import to_diffusers
from ldm_sg.autoencoder.manifest import WAY_OUT
from ldm_sg.errors import InputError
from ldm_sg.hub import hub, weights_on_hub
from ldm_sg.weights import check_finite, read_weights

Manifest = dict[str, Any]


class Codec(nn.Module):
    """What every kind has; built as KIND(manifest, weights file or None)."""

    channels: int
    factor: int
    net_config: dict[str, Any] | None = None  # enough to build the network again around its weights
    half = False  # its weights came as float16, and are stored so

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor: ...


class Diffusers(Codec):
    """Any of diffusers' autoencoders: from the hub, a local folder, or a weights file with its configuration in `net`."""

    cls: type[Any]

    def __init__(self, manifest: Manifest, weights: Path | None) -> None:
        super().__init__()
        source = manifest["source"]
        if weights is None:
            name = source["hub"]
            with hub(f"autoencoder {manifest['name']!r} ({name!r} on the Hugging Face hub)", WAY_OUT):
                # the manifest then says which weights they were
                folder, manifest["sha256"] = weights_on_hub(name, manifest.get("subfolder"), manifest.get("sha256"))
                self.net = self.cls.from_pretrained(folder, low_cpu_mem_usage=False)
        else:
            config = manifest["net"] if "file" in source else self.cls.load_config(str(weights.parent))
            self.net = self.cls.from_config(config)
            self.half = load_weights(self.net, to_diffusers(read_weights(weights)), weights)
        config = self.net.config
        self.net_config = plain_config(self.net)
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)


class KL(Diffusers):
    """AutoencoderKL; a latent is the posterior's mean. `patch` p > 1: the network works on pixel-unshuffled images."""

    cls = AutoencoderKL

    def __init__(self, manifest: Manifest, weights: Path | None) -> None:
        super().__init__(manifest, weights)
        self.patch = manifest.get("patch", 1)
        self.factor *= self.patch

    def encode(self, images: Tensor) -> Tensor:
        return self.net.encode(F.pixel_unshuffle(images, self.patch)).latent_dist.mean

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.net.decode(z).sample, self.patch)


class DiffusersVQ(Diffusers):
    """diffusers' VQModel: latents before quantisation; decoding quantises."""

    cls = VQModel

    def encode(self, images: Tensor) -> Tensor:
        return self.net.encode(images).latents

    def decode(self, z: Tensor) -> Tensor:
        return self.net.decode(z).sample


class Tiny(DiffusersVQ):
    """AutoencoderTiny: TAESD and its kin; nothing is quantised."""

    cls = AutoencoderTiny


class VQ(Codec):
    """taming-transformers' and LDM's VQGAN, from taming.modules; latents before quantisation, decoding quantises.

    `net`: taming's `ddconfig` with `n_embed` and `embed_dim` beside its keys."""

    def __init__(self, manifest: Manifest, weights: Path | None) -> None:
        super().__init__()
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.vqvae.quantize import VectorQuantizer2

        net = {"double_z": False, "dropout": 0.0, "attn_resolutions": [], **manifest["net"]}
        entries, width = net.pop("n_embed"), net.pop("embed_dim")
        with contextlib.redirect_stdout(io.StringIO()):  # taming's Decoder prints its shapes
            self.encoder, self.decoder = Encoder(**net), Decoder(**net)
        self.quantize = VectorQuantizer2(entries, width, beta=0.25)
        self.quant_conv = nn.Conv2d(net["z_channels"], width, 1)
        self.post_quant_conv = nn.Conv2d(width, net["z_channels"], 1)
        self.net_config = manifest["net"]
        self.channels, self.factor = width, 2 ** (len(net["ch_mult"]) - 1)
        state = {k: v for k, v in read_weights(weights).items() if not k.startswith(("loss.", "model_ema."))}
        self.half = load_weights(self, state, weights)

    def encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize(z)[0]))


class Patch(Codec):
    """Pixel-unshuffle: every f x f patch becomes 3 f^2 channels. Exactly invertible; f = 1 is pixel space."""

    def __init__(self, manifest: Manifest, weights: Path | None) -> None:
        super().__init__()
        self.factor = manifest["factor"]
        self.channels = 3 * self.factor**2

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, self.factor)


KINDS: dict[str, type[Codec]] = {"kl": KL, "tiny": Tiny, "vqmodel": DiffusersVQ, "vq": VQ, "patch": Patch}


def load_weights(net: nn.Module, state: dict[str, Tensor], path: Path) -> bool:
    """`load_state_dict`, strict, as float32, with a short message -> whether all of them were float16."""
    try:
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except RuntimeError as err:
        lines = [line.strip() for line in str(err).splitlines()]
        raise InputError(f"{path}: the weights do not fit the network: {' '.join(lines[1:3])[:300]}") from err
    check_finite(state, path)
    return all(v.dtype == torch.float16 for v in state.values())


def plain_config(net: Any) -> dict[str, Any]:
    """The arguments that build a diffusers network again, as plain YAML values."""
    known = inspect.signature(type(net).__init__).parameters
    return {k: list(v) if isinstance(v, tuple) else v for k, v in net.config.items() if k in known}
