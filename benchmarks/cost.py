"""Measure what the study's four kinds of work cost at several sizes, fit how they grow, and write docs/cost.md.

    python benchmarks/cost.py                      about 5 minutes on 2 cores
    python benchmarks/cost.py --quick --out FILE   tiny sizes: whether it runs
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from benchmarks.run import experiment, machine
from config import Config, load_config
from cost import Phase, measure_units, memory, phases, seconds_of
from data import make_shapes, to_model_range
from fid import InceptionV3, Lite0
from model import UNet
from weighting import loss_weights

ROOT = Path(__file__).parents[1]
TRAININGS = ("E1", "E2", "E4", "E7c", "E8a", "E8b", "E8c", "E9a", "E9b")  # of which all experiments are parts
# Peak dense rates in TFLOP/s, as their vendor states them: fp32 outside tensor cores, and the 16-bit format.
GPUS = {"T4": (8.1, 65), "RTX 4090": (82.6, 165), "A100": (19.5, 312), "H100 SXM": (67, 989)}
UTILISATION, LAUNCH = 0.3, 1e-5  # assumed: part of the peak that such convolutions reach; seconds to start a kernel


@cache
def step_flops(base: int) -> int:
    """FLOPs of one image's training step: forward, and twice that backward."""
    net, x = UNet(base), torch.zeros(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        net(x, torch.zeros(1, dtype=torch.int64)).sum().backward()
    return counter.get_total_flops()


@cache
def parameters(base: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(base).parameters())


@cache
def kernels(base: int) -> int:
    """Operations of a training step that are not views: about as many kernels does a GPU start."""
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += not func.is_view
            return func(*args, **(kwargs or {}))

    config = experiment(base, 1)
    state, diffusion = train.new_state(config, torch.device("cpu"))
    images, w = make_shapes(8), loss_weights(diffusion.snr, "constant").float()
    with Count():
        train.backward(config, state, diffusion, w, images)
    return count + 20  # and the update, whose operations take all parameters at once


# ---- measure and fit ----

def measure(base: int, batch: int, rest: bool) -> dict:
    """Seconds and bytes of training at this size; with `rest`, of a network call per image and of a probe too."""
    config = experiment(base, batch, "curvature.num_probes=2", "eval.features=none", "grid.n=20")
    state, diffusion = train.new_state(config, torch.device("cpu"))
    images, w = make_shapes(128), loss_weights(diffusion.snr, "constant").float()
    x_0, t = to_model_range(images[:batch]), torch.zeros(batch, dtype=torch.int64)
    found = {"base": base, "batch": batch, **memory(state.model, lambda: diffusion.eps_mse(state.model, x_0, t, x_0))}

    def step():
        train.train_step(config, state, diffusion, w, images)

    if rest:
        return found | measure_units(config, step, state.ema, diffusion, images)
    return found | {"step": seconds_of(step, 5, images.device)}


def fit(rows: list[dict], key: str, columns) -> tuple[np.ndarray, float]:
    """Coefficients >= 0 of the columns, least squares of the relative error; and the largest of these errors."""
    rows = [row for row in rows if key in row]
    y, x = np.array([row[key] for row in rows]), np.array([columns(row) for row in rows], dtype=float)
    scale = x.max(axis=0)
    coefficients = nnls(x / scale / y[:, None], np.ones(len(y)))[0] / scale
    return coefficients, float(np.abs(x @ coefficients / y - 1).max())


def step_columns(row: dict) -> list[float]:
    return [1, row["batch"] * step_flops(row["base"]), parameters(row["base"])]


def call_columns(row: dict) -> list[float]:
    return [1, step_flops(row["base"]) / 3]


def probe_columns(row: dict) -> list[float]:
    return [1, row["batch"] * step_flops(row["base"])]


def features(quick: bool) -> dict[str, float]:
    """Seconds per image of the two feature networks."""
    x = make_shapes(2 if quick else 50)
    found = {}
    for network in (Lite0(), InceptionV3()):
        found[network.name] = seconds_of(lambda network=network: network(x), 3, x.device) / len(x)
    return found


# ---- the page ----

def hours(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds > 3600 else f"{seconds / 60:.0f} min"


def flops_of(config: Config, phase: Phase) -> float:
    """Of all times of a phase, without features."""
    image = step_flops(config.model.base_channels)
    each = {"step": config.train.batch_size * image, "call": image / 3, "probe": 2 * config.train.batch_size * image}
    return phase.count * sum(n * each.get(kind, 0) for kind, n in phase.work.items())


def study(unit_of, features_s: dict[str, float]) -> list[str]:
    lines = ["| experiment | training | curvature | samples, grids, profiles | features | all | training FLOPs | "
             "sampling FLOPs |", "|---|---|---|---|---|---|---|---|"]
    total = np.zeros(5)
    for exp in TRAININGS:
        config = load_config(exp)
        unit = unit_of(config) | {"feature": features_s[config.eval.features]}
        parts = dict.fromkeys(("step", "probe", "call", "feature"), 0.0)
        for phase in phases(config):
            if phase.name != "statistics":
                for kind, n in phase.work.items():
                    parts[kind] += phase.count * n * unit[kind]
        flops = [sum(flops_of(config, p) for p in phases(config) if (p.name == "train") == trains
                     and p.name != "curvature") for trains in (True, False)]
        seconds = [*parts.values(), sum(parts.values())]
        total += seconds
        lines.append(f"| {exp} | " + " | ".join(map(hours, seconds)) + " | {:.1e} | {:.1e} |".format(*flops))
    return [*lines, "| all nine | " + " | ".join(map(hours, total)) + " | | |"]


def gpus() -> list[str]:
    lines = ["| GPU | TFLOP/s, fp32 and 16 bit | E1: 50k steps, base 32 | E8c: 5k steps, base 64 | "
             "10,000 samples of E1, fp32 |", "|---|---|---|---|---|"]
    for name, (fp32, half) in GPUS.items():
        times = []
        for exp in ("E1", "E8c"):
            config = load_config(exp)
            base, steps = config.model.base_channels, config.train.total_steps
            arithmetic = config.train.batch_size * step_flops(base) / (UTILISATION * half * 1e12)
            times.append(f"{hours(steps * max(arithmetic, LAUNCH * kernels(base)))} (arithmetic alone "
                         f"{hours(steps * arithmetic)})")
        samples = 10_000 * 50 * step_flops(32) / 3 / (UTILISATION * fp32 * 1e12)
        lines.append(f"| {name} | {fp32:g}, {half:g} | {times[0]} | {times[1]} | {hours(samples)} |")
    return lines


PAGE = """# What the study costs

Written by `python benchmarks/cost.py`; `python train.py --exp EXP --dry-run` measures one experiment where you are.
Here: {machine}, fp32; on a machine that others share, so the lowest of three
passes, each the median of 1 to 7 repeats.

{table}

How it grows (fitted to the table; in brackets the largest relative error of the fit). F is the GFLOP of one image's
training step: {flops}; nearly the square of the channels.

* training step: {step[0]:.1f} ms + {step[1]:.2f} ms x batch x F + {step[2]:.2f} ms per million parameters
  ({errors[0]:.0%}), the second part at {rate:.0f} GFLOP/s;
* network call per image: {call[0]:.1f} ms + {call[1]:.2f} ms x F / 3 ({errors[1]:.0%});
  a sample takes NFE of them, an evaluation n x NFE;
* curvature probe: {probe[0]:.0f} ms + {probe[1]:.2f} ms x batch x F ({errors[2]:.0%}),
  with both traces and the split over t;
* features per image: {inception:.0f} ms of Inception, {lite0:.0f} ms of Lite0;
  the statistics of 50,000 training images once, {statistics[0]} and {statistics[1]};
* a distance at d = 2048: about 1 s, at any n;
* memory: 20 bytes per parameter, and activations of {kept:.2f} MiB x batch x base ({errors[3]:.0%});
  a process of torch takes some 600 MiB before that, most of it libraries. Sampling keeps no activations but those of
  20 images at a time.

## The whole study

Nine trainings hold all experiments (E5 = E7a = the start of E1, E7b = E1, E3 = E6 = the start of E2). Curvature is that
of the experiments named; for E1 and E2 add E5's and E6's. Evaluation as registered: Inception, 5,000 samples per
milestone, 10,000 at the end, NFE 50. Estimates from the fits above, for the same machine:

{study}

Most of it is sampling: a smaller evaluation (`--profile cpu`) is the first thing to save.

## On a GPU: an estimate from FLOPs, not measured on a GPU

Arithmetic at {utilisation:.0%} of the peak rate, but no faster than the host starts kernels: {kernels:,} per training
step at {launch:.0f} microseconds each. At batch 4 that bound is the one that counts, on every GPU:
`--set train.compile=true` is meant for it (CUDA graphs: one launch for many kernels), and several runs side by side.

{gpus}
"""


def page(rows: list[dict], features_s: dict[str, float]) -> str:
    step, step_error = fit(rows, "step", step_columns)
    call, call_error = fit(rows, "call", call_columns)
    probe, probe_error = fit(rows, "probe", probe_columns)
    (kept,), kept_error = fit(rows, "activations", lambda row: [row["batch"] * row["base"]])

    def unit_of(config: Config) -> dict[str, float]:
        size = {"base": config.model.base_channels, "batch": config.train.batch_size}
        return {"step": step @ step_columns(size), "call": call @ call_columns(size),
                "probe": probe @ probe_columns(size)}

    table = ["| base | parameters | batch | training step | network call per image | curvature probe | "
             "weights, gradient, moments, EMA | activations |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        per_image, per_probe = (f"{1e3 * r[key]:.1f} ms" if key in r else "" for key in ("call", "probe"))
        held = r["weights, gradient, two moments, EMA"] / 2**20
        table.append(f"| {r['base']} | {parameters(r['base']):,} | {r['batch']} | {1e3 * r['step']:.0f} ms | "
                     f"{per_image} | {per_probe} | {held:.0f} MiB | {r['activations'] / 2**20:.0f} MiB |")
    m, ms, per_gflop = machine(), 1e3, 1e12
    return PAGE.format(
        machine=f"{m['cpu']}, {m['threads']} threads, {m['instructions']}, torch {m['versions']['torch']}",
        table="\n".join(table), study="\n".join(study(unit_of, features_s)), gpus="\n".join(gpus()),
        flops=", ".join(f"{step_flops(b) / 1e9:.2f} at base {b}" for b in sorted({r["base"] for r in rows})),
        step=step * [ms, per_gflop, ms * 1e6], call=call * [ms, per_gflop], probe=probe * [ms, per_gflop],
        rate=1e-9 / step[1], kept=kept / 2**20, errors=(step_error, call_error, probe_error, kept_error),
        inception=ms * features_s["inception"], lite0=ms * features_s["lite0"],
        statistics=[hours(50_000 * features_s[name]) for name in ("inception", "lite0")],
        utilisation=UTILISATION, kernels=kernels(32), launch=LAUNCH * 1e6)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "cost.md")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    sizes = [(base, batch) for base in (8, 16) for batch in (1, 2)] if args.quick else [
        *((base, batch) for base in (32, 64) for batch in (1, 4, 16, 64)),
        *((base, batch) for base in (96, 128) for batch in (4, 16))]
    passes = [[measure(base, batch, rest=batch in (2, 4)) for base, batch in sizes]
              for _ in range(1 if args.quick else 3)]
    rows = [{key: min(row[key] for row in same) for key in same[0]} for same in zip(*passes, strict=True)]
    args.out.write_text(page(rows, features(args.quick)))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
