"""manifest.yaml of an annotation set, in words and numbers."""

from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import entropy

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.clusters import ami, ari, nmi
from ldm_sg.annotate.stage import Sums
from ldm_sg.annotate.tally import TOTAL, Summary
from ldm_sg.autoencoder import Autoencoder
from ldm_sg.config import AnnotatorConfig
from ldm_sg.data.latents import set_hash
from ldm_sg.folder import flat

FEW = 9  # folders of source shards that the manifest names, beside the shards' own lines


def describe(
    study: Study,
    annotator: Annotator,
    autoencoder: Autoencoder,
    summary: Summary,
    sums: Sums,
    files: list[dict[str, Any]],
) -> dict[str, Any]:
    """manifest.yaml: what made the set, how many of what, and the hash of its content."""
    cfg, extractor, size, counts, table = study.config, study.extractor, study.size, sums["counts"], sums["table"]
    totals = {name.removeprefix(TOTAL): total for name, total in sums.items() if name.startswith(TOTAL)}
    files = [file | shard for file, shard in zip(files, summary.shards)]
    f = {"kind": annotator.kind, "k": annotator.k, **changes(cfg.annotator)} | annotator.figures(totals)
    known = table[:, :-1]
    if table.any():
        f |= {"entropy": round(float(entropy(counts)), 4), "max_entropy": round(float(np.log(len(known))), 4)}
    if known.any():
        f |= {"classes": known.shape[1]} | {
            name: round(compute(known), 4) for name, compute in (("nmi", nmi), ("ami", ami), ("ari", ari))
        }
    if len(counts):
        f |= {"empty": int((counts == 0).sum()), "counts": counts.tolist()}
    seen: dict[str, Any] = {}  # images.show, in words
    shapes, factor = [file.pop("latent_shape") for file in files], autoencoder.factor
    if cfg.buckets:
        files = [file | {"latent_shape": shape or summary.latent_shape} for file, shape in zip(files, shapes)]
        seen["buckets"] = sorted({f"{shape[2] * factor}x{shape[1] * factor}" for shape in shapes if shape})
    first_stage = {
        key: autoencoder.manifest.get(key) for key in ("name", "kind", "channels", "factor", "sha256", "round_trip")
    }
    if extractor:
        more = "" if cfg.buckets else f", from the source's own where it has more than {size}"
        seen["g"] = f"the centre square at {extractor.size} pixels{more}"
    if extractor and annotator.whole and extractor.any_shape:
        seen["boxes"] = f"the uncropped image, its short side {extractor.size} pixels, padded to whole patches"
    return {
        "version": 3,
        "features": extractor.manifest if extractor else None,
        "annotator": f,
        "autoencoder": first_stage,
        "size": size,
        "source": list(dict.fromkeys(shard["url"].rpartition("/")[0] for shard in summary.shards))[:FEW],
        "view": seen,
        "num_images": summary.images,
        "num_skipped": len(summary.skipped),
        "latent_shape": summary.latent_shape,
        "flips": cfg.flips,
        "guidance": annotator.spec.to_dict(),
        "hash": set_hash(entry["sha256"] for entry in files),
        "shards": files,
    }


def changes(cfg: AnnotatorConfig) -> dict[str, Any]:
    """The seed and the settings that are not the default ones."""
    here, default = (flat(asdict(c)) for c in (cfg, AnnotatorConfig()))
    changed = {key: value for key, value in here.items() if value != default[key]}
    return {"seed": cfg.seed} | {key: value for key, value in changed.items() if key not in ("kind", "k")}
