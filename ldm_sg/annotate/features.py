"""g, the feature extractor: images -> image-level features [B, D], patch features [B, Dp, h, w], keys [B, Dk, h, w].

With `names`, the only file that imports timm or open_clip. A g is a shipped extractor (a folder of ours), any timm model, or any
open_clip image tower; it resizes and normalises by itself, runs frozen, and can be read at a chosen block."""

import hashlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_sg.config import FeaturesConfig
from ldm_sg.configfile import ASSETS, read_yaml
from ldm_sg.errors import InputError, choices, need_choice, one_line
from ldm_sg.folder import file_sha256
from ldm_sg.hardware import use_bf16
from ldm_sg.hub import check_pinned, hub
from ldm_sg.weights import check_finite, read_weights

EXTRACTORS = ASSETS / "extractors"
POOLS = ("auto", "cls", "mean")
LEAST = 224  # pixels


class FeatureExtractor(nn.Module):
    """A frozen image tower with its own input size and normalisation.

    `manifest` says what it is (model, layer, pool, size, precision, dim, sha256): enough to load the same g again."""

    def __init__(self, tower: nn.Module, manifest: Mapping[str, Any], device: torch.device | str = "cpu"):
        super().__init__()
        self.manifest = dict(manifest)
        self.name = str(manifest["name"])
        self.size, self.layer, self.pool = int(manifest["size"]), manifest["layer"], manifest["pool"]
        self.unit = bool(manifest.get("unit"))  # trained by a cosine loss: only its output's direction means anything
        self.folder: Path | None = None  # where a shipped g lies
        self.register_buffer("mean", torch.tensor(manifest["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(manifest["std"]).view(3, 1, 1), persistent=False)
        self.tower = tower
        self.patch = patch_size(tower)  # pixels
        self.any_shape = bool(getattr(tower, "dynamic_img_size", False))  # reads images that are no squares too
        self.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
        self.bf16 = use_bf16(str(manifest["precision"]), self.mean.device)
        try:
            self.dim = self.forward(torch.zeros(1, 3, self.size, self.size, device=self.mean.device)).shape[1]
        except (AssertionError, RuntimeError) as err:  # patches that do not divide the size, windows larger than it
            raise InputError(f"features.size={self.size}: {self.name} cannot read it: {err}") from err
        self.manifest["dim"] = self.dim

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """g is frozen: it stays in evaluation mode, whatever contains it."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> image-level features [B, D], float32."""
        with self._autocast():
            features = self._image_level(self.prepare(images))
        return features.float()

    @torch.no_grad()
    def patches(self, images: Tensor, mirrored: bool = False) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> image-level features [B, D] and patch features [B, Dp, h, w]; `mirrored`: g sees
        the mirror images, and each patch's features still lie where the patch is in `images`."""
        prepared = self.prepare(images, mirrored)
        with self._autocast():
            spatial, prefix = self._block(prepared, -1 if self.layer is None else self.layer)
            image_level = self._image_level(prepared) if self._own_pooling else self._pooled(spatial, prefix)
        return image_level.float(), spatial.flip(-1).float() if mirrored else spatial.float()

    def keys(self, images: Tensor | Sequence[Tensor], layer: int = -1, mirrored: bool = False) -> Tensor:
        """Images as `prepare` takes them -> patch keys [B, Dk, h, w] of a block's self-attention (the last one's unless told),
        its heads side by side, float32: what LOST reads. The image spans `grid` rows and columns of them; `mirrored`
        as in `patches`."""
        return self.features_and_keys(images, layer, mirrored)[1]

    @torch.no_grad()
    def features_and_keys(
        self, images: Tensor | Sequence[Tensor], layer: int = -1, mirrored: bool = False
    ) -> tuple[Tensor, Tensor]:
        """What `forward` and `keys` give, in one pass."""
        attention, prepared = _fused_attention(self.tower, layer), self.prepare(images, mirrored)
        read: list[Tensor] = []  # what the attention reads [B, P + N, C], prefix tokens first
        if attention is not None:
            hook = attention.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
            try:
                with self._autocast():
                    features = self._image_level(prepared, whole=True)
            finally:
                hook.remove()
        if attention is None or read[0].ndim != 3:  # SAM's attention reads windows
            raise InputError(
                f"features.model={self.name}: its keys cannot be read; choose a timm ViT whose blocks attend through "
                "one fused qkv layer, for example vit_small_patch16_224.dino"
            )
        assert self.patch is not None
        h, w = (side // self.patch for side in prepared.shape[2:])
        with self._autocast():  # not the hooked layer's output: BEiT and EVA use its weight without calling it
            keys = attention.qkv(read[0][:, -h * w :]).chunk(3, dim=2)[1]  # [B, N, Dk]; keys have no bias there
        keys = keys.float().mT.unflatten(2, (h, w))
        return features.float(), keys.flip(-1) if mirrored else keys

    @property
    def grid(self) -> float:
        """How many rows and columns of patches the image spans: a fraction where it was padded to whole patches."""
        assert self.patch is not None, self.name
        return self.size / self.patch

    def prepare(self, images: Tensor | Sequence[Tensor], mirrored: bool = False) -> Tensor:
        """[B, 3, H, W] in [-1, 1], which becomes `size` wide, or images [3, h, w] at g's scale that fill the same patches,
        as they are -> g's normalisation; where patches do not divide the sides, zeros (the mean colour) on the right and
        below fill the last ones. It is mirrored last: the same pixels share a patch."""
        if not isinstance(images, Tensor):
            return torch.cat([self._normalised(image[None].to(self.mean.device), mirrored) for image in images])
        return self._normalised(resize(images.to(self.mean.device), self.size), mirrored)

    def _normalised(self, images: Tensor, mirrored: bool) -> Tensor:
        images = (images * 0.5 + 0.5 - self.mean) / self.std
        height, width = images.shape[2:]
        if self.patch and (height % self.patch or width % self.patch):
            images = F.pad(images, (0, -width % self.patch, 0, -height % self.patch))
        return (images.flip(-1) if mirrored else images).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.mean.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def _own_pooling(self) -> bool:
        """Whether image-level features are what the whole model gives."""
        return self.layer is None and self.pool == "auto"

    def _image_level(self, images: Tensor, whole: bool = False) -> Tensor:
        """Prepared images -> [B, D]; `whole`: every block runs, whichever one is read."""
        if self._own_pooling:
            pooled = self.tower(images)  # [B, D]
            return F.normalize(pooled.float(), dim=1) if self.unit else pooled
        return self._pooled(*self._block(images, -1 if self.layer is None else self.layer, whole))

    def _pooled(self, spatial: Tensor, prefix: Tensor | None) -> Tensor:
        """A block's patches [B, D, h, w] and prefix tokens -> [B, D]."""
        if self.pool == "mean" or (self.pool == "auto" and prefix is None):
            return spatial.mean((2, 3))
        if prefix is None:
            raise InputError(f"features.pool=cls: {self.name} has no class token; choose auto or mean")
        return prefix[:, 0]

    def _block(self, images: Tensor, layer: int, whole: bool = False) -> tuple[Tensor, Tensor | None]:
        """A block's patches [B, Dp, h, w] and class token and registers [B, P, Dp] (None without), after the final norm."""
        forward = getattr(self.tower, "forward_intermediates", None)
        if forward is None:
            raise InputError(f"features.layer={layer}: {self.name} offers no access to its blocks")
        known = inspect.signature(forward).parameters
        wanted = {"norm": True, "normalize_intermediates": True, "intermediates_only": True}
        wanted |= {"return_prefix_tokens": True, "output_extra_tokens": True, "stop_early": not whole}
        try:
            out = forward(images, indices=[layer], **{key: value for key, value in wanted.items() if key in known})
        except AssertionError as err:
            raise InputError(f"features.layer={layer}: {self.name} has no such block: {err}") from err
        if isinstance(out, dict):  # open_clip
            prefix = out.get("image_intermediates_prefix")
            return out["image_intermediates"][0], prefix[0] if prefix else None
        spatial, prefix = out[0] if isinstance(out[0], tuple) else (out[0], None)
        return spatial, None if prefix is None or prefix.shape[1] == 0 else prefix


def resize(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> [B, 3, size, size], antialiased bicubic."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def patch_size(tower: nn.Module) -> int | None:
    """Pixels a side of a timm ViT's patches; None for towers that cut the image up in another way."""
    embed = getattr(tower, "patch_embed", None)
    return embed.patch_size[0] if isinstance(embed, timm.layers.PatchEmbed) else None


def _fused_attention(tower: nn.Module, layer: int) -> nn.Module | None:
    """The self-attention of a ViT's block, None where not one linear layer makes its queries, keys and values."""
    blocks = getattr(tower, "blocks", None) if patch_size(tower) else None
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return None
    if not -len(blocks) <= layer < len(blocks):
        raise InputError(f"annotator.keys_layer={layer}: the ViT has the blocks 0 to {len(blocks) - 1}; -1 is the last")
    attention = getattr(blocks[layer], "attn", None)
    return attention if isinstance(getattr(attention, "qkv", None), nn.Linear) else None


def load_extractor(
    cfg: FeaturesConfig, device: torch.device | str = "cpu", source: int | None = None
) -> FeatureExtractor:
    """The g of a config: a shipped name, a folder with manifest.yaml, `open_clip:MODEL[/PRETRAINED]`, or a timm name.
    Where the config leaves its input size open, `own_size` fits it to images of `source` pixels.

    Raises InputError for an unknown name, weights that cannot be had or do not fit, a block or pooling it lacks."""
    need_choice("features.pool", cfg.pool, POOLS)
    clip = cfg.model.startswith("open_clip:")
    folder = None if clip else _shipped(cfg.model)
    if folder is not None:
        return _load_folder(folder, cfg, device)
    tower, own = open_clip_model(cfg) if clip else _timm(cfg, source)
    tower = tower.visual if clip else tower
    weights = str(Path(cfg.weights).resolve()) if cfg.weights else None
    chosen = {"layer": cfg.layer, "pool": cfg.pool, "precision": cfg.precision}
    manifest = {"name": cfg.model, "model": cfg.model, "weights": weights, **own, **chosen}
    manifest["sha256"] = weights_sha256(tower)
    if weights is None:
        check_pinned(f"{cfg.model} at {own['size']} pixels", manifest["sha256"])
    return FeatureExtractor(tower, manifest, device)


def _shipped(model: str) -> Path | None:
    """The folder of a shipped extractor's name, or the folder that `model` names."""
    for folder in (EXTRACTORS / model, Path(model)):
        if (folder / "manifest.yaml").is_file():
            return folder
    if os.sep in model or Path(model).is_dir():
        raise InputError(f"features.model={model!r}: no folder with a manifest.yaml there")
    return None


def _load_folder(folder: Path, cfg: FeaturesConfig, device: torch.device | str) -> FeatureExtractor:
    if cfg.weights:
        raise InputError(f"features.weights={cfg.weights}: {cfg.model} comes with its own weights; leave this key out")
    own: dict[str, Any] = OmegaConf.to_container(read_yaml(folder / "manifest.yaml"))  # type: ignore[assignment]
    path = folder / "model.safetensors"
    state = read_weights(path)
    if file_sha256(path) != own["sha256"]:
        raise InputError(f"{path}: its sha256 is not the one that manifest.yaml beside it gives: the file was changed")
    tower = timm.create_model(own["model"], **own["kwargs"])
    load_state(tower, state, path)
    manifest = {key: own[key] for key in ("name", "mean", "std", "sha256")} | {"unit": own.get("unit", False)}
    manifest |= {"model": cfg.model, "weights": None, "size": cfg.size or own["size"], "precision": cfg.precision}
    manifest["layer"] = own["layer"] if cfg.layer is None else cfg.layer
    manifest["pool"] = own["pool"] if cfg.pool == "auto" else cfg.pool
    extractor = FeatureExtractor(tower, manifest, device)
    extractor.folder = folder
    return extractor


def own_size(model: int, patch: int, source: int | None) -> int:
    """The input size of a ViT that takes any and is named none: the multiple of its patches nearest to the images' own
    size, for there is no more to see, but at most the model's own and at least what most ViTs are trained at, since a few
    large patches tell little (benchmarks/RESULTS.md)."""
    if source is None:
        return model
    return min(model, max(round(source / patch), round(LEAST / patch)) * patch)


def _timm(cfg: FeaturesConfig, source: int | None) -> tuple[nn.Module, dict[str, Any]]:
    base = cfg.model.split(".")[0]  # ARCHITECTURE.PRETRAINED_TAG
    try:
        own = timm.get_pretrained_cfg(cfg.model, allow_unregistered=False)
    except RuntimeError as err:
        known = timm.list_pretrained(f"{base}.*") or [
            *timm.list_models(),
            *(path.parent.name for path in EXTRACTORS.glob("*/manifest.yaml")),
        ]
        raise InputError(f"features.model={cfg.model!r}: no such extractor; {choices(cfg.model, known)}") from err
    kwargs: dict[str, Any] = {"num_classes": 0}
    with torch.device("meta"):  # shapes only
        draft = timm.create_model(cfg.model, **kwargs)
    data = timm.data.resolve_model_data_config(draft)
    patch, size = patch_size(draft) or 1, cfg.size or data["input_size"][-1]
    if isinstance(draft, VisionTransformer | Eva) and patch > 1:
        kwargs["dynamic_img_size"] = True
        size = cfg.size or own_size(size, patch, source)
    if own.fixed_input_size and size != data["input_size"][-1]:
        kwargs["img_size"] = size + -size % patch  # `prepare` pads to it
    if cfg.weights:
        tower = timm.create_model(cfg.model, **kwargs)
        _load_timm_state(tower, read_weights(Path(cfg.weights)), Path(cfg.weights))
    else:
        with _weights(cfg):
            tower = timm.create_model(cfg.model, pretrained=True, **kwargs)
    return tower, {"size": size, "mean": [float(v) for v in data["mean"]], "std": [float(v) for v in data["std"]]}


def _load_timm_state(tower: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Through timm's own renaming and resizing of positions; a classifier and other parts that the tower does not have are
    left out, but every weight that it has must be there (timm itself would leave it at random)."""
    adapt = getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None)
    try:
        state = adapt(state, tower) if adapt else state
        parts = {key.split(".")[0] for key in tower.state_dict()}
        load_state(tower, {k: v for k, v in state.items() if k.split(".")[0] in parts}, path)
    except (KeyError, IndexError, AttributeError, AssertionError) as err:  # timm's renaming of another model's weights
        raise InputError(f"{path}: does not fit the model") from err


def _weights(cfg: FeaturesConfig) -> AbstractContextManager[None]:
    """Around what gets weights from the hub."""
    return hub(f"features.model={cfg.model!r}: its weights", "give a local copy as features.weights=FILE")


def open_clip_model(cfg: FeaturesConfig) -> tuple[nn.Module, dict[str, Any]]:
    """A CLIP, with the weights of its image tower at least, and how that wants its images."""
    import open_clip  # a second heavy import, only for those who use it

    model, _, tag = cfg.model.removeprefix("open_clip:").partition("/")
    if model not in open_clip.list_models():
        raise InputError(f"features.model={cfg.model!r}: {choices(model, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags and not (cfg.weights and not tag):
        raise InputError(
            f"features.model={cfg.model!r}: name its weights as open_clip:{model}/TAG or give features.weights=FILE; "
            f"tags: {choices(tag, tags)}"
        )
    kwargs: dict[str, Any] = {} if cfg.size is None else {"force_image_size": cfg.size}
    if cfg.weights:
        clip = open_clip.create_model(model, pretrained=None, **kwargs)
        state = read_weights(Path(cfg.weights))
        visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        load_state(clip.visual, visual or state, Path(cfg.weights))
    else:
        with _weights(cfg):
            clip = open_clip.create_model(model, pretrained=tag, **kwargs)
    tower = clip.visual
    size = tower.image_size[0] if isinstance(tower.image_size, tuple) else tower.image_size
    return clip, {"size": size, "mean": list(map(float, tower.image_mean)), "std": list(map(float, tower.image_std))}


def load_state(tower: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        tower.load_state_dict(dict(state))
    except RuntimeError as err:
        raise InputError(f"{path}: does not fit the model: {one_line(err)[:200]}") from err
    check_finite(state, path)


def weights_sha256(module: nn.Module) -> str:
    """A digest of names and values of all weights, the same on every device and whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
