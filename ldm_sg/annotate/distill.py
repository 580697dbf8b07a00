"""A small g taught by a large one, without labels.

The teacher's features of several random views of each image are computed once. The student sees one view at low resolution
and repeats the mean over all of them, under a cosine loss: the mean says less of where the crop fell and more of what is in
the image. Principal components of the means, divided by a power of their standard deviation, are what it repeats; partial
whitening spreads what k-means can tell apart."""

import glob
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm_sg.annotate.clusters import Clusters, contingency, nmi
from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.config import AnnotatorConfig, DistillConfig, FeaturesConfig
from ldm_sg.data.images import crop_resize, decode, to_float, to_tensor
from ldm_sg.data.shards import expand, read_shard
from ldm_sg.errors import InputError
from ldm_sg.folder import file_sha256, whole, write_bytes, write_text
from ldm_sg.hardware import pick_device


def read_images(source: str) -> list[tuple[bytes, str]]:
    """(encoded image, label) of a glob of image files (label = folder), of shards, or of `FILE.parquet?IMAGE,LABEL`;
    `package://NAME/FILE` names a file inside an installed Python package."""
    path, _, columns = source.partition("?") if ".parquet?" in source else (source, "", "")
    if path.startswith("package://"):
        name, _, inside = path.removeprefix("package://").partition("/")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InputError(f"images: {source}: the Python package {name!r} is not installed")
        path = str(Path(spec.origin).parent / inside)
    if path.endswith(".parquet"):
        import pyarrow.parquet  # extra `fruit`: only those who make the shipped g again need it

        image, label = columns.split(",")
        table = pyarrow.parquet.read_table(path, columns=[image, label])
        return list(zip(table[image].to_pylist(), table[label].to_pylist()))
    if path.endswith(".tar"):
        return [(s.image, str(s.cls)) for url in expand(path) for s in read_shard(url, _refuse)]
    files = sorted(Path(f) for f in glob.glob(path, recursive=True))  # noqa: PTH207 (patterns may be absolute)
    if not files:
        raise InputError(f"images: nothing matches {source!r}")
    return [(file.read_bytes(), file.parent.name) for file in files]


def _refuse(shard: str, key: str, reason: str) -> None:
    raise InputError(f"{shard}: {key}: {reason}")


def random_view(image: Image.Image, smallest: float, generator: torch.Generator) -> Image.Image:
    """A square crop that shows `smallest` .. 1 of the largest square's area, mirrored half the time."""
    area, x, y, mirror = torch.rand(4, generator=generator).tolist()
    side = round(min(image.size) * (smallest + (1 - smallest) * area) ** 0.5)
    left, top = int(x * (image.width - side + 1)), int(y * (image.height - side + 1))
    view = image.crop((left, top, left + side, top + side))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else view


def views_of(cfg: DistillConfig, large: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each image [views, 3, large, large] for the teacher and [views, 3, size, size] for the student, uint8."""
    generator = torch.Generator().manual_seed(cfg.seed)
    for source in cfg.images:
        for data, _ in read_images(source):
            image = decode(data)
            views = [image, *(random_view(image, cfg.crop, generator) for _ in range(cfg.views - 1))]
            yield tuple(torch.stack([to_tensor(crop_resize(v, s)) for v in views]) for s in (large, cfg.size))


def teacher_views(cfg: DistillConfig, teacher: FeatureExtractor, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Student views uint8 [N, V, 3, s, s] and the teacher's features of the same views float16 [N, V, D]; kept in
    `cache` under a name made of what they depend on."""
    depends = [asdict(cfg.teacher), cfg.images, cfg.size, cfg.views, cfg.crop, cfg.seed, teacher.manifest["sha256"]]
    path = cache / f"views-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]}.npz"
    if not path.is_file():
        small, features = [], []
        bar = tqdm(views_of(cfg, teacher.size), desc="teacher", unit=" images", mininterval=1)
        for large_views, small_views in bar:
            small.append(small_views.numpy())
            features.append(teacher(to_float(large_views)).cpu().numpy().astype(np.float16))
        with whole(path) as new, new.open("wb") as file:
            np.savez(file, small=np.stack(small), features=np.stack(features))
    with np.load(path) as both:
        return both["small"], both["features"]


def partly_whitened(features: Tensor, width: int, power: float) -> Tensor:
    """[N, D] -> their `width` principal components [N, width], each divided by its (standard deviation)^power."""
    centred = (features - features.mean(0)).double()
    values, vectors = torch.linalg.eigh(torch.cov(centred.T))  # ascending
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    return (centred @ vectors / values.clamp(min=1e-8) ** (power / 2)).float()


def jitter(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift by up to `pad` pixels and change brightness, contrast and saturation a little, each image in its own way."""
    b, _, h, w = images.shape
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    at = torch.randint(0, 2 * pad + 1, (b, 2), generator=generator)
    rows, columns = at[:, :1] + torch.arange(h), at[:, 1:] + torch.arange(w)
    moved = padded[torch.arange(b)[:, None, None, None], torch.arange(3)[None, :, None, None],
                   rows[:, None, :, None], columns[:, None, None, :]]  # fmt: skip
    brightness, contrast, saturation = 0.2 * (torch.rand(3, b, 1, 1, 1, generator=generator) * 2 - 1)
    grey = moved.mean(1, keepdim=True)
    coloured = grey + (moved - grey) * (1 + saturation)
    return (coloured * (1 + contrast) + brightness).clamp(-1, 1)


def train_student(cfg: DistillConfig, reader: FeatureExtractor, views: np.ndarray, targets: Tensor) -> None:
    """Minimise 1 - cos(student(view), target) over views [N, V, 3, s, s] with one target [N, width] for each image."""
    generator = torch.Generator().manual_seed(cfg.seed)
    student, device = reader.tower.train().requires_grad_(True), reader.mean.device
    groups = param_groups_weight_decay(student, cfg.weight_decay)  # of matrices, not of biases and norms
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, cfg.steps, pct_start=0.1)
    bar = tqdm(range(cfg.steps), desc="student", unit="step", mininterval=5)
    smooth = None
    for _ in bar:
        i = torch.randint(len(views), (cfg.batch_size,), generator=generator)
        v = torch.randint(views.shape[1], (cfg.batch_size,), generator=generator)
        images = jitter(to_float(torch.from_numpy(views[i.numpy(), v.numpy()])), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=reader.bf16):
            predicted = student(reader.prepare(images.to(device)))
        loss = (1 - F.cosine_similarity(predicted.float(), targets[i.to(device)])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}")
    student.eval().requires_grad_(False)


def make_student(cfg: DistillConfig, device: torch.device) -> FeatureExtractor:
    """An untrained student behind the resizing and normalisation that it will have."""
    torch.manual_seed(cfg.seed)
    kwargs = {**(cfg.kwargs or {}), "num_classes": cfg.width}  # its head gives the features
    student = timm.create_model(cfg.student, **kwargs)
    norm = {key: [float(v) for v in student.pretrained_cfg[key]] for key in ("mean", "std")}
    own = {"name": Path(cfg.out).name, "size": cfg.input, "layer": None, "pool": "auto", "precision": "auto"}
    own |= {"model": cfg.student, "kwargs": kwargs, "unit": True}  # the loss fixes nothing but the direction
    return FeatureExtractor(student, own | norm, device)


def save_student(cfg: DistillConfig, reader: FeatureExtractor, figures: dict[str, Any]) -> None:
    """OUT/model.safetensors (float16) and OUT/manifest.yaml: a folder that `features.model` can name."""
    out, state = Path(cfg.out), reader.tower.state_dict()
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in state.items()}
    write_bytes(out / "model.safetensors", save(weights))
    elsewhere = {"teacher", "images", "probes", "out", "licence", "note", "device"}
    own = ("name", "model", "kwargs", "size", "mean", "std", "layer", "pool", "unit", "dim")
    manifest = {
        **{key: reader.manifest[key] for key in own},
        "parameters": sum(p.numel() for p in reader.tower.parameters()),
        "sha256": file_sha256(out / "model.safetensors"),
        "licence": cfg.licence,
        "note": cfg.note,
        "teacher": {key: getattr(cfg.teacher, key) for key in ("model", "layer", "pool", "size")},
        "recipe": {key: value for key, value in asdict(cfg).items() if key not in elsewhere},
        **figures,
    }
    write_text(out / "manifest.yaml", yaml.safe_dump(manifest, sort_keys=False, width=118, default_flow_style=None))


def distill(cfg: DistillConfig) -> Path:
    """Teach `cfg.student`, write the folder `cfg.out`, measure NMI of teacher and student on the probes."""
    device = pick_device(cfg.device)
    teacher = load_extractor(cfg.teacher, device)
    out = Path(cfg.out)
    views, features = teacher_views(cfg, teacher, out.with_name(out.name + ".work"))
    targets = partly_whitened(torch.from_numpy(features).float().mean(1), cfg.width, cfg.whiten)
    student = make_student(cfg, device)
    train_student(cfg, student, views, targets.to(device))
    save_student(cfg, student, {})
    reread = load_extractor(FeaturesConfig(model=str(out)), device)  # as it will be used: float16 weights
    figures = {
        name: {
            "classes": len({label for _, label in read_images(source)}),
            "student": probe_nmi(reread, source, cfg.size),
            "teacher": probe_nmi(teacher, source, teacher.size),
        }
        for name, source in (cfg.probes or {}).items()
    }
    save_student(cfg, student, {"images": len(views), "nmi": figures})
    return out


def probe_nmi(extractor: FeatureExtractor, source: str, size: int, batch_size: int = 64) -> float:
    """Mean NMI over 5 seeds of k-means (k = number of classes) on a labelled source whose images have `size` pixels."""
    images, labels = zip(*read_images(source))
    features = []
    for start in tqdm(range(0, len(images), batch_size), desc="probe", mininterval=1):
        batch = [to_tensor(crop_resize(decode(data), size)) for data in images[start : start + batch_size]]
        features.append(extractor(to_float(torch.stack(batch))).cpu())
    points, (names, classes) = torch.cat(features), np.unique(labels, return_inverse=True)
    k = len(names)
    fits = [Clusters(AnnotatorConfig(k=k, seed=seed)).fit_features(points) for seed in range(5)]
    found = [nmi(contingency(fit.assign(points).numpy(), classes, (k, k))) for fit in fits]
    return round(float(np.mean(found)), 4)
