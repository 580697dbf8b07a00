"""Mean and covariance of real images' features, in the .npz of clean-fid and of ADM's evaluator."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm_sg.errors import InputError, one_line
from ldm_sg.evaluate.metrics import Moments
from ldm_sg.folder import whole

KEYS = {"fd": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # the second two are ADM's alone
MADE = ("resize", "sha256", "images")  # what ours say beside


def is_file(where: str) -> bool:
    return where.endswith(".npz")


def read(where: str) -> tuple[dict[str, Moments], dict[str, Any]]:
    """What the file has of `fd` and `sfid`, and what it says of how it was made. InputError where it is no such file."""
    try:
        with np.load(Path(where).expanduser(), allow_pickle=False) as file:
            found = {name: [file[key] for key in keys] for name, keys in KEYS.items() if keys[0] in file}
            made = {key: file[key].item() for key in MADE if key in file}
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as err:
        raise InputError(
            f"{where}: not the statistics of clean-fid or ADM (mu and sigma): {one_line(err)[:200]}"
        ) from err
    if "fd" not in found:
        raise InputError(f"{where}: not the statistics of clean-fid or ADM: mu and sigma are missing")
    return {name: _moments(where, *arrays) for name, arrays in found.items()}, made


def _moments(where: str, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    shapes = f"a mean of shape {list(mean.shape)} and a covariance of {list(covariance.shape)}"
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or "f" not in mean.dtype.kind + covariance.dtype.kind:
        raise InputError(f"{where}: {shapes}, not [D] and [D, D] floating-point numbers")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and np.allclose(covariance, covariance.T)):
        raise InputError(f"{where}: {shapes} that are not finite, or not symmetric")
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance).double())
    return Moments(torch.from_numpy(mean).double(), vectors.T * values.clamp(min=0).sqrt()[:, None])


def check_fits(where: str, moments: dict[str, Moments], made: dict[str, Any], judge: dict[str, Any]) -> None:
    """InputError where a judge with this manifest cannot have made them."""
    dim = len(moments["fd"].mean)
    if dim != judge["dim"]:
        raise InputError(
            f"{where}: a mean of {dim:,} numbers, and {judge['name']} gives {judge['dim']:,}: give --features inception for those of "
            "clean-fid and ADM"
        )
    for key in ("resize", "sha256"):
        if key in made and made[key] != (judge.get(key) or "own"):
            raise InputError(f"{where}: made with {key} {made[key]}, and the judge has {judge.get(key)}")


def write(path: Path, moments: dict[str, Moments], **made: Any) -> None:
    """A file that clean-fid reads, and with sFID's statistics ADM's evaluator too; `made`: of MADE."""
    arrays = {}
    for name, found in moments.items():
        mean, covariance = KEYS[name]
        arrays |= {mean: found.mean.numpy(), covariance: (found.root.T @ found.root).numpy()}
    with whole(path) as new, new.open("wb") as file:
        np.savez(file, **arrays, **made)
