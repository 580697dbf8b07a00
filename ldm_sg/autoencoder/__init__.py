"""The first stage: `load_autoencoder(name_or_dir)` -> an `Autoencoder` with encode, decode, channels, factor."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors.torch import save
from torch import Tensor, nn

from ldm_sg.autoencoder import manifest as manifests
from ldm_sg.autoencoder.kinds import KINDS, Codec
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import file_sha256, write_bytes

__all__ = ["Autoencoder", "load_autoencoder", "measure_normalisation"]

SMALL = 16 * 2**20  # bytes of weights that `save` still copies


class Autoencoder(ModelMixin):
    """A frozen first stage whose latents have zero mean and unit variance per channel, as its manifest says."""

    def __init__(self, codec: Codec, manifest: dict[str, Any]) -> None:
        super().__init__()
        self.codec, self.manifest = codec.eval().requires_grad_(False), dict(manifest)
        self.name: str = manifest["name"]
        self.kind: str = manifest["kind"]
        self.channels, self.factor = codec.channels, codec.factor
        for key in ("channels", "factor"):
            if self.manifest.setdefault(key, getattr(codec, key)) != getattr(codec, key):
                raise InputError(
                    f"autoencoder {self.name!r}: the manifest says {key}: {manifest[key]}, "
                    f"but its network has {getattr(codec, key)}"
                )
        self.register_buffer("mean", torch.zeros(self.channels), persistent=False)
        self.register_buffer("std", torch.ones(self.channels), persistent=False)
        if self.normalised:
            self.normalise(manifest["latent_mean"], manifest["latent_std"])

    @property
    def normalised(self) -> bool:
        """Whether the latents' mean and std are known."""
        return self.manifest.get("latent_mean") is not None and self.manifest.get("latent_std") is not None

    def normalise(self, mean: list[float], std: list[float]) -> None:
        """Set the raw latents' mean and std per channel."""
        if len(mean) != self.channels or len(std) != self.channels or min(std) <= 0:
            raise InputError(
                f"autoencoder {self.name!r}: latent_mean and latent_std must have {self.channels} values, std > 0"
            )
        self.mean.copy_(torch.tensor(mean))
        self.std.copy_(torch.tensor(std))
        self.manifest.update(latent_mean=[float(m) for m in mean], latent_std=[float(s) for s in std])

    def encode_raw(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f] before normalisation."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InputError(
                f"autoencoder {self.name!r} needs sides divisible by {self.factor}, not {height} x {width} pixels"
            )
        return self.codec.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, C, H/f, W/f]; deterministic."""
        self._need_normalisation()
        z = self.encode_raw(images)
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] -> images [B, 3, h*f, w*f] in [-1, 1]."""
        self._need_normalisation()
        z = latents * self.std[:, None, None] + self.mean[:, None, None]
        return self.codec.decode(z).clamp(-1, 1)

    def _need_normalisation(self) -> None:
        if not self.normalised:
            raise InputError(
                f"autoencoder {self.name!r} comes without latent_mean and latent_std: "
                "measure_normalisation(autoencoder, batches) fills them in (`ldm-sg annotate` does)"
            )

    def save(self, folder: str | Path, part: bool = False, whole: bool = False) -> None:
        """Write manifest.yaml, complete, and the weights where they take at most 16 MiB; `load_autoencoder(folder)` reads
        it back. Larger weights stay where they are and are referred to, but with `whole`. `part`: by diffusers' file names."""
        folder, name = Path(folder), "diffusion_pytorch_model.safetensors" if part else "model.safetensors"
        manifest, state = dict(self.manifest), self.weights()
        if state and (whole or sum(t.numel() * t.element_size() for t in state.values()) <= SMALL):
            write_bytes(folder / name, save(state))
            manifest.update(source={"file": name}, sha256=file_sha256(folder / name))
            manifest.update(net=self.codec.net_config)
            manifest.pop("subfolder", None)
        manifests.write(manifest, folder, part)

    def save_pretrained(self, folder: str | Path, refer: bool = False, **_: Any) -> None:
        """As a part of a pipeline; with `refer` large weights stay where they are."""
        self.save(folder, part=True, whole=not refer)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None, device_map: Any = None, **_: Any
    ) -> "Autoencoder":
        """What `save_pretrained` wrote, or whatever `load_autoencoder` takes; `device_map`: a device, or that of {"": device}."""
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        return nn.Module.to(load_autoencoder(folder), device, torch_dtype)

    def weights(self) -> dict[str, Tensor]:
        """The network's tensors as they are stored."""
        net = getattr(self.codec, "net", self.codec)
        dtype = torch.float16 if self.codec.half else torch.float32
        return {k: v.to("cpu", dtype).contiguous() for k, v in net.state_dict().items()}


def load_autoencoder(name_or_dir: str | Path) -> Autoencoder:
    """A name under autoencoders/, a folder with manifest.yaml, or a bare diffusers folder -> the frozen first stage, on the
    CPU in float32. InputError for unknown names, missing or changed weights, and the hub without network."""
    manifest, folder = manifests.find(str(name_or_dir))
    kind = manifest["kind"]
    if kind not in KINDS:
        raise InputError(f"autoencoder {manifest['name']!r}: kind {kind!r}; {choices(kind, KINDS)}")
    return Autoencoder(KINDS[kind](manifest, manifests.weights_file(manifest, folder)), manifest)


def measure_normalisation(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> None:
    """Mean and std of each latent channel over `batches` of images [B, 3, H, W] in [-1, 1], into the autoencoder and its
    manifest. Sums are float64; memory does not grow with the number of batches."""
    device = autoencoder.mean.device
    count, total, squares = 0, torch.zeros(autoencoder.channels).double(), torch.zeros(autoencoder.channels).double()
    with torch.no_grad():
        for images in batches:
            z = autoencoder.encode_raw(images.to(device)).cpu().double()  # MPS has no float64
            count += z.numel() // z.shape[1]
            total += z.sum(dim=(0, 2, 3))
            squares += z.square().sum(dim=(0, 2, 3))
    if count < 2:
        raise InputError(f"autoencoder {autoencoder.name!r}: no images to measure its latents' mean and std on")
    mean = total / count
    std = (squares / count - mean**2).clamp_min(1e-12).sqrt()
    autoencoder.normalise(mean.tolist(), std.tolist())
