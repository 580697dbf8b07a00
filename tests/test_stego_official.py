"""STEGO's official checkpoints and its long training: the key map against a literal head, pickled code that stays inert."""

import os
import pickle
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.annotate.segments import lessons
from ldm_sg.annotate.stego import official
from ldm_sg.config import AnnotateConfig, AnnotatorConfig, FeaturesConfig, SegmentsConfig
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError

K, CODE, SIZE, G = 5, 7, 32, 64


class Theirs(nn.Module):
    """The official segmenter as its code has it: two heads on patch features, added; classes by cosine."""

    def __init__(self, tower: nn.Module, dim: int):
        super().__init__()
        self.net = nn.Module()
        self.net.model = nn.Module()
        self.net.model.patch_embed = nn.Module()
        self.net.model.patch_embed.proj = tower.patch_embed.proj
        self.net.cluster1 = nn.Sequential(nn.Conv2d(dim, CODE, (1, 1)))
        self.net.cluster2 = nn.Sequential(nn.Conv2d(dim, dim, (1, 1)), nn.ReLU(), nn.Conv2d(dim, CODE, (1, 1)))
        self.cluster_probe = nn.Module()
        self.cluster_probe.clusters = nn.Parameter(torch.randn(K, CODE))
        self.linear_probe = nn.Conv2d(CODE, K, (1, 1))

    @torch.no_grad()
    def forward(self, features: torch.Tensor, mirrored: torch.Tensor, size: int) -> torch.Tensor:
        codes = sum(self.net.cluster1(f) + self.net.cluster2(f) for f in (features, mirrored)) / 2
        codes = F.interpolate(codes, (size, size), mode="bilinear", align_corners=False)
        cosines = torch.einsum(
            "bchw,nc->bnhw", F.normalize(codes, dim=1), F.normalize(self.cluster_probe.clusters, dim=1)
        )
        return cosines.argmax(1)


@pytest.fixture(scope="module")
def tower() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=G).eval()


@pytest.fixture(scope="module")
def theirs(tower: nn.Module) -> Theirs:
    torch.manual_seed(1)
    return Theirs(tower, tower.num_features)


class Planted:
    def __reduce__(self):
        return os.system, ("touch ran",)


def checkpoint(path: Path, theirs: nn.Module, **beside) -> Path:
    """As Lightning writes it: classes of modules that are not installed here, and worse, beside the tensors."""
    foreign = types.ModuleType("omegaconf_of_old")
    foreign.DictConfig = type("DictConfig", (), {"__module__": "omegaconf_of_old"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "omegaconf_of_old", foreign)
        cfg = foreign.DictConfig()
        cfg.dim, cfg.flags = CODE, [1, 2]
        torch.save({"state_dict": theirs.state_dict(), "hyper_parameters": {"cfg": cfg}, **beside}, path)
    return path


def shard(folder: Path, n: int = 4) -> str:
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "a.tar") as writer:
        for i in range(n):
            file = folder / "image.png"
            Image.fromarray(generator.integers(0, 256, (G, 80, 3), dtype=np.uint8)).save(file)
            writer.write(f"{i}", {"png": file.read_bytes()})
    return str(folder / "a.tar")


def config(tmp_path: Path, tower: nn.Module, k: int = K, **segments) -> AnnotateConfig:
    save_file(tower.state_dict(), tmp_path / "vit.safetensors")
    features = FeaturesConfig("test_vit", str(tmp_path / "vit.safetensors"), size=G, batch_size=3, precision="fp32")
    f = AnnotatorConfig("segments", k=k, segments=SegmentsConfig(**segments))
    return AnnotateConfig(shard(tmp_path), str(tmp_path / "set"), "patch4", SIZE, features, f, workers=0)


def test_official_weights_give_the_official_masks(tmp_path: Path, tower: nn.Module, theirs: Theirs) -> None:
    path = checkpoint(tmp_path / "official.ckpt", theirs)
    out = annotate_shards(config(tmp_path, tower, weights=str(path)))
    masks = LatentSet(out).signals.mask
    annotator = load_annotator(out / "annotator")
    images = torch.rand(3, 3, G, G, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features, mirrored = (annotator.extractor.patches(images, m)[1] for m in (False, True))
    expected = theirs(features, mirrored, G)
    found = torch.stack([torch.as_tensor(annotator(images).mask[i].copy()) for i in range(3)])
    assert (found == expected).float().mean() > 0.999 and len(expected.unique()) > 1  # equal but for ties
    assert len(masks) == 4


def test_a_planted_payload_stays_inert(
    tmp_path: Path, theirs: Theirs, tower: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = checkpoint(tmp_path / "a.ckpt", theirs)
    with pytest.raises(pickle.UnpicklingError):  # so there is something in it to be afraid of
        torch.load(path, weights_only=True)
    head, classes = official(path, tower)
    assert torch.equal(head.nonlinear[2].weight, theirs.net.cluster2[2].weight) and classes.shape == (K, CODE)
    checkpoint(tmp_path / "planted.ckpt", theirs, callbacks=[Planted()], more={"x": Planted()})
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Planted()))
    for name, message in (
        ("planted.ckpt", "files with code are refused"),
        ("plain.pkl", "not a safetensors file or a torch file"),
        ("no.ckpt", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            official(tmp_path / name, tower)
    assert not (tmp_path / "ran").exists()


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path, theirs: Theirs, tower: nn.Module) -> None:
    path = checkpoint(tmp_path / "a.ckpt", theirs)
    with pytest.raises(InputError, match=r"annotator.k=4: .*a.ckpt has 5 classes"):
        annotate_shards(config(tmp_path, tower, k=4, weights=str(path)))
    torch.manual_seed(5)
    other = timm.create_model("test_vit", num_classes=0, img_size=G)
    with pytest.raises(InputError, match=r"trained on another g.*vit_base_patch8_224\.dino"):
        official(path, other)
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match=r"no net\.cluster1\.0\.weight in it"):
        official(tmp_path / "b.ckpt", tower)
    with pytest.raises(InputError, match=r"belongs to annotator.segments.method=stego"):
        SegmentsConfig(method="patch_kmeans", weights="x").check()


def test_lessons() -> None:
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8) / 192 - 1
    [same] = lessons(images, SegmentsConfig(), torch.Generator())
    assert torch.equal(same, images)
    corners = list(lessons(images, SegmentsConfig(crops=True), torch.Generator()))
    assert torch.equal(corners[0], images[..., :4, :4]) and torch.equal(corners[3], images[..., 4:, 4:])
    assert len(corners) == 5 and torch.equal(corners[4], images[..., 2:6, 2:6])
    many = torch.cat([images] * 50)
    [changed] = lessons(many, SegmentsConfig(augment=True), torch.Generator().manual_seed(0))
    rising = (changed[..., -1] > changed[..., 0]).float().mean()  # mirrored ones fall from left to right
    assert 0.3 < rising < 0.7 and changed.abs().max() <= 1 and not torch.equal(changed[0], changed[2])


def test_stego_learns_from_crops_of_the_source(tmp_path: Path, tower: nn.Module) -> None:
    segments = {"crops": True, "augment": True, "steps": 20, "batch_size": 4, "images": 20, "neighbours": 2, "width": 6}
    out = annotate_shards(config(tmp_path, tower, k=2, **segments))
    assert len(LatentSet(out).signals.mask) == 4
