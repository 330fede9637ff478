"""Is my run right? The same quantities of a run and of this study's seeds.

    python docs/experiments/check.py runs/E1/seed5    a run beside the bands; status 1 if a value is outside
    python docs/experiments/check.py                  only the bands, as results/bands.md

A band is where another seed is expected with 99 % probability: the t prediction interval of the logarithm. It takes
three seeds. A run is compared with the study's runs of the same training; its seed and number of steps may differ, and
it must be measured with --profile study.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parents[2]))
from checkpoint import replace_file
from config import load_tables
from errors import UserError, argument_parser, run_script
from report import HARMLESS, differing, table
from runs import Run, find_runs

HERE = Path(__file__).parent
EXPS = load_tables("comparisons")["min_snr"]["runs"]
SPANS = (500, 1000), (1000, 2000), (4000, 5000), (9000, 10_000), (49_000, 50_000)  # steps, of training
STEPS = 10_000, 50_000                                                             # of what milestones measure
AT, IMAGES = (0, 10, 50, 130, 200, 500, 999), 512                                  # of the per-t profile
PREFACE = ("What the study's runs have measured, and where one more seed is expected with 99 % probability (band).\n"
           "`python docs/experiments/check.py RUN_DIR` compares a run with it: see\n"
           "[reproducibility](../../reproducibility.md#is-my-run-right).")
DISTANCE = {"kind": "milestone", "sampler": "ddpm", "nfe": 50, "n": 2000, "features": "lite0"}


def training(run: Run, key: str, a: float, b: int) -> list[float]:
    """What the lines of loss.jsonl hold as `key`, from behind step a to step b."""
    return [r[key] for r in run.log("loss") if a < r["step"] <= b]


def training_mean(run: Run, key: str, a: int, b: int) -> float | None:
    reached = any(r["step"] == b for r in run.log("loss"))
    return float(np.mean(training(run, key, a, b))) if reached else None


def held_out(run: Run, step: int, t: int) -> float | None:
    lines = [r for r in run.log("per_t") if (r["step"], r["n"]) == (step, IMAGES) and t in r["t"]]
    return lines[0]["eps_mse_ema"][lines[0]["t"].index(t)] if lines else None


def measured(run: Run, step: int, key: str) -> float | None:
    lines = [r for r in run.log("results") if ({"step": step} | DISTANCE).items() <= r.items()]
    return lines[0][key] if lines else None


MEASURES: dict[str, Callable[[Run], float | None]] = {  # of a run: a number, or None if it has not measured it
    **{f"{key}, mean of steps {a:,} to {b:,}": lambda run, key=key, a=a, b=b: training_mean(run, key, a, b)
       for key in ("train/eps_mse_mean", "train/loss_mean") for a, b in SPANS},
    **{f"held-out eps-MSE of EMA weights at t = {t}, {IMAGES} images, step {step:,}":
       lambda run, step=step, t=t: held_out(run, step, t) for step in STEPS for t in AT},
    **{f"{key}, DDPM 50, n = 2,000, step {step:,}": lambda run, step=step, key=key: measured(run, step, key)
       for step in STEPS for key in ("val/fd_lite0", "val/kid_lite0", "samples/channel_mean_sd",
                                     "samples/neighbour_rms")}}


def band(values: list[float]) -> tuple[float, float] | None:
    """Where one more value is with 99 % probability. None for fewer than three."""
    k, y = len(values), np.log(values)
    if k < 3:
        return None
    half = float(student.ppf(0.995, k - 1) * y.std(ddof=1) * (1 + 1 / k)**0.5)
    return float(np.exp(y.mean() - half)), float(np.exp(y.mean() + half))


def values(runs: list[Run], measure: str) -> list[float]:
    return [x for run in runs if (x := MEASURES[measure](run)) is not None]


def bands(root: Path) -> str:
    """A table of all measures that our runs have, for both arms."""
    rows, arms = [], [find_runs(root, exp) for exp in EXPS]
    for name in MEASURES:
        cells = []
        for runs in arms:
            found = values(runs, name)
            ends = dict.fromkeys(f"{x:.4g}" for x in (min(found), max(found))) if found else ()
            ours = f"{' to '.join(ends)} ({len(found)})" if found else ""
            cells += [ours, "{:.4g} to {:.4g}".format(*limits) if (limits := band(found)) else ""]
        if any(cells):
            rows.append([name, *cells])
    return table(["measure", *(f"{exp}: {what}" for exp in EXPS for what in ("our seeds (number)", "band"))], rows)


def check(run: Run, root: Path) -> tuple[str, int]:
    """A table of what the run has measured, and how many values are outside of their bands. Raises UserError."""
    arms = [[one for one in find_runs(root, exp) if one.path.resolve() != run.path.resolve() and not differing(
        one, run, ("seed", "train.total_steps", *HARMLESS))] for exp in EXPS]
    runs, rows, outside = next(filter(None, arms), None), [], 0
    if not runs:
        raise UserError(f"{run.path}: no run in {root} was trained in the same way; bands are of {' and '.join(EXPS)}")
    for name, measure in MEASURES.items():
        value, limits = measure(run), band(values(runs, name))
        if value is not None and limits:
            inside = limits[0] <= value <= limits[1]
            outside += not inside
            rows.append([name, f"{value:.4g}", "{:.4g} to {:.4g}".format(*limits), "" if inside else "**outside**"])
    if not rows:
        raise UserError(f"{run.path}: nothing to compare yet; the first band is that of 1,000 steps, of three seeds")
    return table(["measure", "this run", "band", ""], rows), outside


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN_DIR")
    parser.add_argument("--runs", type=Path, default=HERE / "results" / "runs", help="our runs: RUNS/EXP/seedSEED")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of bands.md")
    args = parser.parse_args(argv)
    if args.run_dir is None:
        replace_file(args.out / "bands.md", f"{PREFACE}\n\n{bands(args.runs)}\n".encode())
        print(args.out / "bands.md")
        return 0
    text, outside = check(Run(args.run_dir), args.runs)
    print(text, f"\n{outside} outside of the band." if outside else "\nAll inside.", sep="\n")
    return min(outside, 1)


if __name__ == "__main__":
    run_script(main)
