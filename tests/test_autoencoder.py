"""First stages: round trips, goldens against taming and diffusers, manifests, wrong input."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file

from ldm_sg.autoencoder import load_autoencoder, measure_normalisation
from ldm_sg.autoencoder.kinds import KINDS
from ldm_sg.autoencoder.manifest import DIFFUSERS_KINDS, read
from ldm_sg.configfile import ASSETS, ROOT
from ldm_sg.data.images import crop_resize, decode, to_float, to_tensor
from ldm_sg.data.shards import expand, image_batches
from ldm_sg.errors import InputError
from ldm_sg.folder import file_sha256

SHARED = Path(__file__).parents[2] / "shared"
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SMALL = {**BLOCKS, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
TAMING = {
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
}


def pictures(n=4, size=32, seed=0):
    """Smooth random images [n, 3, size, size] in [-1, 1]."""
    noise = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(-1, 1)


def psnr(a, b):
    return (-10 * torch.log10(((a - b) / 2).square().mean(dim=(1, 2, 3)))).mean().item()


def manifest(folder, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.yaml").write_text(yaml.safe_dump(keys))
    return folder


def taming_modules():
    """taming's own encoder, quantiser and decoder, wired as its VQModel wires them."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import VectorQuantizer2

    torch.manual_seed(0)
    parts = {
        "encoder": Encoder(**TAMING, attn_resolutions=[], double_z=False),
        "decoder": Decoder(**TAMING, attn_resolutions=[]),
        "quantize": VectorQuantizer2(32, 3, beta=0.25),
        "quant_conv": torch.nn.Conv2d(4, 3, 1),
        "post_quant_conv": torch.nn.Conv2d(3, 4, 1),
    }
    return torch.nn.ModuleDict(parts).eval().requires_grad_(False)


def kl_folder(folder):
    torch.manual_seed(0)
    AutoencoderKL(**SMALL, latent_channels=3, mid_block_add_attention=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_patch_is_an_exact_inverse(factor):
    auto = load_autoencoder(f"patch{factor}")
    images = pictures(size=16)
    raw = auto.encode_raw(images)
    assert raw.shape == (4, 3 * factor**2, 16 // factor, 16 // factor)
    assert torch.equal(auto.codec.decode(raw), images)
    measure_normalisation(auto, [images[:2], images[2:]])
    torch.testing.assert_close(auto.decode(auto.encode(images)), images, atol=1e-6, rtol=0)


def test_latents_have_zero_mean_and_unit_std():
    auto = load_autoencoder("patch2")
    images = pictures(8)
    measure_normalisation(auto, images.split(3))
    z = auto.encode(images)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=(0, 2, 3), correction=0), torch.ones(12), atol=1e-4, rtol=0)


def test_unmeasured_normalisation_is_refused():
    with pytest.raises(InputError, match="measure_normalisation"):
        load_autoencoder("patch2").encode(pictures())
    with pytest.raises(InputError, match="no images"):
        measure_normalisation(load_autoencoder("patch2"), [])


@pytest.mark.parametrize("cls", [AutoencoderKL, AutoencoderTiny, VQModel])
def test_bare_diffusers_folder_is_diffusers_own_result(tmp_path, cls):
    """The golden: encode and decode equal diffusers' (posterior mean), up to our normalisation."""
    torch.manual_seed(0)
    tiny = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny.update(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    net = cls(**(tiny if cls is AutoencoderTiny else SMALL), latent_channels=3).eval().requires_grad_(False)
    net.save_pretrained(tmp_path / "net")
    auto = load_autoencoder(tmp_path / "net")
    images = pictures()
    encoded = net.encode(images)
    expected = encoded.latent_dist.mean if cls is AutoencoderKL else encoded.latents
    assert (auto.kind, auto.channels, auto.factor) == (DIFFUSERS_KINDS[cls.__name__], 3, 2)
    assert torch.equal(auto.encode_raw(images), expected)
    measure_normalisation(auto, [images])
    torch.testing.assert_close(
        auto.decode(auto.encode(images)), net.decode(expected).sample.clamp(-1, 1), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("checkpoint", ["safetensors", "lightning"])
def test_vq_equals_tamings_modules(tmp_path, checkpoint):
    parts = taming_modules()
    state = dict(parts.state_dict())
    if checkpoint == "safetensors":
        save_file(state, tmp_path / "w.safetensors")
    else:  # as taming's and LDM's checkpoints are: nested, with the loss's own weights among the rest
        torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}, "epoch": 3}, tmp_path / "w.ckpt")
    name = "w.safetensors" if checkpoint == "safetensors" else "w.ckpt"
    net = {**TAMING, "double_z": False, "n_embed": 32, "embed_dim": 3}
    auto = load_autoencoder(manifest(tmp_path / "vq", kind="vq", source={"file": f"../{name}"}, net=net))
    images = pictures()
    h = parts["quant_conv"](parts["encoder"](images))
    assert torch.equal(auto.encode_raw(images), h)
    quantised = parts["decoder"](parts["post_quant_conv"](parts["quantize"](h)[0])).clamp(-1, 1)
    measure_normalisation(auto, [images])
    torch.testing.assert_close(auto.decode(auto.encode(images)), quantised, atol=1e-4, rtol=0)
    assert (auto.channels, auto.factor) == (3, 2)


def test_kl_with_patch_multiplies_the_factor(tmp_path):
    net = AutoencoderKL(**SMALL, in_channels=12, out_channels=12, latent_channels=4)
    net.save_pretrained(tmp_path / "net")
    auto = load_autoencoder(manifest(tmp_path / "m", kind="kl", source={"folder": str(tmp_path / "net")}, patch=2))
    assert auto.factor == 4
    z = auto.encode_raw(pictures())
    assert z.shape == (4, 4, 8, 8) and auto.codec.decode(z).shape == (4, 3, 32, 32)


def test_save_and_load_give_the_same_autoencoder(tmp_path):
    auto = load_autoencoder(kl_folder(tmp_path / "net"))
    images = pictures()
    measure_normalisation(auto, [images])
    auto.save(tmp_path / "saved")
    again = load_autoencoder(tmp_path / "saved")
    assert torch.equal(again.encode(images), auto.encode(images))
    assert torch.equal(again.decode(auto.encode(images)), auto.decode(auto.encode(images)))
    assert again.name == auto.name and again.manifest["sha256"] == file_sha256(tmp_path / "saved" / "model.safetensors")
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice/manifest.yaml").read_text() == (tmp_path / "saved/manifest.yaml").read_text()
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_float16_weights_are_saved_as_float16(tmp_path):
    kl_folder(tmp_path / "net")
    path = tmp_path / "net/diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path)
    auto = load_autoencoder(tmp_path / "net")
    assert auto.encode_raw(pictures()).dtype == torch.float32
    measure_normalisation(auto, [pictures()])
    auto.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in load_file(path).items())


def test_large_weights_are_referred_to(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_sg.autoencoder.SMALL", 100)
    auto = load_autoencoder(kl_folder(tmp_path / "net"))
    measure_normalisation(auto, [pictures()])
    auto.save(tmp_path / "saved")
    assert [p.name for p in (tmp_path / "saved").iterdir()] == ["manifest.yaml"]
    assert torch.equal(load_autoencoder(tmp_path / "saved").encode(pictures()), auto.encode(pictures()))


def test_changed_weights_are_refused(tmp_path):
    auto = load_autoencoder(kl_folder(tmp_path / "net"))
    measure_normalisation(auto, [pictures()])
    auto.save(tmp_path / "saved")
    path = tmp_path / "saved/model.safetensors"
    save_file({k: v + 1 for k, v in load_file(path).items()}, path)
    with pytest.raises(InputError, match="sha256"):
        load_autoencoder(tmp_path / "saved")


def test_pickled_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {"encoder": Evil()}}, tmp_path / "w.ckpt")
    net = {**TAMING, "n_embed": 32, "embed_dim": 3}
    folder = manifest(tmp_path, kind="vq", source={"file": "w.ckpt"}, net=net)
    with pytest.raises(InputError, match=r"w\.ckpt.*safetensors"):
        load_autoencoder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "patch"}, "does not say factor: image side / latent side"),
        ({"kind": "patch", "factor": "4"}, "factor: int is expected, not '4'"),
        ({"kind": "patch", "factor": 0}, "factor=0: at least 1"),
        ({"kind": "patch", "factor": 1, "latent_mean": 0.5}, "latent_mean: a list is expected, not 0.5"),
        ({"kind": "tiny"}, "does not say source: {hub: ID"),
        ({"kind": "tiny", "source": "weights.safetensors"}, "does not say source: {hub: ID"),
        ({"kind": "vq", "source": {"file": "weights.safetensors"}}, "does not say net: the network's own"),
    ],
)
def test_wrong_manifests_are_named(tmp_path, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_autoencoder(manifest(tmp_path / "m", **keys))


def test_wrong_input_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="did you mean 'taesd3'"):
        load_autoencoder("teasd3")
    with pytest.raises(InputError, match=r"no manifest\.yaml"):
        load_autoencoder(tmp_path)
    with pytest.raises(InputError, match="no kind in it"):
        load_autoencoder(manifest(tmp_path / "a", knid="kl"))
    with pytest.raises(InputError, match=r"kind 'klx'.*'kl'"):
        load_autoencoder(manifest(tmp_path / "b", kind="klx", source="none"))
    with pytest.raises(InputError, match="unknown key 'chanels'; did you mean 'channels'"):
        load_autoencoder(manifest(tmp_path / "c", kind="patch", chanels=3))
    with pytest.raises(InputError, match="manifest says channels: 5, its network has 3"):
        load_autoencoder(manifest(tmp_path / "d", kind="patch", factor=1, channels=5))
    with pytest.raises(InputError, match=r"model\.safetensors not found.*vq-f4\.zip"):
        load_autoencoder("vq-f4")
    with pytest.raises(InputError, match="divisible by 4, not 18 x 16"):
        load_autoencoder("patch4").encode_raw(torch.zeros(1, 3, 18, 16))
    with pytest.raises(InputError, match="do not fit the network"):
        kl_folder(tmp_path / "net")
        config = (tmp_path / "net/config.json").read_text().replace('"latent_channels": 3', '"latent_channels": 4')
        (tmp_path / "net/config.json").write_text(config)
        load_autoencoder(tmp_path / "net")


def test_hub_without_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"'madebyollin/taesd'.*autoencoder=PATH"):
        load_autoencoder("taesd")


@pytest.mark.parametrize("path", sorted((ROOT / "autoencoders").glob("*/manifest.yaml")), ids=lambda p: p.parent.name)
def test_every_manifest_is_complete(path):
    known = read(path)
    assert known["kind"] in KINDS and known["channels"] > 0 and known["factor"] > 0 and "note" in known
    assert known["kind"] == "patch" or known["licence"]
    if known["source"] == "none" or ("file" in known["source"] and (path.parent / known["source"]["file"]).is_file()):
        auto = load_autoencoder(path.parent.name)
        assert (auto.channels, auto.factor) == (known["channels"], known["factor"])


@pytest.fixture(scope="module")
def fruit():
    """The last 100 embedded fruit images, which no shipped autoencoder was trained on."""
    shard = expand(str(ASSETS / "fruit64/*.tar"))[-1:]
    return torch.cat([batch.images for batch in image_batches(shard, 64, 256, 0, print)])[-100:]


def test_shipped_autoencoder_reconstructs_held_out_fruit(fruit):
    auto = load_autoencoder("demo-f8c16")
    assert (ROOT / "autoencoders/demo-f8c16/model.safetensors").stat().st_size <= 12e6
    images = to_float(fruit)
    z = auto.encode(images)
    assert z.shape == (100, auto.channels, 8, 8)
    decoded = psnr(auto.decode(z), images)
    assert decoded == pytest.approx(auto.manifest["psnr"]["fruit"], abs=0.05) and decoded > 25
    assert min(auto.manifest["psnr"].values()) > 24
    assert z.mean().abs() < 0.2 and 0.8 < z.std() < 1.2
    torch.testing.assert_close(auto.encode(images[:3]), z[:3], atol=1e-4, rtol=1e-4)  # no matter the batch


@pytest.mark.skipif(not (SHARED / "weights/taesd").is_dir(), reason="needs ../shared/weights/taesd")
def test_taesd_reconstructs_photos():
    files = sorted((SHARED / "data/imagenette10_224/val").rglob("*.*"))[::80][:4]
    images = to_float(torch.stack([to_tensor(crop_resize(decode(f.read_bytes(), f.name), 224)) for f in files]))
    auto = load_autoencoder(SHARED / "weights/taesd")
    measure_normalisation(auto, [images])
    assert psnr(auto.decode(auto.encode(images)), images) > 22
