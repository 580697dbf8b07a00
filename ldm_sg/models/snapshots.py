"""EMA weights of single steps, kept beside a run: RUN/checkpoints/ema_0001000.safetensors."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ldm_sg.errors import InputError, choices, one_line
from ldm_sg.folder import whole


def keep(network: nn.Module, run: Path, step: int) -> Path:
    """Writes the weights of `network` as the run's snapshot of `step`: whole, or not there."""
    path = run / "checkpoints" / f"ema_{step:07d}.safetensors"
    with whole(path) as new:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, new)
    return path


def restore(network: nn.Module, run: Path, checkpoint: str) -> int:
    """Loads a snapshot of `run` into `network`: a step, or `best`. Returns the step; InputError names what there is."""
    found = {int(p.stem[4:]): p for p in (run / "checkpoints").glob("ema_*.safetensors") if p.stem[4:].isdigit()}
    if not found:
        raise InputError(f"checkpoint {checkpoint!r}: {run} keeps none; train with keep_every=N to have them")
    step = best(run) if checkpoint == "best" else int(checkpoint) if checkpoint.isdigit() else -1
    if step not in found:
        raise InputError(f"checkpoint {checkpoint!r} of {run}; {choices(checkpoint, [*found, 'best'])}")
    try:
        network.load_state_dict(load_file(found[step]))
    except (SafetensorError, RuntimeError) as err:
        raise InputError(f"{found[step]}: damaged, or of another network: {one_line(err)[:200]}") from err
    return step


def best(run: Path) -> int:
    """The step whose evaluation has the lowest fd. InputError where none is evaluated, or they are not comparable."""
    judged: dict[str, list[tuple[float, int]]] = {}
    for file in (run / "evaluations").glob("*.json"):
        try:
            result = json.loads(file.read_text())
            step = int(result["sampling"]["checkpoint"])
            how = {key: value for key, value in result["sampling"].items() if key != "checkpoint"}
            for space, figures in result["metrics"].items():
                network = [result["judges"][space].get(key) for key in ("name", "sha256")]
                judge = json.dumps([network, result["reference"], result["samples"], how], sort_keys=True)
                judged.setdefault(judge, []).append((float(figures["fd"]), step))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # of the run as it is, or without fd
    several = [ranks for ranks in judged.values() if len({step for _, step in ranks}) > 1]
    if len(several) != 1:
        what = f"{len(several)} sets of them differ in judge or settings" if several else "there are none to compare"
        raise InputError(
            f"checkpoint 'best' of {run} needs fd of at least two checkpoints, of one judge and with the same settings, and "
            f"{what}: `ldm-sg evaluate {run} --checkpoint STEP`"
        )
    return min(several[0])[1]
