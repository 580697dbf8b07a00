"""Mean and covariance of real images' features, in the .npz of clean-fid and of ADM's evaluator."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_sg.errors import InputError, one_line
from ldm_sg.evaluate.inception import Inception
from ldm_sg.evaluate.metrics import Moments
from ldm_sg.folder import whole

KEYS = {"fd": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # the second two are ADM's alone
MADE = ("resize", "sha256")  # of the judge, in ours, and how many `images`


def read(where: str) -> tuple[dict[str, Moments], dict[str, Any]] | None:
    """What an .npz has of `fd` and `sfid`, and what it says of how it was made; None for images. InputError where it is no
    such file."""
    if not where.endswith(".npz"):
        return None
    try:
        with np.load(Path(where).expanduser(), allow_pickle=False) as file:
            found = {
                name: [file[key] for key in keys] for name, keys in KEYS.items() if name == "fd" or keys[0] in file
            }
            made = {key: file[key].item() for key in (*MADE, "images") if key in file}
    except FileNotFoundError as err:
        raise InputError(f"{where}: no such file") from err
    except Exception as err:  # a file that may be anybody's: zip and numpy raise anything
        why = one_line(err)[:200]
        raise InputError(f"{where}: not the statistics of clean-fid or ADM (mu and sigma): {why}") from err
    if type(images := made.get("images", 1)) is not int or images < 1:
        raise InputError(f"{where}: images={images!r}: of how many images the statistics are, at least 1")
    return {name: _moments(where, *arrays) for name, arrays in found.items()}, made


def _moments(where: str, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    good = mean.ndim == 1 and covariance.shape == 2 * mean.shape and mean.dtype.kind == covariance.dtype.kind == "f"
    if (
        not good
        or not (np.isfinite(mean).all() and np.isfinite(covariance).all())
        or not np.allclose(covariance, covariance.T)
    ):
        shapes = " and ".join(f"{part.dtype} {list(part.shape)}" for part in (mean, covariance))
        raise InputError(f"{where}: not a finite mean [D] and a symmetric covariance [D, D] of floats, but {shapes}")
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance.astype(np.float64)))
    return Moments(torch.from_numpy(mean.astype(np.float64)), vectors.T * values.clamp(min=0).sqrt()[:, None])


def check_fits(
    where: str, moments: Mapping[str, Moments], made: dict[str, Any], judge: dict[str, Any], wanted: list[str]
) -> None:
    """InputError where a judge with this manifest cannot have made them, or they lack what is wanted. A file that does not say by
    which weights it was made is taken for Inception's."""
    own, theirs = "those of clean-fid and ADM are for --features inception", made | {"dim": len(moments["fd"].mean)}
    if "sha256" not in made and judge["name"] != Inception.name:
        raise InputError(f"{where}: does not say which network made it, and the judge is {judge['name']}: {own}")
    if "sfid" in wanted and "spatial" in judge:
        if "sfid" not in moments:
            raise InputError(f"{where}: has no mu_s and sigma_s, which sfid is of: leave sfid out, or give ADM's file")
        theirs["spatial"] = len(moments["sfid"].mean)
    for key in ("dim", "spatial", *MADE):
        if theirs.get(key, judge.get(key)) != judge.get(key):
            raise InputError(f"{where}: made with {key} {theirs[key]}, and the judge has {judge.get(key)}: {own}")


def write(path: Path, moments: Mapping[str, Moments], judge: dict[str, Any], images: int) -> None:
    """A file that clean-fid reads, and with sFID's statistics ADM's evaluator too; judge: the network's manifest."""
    arrays: dict[str, Any] = {key: judge[key] for key in MADE if key in judge} | {"images": images}
    for name, found in moments.items():
        arrays |= zip(KEYS[name], (found.mean.numpy(), (found.root.T @ found.root).numpy()))
    with whole(path) as new, new.open("wb") as file:
        np.savez(file, **arrays)
