"""The first stage: `load_autoencoder(name_or_dir)` -> an `Autoencoder` with encode, decode, channels, factor."""

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors.torch import save
from torch import Tensor, nn

from ldm_sg.autoencoder.kinds import KINDS, Codec
from ldm_sg.autoencoder.manifest import find, weights_file, write
from ldm_sg.errors import InputError, choices
from ldm_sg.folder import WEIGHTS, file_sha256, write_bytes

__all__ = ["Autoencoder", "load_autoencoder", "load_preview", "measure_normalisation", "measure_round_trip"]

SMALL = 16 * 2**20  # bytes of weights that `save` still copies
PIXELS = 2**20  # that pass through a network at once: 16 images of 256 x 256, or one of 1024 x 1024
OVERLAP = 4  # of two tiles: this part of their side


class Autoencoder(ModelMixin):
    """A frozen first stage whose latents have zero mean and unit variance per channel, as its manifest says."""

    def __init__(self, codec: Codec, manifest: dict[str, Any]) -> None:
        super().__init__()
        self.codec, self.manifest = codec.eval().requires_grad_(False), dict(manifest)
        self.name: str = manifest["name"]
        self.kind: str = manifest["kind"]
        self.channels, self.factor = codec.channels, codec.factor
        self.set_tile()
        for key in ("channels", "factor"):
            if self.manifest.setdefault(key, getattr(codec, key)) != getattr(codec, key):
                said = f"the manifest says {key}: {manifest[key]}, its network has {getattr(codec, key)}"
                raise InputError(f"autoencoder {self.name!r}: {said}")
        self.register_buffer("mean", torch.zeros(self.channels), persistent=False)
        self.register_buffer("std", torch.ones(self.channels), persistent=False)
        if self.normalised:
            self.normalise(manifest["latent_mean"], manifest["latent_std"])

    def set_tile(self, pixels: int | None = None) -> None:
        """Side from which on images pass in tiles of it; None = what the manifest says, or 1024."""
        tile = self.manifest.get("tile", int(PIXELS**0.5)) if pixels is None else pixels
        least = OVERLAP * self.factor
        if type(tile) is not int or tile < least:
            said = "the manifest says tile" if pixels is None else "tile"
            raise InputError(f"autoencoder {self.name!r}: {said}: {tile}; a whole number from {least} pixels")
        self.tile = tile // least * least

    @property
    def normalised(self) -> bool:
        """Whether the latents' mean and std are known."""
        return self.manifest.get("latent_mean") is not None and self.manifest.get("latent_std") is not None

    def normalise(self, mean: list[float], std: list[float]) -> None:
        """Set the raw latents' mean and std per channel."""
        finite = all(isinstance(value, int | float) and abs(value) < float("inf") for value in (*mean, *std))
        if len(mean) != self.channels or len(std) != self.channels or not finite or min(std) <= 0:
            said = f"latent_mean and latent_std must have {self.channels} finite values, std > 0"
            raise InputError(f"autoencoder {self.name!r}: {said}")
        self.mean.copy_(torch.tensor(mean))
        self.std.copy_(torch.tensor(std))
        self.manifest.update(latent_mean=[float(m) for m in mean], latent_std=[float(s) for s in std])

    def check_channels(self, channels: int, whose: str) -> None:
        """InputError where latents of so many `channels` are not of this autoencoder."""
        if channels != self.channels:
            said = f"makes latents of {self.channels} channels, those of {whose} have {channels}"
            raise InputError(f"autoencoder {self.name!r} {said}: that was made with another one")

    def encode_raw(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, H/f, W/f] before normalisation."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            said = f"needs sides divisible by {self.factor}, not {height} x {width} pixels"
            raise InputError(f"autoencoder {self.name!r} {said}")
        return self._sliced(self.codec.encode, images, self.tile, 1 / self.factor)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> normalised latents [B, C, H/f, W/f]; deterministic."""
        self._need_normalisation()
        z = self.encode_raw(images)
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    @apply_forward_hook
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] -> images [B, 3, h*f, w*f] in [-1, 1]."""
        self._need_normalisation()
        return self.decode_raw(latents * self.std[:, None, None] + self.mean[:, None, None])

    forward = decode  # what ONNX's export calls

    def decode_raw(self, z: Tensor) -> Tensor:
        """Latents [B, C, h, w] as `encode_raw` gives them -> images [B, 3, h*f, w*f] in [-1, 1]."""
        return self._sliced(self.codec.decode, z, self.tile // self.factor, self.factor).clamp(-1, 1)

    def _sliced(self, run: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale: float) -> Tensor:
        """`run` on a few of x [B, C, H, W] at a time; where a side is longer than `tile`, on overlapping tiles of that side.
        `scale`: result's side / x's."""
        side = max(x.shape[-2:])
        if side > tile:
            return torch.cat([tiled(run, one, tile, scale) for one in x.split(1)])
        pixels = x.shape[-2] * x.shape[-1] * max(1, scale) ** 2
        return torch.cat([run(part) for part in x.split(max(1, int(PIXELS / pixels)))])

    def _need_normalisation(self) -> None:
        if not self.normalised:
            said = "comes without latent_mean and latent_std, which measure_normalisation or `ldm-sg annotate` fills in"
            raise InputError(f"autoencoder {self.name!r} {said}")

    def save(self, folder: str | Path, part: bool = False, whole: bool = False) -> None:
        """Write manifest.yaml, complete, and the weights where they take at most 16 MiB; `load_autoencoder(folder)` reads
        it back. Larger weights stay where they are and are referred to, but with `whole`. `part`: by diffusers' file names."""
        folder, name = Path(folder), WEIGHTS if part else "model.safetensors"
        manifest, state = dict(self.manifest), self.weights()
        if state and (whole or sum(t.numel() * t.element_size() for t in state.values()) <= SMALL):
            write_bytes(folder / name, save(state))
            manifest.update(source={"file": name}, sha256=file_sha256(folder / name))
            manifest.update(net=self.codec.net_config)
            manifest.pop("subfolder", None)
        write(manifest, folder, part)

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


def tiled(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, scale: float) -> Tensor:
    """`run` on tiles [B, C, <= tile, <= tile] of x [B, C, H, W], put together: where tiles overlap, by OVERLAP-th of their side,
    one fades into the next. Not quite `run(x)`: a network looks farther (demo-f8c16, a church photo of 512 px in tiles of 256:
    49 dB from the photo in one piece, which is 34 dB from the original either way)."""
    step = tile - max(1, tile // OVERLAP)
    places = [sorted({min(at, max(0, n - tile)) for at in range(0, n - tile + step, step)} | {0}) for n in x.shape[-2:]]
    total = weights = torch.zeros(())
    for top, left in itertools.product(*places):
        part = run(x[:, :, top : top + tile, left : left + tile]).float()
        ramps = [torch.arange(1, n + 1, device=part.device).float() for n in part.shape[-2:]]
        window = torch.minimum(ramps[0], ramps[0].flip(0))[:, None] * torch.minimum(ramps[1], ramps[1].flip(0))
        if not total.ndim:
            shape = (*part.shape[:2], *(round(n * scale) for n in x.shape[-2:]))
            total, weights = part.new_zeros(shape), part.new_zeros(shape[-2:])
        rows, columns = (slice(round(at * scale), round(at * scale) + n) for at, n in zip((top, left), window.shape))
        total[:, :, rows, columns] += part * window
        weights[rows, columns] += window
    return total / weights


def load_autoencoder(name_or_dir: str | Path) -> Autoencoder:
    """A name under autoencoders/, a folder with manifest.yaml, a bare diffusers folder, or hub://USER/NAME[/SUBFOLDER] of such
    a one -> the frozen first stage, on the CPU in float32. InputError for unknown names, missing or changed weights, and the hub
    without network."""
    manifest, folder = find(str(name_or_dir))
    kind = manifest["kind"]
    if kind not in KINDS:
        raise InputError(f"autoencoder {manifest['name']!r}: kind {kind!r}; {choices(kind, KINDS)}")
    return Autoencoder(KINDS[kind](manifest, weights_file(manifest, folder)), manifest)


def load_preview(autoencoder: Autoencoder) -> Autoencoder:
    """The small network that its manifest names under `preview`, as an autoencoder of the same normalised latents; itself where
    none is named, or (with a note) can be had. Small ones read z as diffusion models of that family do:
    (z - shift_factor) * scaling_factor."""
    if autoencoder.manifest.get("preview") is None:
        return autoencoder
    known = autoencoder.codec.net_config or {}
    shift, scale = known.get("shift_factor") or 0.0, known.get("scaling_factor") or 1.0
    mean, std = autoencoder.mean.cpu(), autoencoder.std.cpu()
    try:
        small = load_autoencoder(autoencoder.manifest["preview"])
        small.normalise(((mean - shift) * scale).tolist(), (std * scale).tolist())
    except InputError as err:
        print(f"note: pictures are decoded by {autoencoder.name} itself: {err}", file=sys.stderr)
        return autoencoder
    return small.to(autoencoder.mean.device)


def measure_normalisation(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> None:
    """Mean and std of each latent channel over `batches` of images [B, 3, H, W] in [-1, 1], into the autoencoder and its
    manifest."""
    device = autoencoder.mean.device
    with torch.no_grad():
        found = moments(autoencoder.encode_raw(images.to(device)) for images in batches)
    if found is None:
        raise InputError(f"autoencoder {autoencoder.name!r}: no images to measure its latents' mean and std on")
    autoencoder.normalise(*found)


def moments(latents: Iterable[Tensor]) -> tuple[list[float], list[float]] | None:
    """Mean and std of each channel of all [B, C, h, w]; None where there are none. Sums are float64; memory does not grow with
    their number."""
    count, total, squares = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for z in latents:
        z = z.cpu().double()  # MPS has no float64
        count += z.numel() // z.shape[1]
        total = total + z.sum(dim=(0, 2, 3))
        squares = squares + z.square().sum(dim=(0, 2, 3))
    if count < 2:
        return None
    mean = total / count
    return mean.tolist(), (squares / count - mean**2).clamp_min(1e-12).sqrt().tolist()


@torch.no_grad()
def measure_round_trip(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> None:
    """PSNR of `batches` of images [B, 3, H, W] in [-1, 1] decoded again, dB, into the manifest."""
    found = []
    for images in batches:
        images = images.to(autoencoder.mean.device)
        found.append(psnr(autoencoder.decode_raw(autoencoder.encode_raw(images)), images).cpu())
    if found:
        autoencoder.manifest["round_trip"] = round(float(torch.cat(found).mean()), 2)


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """dB [B] for a range of 2 ([-1, 1])."""
    return -10 * torch.log10(((decoded.float() - images) / 2).square().mean(dim=(1, 2, 3)))
