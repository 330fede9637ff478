"""Draw samples from a finished or unfinished run. The architecture comes from the run, never from flags.

    python sample.py runs/E8c/seed1077 --sampler ddim --nfe 50 --n 64
    python sample.py runs/E8c/seed1077 --trajectory --n 4             the path of each sample from x_T to x_0
"""

import argparse
import io
from pathlib import Path

import numpy
import torch
from torch import Tensor

from checkpoint import replace_file
from config import MAX_SAMPLES
from data import grid_png, to_uint8
from diffusion import Diffusion
from evaluate import RunError, add_device_option, check_device, load_run, run_script, sample_images
from model import UNet

FRAMES = 10  # moments of a trajectory, x_T and x_0 among them


def trajectories(model: UNet, diffusion: Diffusion, n: int, *args, **kwargs) -> Tensor:
    """The path of n samples as rows of a picture: uint8 (2 * n * FRAMES, 3, H, W).

    For each sample one row of x_t, from x_T to x_0, and below it what the network makes of it: x_0_hat, clipped. The
    further arguments are those of sample_images. It watches the network at work, so the samples are the usual ones.
    """
    calls = []

    def watch(_module, inputs, eps_hat):
        x_t, t = inputs
        calls.append((to_uint8(x_t).cpu(), to_uint8(diffusion.predict_x0(x_t, t, eps_hat)).cpu()))

    handle = model.register_forward_hook(watch)
    try:
        x_0 = sample_images(model, diffusion, n, *args, **kwargs)
    finally:
        handle.remove()
    shown = torch.linspace(0, len(calls) - 1, FRAMES - 1).round().long().tolist()
    x_t = torch.stack([*(calls[i][0] for i in shown), x_0], dim=1)                # (n, FRAMES, 3, H, W)
    x_0_hat = torch.stack([*(calls[i][1] for i in shown), x_0], dim=1)
    return torch.stack([x_t, x_0_hat], dim=1).flatten(0, 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # an error is one line
    parser.add_argument("run_dir", type=Path, help="such as runs/E8c/seed1077")
    parser.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddim")
    parser.add_argument("--nfe", type=int, default=50, help="network calls per sample, 1 to T")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 deterministic, 1 as DDPM")
    parser.add_argument("--n", type=int, help="number of samples: 64 by default, 4 of --trajectory")
    parser.add_argument("--trajectory", action="store_true",
                        help="draw the path of each sample: a row of x_t, and below it the x_0 predicted from each")
    parser.add_argument("--seed", type=int, help="of the noise; the run's own by default")
    parser.add_argument("--raw", action="store_true", help="raw weights in place of the EMA's")
    parser.add_argument("--npz", action="store_true", help="also save the samples: key arr_0, uint8 (N, 32, 32, 3)")
    parser.add_argument("--out", type=Path, help="folder to write to; RUN_DIR/samples by default")
    add_device_option(parser)
    args = parser.parse_args(argv)
    if args.trajectory and args.npz:
        parser.error("--npz saves samples, --trajectory their paths; give one of them")
    args.n = args.n if args.n is not None else 4 if args.trajectory else 64

    config, step, model, ema, diffusion = load_run(args.run_dir, check_device(args.device))
    for name, ok, reason in [("nfe", 1 <= args.nfe <= diffusion.T, f"must be from 1 to T = {diffusion.T}"),
                             ("n", 1 <= args.n <= MAX_SAMPLES, f"must be from 1 to {MAX_SAMPLES}"),
                             ("n", args.n <= 16 or not args.trajectory, "of --trajectory must be at most 16"),
                             ("seed", args.seed is None or 0 <= args.seed < 2**63, "must be from 0 to 2^63 - 1"),
                             ("eta", 0 <= args.eta <= 1, "must be from 0 to 1"),
                             ("eta", args.eta == 0 or args.sampler == "ddim", "is DDIM's; ddpm has none")]:
        if not ok:
            raise RunError(f"--{name} {getattr(args, name)}: {reason}")
    out = args.out or args.run_dir / "samples"
    out.mkdir(parents=True, exist_ok=True)
    seed = config.seed if args.seed is None else args.seed
    network, how = model if args.raw else ema, (args.n, args.sampler, args.nfe, seed, args.eta)
    eta, raw = f"_eta{args.eta:g}" if args.eta else "", "_raw" if args.raw else ""
    stem = f"step_{step:06d}_{args.sampler}{args.nfe}{eta}{raw}_n{args.n}_seed{seed}"
    if args.trajectory:
        path = out / f"{stem}_trajectory.png"
        replace_file(path, grid_png(trajectories(network, diffusion, *how), cols=FRAMES))
        print(path)
        return 0
    samples = sample_images(network, diffusion, *how, progress="sampling")
    replace_file(out / f"{stem}.png", grid_png(samples))
    print(out / f"{stem}.png")
    if args.npz:
        npz = io.BytesIO()
        numpy.savez_compressed(npz, samples.permute(0, 2, 3, 1).numpy())
        replace_file(out / f"{stem}.npz", npz.getvalue())
        print(out / f"{stem}.npz")
    return 0


if __name__ == "__main__":
    run_script(main)
