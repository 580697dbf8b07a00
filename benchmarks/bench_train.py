"""Training images/s of one network: fp32 and bf16, with and without channels-last and torch.compile, side by side.

python benchmarks/bench_train.py [--model demo] [--latent 8,8,8] [--batch 64] [--device auto] [--compile]"""

import argparse
import itertools
import time

import torch

from ldm_sg.config import ObjectiveConfig, model_config
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.hardware import pick_device
from ldm_sg.models.unet import make_unet
from ldm_sg.sampling.schedules import noise_scheduler, objective_of


def step_maker(
    model: str, shape: tuple[int, int, int], batch: int, device: torch.device, bf16: bool, last: bool, comp: bool
):
    """One training step of a fresh network as a function without arguments."""
    torch.manual_seed(0)
    net = make_unet(model_config(model), GuidanceSpec(num_labels=32), shape).to(device)
    if last:
        net.unet.to(memory_format=torch.channels_last)
    if comp:
        net.unet.compile()
    objective = objective_of(noise_scheduler(ObjectiveConfig())).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=device.type == "cuda")
    x0, noise = torch.randn(2, batch, *shape, device=device)
    guidance = Guidance.from_k(torch.arange(batch, device=device) % 32)
    t = torch.arange(batch, device=device) * 7 % 1000

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            prediction = net(objective.add_noise(x0, noise, t), t, guidance)
        objective.loss(prediction, x0, noise, t).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--latent", default="8,8,8")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile (minutes to warm up)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = pick_device(args.device)
    shape = tuple(map(int, args.latent.split(",")))
    variants = list(itertools.product([False, True], [False, True], [False, True] if args.compile else [False]))
    steps = {v: step_maker(args.model, shape, args.batch, device, *v) for v in variants}
    for step in steps.values():
        step()
        step()
    best = dict.fromkeys(variants, 0.0)
    for _ in range(args.rounds):  # interleaved: a noisy neighbour hits all variants alike; the best round counts
        for variant, step in steps.items():
            start = time.perf_counter()
            for _ in range(3):
                step()
            best[variant] = max(best[variant], 3 * args.batch / (time.perf_counter() - start))
    print(
        f"{args.model}, latents {args.latent}, batch {args.batch}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("| precision | channels-last | compile | images/s |\n| --- | --- | --- | --- |")
    for (bf16, last, comp), rate in best.items():
        print(f"| {'bf16' if bf16 else 'fp32'} | {'yes' if last else 'no'} | {'yes' if comp else 'no'} | {rate:,.0f} |")


if __name__ == "__main__":
    main()
