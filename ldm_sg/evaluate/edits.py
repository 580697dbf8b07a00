"""Do edits happen? One concept of each image is moved, and made larger or smaller; judges say where it was and where it is."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm_sg.annotate.features import FeatureExtractor
from ldm_sg.annotate.kinds import LoadedAnnotator
from ldm_sg.data.images import to_float
from ldm_sg.errors import InputError
from ldm_sg.evaluate import metrics, sources
from ldm_sg.evaluate.inception import Inception
from ldm_sg.evaluate.judges import OWN, load_network, parse_features
from ldm_sg.evaluate.options import Options
from ldm_sg.evaluate.subjects import Subject
from ldm_sg.guidance import selfguide
from ldm_sg.sampling.edit import Edit
from ldm_sg.sampling.editor import Editor, MaskEditor, Source
from ldm_sg.sampling.options import SampleOptions

MOST = 64  # images
SHIFT = 0.2  # of the width
RATIOS = (0.5, 0.7, 1.4, 2.0)  # of areas
LARGE, SMALL = 0.3, 0.02  # shares of the image that an edited concept may cover
NEAR = 0.1  # share of the sides
GRID = 32  # cells a side of the masks that are compared, or what divides the image
REDRAWN = 0.4  # share of the steps after which an image with a pasted object is gone on with


@dataclass(frozen=True)
class Asked:
    """Of one image: its concept, the shift in x as a share of the width, and the ratio of areas."""

    concept: int
    dx: float
    ratio: float

    @property
    def edits(self) -> dict[str, Edit]:
        return {"moved": Edit(self.concept, dx=self.dx), "resized": Edit(self.concept, scale=self.ratio**0.5)}


# images [B, 3, H, W] in [-1, 1], the first of them the source with its masks [K, h, w] -> masks [B, K, h, w], patch features [B, D, h', w']
Sight = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def by_annotator(own: LoadedAnnotator) -> Sight:
    """The run's own g and f."""
    return lambda images, _: (coverage(own, images), own.extractor.patches(images)[1])


def coverage(own: LoadedAnnotator, images: Tensor) -> Tensor:
    """[B, K, h, w], h = w at most GRID: which share of each cell is of which concept."""
    side = next(cells for cells in range(GRID, 0, -1) if images.shape[-1] % cells == 0)
    found = own(images).guidance((side, side)).spatial
    assert found is not None
    return found


def by_prototypes(network: FeatureExtractor | Inception) -> Sight:
    """Another network, which made no signal: each patch is of the concept in whose mask of the source the features are most alike."""

    def see(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        features = network.patches(images)[1]
        unit = F.normalize(features - features[:1].mean((2, 3), keepdim=True), dim=1)
        weights = selfguide.resized(masks.to(unit), (unit.shape[2], unit.shape[3])).flatten(1)  # [K, h * w]
        prototypes = F.normalize(weights @ unit[0].flatten(1).T, dim=1)  # [K, D], 0 of what is not there
        alike = torch.einsum("kd,bdhw->bkhw", prototypes, unit)
        alike[:, weights.sum(1) == 0] = -torch.inf
        return F.one_hot(alike.argmax(1), len(masks)).permute(0, 3, 1, 2).to(unit), features

    return see


def able(masks: Tensor) -> Tensor:
    """Masks [K, h, w] of a source -> which concepts [K] are neither tiny nor most of it."""
    shares = masks.mean((1, 2))
    return (shares > SMALL) & (shares < LARGE)


def localised(masks: Tensor, maps: Tensor) -> Tensor:
    """Which concepts [K] lie where their attention [K, h', w'] does, by the centroids: only these can be asked for."""
    return ((selfguide.centroid(masks) - selfguide.centroid(maps)).abs() < NEAR).all(1)


def choose(masks: Tensor, among: Tensor, generator: np.random.Generator) -> Asked:
    """One of the concepts `among` [K], away from the nearer side."""
    concept = int(generator.choice(among.nonzero()[:, 0].numpy()))
    right = bool(selfguide.centroid(masks)[concept, 0] < 0.5)
    return Asked(concept, SHIFT if right else -SHIFT, float(generator.choice(RATIOS)))


def moved(before: Tensor, after: Tensor, asked: Asked) -> tuple[float, list[float]]:
    """Masks [K, h, w] -> which share of the asked shift the concept made (0 where it is gone), and how far each other one that is in
    both went, as a share of it."""
    there = (before.mean((1, 2)) > SMALL) & (after.mean((1, 2)) > SMALL)
    way = selfguide.centroid(after) - selfguide.centroid(before)  # [K, 2]
    made = float(way[asked.concept, 0]) / asked.dx if after[asked.concept].any() else 0.0
    there[asked.concept] = False
    return made, (way[there].norm(dim=1) / abs(asked.dx)).tolist()


def look_distance(masks: Tensor, features: Tensor, concept: int) -> float:
    """1 - cosine of the features [2, D, h', w'] in the concept's masks [2, K, h, w], before and after; 1 where it is gone."""
    weights = selfguide.resized(masks[:, concept][:, None].to(features), (features.shape[2], features.shape[3]))
    before, after = (weights * features).sum((2, 3))
    return 1 - float(F.cosine_similarity(before, after, dim=0))


@dataclass(frozen=True)
class Made:
    """Of one image, by one judge: masks and features of the source and of what became of it."""

    asked: Asked
    masks: dict[str, Tensor]
    features: dict[str, Tensor]


def figures(found: list[Made], way: str = "") -> dict[str, float]:
    """Of images edited in one `way` ("" or "_paste")."""
    names, shifts, others, looks, ratios, means = ("source", f"moved{way}", f"resized{way}"), [], [], [], [], []
    for made in found:
        k, (before, after, resized) = made.asked.concept, (made.masks[name] for name in names)
        features = torch.stack([made.features[name] for name in names[:2]])
        share, rest = moved(before, after, made.asked)
        shifts.append(share)
        others += rest
        looks.append(look_distance(torch.stack([before, after]), features, k))
        ratios.append(float(resized[k].mean() / before[k].mean().clamp(min=1e-6)))
        means.append(features.mean((2, 3)))
    low, middle, high = np.quantile(shifts, (0.25, 0.5, 0.75))
    asked = [made.asked.ratio for made in found]
    rank = spearmanr(asked, ratios).statistic if min(len({*asked}), len({*ratios})) > 1 else 0.0
    return {
        f"edit_shift{way}": middle,
        f"edit_shift_low{way}": low,
        f"edit_shift_high{way}": high,
        f"edit_others{way}": float(np.median(others or [0.0])),
        f"edit_size_rank{way}": float(rank),
        f"edit_look{way}": float(np.median(looks)),
        f"edit_fd{way}": metrics.frechet_distance(*torch.stack(means, 1).flip(0)),
    }


def paste(image: Tensor, mask: Tensor, edit: Edit) -> Tensor:
    """[3, H, W] with what lies in the mask [h, w] cut out, moved or resized, and put in again; the hole holds the mirrored image."""
    soft = F.interpolate(mask[None, None], image.shape[1:], mode="bilinear")[0]
    *pasted, there = edit.of(torch.cat([image * soft, soft]), around=soft)
    rest = torch.where(soft > 0.5, image.flip(2), image)
    return rest * (1 - there) + torch.stack(pasted)


def examined(
    found: Iterable[Source], editor: Editor, judges: dict[str, Sight], seed: int, of: str, n: int
) -> dict[str, dict[str, float]]:
    """Edits n sources, one at a time, and lets the judges see: figures by the name of the judge."""
    seen: dict[str, list[Made]] = {name: [] for name in judges}
    sure: list[float] = []
    for i, source in enumerate(tqdm(found, f"edits of {of}", n, unit="image", dynamic_ncols=True)):
        [masks] = coverage(editor.annotator, to_float(source.images))
        last = source.observed[-1]
        candidates = able(masks) & last.there[0].cpu()
        chosen = candidates & localised(masks, last.maps[0].cpu())
        sure += [float(chosen.sum() / candidates.sum())] * bool(candidates.any())
        if not chosen.any():
            continue
        asked = choose(masks, chosen, np.random.default_rng([seed, i]))
        images = {"source": source.images}
        for name, edit in asked.edits.items():
            images[name] = editor.edit(source, [edit])
            pasted = paste(to_float(source.images)[0], masks[asked.concept], edit)[None]
            images[f"{name}_paste"] = editor.redrawn(source, pasted, REDRAWN)
        pixels = to_float(torch.cat(list(images.values())))
        for name, judge in judges.items():
            given, features = (part.cpu() for part in judge(pixels, masks))
            if given[0, asked.concept].any():  # a judge of few patches may not see it
                seen[name].append(Made(asked, dict(zip(images, given)), dict(zip(images, features))))
    for name, made in seen.items():
        if len(made) < 2:
            what = f"hold a concept of {SMALL:.0%} to {LARGE:.0%} of them that {name} sees"
            raise InputError(f"metric edit: fewer than 2 of {n} {of} {what}")
    sure_of = {"edit_localised": float(np.mean(sure))}
    return {
        name: {"edit_images": float(len(made))} | sure_of | figures(made) | figures(made, "_paste")
        for name, made in seen.items()
    }


def examine(
    options: Options, subject: Subject, real: sources.ImageSet, device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Figures of images that the run draws (image i depends on (seed, i) only) and, as `_real`, of photos, by its own g and f and
    by the other networks of `features`: by the judge's name, with each judge's manifest. Of a run that is told where things are it is
    its masks that are edited. InputError where the run cannot edit."""
    assert subject.pipe is not None
    named = {name: text for name, text in parse_features(options.features).items() if text != OWN}
    networks = {name: load_network(text, options.resize, device) for name, text in named.items()}
    for name in ("scheduler", "spacing"):
        if subject.sampling[name] != getattr(SampleOptions, name):
            raise InputError(f"{name}={subject.sampling[name]}: metric edit draws with {getattr(SampleOptions, name)}")
    laid = subject.pipe.spec.spatial == "mask" and subject.pipe.spec.spatial_channels > 0
    strategy = options.drawing().solving()["strategy"]
    kind = MaskEditor if laid else Editor
    editor = kind(subject.pipe, subject.sampling["w"], subject.sampling["steps"], strategy)
    own, seed, n = editor.annotator, options.seed, min(options.n, MOST)
    judges = {own.extractor.name: by_annotator(own)} | {name: by_prototypes(each) for name, each in networks.items()}
    drawn = (editor.drawn(1, seed, i) for i in range(n))
    photos = (editor.photo(image, seed + i) for i, image in enumerate(sources.pictures(real, n)))
    found = examined(drawn, editor, judges, seed, "samples", n)
    for name, values in examined(photos, editor, judges, seed, "photos", min(n, real.total or n)).items():
        found[name] |= {f"{key}_real": value for key, value in values.items()}
    manifests = {own.extractor.name: own.extractor.manifest}
    return found, manifests | {name: each.manifest for name, each in networks.items()}
