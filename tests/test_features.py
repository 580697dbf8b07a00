"""g: blocks, pooling, sizes, weights, shipped extractors and what is refused."""

import io
import json
import math
import os
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from ldm_sg.annotate.distill import distill, make_student, partly_whitened, train_student
from ldm_sg.annotate.features import EXTRACTORS, load_extractor, read_weights
from ldm_sg.config import DistillConfig, FeaturesConfig
from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError

VIT, CONV = "test_vit", "test_resnet"  # timm's own tiny models


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the tiny models, as float16 safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    for name in (VIT, CONV):
        torch.manual_seed(0)
        state = timm.create_model(name, num_classes=0).state_dict()
        half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        save_file(half, folder / f"{name}.safetensors")
    return folder


def config(folder, name, **changes):
    return FeaturesConfig(
        **{"model": name, "weights": str(folder / f"{name}.safetensors"), "precision": "fp32", **changes}
    )


def images(n=3, size=64):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def reference(folder, name, size):
    model = timm.create_model(name, num_classes=0, **({"img_size": size} if name == VIT else {}))
    state = read_weights(folder / f"{name}.safetensors")
    if name == VIT:
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, model)
    model.load_state_dict(state)
    return model.eval()


def prepared(model, batch, size):
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    resized = F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return (resized / 2 + 0.5 - mean) / std


@pytest.mark.parametrize("name", [VIT, CONV])
def test_default_features_are_timms_pooled_ones(weights, name):
    g, model = load_extractor(config(weights, name, size=96)), reference(weights, name, 96)
    with torch.no_grad():
        expected = model(prepared(model, images(), 96))
    found = g(images())
    assert found.dtype == torch.float32 and found.shape == (3, g.dim)
    assert torch.allclose(found, expected, atol=1e-4)
    assert g.manifest["size"] == 96 and g.manifest["dim"] == g.dim


def test_a_block_is_read_with_the_final_norm(weights):
    model = reference(weights, VIT, 64)
    x = prepared(model, images(), 64)
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks[:3]:
            tokens = block(tokens)
        tokens = model.norm(tokens)
    prefix = model.num_prefix_tokens
    cls = load_extractor(config(weights, VIT, size=64, layer=2))(images())
    mean = load_extractor(config(weights, VIT, size=64, layer=2, pool="mean"))(images())
    assert torch.allclose(cls, tokens[:, 0], atol=1e-4)
    assert torch.allclose(mean, tokens[:, prefix:].mean(1), atol=1e-4)


def test_last_block_by_number_equals_the_default(weights):
    depth = len(timm.create_model(VIT).blocks)
    by_default = load_extractor(config(weights, VIT, size=64))(images())
    for layer in (depth - 1, -1):
        assert torch.allclose(
            load_extractor(config(weights, VIT, size=64, layer=layer))(images()), by_default, atol=1e-4
        )


@pytest.mark.parametrize("name", [VIT, CONV])
def test_patches_are_a_grid_and_average_to_the_mean_pool(weights, name):
    g = load_extractor(config(weights, name, size=64, pool="mean"))
    features, patches = g.patches(images())
    assert patches.ndim == 4 and patches.shape[2] == patches.shape[3] > 1
    assert torch.allclose(patches.mean((2, 3)), features, atol=1e-4)


def test_bf16_features_stay_close_to_fp32(weights):
    a, b = (load_extractor(config(weights, VIT, size=64, precision=p))(images()) for p in ("fp32", "bf16"))
    assert b.dtype == torch.float32 and F.cosine_similarity(a, b).min() > 0.99
    assert not torch.equal(a, b)


def test_frozen_and_always_in_evaluation_mode(weights):
    g = load_extractor(config(weights, CONV, size=64))
    torch.nn.Sequential(g).train()
    assert not any(p.requires_grad for p in g.parameters())
    assert not any(m.training for m in g.modules())
    x = images().requires_grad_()
    assert not g(x).requires_grad


def test_features_do_not_depend_on_the_batch(weights):
    g = load_extractor(config(weights, VIT, size=64))
    assert torch.allclose(g(images(4)), torch.cat([g(x[None]) for x in images(4)]), atol=1e-4)


def test_size_is_g_s_own_and_images_of_any_size_are_resized(weights):
    g = load_extractor(config(weights, VIT))
    assert g.size == timm.create_model(VIT).pretrained_cfg["input_size"][-1]
    assert g(images(2, 32)).shape == g(images(2, 200)).shape


@pytest.mark.parametrize("shipped", sorted(p.name for p in EXTRACTORS.iterdir() if p.is_dir()))
def test_shipped_extractors(shipped):
    g = load_extractor(FeaturesConfig(model=shipped))
    features = g(images(4))
    assert features.shape == (4, g.dim) and features.isfinite().all()
    weights = EXTRACTORS / shipped / "model.safetensors"
    assert weights.stat().st_size <= 8e6
    assert sum(p.numel() for p in g.parameters()) <= 4e6
    assert g(images(1))[0].sub(g(images(1).flip(1))[0]).abs().max() > 0
    _, patches = g.patches(images(2))
    assert patches.shape[0] == 2 and math.prod(patches.shape[2:]) > 1


def test_a_folder_works_as_a_name_and_damage_is_noticed(tmp_path):
    shutil.copytree(EXTRACTORS / "demo-g", tmp_path / "mine")
    load_extractor(FeaturesConfig(model=str(tmp_path / "mine")))
    path = tmp_path / "mine" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="sha256"):
        load_extractor(FeaturesConfig(model=str(tmp_path / "mine")))
    with pytest.raises(InputError, match=r"no folder with a manifest\.yaml"):
        load_extractor(FeaturesConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    "model, hint",
    [
        ("vit_base_patch61_224", "vit_base_patch16_224"),
        ("vit_base_patch16_224.dyno", "vit_base_patch16_224.dino"),
        ("demo_g", "demo-g"),
        ("open_clip:ViT-B-33/openai", "ViT-B-32"),
        ("open_clip:ViT-B-32/openay", "openai"),
    ],
)
def test_unknown_names_say_what_was_meant(model, hint):
    with pytest.raises(InputError, match=hint):
        load_extractor(FeaturesConfig(model=model))


def test_weights_that_cannot_be_fetched_name_the_model_and_the_way_out(monkeypatch):
    real = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route to host")
        return real(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"resnet18.*no network.*no route to host.*features\.weights=FILE"):
        load_extractor(FeaturesConfig(model="resnet18"))


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Runs()}, "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth.*refused"):
        load_extractor(FeaturesConfig(model=CONV, weights="evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_plain_torch_files_are_read(tmp_path, weights):
    state = read_weights(weights / f"{CONV}.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "g.pth")
    a = load_extractor(config(weights, CONV, size=64, weights=str(tmp_path / "g.pth")))
    b = load_extractor(config(weights, CONV, size=64))
    assert torch.equal(a(images()), b(images())) and a.manifest["sha256"] == b.manifest["sha256"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": "nowhere.pth"}, "no such file"),
        ({"layer": 40, "size": 64}, r"features\.layer=40"),
        ({"pool": "max"}, r"features\.pool"),
        ({"precision": "fp8", "size": 64}, "precision"),
    ],
)
def test_bad_settings(weights, changes, message):
    with pytest.raises(InputError, match=message):
        load_extractor(config(weights, VIT, **changes))


def test_a_class_token_of_a_network_without_one(weights):
    with pytest.raises(InputError, match="no class token"):
        load_extractor(config(weights, CONV, size=64, pool="cls"))


def test_weights_of_another_model_do_not_fit(weights):
    with pytest.raises(InputError, match="does not fit"):
        load_extractor(config(weights, VIT, weights=str(weights / f"{CONV}.safetensors")))


TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


def test_open_clip_tower(tmp_path):
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny-clip", pretrained=None).eval()
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    weights = str(tmp_path / "clip.safetensors")
    cfg = FeaturesConfig(model="open_clip:tiny-clip", weights=weights, precision="fp32")
    g = load_extractor(cfg)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std))
    batch = images(2, 32)
    with torch.no_grad():
        expected = clip.encode_image((batch / 2 + 0.5 - mean) / std)
    assert g.size == 32 and torch.allclose(g(batch), expected, atol=1e-4)
    cfg.layer = 1
    features, patches = load_extractor(cfg).patches(batch)
    assert features.shape == (2, 32) and patches.shape == (2, 32, 4, 4)
    with pytest.raises(InputError, match="name its weights"):
        load_extractor(FeaturesConfig(model="open_clip:ViT-B-32"))


def picture(colour, seed):
    noise = np.random.default_rng(seed).normal(0, 20, (48, 60, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_distilling_makes_a_folder_that_features_model_can_name(tmp_path, weights):
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "images" / name / f"{i}.jpg").write_bytes(picture(colour, i))
    with ShardWriter(tmp_path / "a.tar") as writer:
        for i in range(4):
            writer.write(str(i), {"jpg": picture((40, 200, 40), i), "cls": b"0"})
    files = str(tmp_path / "images" / "*" / "*.jpg")
    cfg = DistillConfig(
        teacher=config(weights, VIT, size=64, layer=2),
        images=[files, str(tmp_path / "a.tar")],
        probes={"colours": files},
        out=str(tmp_path / "tiny-g"),
        student=CONV,
        size=32,
        input=32,
        width=8,
        views=3,
        steps=3,
        batch_size=4,
        device="cpu",
    )
    distill(cfg)
    manifest = yaml.safe_load((tmp_path / "tiny-g" / "manifest.yaml").read_text())
    assert manifest["images"] == 16 and set(manifest["nmi"]["colours"]) == {"classes", "student", "teacher"}
    g = load_extractor(FeaturesConfig(model=str(tmp_path / "tiny-g")))
    assert g(images(2)).shape == (2, 8) and g.name == "tiny-g"
    first = (tmp_path / "tiny-g" / "model.safetensors").read_bytes()
    distill(cfg)  # the teacher's features are read from beside the folder now
    assert (tmp_path / "tiny-g" / "model.safetensors").read_bytes() == first


def test_targets_of_distillation_are_whitened_components():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 0.5, 0.2, 0.1]) + 7
    white = partly_whitened(x, 3, 1.0)
    assert torch.allclose(torch.cov(white.T), torch.eye(3), atol=1e-4)
    plain = partly_whitened(x, 3, 0.0)
    assert torch.allclose(plain.var(0), torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)[:3], rtol=1e-4)
    assert white.mean(0).abs().max() < 1e-4


def test_student_learns_what_the_teacher_says():
    """A student of the colour: the loss must fall well under that of guessing."""
    colours = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    views = (colours * 255).to(torch.uint8)[:, None, :, None, None].expand(64, 2, 3, 16, 16).contiguous().numpy()
    cfg = DistillConfig(out="student", student=CONV, size=16, input=32, width=3, steps=60, batch_size=32, lr=5e-3)
    student = make_student(cfg, torch.device("cpu"))
    targets = colours - colours.mean(0)
    train_student(cfg, student, views, targets)
    found = student(torch.from_numpy(views[:, 0]).float() / 127.5 - 1)
    assert F.cosine_similarity(found, targets).mean() > 0.8
