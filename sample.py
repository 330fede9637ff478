"""Draw samples from a finished or unfinished run. The architecture comes from the run, never from flags.

    python sample.py runs/E8c/seed1077 --sampler ddim --nfe 50 --n 64
"""

import argparse
import io
from pathlib import Path

import numpy

from checkpoint import replace_file
from config import MAX_SAMPLES
from data import grid_png
from evaluate import RunError, add_device_option, check_device, load_run, run_script, sample_images


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # an error is one line
    parser.add_argument("run_dir", type=Path, help="such as runs/E8c/seed1077")
    parser.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddim")
    parser.add_argument("--nfe", type=int, default=50, help="network calls per sample, 1 to T")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 deterministic, 1 as DDPM")
    parser.add_argument("--n", type=int, default=64, help="number of samples")
    parser.add_argument("--seed", type=int, help="of the noise; the run's own by default")
    parser.add_argument("--raw", action="store_true", help="raw weights in place of the EMA's")
    parser.add_argument("--npz", action="store_true", help="also save the samples: key arr_0, uint8 (N, 32, 32, 3)")
    parser.add_argument("--out", type=Path, help="folder to write to; RUN_DIR/samples by default")
    add_device_option(parser)
    args = parser.parse_args(argv)

    config, step, model, ema, diffusion = load_run(args.run_dir, check_device(args.device))
    for name, ok, reason in [("nfe", 1 <= args.nfe <= diffusion.T, f"must be from 1 to T = {diffusion.T}"),
                             ("n", 1 <= args.n <= MAX_SAMPLES, f"must be from 1 to {MAX_SAMPLES}"),
                             ("eta", 0 <= args.eta <= 1, "must be from 0 to 1"),
                             ("eta", args.eta == 0 or args.sampler == "ddim", "is DDIM's; ddpm has none")]:
        if not ok:
            raise RunError(f"--{name} {getattr(args, name)}: {reason}")
    out = args.out or args.run_dir / "samples"
    out.mkdir(parents=True, exist_ok=True)
    seed = config.seed if args.seed is None else args.seed
    samples = sample_images(model if args.raw else ema, diffusion, args.n, args.sampler, args.nfe, seed, args.eta,
                            progress="sampling")

    eta, raw = f"_eta{args.eta:g}" if args.eta else "", "_raw" if args.raw else ""
    stem = f"step_{step:06d}_{args.sampler}{args.nfe}{eta}{raw}_n{args.n}_seed{seed}"
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
