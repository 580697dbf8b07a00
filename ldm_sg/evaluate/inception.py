"""The FID network: torch-fidelity's InceptionV3, whose weights are TensorFlow's of 2015, as a feature extractor."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from ldm_sg.errors import InputError
from ldm_sg.folder import file_sha256
from ldm_sg.weights import read_weights

MARK = "Mixed_7c.branch_pool.conv.weight"  # a key that only this network has


class Inception(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> pooled features [B, 2048], resized to 299 pixels as TensorFlow 1 did."""

    name = "inception"
    dim = 2048

    def __init__(self, state: dict[str, Tensor], sha256: str):
        super().__init__()
        whole = io.BytesIO()  # torch-fidelity takes weights from a file only, and unpickles it: it gets ours
        torch.save({key: value.float() if value.is_floating_point() else value for key, value in state.items()}, whole)
        whole.seek(0)
        self.net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=whole)
        self.manifest = {"name": self.name, "dim": self.dim, "sha256": sha256}

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.net(pixels)[0]

    @property
    def classifies(self) -> bool:
        """False for weights whose last layer (fc) is empty: good for distances, not for the Inception score."""
        return bool(self.net.fc.weight.any())

    def logits(self, features: Tensor) -> Tensor:
        """Class scores [N, 1008] of features [N, 2048], without the bias, as the Inception score takes them."""
        return features @ self.net.fc.weight.T.to(features)


def load_inception(file: str | Path | None = None) -> Inception:
    """From a safetensors or .pth file with torch-fidelity's key names, or downloaded (and kept by torch.hub).

    Raises InputError for a file that is not there, is not such weights or would run code, and without network."""
    if file is None:
        return Inception(*_download())
    path = Path(file)
    if not path.is_file():
        raise InputError(f"Inception weights {str(file)!r}: no such file")
    state = read_weights(path)
    if MARK not in state:
        raise InputError(f"{path}: not the weights of torch-fidelity's InceptionV3: {MARK} is missing")
    try:
        return Inception(state, file_sha256(path))
    except RuntimeError as err:  # load_state_dict's: keys or shapes that do not fit
        raise InputError(
            f"{path}: not the weights of torch-fidelity's InceptionV3: {str(err).splitlines()[-1].strip()}"
        ) from err


def first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]


def _download() -> tuple[dict[str, Tensor], str]:
    name = URL_INCEPTION_V3.rsplit("/", 1)[1]
    try:
        state = torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as err:  # no network, or a file that does not match its hash
        raise InputError(
            f"the Inception weights could not be downloaded ({first_line(err)}): fetch {name} from torch-fidelity's "
            "releases elsewhere and name the file: --features inception:FILE"
        ) from err
    return state, file_sha256(Path(torch.hub.get_dir()) / "checkpoints" / name)
