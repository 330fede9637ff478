"""Draw samples from a run. The architecture comes from the run, never from flags.

    python sample.py runs/E8c/seed1077 --sampler ddim --nfe 50 --n 64
    python sample.py runs/E8c/seed1077 --step 4000                    from the weights of a milestone
    python sample.py runs/E8c/seed1077 --export-diffusers DIR         no samples: the network, for diffusers
"""

import io
from pathlib import Path

import numpy

import interop
from checkpoint import replace_file
from config import MAX_SAMPLES
from data import grid_png
from diffusion import SAMPLERS
from errors import UserError, argument_parser, run_script
from evaluate import sample_images
from parallel import DEVICE, check_device, precision
from runs import load_run


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dir", type=Path, help="such as runs/E8c/seed1077")
    parser.add_argument("--step", type=int, help="a milestone; the last checkpoint by default")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    parser.add_argument("--nfe", type=int, default=50, help="network calls per sample, 1 to T")
    parser.add_argument("--eta", type=float, help="noise of DDIM: 0 deterministic (the default), 1 as DDPM")
    parser.add_argument("--n", type=int, default=64, help="number of samples")
    parser.add_argument("--seed", type=int, help="of the noise; the run's own by default")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the EMA's")
    parser.add_argument("--npz", action="store_true", help="also save the samples: key arr_0, uint8 (N, 32, 32, 3)")
    parser.add_argument("--out", type=Path, help="folder to write to; RUN_DIR/samples by default")
    parser.add_argument("--device", default=DEVICE, help="cpu, cuda or cuda:N")
    parser.add_argument("--export-diffusers", type=Path, metavar="DIR", help="new folder for diffusers' DDPMPipeline")
    args = parser.parse_args(argv)
    for name in ("sampler", "nfe", "eta", "n", "seed", "npz", "out") if args.export_diffusers else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect with --export-diffusers")

    device = check_device(args.device)
    config, step, model, ema, diffusion = load_run(args.run_dir, device, args.step)
    if args.export_diffusers:
        interop.write(args.export_diffusers, config, model if args.raw else ema, diffusion)
        print(args.export_diffusers)
        return 0
    seed = config.seed if args.seed is None else args.seed
    limits = {"nfe": (args.nfe, 1, diffusion.T), "n": (args.n, 1, MAX_SAMPLES), "seed": (seed, 0, 2**63 - 1),
              "eta": (args.eta or 0, 0, 1)}
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise UserError(f"--{name} {value}: must be from {low} to {high}")
    if args.eta is not None and args.sampler != "ddim":
        raise UserError(f"--eta {args.eta}: only DDIM has it")
    options = {} if args.eta is None else {"eta": args.eta}
    samples = sample_images(model if args.raw else ema, diffusion, args.n, args.sampler, args.nfe, seed,
                            precision(config.eval.amp, device), **options)
    stem = f"step_{step:06d}_{args.sampler}{args.nfe}" + (f"_eta{args.eta:g}" if args.eta else "") + "_raw" * args.raw
    path = (args.out or args.run_dir / "samples") / f"{stem}_n{args.n}_seed{seed}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, grid_png(samples))
    print(path)
    if args.npz:
        npz = io.BytesIO()
        numpy.savez_compressed(npz, samples.permute(0, 2, 3, 1).numpy())
        replace_file(path.with_suffix(".npz"), npz.getvalue())
        print(path.with_suffix(".npz"))
    return 0


if __name__ == "__main__":
    run_script(main)
