"""The networks: block by block those that the papers name, counted by an independent formula; options, weight decay, saving."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import TINY
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.config import ObjectiveConfig, model_config
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.models.unet import PlainUNet, make_unet
from ldm_sg.pipeline import SelfGuidedPipeline
from ldm_sg.sampling.schedules import noise_scheduler
from ldm_sg.training.diffusion import decayed


def reference_count(base: int, mult: tuple, blocks: int, attention: tuple, ends: int, film: bool, updown: bool) -> int:
    """Parameters of openai's guided-diffusion UNet, by walking through its constructor with sizes in place of layers."""
    time = 4 * base

    def conv(a: int, b: int, kernel: int = 3) -> int:
        return a * b * kernel * kernel + b

    def res(a: int, b: int) -> int:  # norm, conv; time; norm, conv; skip
        return 2 * a + conv(a, b) + (time + 1) * b * (1 + film) + 2 * b + conv(b, b) + (conv(a, b, 1) if a != b else 0)

    def attend(c: int) -> int:  # norm, qkv, projection
        return 2 * c + conv(c, 3 * c, 1) + conv(c, c, 1)

    total = (base + 1) * time + (time + 1) * time + conv(ends, base)
    width, skips = base, [base]
    for level, m in enumerate(mult):
        for _ in range(blocks):
            total += res(width, m * base) + (attend(m * base) if 2**level in attention else 0)
            width = m * base
            skips.append(width)
        if level < len(mult) - 1:
            total += res(width, width) if updown else conv(width, width)
            skips.append(width)
    total += 2 * res(width, width) + attend(width)
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            total += res(width + skips.pop(), m * base) + (attend(m * base) if 2**level in attention else 0)
            width = m * base
            if level and i == blocks:
                total += res(width, width) if updown else conv(width, width)
    assert not skips
    return total + 2 * width + conv(width, ends)


@pytest.mark.parametrize(
    ("model", "reference", "millions"),
    [
        ({"tokens": "none", "inject": "add"}, (128, (1, 2, 4), 2, (4,), 4, False, False), 62.8),
        ("ldm-church-plain", (192, (1, 2, 2, 4, 4), 2, (1, 2, 4, 8), 4, True, True), 295.0),
    ],
)
def test_without_cross_attention_it_is_the_reference_net(model, reference: tuple, millions: float) -> None:
    with torch.device("meta"):
        net = make_unet(model_config(model), GuidanceSpec(num_labels=10), (4, 32, 32)).unet
    assert sum(p.numel() for p in net.parameters()) == reference_count(*reference)
    assert abs(reference_count(*reference) / 1e6 - millions) < 0.05  # what LDM's paper and code say


@pytest.mark.parametrize("name", ["b-plain", "ldm-church-plain", "b", "ldm-church"])
def test_heads_are_those_asked_for_everywhere_and_the_middle_attends(name: str) -> None:
    with torch.device("meta"):
        net = make_unet(model_config(name), GuidanceSpec(num_labels=10), (4, 32, 32)).unet
    heads = [m.heads for m in net.modules() if isinstance(m, Attention)]
    assert set(heads) == {8} and len(heads) > 5
    assert len(net.mid_block.resnets) == 2 and len(net.mid_block.attentions) == 1
    assert isinstance(net.mid_block.attentions[0], Attention | Transformer2DModel)


PLAIN = {**TINY, "tokens": "none", "multipliers": [1, 2, 2], "attention": [1, 4]}


@pytest.mark.parametrize("options", [{}, {"inject": "add", "scale_shift": True, "residual_updown": True}])
def test_plain_net_is_saved_and_loaded_whole(options: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = make_unet(model_config({**PLAIN, **options}), GuidanceSpec(num_labels=5), (4, 16, 16)).eval()
    x, t, guidance = torch.randn(2, 4, 16, 16), torch.tensor([3, 800]), Guidance.from_k(torch.tensor([1, 2]))
    assert not net(x, t, guidance).any()  # the output convolution starts at zero
    nn.init.normal_(net.unet.conv_out.weight)
    expected = net(x, t, guidance)
    net.unet.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        net.unet = PlainUNet.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    assert not caplog.records
    assert torch.equal(net(x, t, guidance), expected)
    assert not torch.allclose(net(x, t, guidance), net(x, t, guidance.null()), atol=1e-4)


def test_residual_halving_needs_a_net_without_tokens() -> None:
    with pytest.raises(InputError, match="tokens=none"):
        make_unet(model_config({"residual_updown": True}), GuidanceSpec(num_labels=5), (4, 32, 32))


@pytest.mark.parametrize("tokens", ["vector", "none"])
def test_only_weights_of_layers_decay(tokens: str) -> None:
    net = make_unet(model_config({**TINY, "tokens": tokens}), GuidanceSpec(num_labels=5, spatial="box"), (4, 8, 8))
    weights, rest = decayed(net)
    names = {id(p): name for name, p in net.named_parameters()}
    assert len(weights) + len(rest) == len(names) and not {id(p) for p in weights} & {id(p) for p in rest}
    assert all(p.ndim >= 2 for p in weights)
    assert {names[id(p)] for p in rest if p.ndim >= 2} <= {
        "conditioner.labels", "conditioner.token_labels", "conditioner.token_null", "conditioner.spatial_null",
    }  # fmt: skip
    assert any("to_q.weight" in names[id(p)] for p in weights)


def test_a_pipeline_without_cross_attention_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ldm_sg, and by diffusers with the code beside it."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    spec = GuidanceSpec(num_labels=4)
    net = make_unet(model_config({**TINY, "tokens": "none"}), spec, (12, 8, 8))
    signals = Signals(spec, k=torch.arange(4), count=4)
    parts = (noise_scheduler(ObjectiveConfig()), load_autoencoder("patch2"), signals)
    SelfGuidedPipeline(net.unet, net.conditioner, *parts).save_pretrained(tmp_path)
    other = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(other.unet).__name__ == "PlainUNet" and type(other.unet) is not PlainUNet
    assert torch.equal(other.unet.conv_in.weight, net.unet.conv_in.weight)
    again = SelfGuidedPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is PlainUNet
    for key, value in net.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[key], value)
