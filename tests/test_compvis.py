"""First stages of others: checkpoints in CompVis's names against CompVis's own modules, files with code in them, tiles, previews,
and the verb autoencoder."""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SHARED, write_annotation_set
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2
from test_autoencoder import SMALL, manifest, pictures, psnr
from typer.testing import CliRunner

from ldm_sg import build
from ldm_sg.autoencoder import load_autoencoder, load_preview, measure_normalisation, tiled
from ldm_sg.autoencoder.compvis import to_diffusers
from ldm_sg.autoencoder.manifest import LEAST, blurred
from ldm_sg.cli import app
from ldm_sg.config import AnnotateConfig, AnnotatorConfig, TrainConfig
from ldm_sg.data.images import to_float, to_tensor
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.pack import ShardWriter
from ldm_sg.errors import InputError
from ldm_sg.folder import file_sha256
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.autoencoder import import_checkpoint, measure
from ldm_sg.weights import read_weights

KL = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2],
      "num_res_blocks": 2, "attn_resolutions": []}  # fmt: skip
VQ = {**KL, "double_z": False, "num_res_blocks": 1, "ch_mult": [1, 2]}
CASES = {
    "kl": ({}, True),
    "kl with attention in its levels": ({"attn_resolutions": [16, 8], "num_res_blocks": 1, "resolution": 32}, True),
    "kl without quant convs": ({"z_channels": 16, "ch_mult": [1, 2]}, False),
}


class Lightning(torch.nn.Module):
    """What stands in for ModelCheckpoint and the like: its class is not to be had when the file is read."""


def reference(ddconfig: dict, quant: bool = True, codes: int = 0) -> torch.nn.ModuleDict:
    """CompVis's own encoder and decoder with random weights, wired as its AutoencoderKL and VQModel wire them."""
    torch.manual_seed(0)
    z, wide = ddconfig["z_channels"], ddconfig["z_channels"] * (1 + ddconfig["double_z"])
    with contextlib.redirect_stdout(io.StringIO()):
        parts = {"encoder": Encoder(**ddconfig), "decoder": Decoder(**ddconfig)}
    if quant:
        parts |= {"quant_conv": torch.nn.Conv2d(wide, wide, 1), "post_quant_conv": torch.nn.Conv2d(z, z, 1)}
    if codes:
        parts["quantize"] = VectorQuantizer2(codes, z, beta=0.25)
    net = torch.nn.ModuleDict(parts).eval().requires_grad_(False)
    for value in net.parameters():
        if value.ndim == 1:  # norms that are 1 and biases that are 0 would hide a wrong name
            value.add_(0.1 * torch.randn(value.shape))
    return net


def encoded(net: torch.nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
    h = net["encoder"](images)
    return net["quant_conv"](h) if "quant_conv" in net else h


def decoded(net: torch.nn.ModuleDict, z: torch.Tensor) -> torch.Tensor:
    return net["decoder"](net["post_quant_conv"](z) if "post_quant_conv" in net else z)


def write_yaml(path: Path, ddconfig: dict, around: bool = False, **more: int) -> Path:
    params = {"embed_dim": ddconfig["z_channels"], "ddconfig": ddconfig, "lossconfig": {"target": "x"}, **more}
    if around:
        params = {"first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}}
    path.write_text(yaml.safe_dump({"model": {"base_learning_rate": 1e-6, "target": "x", "params": params}}))
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["autoencoder", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["bare", "inside a model", "with a yaml"])
def test_kl_is_compvis_own(tmp_path: Path, case: str, form: str) -> None:
    change, quant = CASES[case]
    net, config = reference({**KL, **change}, quant), None
    state = dict(net.state_dict())
    if form == "bare":
        save_file(state, file := tmp_path / "my.safetensors")
    elif form == "inside a model":
        state = {f"first_stage_model.{name}": value for name, value in state.items()}
        state |= {"model.diffusion_model.out.2.bias": torch.ones(4), "cond_stage_model.x": torch.ones(1)}
        callbacks = {Lightning: {"best_model_score": Lightning(), "dirpath": Path("a")}}
        torch.save({"state_dict": state, "epoch": 3, "callbacks": callbacks}, file := tmp_path / "my.ckpt")
    else:
        torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}}, file := tmp_path / "my.ckpt")
        config = write_yaml(tmp_path / "my.yaml", {**KL, **change, "dropout": 0.0}, around=case == "kl")
    auto = load_autoencoder(import_checkpoint(file, config, tmp_path / "out"))
    images = pictures()
    moments = encoded(net, images)
    mean = moments[:, : moments.shape[1] // 2]
    assert (auto.kind, auto.channels, auto.factor) == ("kl", mean.shape[1], images.shape[-1] // mean.shape[-1])
    torch.testing.assert_close(auto.encode_raw(images), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(auto.codec.decode(mean), decoded(net, mean), atol=1e-5, rtol=1e-5)
    assert auto.manifest["sha256"] == file_sha256(tmp_path / "out/model.safetensors")
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("config", [False, True])
def test_vq_is_compvis_own(tmp_path: Path, config: bool, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    ddconfig = {**VQ, "attn_resolutions": [16]}
    net = reference(ddconfig, codes=16)
    Path("vq-f2").mkdir()
    torch.save({"state_dict": net.state_dict(), "callbacks": {Lightning: {}}}, "vq-f2/model.ckpt")
    options = ["--config", write_yaml(Path("vq.yaml"), ddconfig, n_embed=16)] if config else []
    code, output = run("import", "vq-f2/model.ckpt", *options)
    assert code == 0 and "kind vq, 4 channels, factor 2" in output and "ch_mult [1, 2]" in output
    assert ("resolution assumed" in output) != config
    auto, images = load_autoencoder("autoencoders/vq-f2"), pictures()
    assert torch.equal(auto.encode_raw(images), encoded(net, images))
    codes = net["quantize"](encoded(net, images))[0]
    assert torch.equal(auto.decode_raw(auto.encode_raw(images)), decoded(net, codes).clamp(-1, 1))
    assert run("import", "vq-f2/model.ckpt")[0] == 2  # it is there already


class Payload:
    def __init__(self, call, *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def test_planted_code_stays_inert(tmp_path: Path) -> None:
    """Whatever a checkpoint names beside its tensors is replaced, and nothing is called; `os` is refused outright."""
    touch = f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).touch()"
    file, tensors = tmp_path / "w.ckpt", {"encoder.x": torch.arange(3.0), "odd": Payload(exec, touch)}
    planted = [
        Payload(subprocess.call, ["touch", str(tmp_path / "ran")]),
        Payload(eval, f"exec({touch!r})"),
        Lightning(),
    ]
    torch.save({"state_dict": tensors, "callbacks": planted, "optimizer_states": [{"a": 1}]}, file)
    with pytest.raises(InputError, match="files with code are refused"):
        read_weights(file)
    found = read_weights(file, inert=True)
    assert list(found) == ["encoder.x"] and torch.equal(found["encoder.x"], torch.arange(3.0))
    torch.save({"state_dict": tensors, "callbacks": Payload(os.system, f"touch {tmp_path / 'ran'}")}, file)
    with pytest.raises(InputError, match=r"posix"):
        read_weights(file, inert=True)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="files with code"):  # and none of it is allowed from now on
        torch.save({"state_dict": {"odd": Payload(exec, touch)}}, file)
        read_weights(file)


def test_wrong_checkpoints_are_named_in_one_line_and_leave_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = dict(reference(KL).state_dict())
    save_file(state, "kl.safetensors")
    save_file({k: v for k, v in state.items() if k != "decoder.conv_in.weight"}, "half.safetensors")
    save_file({k: v for k, v in state.items() if k != "decoder.mid.block_1.norm1.weight"}, "hole.safetensors")
    save_file({"a": torch.ones(1)}, "other.safetensors")
    save_file({**state, "decoder.conv_out.bias": torch.tensor([0, torch.inf, 0])}, "inf.safetensors")
    Path("text.ckpt").write_text("hello")
    write_yaml(Path("z.yaml"), {**KL, "z_channels": 8})
    write_yaml(Path("vq.yaml"), VQ, n_embed=16)
    write_yaml(Path("odd.yaml"), {**KL, "ch_mult": "many", "attn_resolutions": 3})
    Path("flat.yaml").write_text("model: {params: {a: 1}}")
    cases = {
        "z_channels is 8 there, but 4 in kl.safetensors": ["kl.safetensors", "--config", "z.yaml"],
        "ch_mult is [1, 2] there, but [1, 2, 2]": ["kl.safetensors", "--config", "vq.yaml"],
        "odd.yaml: ddconfig.ch_mult is 'many'": ["kl.safetensors", "--config", "odd.yaml"],
        "flat.yaml: no ddconfig": ["kl.safetensors", "--config", "flat.yaml"],
        "half.safetensors: no tensor decoder.conv_in.weight": ["half.safetensors"],
        "hole.safetensors: the weights do not fit": ["hole.safetensors"],
        "inf.safetensors: decoder.conv_out.bias holds NaN or infinity": ["inf.safetensors"],
        "other.safetensors: no tensor encoder.conv_in.weight": ["other.safetensors"],
        "text.ckpt: not a safetensors file": ["text.ckpt"],
        "nowhere.ckpt: no such file": ["nowhere.ckpt"],
    }
    for message, arguments in cases.items():
        code, output = run("import", *arguments)
        assert code == 2 and message in output and output.count("\n") == 1, output
    assert not Path("autoencoders").is_dir() or not list(Path("autoencoders").iterdir())
    with pytest.raises(InputError, match=r"ldm-sg autoencoder import kl\.safetensors"):
        load_autoencoder("kl.safetensors")


def test_the_attention_names_of_older_diffusers_are_read(tmp_path: Path) -> None:
    """The weights of sd-vae-ft-mse on the hub still have them."""
    torch.manual_seed(0)
    AutoencoderKL(**SMALL, latent_channels=3).save_pretrained(tmp_path / "net")
    path, images = tmp_path / "net/diffusion_pytorch_model.safetensors", pictures()
    expected, state = load_autoencoder(tmp_path / "net").encode_raw(images), load_file(path)
    assert to_diffusers(state).keys() == state.keys()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    save_file(state, path)
    assert torch.equal(load_autoencoder(tmp_path / "net").encode_raw(images), expected)


def test_a_pickle_that_swells_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N" * (65 * 2**20))
        archive.writestr("archive/version", "3")
    assert path.stat().st_size < 2**20
    with pytest.raises(InputError, match="65 MiB"):
        read_weights(path, inert=True)


def test_tiles_are_nearly_the_whole() -> None:
    """The shipped autoencoder in 128 px tiles that overlap by 32: its own error is larger than what tiling adds."""
    auto = load_autoencoder("demo-f8c16")
    images = torch.nn.functional.interpolate(pictures(1, 64), (136, 232), mode="bicubic").clamp(-1, 1)
    whole = auto.encode_raw(images)
    back = auto.decode_raw(whole)
    auto.tile, seen = 128, []
    encode = auto.codec.encode
    auto.codec.encode = lambda x: (seen.append(tuple(x.shape)), encode(x))[1]
    z = auto.encode_raw(images)
    assert set(seen) == {(1, 3, 128, 128)} and len(seen) == 2 * 3
    assert (z - whole).abs().mean() < 0.05 * whole.std() and z.shape == whole.shape
    assert psnr(auto.decode_raw(whole), back) > 40 and psnr(auto.decode_raw(z), back) > psnr(back, images)


def test_tiling_is_exact_where_nothing_looks_beyond_a_pixel(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled(lambda part: part * 2, x, 16, 1), x * 2)
    down = tiled(lambda part: torch.nn.functional.pixel_unshuffle(part, 2), x[:, :, :36], 16, 0.5)
    torch.testing.assert_close(down, torch.nn.functional.pixel_unshuffle(x[:, :, :36], 2))
    AutoencoderKL(**SMALL, in_channels=12, out_channels=12, latent_channels=4).save_pretrained(tmp_path / "net")
    source = {"kind": "kl", "source": {"folder": str(tmp_path / "net")}, "patch": 2}
    auto = load_autoencoder(manifest(tmp_path / "m", **source, tile=35))
    assert auto.tile == 32 and auto.encode_raw(pictures(2, 64)).shape == (2, 4, 16, 16)
    assert auto.decode_raw(torch.zeros(1, 4, 16, 16)).shape == (1, 3, 64, 64)
    for wrong in (8, "large"):
        with pytest.raises(InputError, match=f"tile: {wrong}; a whole number from 16"):
            load_autoencoder(manifest(tmp_path / "n", **source, tile=wrong))


def test_a_batch_passes_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, images = load_autoencoder("demo-f8c16"), pictures(5)
    z = auto.encode_raw(images)
    monkeypatch.setattr("ldm_sg.autoencoder.PIXELS", 2 * 32 * 32)
    seen: list[int] = []
    decode = auto.codec.decode
    auto.codec.decode = lambda x: (seen.append(len(x)), decode(x))[1]
    torch.testing.assert_close(auto.encode_raw(images), z, atol=1e-5, rtol=0)
    assert auto.decode_raw(z).shape == images.shape and seen == [2, 2, 1]


def previewed(folder: Path, latents: int = 4) -> Path:
    """A KL autoencoder of factor 2 whose preview is a small one, with a scale and a shift as SD3's."""
    torch.manual_seed(0)
    AutoencoderKL(**SMALL, latent_channels=4, scaling_factor=1.5, shift_factor=0.1).save_pretrained(folder / "net")
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": latents}
    AutoencoderTiny(**small, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder / "small")
    source = {"kind": "kl", "source": {"folder": str(folder / "net")}}
    return manifest(folder / "auto", **source, preview=str(folder / "small"))


def test_a_preview_decodes_the_same_normalised_latents(tmp_path: Path, capsys) -> None:
    auto, images = load_autoencoder(previewed(tmp_path)), pictures()
    measure_normalisation(auto, [images])
    small, raw = load_preview(auto), auto.encode_raw(images)
    expected = AutoencoderTiny.from_pretrained(tmp_path / "small").decode((raw - 0.1) * 1.5).sample.clamp(-1, 1)
    torch.testing.assert_close(small.decode(auto.encode(images)), expected, atol=1e-5, rtol=0)
    plain, other = load_autoencoder("demo-f8c16"), load_autoencoder(previewed(tmp_path / "b", latents=8))
    other.normalise([0.0] * 4, [1.0] * 4)
    assert load_preview(plain) is plain and load_preview(other) is other
    assert "decoded by auto itself: autoencoder 'small': latent_mean" in capsys.readouterr().err


def test_grids_of_a_run_take_the_preview_and_samples_the_real_one(tmp_path: Path, capsys) -> None:
    images = pictures(8)
    folder = write_annotation_set(tmp_path / "set", images, [0, 1] * 4, 2)
    auto = load_autoencoder(previewed(tmp_path))
    measure_normalisation(auto, [images])
    auto.save(folder / "autoencoder")
    latents = LatentSet(folder)
    config = TrainConfig(annotation=str(folder))
    with pytest.raises(InputError, match=r"'auto' makes latents of 4 channels, those of .*set have 12"):
        build.PipelineWriter(config, latents, torch.device("cpu"))
    latents.latent_shape = (4, 16, 16)
    latents.shapes = [latents.latent_shape]
    writer = build.PipelineWriter(config, latents, torch.device("cpu"))
    assert writer.preview.kind == "tiny" and writer.autoencoder.kind == "kl"
    unet = {"channels": 16, "multipliers": [1], "blocks": 1, "attention": [], "heads": 2}
    net = build.network(dataclasses.replace(config, model=unet), latents)
    assert writer.pipeline(net).autoencoder is writer.autoencoder
    assert writer.pipeline(net, preview=True).autoencoder is writer.preview
    with pytest.raises(InputError, match="'patch2' makes latents of 12 channels"):
        build.SelfGuidedPipeline(
            net.unet, net.conditioner, writer.scheduler, load_autoencoder("patch2"), latents.signals
        )
    writer = build.PipelineWriter(config, latents, torch.device("cpu"))
    writer.autoencoder.manifest["preview"] = "taesd"  # on the hub, which no test reaches
    assert (
        writer.preview is writer.autoencoder and "note: pictures are decoded by auto itself" in capsys.readouterr().err
    )


def photos(folder: Path, size: int = 32, n: int = 12) -> Path:
    folder.mkdir()
    for i, image in enumerate(pictures(n, size, seed=3)):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def test_measure_says_what_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = photos(tmp_path / "photos")
    code, output = run("measure", "demo-f8c16", "--data", folder, "--picture", "p.png", "--batch-size", 5)
    assert code == 0 and "lpips not measured" in output and "rfid  not measured" in output, output
    found = json.loads(Path("demo-f8c16-measured.json").read_text())
    real = to_float(torch.stack([to_tensor(Image.open(path)) for path in sorted(folder.iterdir())]))
    auto = load_autoencoder("demo-f8c16")
    with torch.no_grad():
        z = auto.encode_raw(real)
        assert found["metrics"]["psnr"] == pytest.approx(psnr(auto.decode_raw(z), real), abs=1e-3)
    assert found["latent_mean"] == pytest.approx(z.mean((0, 2, 3)).tolist(), abs=1e-4)
    assert found["latent_std"] == pytest.approx(z.std((0, 2, 3), correction=0).tolist(), abs=1e-4)
    assert found["images"] == 12 and 0 < found["metrics"]["ssim"] < 1 and f"{found['metrics']['psnr']} dB" in output
    picture = Image.open("p.png")
    assert picture.height == 2 * 32 + 6 and picture.width > 8 * 32
    exact = measure("patch2", str(folder), n=4, out=tmp_path / "b.json")
    assert exact["metrics"] == {"psnr": 100.0, "ssim": 1.0} and exact["images"] == 4
    assert run("measure", "demo-f8c16", "--data", folder, "--size", 20)[0] == 2
    own, other = Path("p.png").read_bytes(), Path("mine.json")
    other.write_text('{"precious": 1}')
    save_file({"features.0.weight": torch.ones(3), "features.0.bias": torch.ones(3)}, "lpips.safetensors")
    for flags, message in (
        (("--size", 8), "size=8: from 16 to 8,192"),
        (("--size", 0), "size=0: from 16"),
        (("--size", 100_000), "size=100000: from 16"),
        (("--batch-size", -3), "batch_size=-3: at least"),
        (("--inception", "nowhere.pth"), "no such file"),
        (("--lpips", other), "mine.json: not a safetensors file"),
        (("--lpips", "lpips.safetensors"), "lpips_weights=lpips.safetensors: not those of AlexNet's features"),
        (("--out", other, "--overwrite"), "mine.json' holds no figures"),
        (("--size", 16), "holds figures of demo-f8c16, .* at 32 px: choose another, or add --overwrite"),
        (("--picture", other), "--picture 'mine.json' is there, and not of the figures in demo-f8c16-measured.json"),
        (("--picture", "p.png", "--out", "new.json"), "--picture 'p.png' is there"),
    ):
        code, output = run("measure", "demo-f8c16", "--data", folder, *flags)
        assert code == 2 and output.count("\n") == 1 and re.search(message, output), output
    assert (
        other.read_text() == '{"precious": 1}' and Path("p.png").read_bytes() == own and not Path("new.json").exists()
    )
    again = ("measure", "demo-f8c16", "--data", folder, "--picture", "p.png")
    assert run(*again)[0] == run(*again, "--size", 16, "--overwrite")[0] == 0  # its own
    assert json.loads(Path("demo-f8c16-measured.json").read_text())["size"] == 16


@pytest.mark.skipif(not (SHARED / "weights/lpips_alex").is_dir(), reason="needs ../shared/weights")
def test_measure_with_all_judges(tmp_path: Path) -> None:
    weights = {"lpips": "lpips_alex/alexnet_features.safetensors", "inception": "inception_fid/model.safetensors"}
    given = {name: str(SHARED / "weights" / file) for name, file in weights.items()}
    folder = photos(tmp_path / "photos", 32, 2)
    found = measure("demo-f8c16", str(folder), out=tmp_path / "a.json", **given)["metrics"]
    assert list(found) == ["psnr", "ssim", "lpips", "rfid"] and found["lpips"] > 1e-3 and found["rfid"] > 1


@pytest.mark.parametrize("damage", ["kind: [", "kind: kl\nsource: {file: 3}", "knd: kl"])
def test_list_shows_every_manifest(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("autoencoders/broken").mkdir(parents=True)
    Path("autoencoders/broken/manifest.yaml").write_text(damage)
    code, output = run("list")
    assert re.search("\nbroken .*manifest.yaml.*(damaged|source|kind)", output), output
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert code == 0 and "f8 c16" in lines["demo-f8c16"] and lines["demo-f8c16"].endswith("here")
    assert "hub REPA-E/e2e-sdvae-hf" in lines["e2e-sdvae"] and "yours to bring" in lines["vq-f4"]
    assert {"sd3-vae", "flux-vae", "sdxl-vae", "taesdxl", "taef1"} <= lines.keys()


def test_annotate_measures_the_round_trip_and_warns(tmp_path: Path, capsys) -> None:
    """Noise that no autoencoder holds: below 24 dB, said at once and in the report; pixels lose nothing and say nothing."""
    with ShardWriter(tmp_path / "000000.tar") as writer:
        for i, image in enumerate(torch.randint(256, (20, 32, 32, 3), generator=torch.Generator().manual_seed(0))):
            Image.fromarray(image.byte().numpy()).save(out := io.BytesIO(), "PNG")
            writer.write(f"{i:03d}", {"png": out.getvalue()})
    config = AnnotateConfig(str(tmp_path / "*.tar"), str(tmp_path / "set"), "demo-f8c16", workers=0, device="cpu")
    config.annotator = AnnotatorConfig(kind="random", k=2)
    annotate(config)
    said, first = capsys.readouterr().err, yaml.safe_load((tmp_path / "set/manifest.yaml").read_text())["autoencoder"]
    report = (tmp_path / "set/report.html").read_text()
    assert 5 < first["round_trip"] < LEAST and f"{first['round_trip']:.1f} dB" in report
    for text in (said, report):
        assert f"at {first['round_trip']} dB" in text and "configs/autoencoder/finetune.yaml" in text
    assert blurred({"name": "x", "round_trip": 24.0}) == blurred({"name": "x"}) == ""
    annotate(dataclasses.replace(config, autoencoder="patch2", out=str(tmp_path / "pixels")))
    assert yaml.safe_load((tmp_path / "pixels/manifest.yaml").read_text())["autoencoder"]["round_trip"] is None
    assert "note: The autoencoder" not in capsys.readouterr().err


def test_hub_names_are_asked_for_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"'hub://some/thing/vae' cannot be had: no network.*autoencoder=PATH"):
        load_autoencoder("hub://some/thing/vae")
    folder = tmp_path / "models--some--thing"
    torch.manual_seed(0)
    AutoencoderKL(**SMALL, latent_channels=3).save_pretrained(folder / "snapshots" / ("a" * 40) / "vae")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    auto = load_autoencoder("hub://some/thing/vae")
    assert (auto.name, auto.kind, auto.channels) == ("some-thing-vae", "kl", 3)
    auto.normalise([0.0] * 3, [1.0] * 3)
    monkeypatch.setattr("ldm_sg.autoencoder.SMALL", 0)
    auto.save(tmp_path / "kept")
    assert torch.equal(load_autoencoder(tmp_path / "kept").encode(pictures()), auto.encode(pictures()))
