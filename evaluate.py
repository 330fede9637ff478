"""What is measured on a model: called by train.py during training, and a command on a run.

    python evaluate.py runs/E8c/seed1077                             per-t profile of its last checkpoint
    python evaluate.py runs/E8c/seed1077 --step 4000                 of a milestone; so for the next four commands
    python evaluate.py runs/E8c/seed1077 --distance --n 1000         distances of fresh samples to the training images
    python evaluate.py runs/E8c/seed1077 --frontier 10,20,50 --n 500 distances over NFE, appended to its results.jsonl
    python evaluate.py runs/E6/seed1077 --curvature                  Hessian traces
    python evaluate.py runs/E6/seed1077 --curvature --probes 256     with more probes, appended to its traces.jsonl
    python evaluate.py --stats cifar10 --n 5000                      reference statistics, floor and ceiling
    python evaluate.py --diffusers DIR --distance --sampler ddim     distances of a network stored by diffusers
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import interop
from checkpoint import lock, replace_file
from config import MAX_SAMPLES, Config, default, load_config
from curvature import rademacher, summarise
from data import grid_png, load_images, to_model_range, to_uint8
from diffusion import SAMPLERS, Diffusion, spaced_timesteps
from distances import Distances, extract_shared
from errors import UserError, argument_parser, run_script
from fid import FEATURES, feature_network, metric_name
from model import UNet
from parallel import DEVICE, check_device, first, from_first, map_shared, precision
from rng import generator
from runs import append_jsonl, load_run, read_jsonl, save_influence, weights_of
from taylor import quadratic_forms

CHUNK = 100           # samples that share one stream of noise
CPU_BATCH = 20        # examples whose activations fit a CPU's caches: at base 64, 1.3 times faster than 100
T_BINS = 8            # of the Hessian trace, over [0, T)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout is off inside; on exit each module has its mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def sample_images(model: UNet, diffusion: Diffusion, n: int, sampler: str, nfe: int, seed: int,
                  precision: str = "fp32", label: str = "samples", **options) -> Tensor:
    """n samples, uint8 (n, 3, 32, 32) on the CPU. A chunk's noise depends only on (seed, chunk) and its size.

    sampler: a key of SAMPLERS, which may take further options (DDIM: eta). precision: "fp32", or "bf16" for the network
    alone. label: of the progress bar. Chunk i starts from the same x_T whatever the model, sampler and nfe, so that two
    arms can be paired sample by sample.
    """
    device = next(model.parameters()).device
    shape = (model.image_channels, model.image_size, model.image_size)
    batch = CPU_BATCH if device.type == "cpu" else CHUNK

    def in_batches(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(*part) for part in zip(x_t.split(batch), t.split(batch), strict=True)])

    def chunk(i: int) -> Tensor:
        x_T = torch.randn(min(CHUNK, n - i * CHUNK), *shape, generator=generator(seed, "x_T", i)).to(device)
        noise = generator(seed, "sampler_noise", i)
        return to_uint8(SAMPLERS[sampler](in_batches, diffusion, x_T, nfe, generator=noise, **options)).cpu()

    with eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat(map_shared(chunk, math.ceil(n / CHUNK), label))


# ---- per-t profile and curvature ----

def profile_timesteps(T: int, kind: str) -> list[int]:
    """Ascending. "even": 21 of them (0, 50, 100, ... 999 at T = 1000). "dense": also every 5 up to 150."""
    even = spaced_timesteps(T, min(21, T)).flip(0).tolist()
    return even if kind == "even" else sorted({*even, *range(0, min(151, T), 5)})


@torch.no_grad()
def per_t_profile(model: UNet, diffusion: Diffusion, images: Tensor, ts: list[int]) -> tuple[list[float], list[float]]:
    """At each t of ts, over held-out images uint8 (N >= 2, 3, 32, 32), dropout off: eps-MSE and slope of channel means.

    The slope is that of the line through (channel mean of x_t, channel mean of eps_hat); see best_mean_slope. At
    equal ts, images and eps are the same for every model, step, arm and seed.
    """
    device = next(model.parameters()).device

    def at(i: int) -> tuple[float, float]:
        eps, total, means = torch.randn(images.shape, generator=generator(0, "profile_eps", i)), 0.0, []

        def watched(x_t: Tensor, t: Tensor) -> Tensor:
            output = model(x_t, t)
            x_bar, output_bar = (a.double().mean(dim=(2, 3)) for a in (x_t, output))  # (B, 3); all below is linear
            means.append((x_bar, diffusion.predict_eps(x_bar, t, output_bar)))
            return output

        for x, e in zip(images.split(CPU_BATCH), eps.split(CPU_BATCH), strict=True):
            t = torch.full((len(x),), ts[i], dtype=torch.int64, device=device)
            mse = diffusion.eps_mse(watched, to_model_range(x.to(device)), t, e.to(device))
            total += mse.double().sum().item()
        x_bar, eps_bar = map(torch.cat, zip(*means, strict=True))
        x_bar -= x_bar.mean(dim=0)
        return total / len(images), ((x_bar * eps_bar).sum() / x_bar.square().sum()).item()

    with eval_mode(model):
        mse, slope = zip(*map_shared(at, len(ts), "per-t profile"), strict=True)
    return list(mse), list(slope)


def best_mean_slope(diffusion: Diffusion, images: Tensor, ts: list[int]) -> list[float]:
    """The slope of channel means of the best linear estimate of eps's channel mean from x_t's, at each t of ts.

    It is cov / var = noise E / (signal^2 V + noise^2 E), where V is the variance of a channel mean over the images and
    E = 1 / (32 * 32) that of eps's. A network that cannot see x_t's channel mean has a slope near 0.
    """
    ac, E = diffusion.alphas_cumprod.cpu()[ts], 1 / images[0, 0].numel()
    V = to_model_range(images).mean(dim=(2, 3)).var(dim=0).mean().item()
    return ((1 - ac).sqrt() * E / (ac * V + (1 - ac) * E)).tolist()


def profile_record(config: Config, step: int, model: UNet, ema: UNet, diffusion: Diffusion, images: Tensor) -> dict:
    """One line of per_t.jsonl: the profiles of raw and EMA weights."""
    ts = profile_timesteps(diffusion.T, config.eval.profile_t)
    record = {"step": step, "n": len(images), "t": ts, "eps_mean_slope_best": best_mean_slope(diffusion, images, ts)}
    for name, network in (("raw", model), ("ema", ema)):
        record[f"eps_mse_{name}"], record[f"eps_mean_slope_{name}"] = per_t_profile(network, diffusion, images, ts)
    return record


def curvature_record(config: Config, step: int, model: UNet, diffusion: Diffusion, images: Tensor) -> dict:
    """One line of curvature.jsonl: Hutchinson traces of the run's loss, weighted and unweighted, dropout off, fp32.

    Probe j has its own images, t, eps and v, the same at every step, in every arm and for every seed. [0, T) is cut
    into P * B equal strata, and one t is drawn from each. Both traces weigh the same quadratic forms v^T H_i v, which
    tells a flatter loss from a smaller weight. t_bins: the mean unweighted trace in each of T_BINS equal ranges of t.
    """
    P, B, T, device = config.curvature.num_probes, config.train.batch_size, diffusion.T, images.device
    params = list(model.parameters())

    def probe(j: int) -> tuple[Tensor, Tensor]:
        rng = generator(0, "curvature", j)
        x_0 = to_model_range(images[torch.randint(len(images), (B,), generator=rng).to(device)])
        stratum = torch.arange(B) * P + j
        t = ((stratum + torch.rand(B, generator=rng, dtype=torch.float64)) * (T / (P * B))).long()
        losses = partial(diffusion.mse, model, x_0, t.to(device), torch.randn(x_0.shape, generator=rng).to(device))
        return quadratic_forms(losses, params, rademacher(params, rng)).cpu(), t

    with eval_mode(model):
        forms, t = (torch.stack(parts) for parts in zip(*map_shared(probe, P, "curvature"), strict=True))  # each (P, B)
    w = weights_of(config, diffusion).cpu()
    record = {"step": step, "num_probes": P, "batch_size": B,
              "curvature/snr_mean_samples": diffusion.snr.cpu()[t].mean(dim=1).tolist()}
    for name, values in (("hutch_trace", w[t] * forms), ("hutch_trace_unweighted", forms)):
        trace = summarise(values.mean(dim=1).tolist())
        record |= {f"curvature/{name}_{key}": value for key, value in trace._asdict().items()}
    bins = [forms[t * T_BINS // T == b] for b in range(T_BINS)]
    record["curvature/hutch_trace_t_bins"] = [part.mean().item() if len(part) else None for part in bins]
    return record


# ---- distances ----

def logged(path: Path, point: dict, make: Callable[[], dict]) -> dict:
    """The line of a log that has all items of `point`. If there is none, make() completes it and it is appended."""
    line = next((r for r in from_first(lambda: read_jsonl(path)) if point.items() <= r.items()), None)
    if line is None:
        line = point | make()
        if first():
            append_jsonl(path, line)
    return line


def save_grid(run_dir: Path, name: str, images: Tensor) -> None:
    """Write uint8 images (n, 3, H, W) to RUN_DIR/grids/NAME.png, unless it is there."""
    path = run_dir / "grids" / f"{name}.png"
    if first() and not path.exists():
        path.parent.mkdir(exist_ok=True)
        replace_file(path, grid_png(images))


def measure_points(points: list[dict], distances: Distances, ema: UNet, diffusion: Diffusion, seed: int,
                   run_dir: Path | None = None, means: dict | None = None, grid: int = 0) -> Iterator[dict]:
    """The results line of each point, which has at least sampler, nfe, n and precision; samples are drawn with `seed`.

    With a run_dir, lines that its results.jsonl holds are not measured again, and new ones, with `means`, are appended;
    with a `grid`, so many of the samples are also saved as one.
    """
    @lru_cache(maxsize=2)
    def draw(sampler: str, nfe: int, n: int, precision: str) -> tuple[Tensor, np.ndarray]:
        samples = sample_images(ema, diffusion, n, sampler, nfe, seed, precision, f"{sampler} {nfe}")
        return samples, extract_shared(distances.network, samples)

    def fields(point: dict) -> dict:
        sampler, nfe, n = point["sampler"], point["nfe"], point["n"]
        longest = max(p["n"] for p in points if (p["sampler"], p["nfe"]) == (sampler, nfe))
        drawn = n if n % CHUNK else longest  # the first whole chunks do not depend on how many follow
        samples, features = draw(sampler, nfe, drawn, point["precision"])
        record, estimates = distances.measure(samples[:n], features[:n])
        if run_dir and grid:
            save_grid(run_dir, f"step_{point['step']:06d}_{sampler}{nfe}", samples[:grid])
        if run_dir and first():
            save_influence(run_dir, point | record, estimates)
        return record | (means or {})

    for point in points:
        make = partial(fields, point)
        yield logged(run_dir / "results.jsonl", point, make) if run_dir else point | make()


def measure(config: Config, run_dir: Path, step: int, model: UNet, ema: UNet, diffusion: Diffusion, images: Tensor,
            held_out: Tensor, distances: Distances | None) -> list[dict]:
    """During training: write to run_dir what is due at this step and not there yet. Changes nothing else.

    Returns the lines of results.jsonl with distances. images, held_out: uint8 (N, 3, 32, 32), for the curvature and
    for the per-t profile.
    """
    ev, grid, last = config.eval, config.grid, step == config.train.total_steps
    used = precision(ev.amp, images.device)
    if config.curvature.every and step % config.curvature.every == 0:
        logged(run_dir / "curvature.jsonl", {"step": step},
               lambda: curvature_record(config, step, model, diffusion, images))
    name = f"step_{step:06d}_{grid.sampler}{grid.nfe}"
    if (step % grid.every == 0 or last) and not from_first((run_dir / "grids" / f"{name}.png").exists):
        save_grid(run_dir, "data", images[:grid.n])
        save_grid(run_dir, name, sample_images(ema, diffusion, grid.n, grid.sampler, grid.nfe, config.seed, used))
    due = [("milestone", ev.sampler, ev.n_samples)] if step % ev.every == 0 else []
    due += [("final", sampler, ev.final_n_samples) for sampler in ev.final_samplers] if last else []
    if not due:
        return []
    profile = logged(run_dir / "per_t.jsonl", {"step": step},
                     lambda: profile_record(config, step, model, ema, diffusion, held_out))
    means = {f"val/{key}": sum(profile[key]) / len(profile[key]) for key in ("eps_mse_raw", "eps_mse_ema")}
    if distances is None:
        for kind in dict.fromkeys(kind for kind, _, _ in due):
            logged(run_dir / "results.jsonl", {"step": step, "kind": kind}, lambda: means)
        return []
    points = [{"step": step, "kind": kind, "sampler": sampler, "nfe": ev.nfe, "n": n, "precision": used,
               "features": ev.features} for kind, sampler, n in due]
    return list(measure_points(points, distances, ema, diffusion, config.seed, run_dir, means, grid.n))


def sentence(r: dict) -> str:
    """The Frechet distance of a line of results.jsonl, with what it is to be held against."""
    key = metric_name("fd", r["features"])
    context = [f"{what} {r[f'{key}_{end}']:.1f}" for end, what in (("floor", "training images"), ("ceiling", "noise"))
               if r[f"{key}_{end}"] is not None]
    return (f"{r['sampler'].upper()} {r['nfe']}, n = {r['n']:,}: {key} {r[key]:.1f} +- {r[f'{key}_stderr']:.1f}"
            + f" ({', '.join(context)})" * bool(context))


# ---- the command ----

def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dir", type=Path, nargs="?", help="such as runs/E8c/seed1077")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--distance", action="store_true", help="sample from the EMA weights and measure")
    what.add_argument("--frontier", type=integers, metavar="NFE,NFE", help="distances at each NFE, appended to the run")
    what.add_argument("--curvature", action="store_true", help="Hessian traces at the raw weights")
    what.add_argument("--stats", choices=["cifar10", "shapes"], help="make the statistics of these images; no RUN_DIR")
    parser.add_argument("--diffusers", type=Path, metavar="DIR", help="a network for CIFAR-10, in place of RUN_DIR")
    parser.add_argument("--probes", type=int, help="of --curvature; its line then goes to the run's traces.jsonl")
    parser.add_argument("--step", type=int, help="a milestone of the run; its last checkpoint by default")
    parser.add_argument("--seed", type=int, help="of the samples of --distance; the run's by default")
    parser.add_argument("--features", choices=FEATURES, help="the run's by default, else inception")
    parser.add_argument("--weights", help="Inception weights; torch.hub's cache or download by default")
    parser.add_argument("--sampler", choices=SAMPLERS, help="the run's by default; of --frontier all")
    parser.add_argument("--nfe", type=int, help="the run's by default")
    parser.add_argument("--n", type=int, help="samples; that of the run's milestones by default, 5000 with --stats")
    # Not the run's paths by default: a run may come from somebody else, and these folders are written to.
    parser.add_argument("--data-root", default=default("data.root"), help="folder of CIFAR-10; default %(default)s")
    parser.add_argument("--stats-root", help=f"folder of reference statistics; default {default('eval.stats_root')}")
    parser.add_argument("--device", default=DEVICE, help="cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if [args.run_dir, args.stats, args.diffusers].count(None) != 2:
        parser.error("give either RUN_DIR, --stats or --diffusers")
    if args.diffusers and not args.distance:
        parser.error("--diffusers: give --distance too")
    samples = args.distance or args.frontier
    reads = dict.fromkeys(["features", "weights", "n", "stats_root"], samples or args.stats)
    reads |= {"nfe": args.distance, "seed": args.distance, "sampler": samples, "step": args.run_dir,
              "probes": args.curvature,
              "weights": (samples or args.stats) and args.features in (None, "inception")}
    for name, read in reads.items():
        if getattr(args, name) is not None and not read:
            parser.error(f"--{name.replace('_', '-')} has no effect here; see the examples of --help")
    if args.n is not None and not 2 <= args.n <= MAX_SAMPLES:
        parser.error(f"--n {args.n}: must be from 2 to {MAX_SAMPLES}")
    if args.probes is not None and args.probes < 2:
        parser.error(f"--probes {args.probes}: must be 2 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device, stats_root = check_device(args.device), args.stats_root or default("eval.stats_root")
    if args.stats:
        network = feature_network(args.features or "inception", args.weights, device)
        images = [load_images(args.stats, args.data_root, train) for train in (True, False)]
        distances, n = Distances(network, args.stats, *images, stats_root), args.n or 5000
        print(json.dumps({"n": n, **distances.origin, "reference_n": distances.reference.n, **distances.context(n)}))
        return 0
    if args.diffusers:
        config, step = load_config("E1"), None  # the defaults of eval.* and seed, on CIFAR-10
        ema, diffusion = interop.read(args.diffusers, device)
    else:
        config, step, model, ema, diffusion = load_run(args.run_dir, device, args.step)
    ev = config.eval
    train, test = (load_images(config.data.name, args.data_root, split) for split in (True, False))
    if args.curvature and args.probes is None:
        print(json.dumps(curvature_record(config, step, model, diffusion, train.to(device))))
        return 0
    if args.curvature:
        config = dataclasses.replace(config, curvature=dataclasses.replace(config.curvature, num_probes=args.probes))
        make = partial(curvature_record, config, step, model, diffusion, train.to(device))
        with lock(args.run_dir):
            print(json.dumps(logged(args.run_dir / "traces.jsonl", {"step": step, "num_probes": args.probes}, make)))
        return 0
    if not (args.distance or args.frontier):
        print(json.dumps(profile_record(config, step, model, ema, diffusion, test[:ev.profile_images])))
        return 0
    features, n = args.features or ev.features, args.n or ev.n_samples
    if features == "none":
        raise UserError(f"{args.run_dir}: its config has eval.features = none; give --features lite0 or inception")
    if args.weights and features != "inception":
        raise UserError(f"--weights are Inception's; {features} has its own")
    nfes = args.frontier or [ev.nfe if args.nfe is None else args.nfe]
    if min(nfes) < 1 or max(nfes) > diffusion.T:
        raise UserError(f"NFE {', '.join(map(str, nfes))}: must be from 1 to T = {diffusion.T}")
    network = feature_network(features, args.weights or default("eval.inception_weights"), device)
    distances = Distances(network, config.data.name, train, test, stats_root)
    seed = config.seed if args.seed is None else args.seed
    samplers = [args.sampler] if args.sampler else SAMPLERS if args.frontier else [ev.sampler]
    named = {"step": step, "kind": "frontier"} if args.frontier else {"step": step, "seed": seed}
    named = {"diffusers": str(args.diffusers), "seed": seed} if args.diffusers else named
    points = [{**named, "sampler": sampler, "nfe": nfe, "n": n, "features": features,
               "precision": precision(ev.amp, device)} for sampler, nfe in product(samplers, nfes)]
    run_dir = args.run_dir if args.frontier else None
    with lock(run_dir) if run_dir else nullcontext():
        for line in measure_points(points, distances, ema, diffusion, seed, run_dir):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
