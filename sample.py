"""Draw samples from a run. The architecture comes from the run, never from flags.

    python sample.py runs/E8c/seed1077 --sampler ddim --nfe 50 --n 64
    python sample.py runs/E8c/seed1077 --step 4000                    from the weights of a milestone
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
from diffusion import SAMPLERS, Diffusion
from errors import UserError, run_script
from evaluate import sample_images
from model import UNet
from parallel import DEVICE, check_device
from runs import load_run

FRAMES = 10  # moments of a trajectory, x_T and x_0 among them


def trajectories(model: UNet, diffusion: Diffusion, n: int, *args, **kwargs) -> Tensor:
    """The path of n samples as rows of a picture: uint8 (2 * n * FRAMES, 3, H, W).

    For each sample one row of x_t, from x_T to x_0, and below it the x_0 predicted from each (clipped). The further
    arguments are those of sample_images. The network's calls are only watched, so the samples are the usual ones.
    """
    calls = []

    def watch(_module, inputs, output):
        x_t, t = inputs
        calls.append((to_uint8(x_t).cpu(), to_uint8(diffusion.predict_x0(x_t, t, output)).cpu()))

    handle = model.register_forward_hook(watch)
    try:
        x_0 = sample_images(model, diffusion, n, *args, **kwargs)
    finally:
        handle.remove()
    shown = torch.linspace(0, len(calls) - 1, FRAMES - 1).round().long().tolist()
    rows = [torch.stack([*(calls[i][k] for i in shown), x_0], dim=1) for k in (0, 1)]  # each (n, FRAMES, 3, H, W)
    return torch.stack(rows, dim=1).flatten(0, 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # so that an error is one line
    parser.add_argument("run_dir", type=Path, help="such as runs/E8c/seed1077")
    parser.add_argument("--step", type=int, help="a milestone; the last checkpoint by default")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    parser.add_argument("--nfe", type=int, default=50, help="network calls per sample, 1 to T")
    parser.add_argument("--eta", type=float, help="noise of DDIM: 0 deterministic (the default), 1 as DDPM")
    parser.add_argument("--n", type=int, help="number of samples: 64 by default, 4 with --trajectory")
    parser.add_argument("--trajectory", action="store_true", help="draw the path of each sample, at most 16")
    parser.add_argument("--seed", type=int, help="of the noise; the run's own by default")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the EMA's")
    parser.add_argument("--npz", action="store_true", help="also save the samples: key arr_0, uint8 (N, 32, 32, 3)")
    parser.add_argument("--out", type=Path, help="folder to write to; RUN_DIR/samples by default")
    parser.add_argument("--device", default=DEVICE, help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)

    config, step, model, ema, diffusion = load_run(args.run_dir, check_device(args.device), args.step)
    n = args.n if args.n is not None else 4 if args.trajectory else 64
    seed = config.seed if args.seed is None else args.seed
    limits = {"nfe": (args.nfe, 1, diffusion.T), "n": (n, 1, 16 if args.trajectory else MAX_SAMPLES),
              "seed": (seed, 0, 2**63 - 1), "eta": (args.eta or 0, 0, 1)}
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise UserError(f"--{name} {value}: must be from {low} to {high}")
    if args.eta is not None and args.sampler != "ddim":
        raise UserError(f"--eta {args.eta}: only DDIM has it")
    options = {} if args.eta is None else {"eta": args.eta}
    how = (model if args.raw else ema, diffusion, n, args.sampler, args.nfe, seed)
    if args.trajectory:
        pixels, cols = trajectories(*how, **options), FRAMES
    else:
        pixels, cols = sample_images(*how, progress="sampling", **options), None
    stem = f"step_{step:06d}_{args.sampler}{args.nfe}" + (f"_eta{args.eta:g}" if args.eta else "") + "_raw" * args.raw
    path = (args.out or args.run_dir / "samples") / f"{stem}_n{n}_seed{seed}{'_trajectory' * args.trajectory}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, grid_png(pixels, cols=cols))
    print(path)
    if args.npz and not args.trajectory:
        npz = io.BytesIO()
        numpy.savez_compressed(npz, pixels.permute(0, 2, 3, 1).numpy())
        replace_file(path.with_suffix(".npz"), npz.getvalue())
        print(path.with_suffix(".npz"))
    return 0


if __name__ == "__main__":
    run_script(main)
