"""Error of every solver over the number of evaluations, with the exact denoiser of a Gaussian, under every schedule that a config
uses: what the default (dpmpp_2m, log_snr) was chosen by.     python benchmarks/solver_error.py docs/solvers.png

The Gaussian is N(0.5, s^2); the error is |std / s - 1|, mean over s = 0.3, 0.1 and 0.03 (fine texture)."""

import argparse
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
import matplotlib.pyplot as plt

from ldm_sg.config import ObjectiveConfig
from ldm_sg.guidance.signal import Guidance
from ldm_sg.objective import Objective
from ldm_sg.sampling.schedules import noise_scheduler, objective_of
from ldm_sg.sampling.solvers import make_grid, make_step, solve

SCHEDULES = {
    "churches (scaled_linear, 0.0015 to 0.0155)": ObjectiveConfig(
        schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155
    ),
    "paper's pixels (scaled_linear, 0.0001 to 0.02)": ObjectiveConfig(schedule="scaled_linear"),
    "squaredcos_cap_v2": ObjectiveConfig(kind="v", schedule="squaredcos_cap_v2"),
    "flow": ObjectiveConfig(kind="flow"),
}
SOLVERS = ("ddim", "dpmpp_2m", "unipc")  # euler's step is ddim's; ddpm draws noise
STEPS = (5, 8, 10, 15, 20, 25, 35, 50, 100, 250)
SPREADS = (0.3, 0.1, 0.03)


def error(objective: Objective, solver: str, spacing: str, steps: int) -> float:
    """Of the std, exactly: the solvers are affine here, so two noises tell it."""
    found = []
    for s in SPREADS:

        def denoise(x, t, guidance, s=s):
            alpha, sigma = objective.alpha_sigma(t)
            x0 = 0.5 + s**2 * alpha / (s**2 * alpha**2 + sigma**2) * (x - alpha * 0.5)
            return objective.prediction(x0, x, t)

        noise = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        guidance = Guidance.from_k(torch.zeros(2, dtype=torch.long))
        x = solve(denoise, noise, guidance, objective, make_grid(objective, steps, spacing), make_step(solver))
        found.append(abs((x[1] - x[0]).item() / s - 1))
    return sum(found) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", default=Path("docs/solvers.png"))
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.4), sharey=True)
    for ax, (name, config) in zip(axes, SCHEDULES.items()):
        objective = objective_of(noise_scheduler(config))
        for colour, solver in zip(("tab:orange", "tab:blue", "tab:green"), SOLVERS):
            for style, spacing in (("-", "log_snr"), (":", "trailing")):
                errors = [error(objective, solver, spacing, n) for n in STEPS]
                ax.loglog(STEPS, errors, style, color=colour, label=f"{solver}, {spacing}")
                print(f"{name:48}{solver:10}{spacing:10}" + " ".join(f"{n}: {e:.3f}" for n, e in zip(STEPS, errors)))
        ax.set(title=name, xlabel="evaluations")
        ax.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel("error of the std, mean over s = 0.3, 0.1, 0.03")
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(parser.parse_args().picture, dpi=70)


if __name__ == "__main__":
    main()
