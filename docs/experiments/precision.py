"""What bf16 changes: samples of one network drawn in fp32 and in bf16 from the same noise, and training in both.

    python docs/experiments/precision.py runs/E1/seed1078 --step 10000    draws, and appends to results/precision.jsonl
    python docs/experiments/precision.py                                  writes results/precision.md from the logs

The page compares runs/E5 of the folders results/fp32 and results/bf16 too, and two seeds of E1 in fp32 beside them.
"""

import math
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import parallel
from checkpoint import replace_file
from config import default
from data import load_images
from distances import Distances, extract_shared
from errors import UserError, argument_parser, run_script
from evaluate import sample_images
from fid import Estimate, feature_network, load_npz
from report import table
from runs import Run, append_jsonl, influence_path, load_run, paired_stderr, read_jsonl

RESULTS = Path(__file__).parent / "results"
STEPS = 2000


def draw(run_dir: Path, step: int | None, n: int, ddim_nfe: int | None, data_root: str, stats_root: str,
         log: Path) -> None:
    """Append to log, for each sampler and metric, the distance in fp32 and how bf16 changes it. Raises UserError."""
    config, step, _, ema, _ = loaded = load_run(run_dir, "cpu", step)
    if config.eval.features == "none" or parallel.precision(True, torch.device("cpu")) != "bf16":
        raise UserError(f"{run_dir}: needs eval.features, and a CPU that computes in bf16")
    ddim_nfe = config.grid.nfe if ddim_nfe is None else ddim_nfe
    if n < 2 or not 1 <= ddim_nfe <= loaded.diffusion.T:
        raise UserError(f"--n {n} --ddim-nfe {ddim_nfe}: must be 2 or more, and from 1 to T = {loaded.diffusion.T}")
    train, test = (load_images(config.data.name, data_root, split) for split in (True, False))
    network = feature_network(config.eval.features, default("eval.inception_weights"), "cpu")
    distances = Distances(network, config.data.name, train, test, stats_root)
    for sampler, nfe in {"ddpm": config.eval.nfe, "ddim": ddim_nfe}.items():
        point = {"step": step, "sampler": sampler, "nfe": nfe, "n": n, "features": network.name}

        def estimates(precision: str, point=point) -> dict[str, Estimate]:
            """By metric, from the run's log if it has them."""
            for r in Run(run_dir).log("results"):
                if point.items() | {("precision", precision)} <= r.items() and r["kind"] != "frontier":
                    pulls = load_npz(influence_path(run_dir, r))
                    return {metric: Estimate(r[metric], r[f"{metric}_stderr"], pull) for metric, pull in pulls.items()}
            samples = sample_images(ema, loaded.diffusion, n, point["sampler"], point["nfe"], config.seed, precision,
                                    f"{point['sampler']}, {precision}")
            return distances.estimates(extract_shared(network, samples))

        fp32, bf16 = estimates("fp32"), estimates("bf16")
        for metric, a in fp32.items():
            append_jsonl(log, {"exp": config.exp, "seed": config.seed, **point, "metric": metric, "fp32": a.value,
                               "fp32_stderr": a.stderr, "change": bf16[metric].value - a.value,
                               "change_stderr": paired_stderr(bf16[metric].influence, a.influence)})


def sampling(lines: list[dict]) -> str:
    """The table of draw()'s lines, and what follows from the rule."""
    rows = [[f"{r['exp']}, seed {r['seed']}, {r['step']:,} steps", f"{r['sampler'].upper()} {r['nfe']}",
             f"{r['n']:,}", r["metric"], f"{r['fp32']:.4g} ± {r['fp32_stderr']:.2g}",
             f"{r['change']:+.2g} ± {r['change_stderr']:.2g}", f"{abs(r['change']) / r['fp32_stderr']:.2f}"]
            for r in lines]
    above = sum(abs(r["change"]) >= r["fp32_stderr"] / 3 for r in lines)
    return "\n\n".join([
        table(["network", "sampler, NFE", "n", "distance", "fp32", "bf16 - fp32, paired", "/ sampling error"], rows),
        f"bf16 becomes the default of sampling if no change reaches a third of the sampling error. {above} of "
        f"{len(lines)} do" + ("." if not above else ", so `eval.amp` stays false.")])


def training(pairs: dict[str, tuple[Run, Run]]) -> str:
    """The table of ln(b / a) of train/eps_mse_mean over the log lines up to STEPS: its mean and the sd of a line."""
    rows = []
    for name, runs in pairs.items():
        a, b = ({r["step"]: r["train/eps_mse_mean"] for r in run.log("loss") if r["step"] <= STEPS} for run in runs)
        change = [100 * math.log(b[step] / a[step]) for step in sorted(a.keys() & b.keys())]
        if len(change) < 2:
            raise UserError(f"{runs[0].path} and {runs[1].path} share no two log lines up to step {STEPS}")
        rows.append([name, str(len(change)), f"{fmean(change):+.2f} %", f"{stdev(change):.2f} %"])
    return table(["training eps-MSE", "lines of 100 steps", "mean change", "sd of a line's change"], rows)


def page(results: Path) -> str:
    fp32, bf16 = (Run(results / p / "E5" / "seed1078") for p in ("fp32", "bf16"))
    seeds = Run(results / "runs" / "E1" / "seed1077"), Run(results / "runs" / "E1" / "seed1078")
    return "\n\n".join([
        "# What bf16 changes", "Written by `python docs/experiments/precision.py`.", "## Sampling",
        "Both precisions start from the same noise. The sampling error is that of n samples in fp32.",
        sampling(read_jsonl(results / "precision.jsonl")), "## Training",
        f"Over the first {STEPS:,} steps at base 32. A line is the mean of 100 steps.",
        training({"E5, seed 1078: bf16 against fp32": (fp32, bf16),
                  "E1 in fp32: seed 1078 against 1077": seeds})]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--ddim-nfe", type=int, help="that of the run's grids by default; DDPM's is that of milestones")
    parser.add_argument("--step", type=int, help="a milestone; the last checkpoint by default")
    parser.add_argument("--data-root", default=default("data.root"), help="folder of CIFAR-10; default %(default)s")
    parser.add_argument("--stats-root", default=default("eval.stats_root"), help="folder of reference statistics")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the log and the page")
    args = parser.parse_args(argv)
    if args.run_dir:
        draw(args.run_dir, args.step, args.n, args.ddim_nfe, args.data_root, args.stats_root,
             args.out / "precision.jsonl")
    else:
        replace_file(args.out / "precision.md", page(args.out).encode())
    return 0


if __name__ == "__main__":
    run_script(main)
