"""UNet (with its conditioner) and decoder of a pipeline as ONNX files, held against torch where onnxruntime is installed."""

import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm_sg.errors import InputError
from ldm_sg.folder import disk_errors
from ldm_sg.guidance.signal import Guidance
from ldm_sg.models.unet import GuidedUNet

if TYPE_CHECKING:
    from ldm_sg.pipeline import SelfGuidedPipeline

BATCH = 2  # of the example; the files take any


class _Denoiser(nn.Module):
    """The guided network with its signals as plain tensors."""

    def __init__(self, network: GuidedUNet, parts: Iterable[str]) -> None:
        super().__init__()
        self.network, self.parts = network, list(parts)

    def forward(self, x: Tensor, t: Tensor, *signals: Tensor) -> Tensor:
        return self.network(x, t, Guidance(**dict(zip(self.parts, signals, strict=True))))


def need() -> None:
    """InputError where a package is missing."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx needs {' and '.join(missing)}: pip install 'ldm-sg[onnx]'")


@torch.no_grad()
def export_onnx(pipe: "SelfGuidedPipeline", folder: Path) -> dict[str, float]:
    """unet.onnx and decoder.onnx, for any batch size -> file name, the largest difference from torch (nan without onnxruntime)."""
    assert pipe.dtype == torch.float32, pipe.dtype
    pipe = pipe.to("cpu")
    guidance = vars(pipe.guidance(pipe.draw(BATCH)))
    signals = {name: part for name, part in guidance.items() if part is not None}
    x = torch.randn(BATCH, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = {"x": x, "t": torch.linspace(0, 900, BATCH), **signals}
    folder.mkdir(parents=True, exist_ok=True)
    networks = {
        "unet.onnx": (_Denoiser(GuidedUNet(pipe.unet, pipe.conditioner), signals), inputs, "prediction"),
        "decoder.onnx": (pipe.autoencoder, {"latents": x}, "images"),
    }
    return {file: _export(*network, folder / file) for file, network in networks.items()}


def _export(network: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> float:
    batch = {0: torch.export.Dim("batch")}
    tensors = tuple(inputs.values())
    shapes = [batch] * len(tensors)
    shapes = (*shapes[:2], tuple(shapes[2:])) if len(tensors) > 1 else tuple(shapes)
    with disk_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(), tensors, path, input_names=list(inputs), output_names=[output], dynamo=True, dynamic_shapes=shapes, verbose=False
        )  # fmt: skip
    if find_spec("onnxruntime") is None:
        return float("nan")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # another batch size than the example's
    more = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    (made,) = session.run(None, {name: value.numpy() for name, value in more.items()})
    return float((torch.from_numpy(made) - network(*more.values())).abs().max())
