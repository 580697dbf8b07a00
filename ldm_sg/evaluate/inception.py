"""The FID network: torch-fidelity's InceptionV3, whose weights are TensorFlow's of 2015, as a feature extractor, with the
two ways to resize its input that published figures use."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from ldm_sg.data.images import to_uint8
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import file_sha256
from ldm_sg.hub import downloadable
from ldm_sg.weights import check_finite, read_weights

SIDE = (299, 299)
CHANNELS = 7  # of TensorFlow's mixed_6/conv [17, 17, 192], of which sFID is (Nash et al., 2021; ADM's evaluator)
SPATIAL = 17 * 17 * CHANNELS


def _tf(pixels: Tensor) -> Tensor:
    """Float [B, 3, H, W] -> [B, 3, 299, 299] as TensorFlow 1 did and torch-fidelity does: bilinear, not antialiased."""
    return interpolate_bilinear_2d_like_tensorflow1x(pixels, size=SIDE, align_corners=False)


def _clean(pixels: Tensor) -> Tensor:
    """Float [B, 3, H, W] -> [B, 3, 299, 299] as clean-fid does (Parmar et al., 2022): PIL's antialiased bicubic of each
    channel in float, clipped and not rounded."""
    return F.interpolate(pixels, size=SIDE, mode="bicubic", antialias=True).clamp(0, 255)


RESIZES = {"tf": _tf, "clean": _clean}


class Inception(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> pooled features [B, 2048]; `resize`: of RESIZES."""

    name = "inception"
    dim = 2048

    def __init__(self, state: dict[str, Tensor], sha256: str, resize: str = "tf"):
        super().__init__()
        whole = io.BytesIO()  # torch-fidelity takes weights from a file only, and unpickles it: it gets ours
        torch.save({key: value.float() if value.is_floating_point() else value for key, value in state.items()}, whole)
        whole.seek(0)
        self.net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=whole)
        self.manifest = {"name": self.name, "dim": self.dim, "sha256": sha256, "resize": resize}
        self.resize, self.spatial = RESIZES[resize], False

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        x = (self.resize(to_uint8(images).float()) - 128) / 128
        maps = []
        for layer in list(self.net.children())[:-1]:  # all but the classifier: its forward() would resize by itself
            if self.spatial and layer is self.net.Mixed_6d:
                maps.append(layer.branch1x1(x)[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1))  # in ADM's order
            x = layer(x)
        return torch.cat([x.flatten(1), *maps], 1)

    def see_maps(self) -> None:
        """From now on features are [B, 2048 + 2023]: the pooled ones, then the maps that sFID compares."""
        self.spatial, self.manifest = True, self.manifest | {"spatial": SPATIAL}

    @torch.inference_mode()
    def patches(self, images: Tensor) -> tuple[None, Tensor]:
        """[B, 768, 17, 17], of Mixed_6e: what it sees where."""
        images = images.to(self.net.fc.weight.device)
        x = (self.resize(to_uint8(images).float()) - 128) / 128
        for name, layer in self.net.named_children():
            x = layer(x)
            if name == "Mixed_6e":
                break
        return None, x

    @property
    def classifies(self) -> bool:
        """False for weights whose last layer (fc) is empty: good for distances, not for the Inception score."""
        return bool(self.net.fc.weight.any())

    def logits(self, features: Tensor) -> Tensor:
        """Class scores [N, 1008] of features [N, 2048], without the bias, as the Inception score takes them."""
        return features @ self.net.fc.weight.T.to(features)


def load_inception(file: str | Path | None = None, resize: str = "tf") -> Inception:
    """From a safetensors or .pth file with torch-fidelity's key names, or downloaded (and kept by torch.hub).

    Raises InputError for a file that is not there, is not such weights or would run code, and without network."""
    if file is None:
        return Inception(*_download(), resize)
    state = read_weights(path := Path(file))
    check_finite(state, path)
    try:
        return Inception(state, file_sha256(path), resize)
    except RuntimeError as err:  # load_state_dict's: keys or shapes that do not fit
        why = str(err).splitlines()[-1].strip()[:200]
        raise InputError(f"{path}: not the weights of torch-fidelity's InceptionV3: {why}") from err


def _download() -> tuple[dict[str, Tensor], str]:
    name = URL_INCEPTION_V3.rsplit("/", 1)[1]
    try:
        if not downloadable(URL_INCEPTION_V3):
            raise OSError("no network")
        state = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as err:  # or a file that does not match its hash
        why = f"the Inception weights could not be downloaded ({one_line(err)[:200]})"
        raise InputError(f"{why}: fetch {name} from torch-fidelity's releases: --features inception:FILE") from err
    return state, file_sha256(Path(torch.hub.get_dir()) / "checkpoints" / name)
