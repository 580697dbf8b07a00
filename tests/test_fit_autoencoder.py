"""fit-autoencoder: it learns, resumes exactly, stops on Ctrl-C, and refuses wrong input."""

import csv
import dataclasses
import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.config import FitAutoencoderConfig
from ldm_sg.configfile import ROOT, load
from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError
from ldm_sg.training import autoencoder as training
from ldm_sg.training.autoencoder import Fit, Source, add_noise, draw
from ldm_sg.verbs import fit_autoencoder as verb
from ldm_sg.verbs.fit_autoencoder import fit_autoencoder

ALEXNET = Path(__file__).parents[2] / "shared/weights/lpips_alex/alexnet_features.safetensors"


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """24 images of 24 px: two-colour gradients."""
    path = tmp_path_factory.mktemp("shards") / "000000.tar"
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 24)[:, None, None]
    with ShardWriter(path) as writer:
        for i in range(24):
            a, b = rng.integers(0, 256, (2, 3))
            pixels = np.broadcast_to(a * ramp + b * (1 - ramp), (24, 24, 3)).astype(np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels if i % 2 else pixels.transpose(1, 0, 2)).save(data, "PNG")
            writer.write(f"{i:03d}", {"png": data.getvalue()})
    return str(path)


@pytest.fixture
def config(shard, tmp_path):
    return FitAutoencoderConfig(
        shards={"a": shard},
        holdout={"a": 4},
        zoom={"a": 1.5},
        out=str(tmp_path / "fit"),
        size=16,
        channels=4,
        widths=[16, 16],
        lpips=0.0,
        noise=0.1,
        steps=30,
        batch_size=8,
        lr=3e-3,
        ema=0.9,
        precision="fp32",
        device="cpu",
        workers=0,
        log_every=5,
        val_every=10,
        checkpoint_every=10,
        data="gradients",
        recipe="tests",
    )


def rows(out):
    with (Path(out) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(out):
    return (Path(out) / "model.safetensors").read_bytes()


def test_fit_learns_and_writes_an_autoencoder(config):
    config = dataclasses.replace(config, steps=120, log_every=20, val_every=120)
    out = fit_autoencoder(config)
    log = rows(out)
    assert [int(r["step"]) for r in log] == list(range(20, 121, 20))
    assert float(log[-1]["l1"]) < 0.5 * float(log[0]["l1"])
    auto = load_autoencoder(out)
    assert (auto.kind, auto.channels, auto.factor, auto.name) == ("kl", 4, 4, "fit")
    assert auto.manifest["psnr"]["a"] > 14 and auto.manifest["psnr_noisy"]["a"] <= auto.manifest["psnr"]["a"] + 0.1
    assert auto.manifest["data"] == "gradients" and auto.manifest["recipe"] == "tests"
    assert Image.open(out / "reconstructions.png").format == "PNG"
    assert (out / "samples/step-000120.png").is_file() and not list(out.rglob("*.tmp-*"))
    before = weights(out)
    assert fit_autoencoder(config) == out and weights(out) == before


@pytest.fixture
def tiny(tmp_path):
    """A bare diffusers folder: TAESD's architecture in small, with random weights."""
    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
    net = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    net.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize("part", ["decoder", "all"])
def test_a_tiny_autoencoder_is_fitted_on(config, tiny, part):
    """By its decoder alone: the encoder stays bit for bit, so latents that were stored keep their meaning."""
    config = dataclasses.replace(config, init=tiny, part=part, half=0, steps=60, log_every=10, gan=0.1, gan_start=0.5)
    auto = load_autoencoder(fit_autoencoder(config))
    assert (auto.kind, auto.channels, auto.factor) == ("tiny", 4, 2) and "patch" not in auto.manifest
    log = rows(config.out)
    assert float(log[-1]["l1"]) < 0.7 * float(log[0]["l1"])
    before, after = load_autoencoder(tiny).codec.net.state_dict(), auto.codec.net.state_dict()
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key].half(), after[key].half())}
    assert moved == ({"decoder"} if part == "decoder" else {"encoder", "decoder"})


def test_a_kl_autoencoder_is_fitted_on_with_its_patch(config):
    first = load_autoencoder(fit_autoencoder(config))
    config = dataclasses.replace(config, init=config.out, part="decoder", out=f"{config.out}-on", widths=[8], steps=5)
    again = load_autoencoder(fit_autoencoder(config))
    assert (again.kind, again.factor, again.manifest["patch"]) == ("kl", 4, 2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(again.encode_raw(images), first.encode_raw(images))
    assert not torch.equal(again.decode(first.encode(images)), first.decode(first.encode(images)))


def test_an_interrupted_fit_resumes_to_the_same_weights(config, tmp_path, monkeypatch):
    """Ctrl-C in the middle of step 14: the step is finished, saved, and the end is the same as without it."""
    whole = fit_autoencoder(dataclasses.replace(config, out=str(tmp_path / "whole")))
    step = Fit.step

    def interrupted(self, *args):
        if self.steps == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Fit, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
        fit_autoencoder(config)
    monkeypatch.undo()
    assert not (Path(config.out) / "manifest.yaml").exists()
    assert torch.load(Path(config.out) / "checkpoint.pt", weights_only=True)["steps"] == 14
    out = fit_autoencoder(config)
    assert weights(out) == weights(whole)
    assert [r["step"] for r in rows(out)] == [r["step"] for r in rows(whole)]


def test_gan_and_lpips_take_part(config):
    if not ALEXNET.is_file():
        pytest.skip("needs ../shared/weights/lpips_alex")
    config = dataclasses.replace(config, gan=0.5, gan_start=0.5, lpips=0.3, lpips_weights=str(ALEXNET), lpips_size=64)
    fit = Fit(dataclasses.replace(config, size=32, steps=4), torch.device("cpu"), bf16=False)
    images = draw([Source("a", torch.randint(0, 256, (8, 3, 32, 32)).byte())], 32, 4, torch.Generator().manual_seed(0))
    names = [set(fit.step(images, torch.Generator().manual_seed(i))) for i in range(4)]
    assert names[0] == {"l1", "kl", "half", "lpips"} and names[3] == names[0] | {"gan", "critic"}
    again = Fit(dataclasses.replace(config, size=32, steps=4), torch.device("cpu"), bf16=False)
    again.load_state_dict(fit.state_dict())
    assert fit.step(images, torch.Generator().manual_seed(9)) == again.step(images, torch.Generator().manual_seed(9))


@pytest.mark.skipif(not ALEXNET.is_file(), reason="needs ../shared/weights/lpips_alex")
def test_lpips_orders_distortions():
    """A blur is perceptually farther than a one-pixel shift of the same picture; itself is at distance 0."""
    distance = training.perceptual_distance(str(ALEXNET))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2)
    assert distance(image, image).item() == 0
    assert distance(image, blurred).item() > 2 * distance(image, 0.95 * image).item() > 0


def test_noise_is_relative_to_the_latents_spread():
    z = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0])[:, None, None]
    noise = add_noise(z, 0.3, torch.Generator().manual_seed(1)) - z
    small, large = (noise.std(dim=(0, 2, 3)) / z.std(dim=(0, 2, 3))).tolist()
    assert small == pytest.approx(0.3 / 3**0.5, rel=0.2) and small == pytest.approx(large, rel=0.1)  # sqrt(E u^2)


def test_batches_depend_on_the_seed_alone_and_crop_what_is_larger():
    sources = [Source("a", torch.full((3, 3, 24, 24), 255).byte()), Source("b", torch.zeros(5, 3, 16, 16).byte())]
    first, again = (draw(sources, 16, 64, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (64, 3, 16, 16) and torch.equal(first, again)
    bright = (first > 0.99).flatten(1).all(dim=1).float().mean().item()
    assert bright == pytest.approx(3 / 8, abs=0.15) and ((first > 0.99) | (first < -0.99)).all()


def test_wrong_input_is_named(config, shard):
    cases = {
        "multiple of 8 a level": {"widths": [12]},
        "factor of 4; give a multiple of 8": {"size": 20},
        r"holdout=\{'b': 1\}: b: no such entry": {"holdout": {"b": 1}},
        r"holdout\.a=24": {"holdout": {"a": 24}},
        "no .tar or .parquet shards": {"shards": {"a": "nowhere/*.tar"}},
        "steps=0": {"steps": 0},
        "part=decoder: all, or with init= decoder": {"part": "decoder"},
        "part=encoder": {"part": "encoder", "init": "patch2"},
        r"init='patch2': only .* kl and tiny": {"init": "patch2"},
        "needs a multiple of 8": {"init": "demo-f8c16", "size": 20},
        "lpips_weights='nowhere'": {"lpips": 1.0, "lpips_weights": "nowhere"},
    }
    for message, change in cases.items():
        with pytest.raises(InputError, match=message):
            fit_autoencoder(dataclasses.replace(config, out=f"{config.out}-{len(message)}", **change))


def test_another_configs_folder_is_refused(config):
    verb.claim(Path(config.out), "config.yaml", verb.to_mapping(config), verb.FREE)
    with pytest.raises(InputError, match="channels"):
        fit_autoencoder(dataclasses.replace(config, channels=8))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/autoencoder").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_builds(path):
    given = [
        "shards.church=a",
        "shards.imagenette=a",
        "shards.clothing=a",
        *(f"val_shards.{name}=a" for name in ("church_val", "clothing_val", "blood_cells", "road_scenes")),
        "lpips_weights=a",
    ]
    config = load(FitAutoencoderConfig, path, {"demo": given, "finetune": ["shards=a"]}.get(path.stem))
    config.check()
    if config.init is None:
        assert sum(p.numel() for p in training.make_net(config).parameters()) * 2 < 12e6
