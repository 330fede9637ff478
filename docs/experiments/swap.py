"""Which timesteps make the samples of two arms differ: one network denoises at t >= AT, the other below.

    python docs/experiments/swap.py runs/E5/seed1077 runs/E6/seed1077 > swap.jsonl

Prints a line for each of the four combinations (network of t >= AT, network of t < AT): its distances, their paired
differences from the first run's own samples, and the spread of the samples' colours and their texture. Both runs must
share data, schedule and seed, or be two seeds of one experiment, which are then named such as E1/1078. All samples
start from the noise of the first run's seed. Features are those of its milestones, and so are n, sampler and NFE unless
given.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import default, flatten
from data import load_images
from diffusion import SAMPLERS
from distances import Distances, extract_shared
from errors import UserError, argument_parser, run_script
from evaluate import sample_images
from fid import Estimate, feature_network
from parallel import precision
from runs import load_run, paired_stderr

MUST_AGREE = ["data.name", "diffusion.beta_schedule", "diffusion.num_timesteps", "diffusion.prediction"]


class Switched(nn.Module):
    """A denoiser that is `noisy` at t >= at and `clean` below. As in sampling, all t of a batch must be equal."""

    def __init__(self, noisy: nn.Module, clean: nn.Module, at: int):
        super().__init__()
        self.noisy, self.clean, self.at = noisy, clean, at
        self.image_channels, self.image_size = noisy.image_channels, noisy.image_size

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return (self.noisy if t[0] >= self.at else self.clean)(x_t, t)


def differences(estimates: dict[str, Estimate], own: dict[str, Estimate]) -> dict[str, float]:
    """The paired differences of all metrics from those of the samples `own`, and their standard errors."""
    found = {}
    for name, estimate in estimates.items():
        found[f"{name}_difference"] = estimate.value - own[name].value
        found[f"{name}_difference_stderr"] = paired_stderr(estimate.influence, own[name].influence)
    return found


def swap(run_dirs: list[Path], at: int, n: int | None = None, sampler: str | None = None, nfe: int | None = None,
         data_root: str | None = None, stats_root: str | None = None, milestone: int | None = None) -> list[dict]:
    """The four lines. Raises UserError."""
    loaded = [load_run(run_dir, "cpu", milestone) for run_dir in run_dirs]
    (config, step, _, first, diffusion), (other, other_step, _, second, _) = loaded
    two_seeds = config.exp == other.exp  # of one experiment
    names = [f"{c.exp}/{c.seed}" if two_seeds else c.exp for c in (config, other)]
    differs = [key for key in MUST_AGREE + ["seed"] * (not two_seeds) if flatten(config)[key] != flatten(other)[key]]
    if differs or step != other_step:
        raise UserError(f"{run_dirs[0]} and {run_dirs[1]} differ in {', '.join(differs) or 'their last step'}")
    if len(set(names)) == 1:
        raise UserError(f"{run_dirs[0]} and {run_dirs[1]}: both of {config.exp}; give two experiments, or two seeds")
    if config.eval.features == "none":
        raise UserError(f"{run_dirs[0]}: its config has eval.features = none; give another run first")
    if not 0 < at < diffusion.T:
        raise UserError(f"--at {at}: must be from 1 to T - 1 = {diffusion.T - 1}")
    n = config.eval.n_samples if n is None else n
    if n < 2:
        raise UserError(f"--n {n}: must be 2 or more")
    nfe = config.eval.nfe if nfe is None else nfe
    if not 1 <= nfe <= diffusion.T:
        raise UserError(f"--nfe {nfe}: must be from 1 to T = {diffusion.T}")
    data_root, stats_root = data_root or default("data.root"), stats_root or default("eval.stats_root")
    train, test = (load_images(config.data.name, data_root, split) for split in (True, False))
    network = feature_network(config.eval.features, default("eval.inception_weights"), "cpu")
    distances = Distances(network, config.data.name, train, test, stats_root)
    sampler = sampler or config.eval.sampler
    used = precision(config.eval.amp, torch.device("cpu"))
    arms, lines, own = dict(zip(names, (first, second), strict=True)), [], None
    for noisy, clean in product(arms, arms):
        samples = sample_images(Switched(arms[noisy], arms[clean], at), diffusion, n, sampler, nfe, config.seed,
                                used, f"{noisy}, {clean}")
        record, estimates = distances.measure(samples, extract_shared(network, samples))
        own = own or estimates
        lines.append({"noisy": noisy, "clean": clean, "at": at, "step": step, "seed": config.seed, "sampler": sampler,
                      "nfe": nfe, "precision": used, **record, **differences(estimates, own)})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dirs", type=Path, nargs=2, metavar="RUN_DIR")
    parser.add_argument("--at", type=int, default=130, help="130: the first t with w = 1 at gamma 5, linear betas")
    parser.add_argument("--n", type=int, help="the first run's milestone number by default")
    parser.add_argument("--step", type=int, help="a milestone of both runs; their last checkpoints by default")
    parser.add_argument("--sampler", choices=SAMPLERS)
    parser.add_argument("--nfe", type=int, help="network calls per sample, 1 to T")
    parser.add_argument("--data-root", help="folder of CIFAR-10; that of experiments.toml by default")
    parser.add_argument("--stats-root", help="folder of reference statistics; that of experiments.toml by default")
    args = parser.parse_args(argv)
    swap(args.run_dirs, args.at, args.n, args.sampler, args.nfe, args.data_root, args.stats_root, milestone=args.step)
    return 0


if __name__ == "__main__":
    run_script(main)
