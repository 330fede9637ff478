"""What is measured on a model: called by train.py at milestones, and a command on a finished run.

    python evaluate.py runs/E8c/seed1077                             per-t profile of its last checkpoint
    python evaluate.py runs/E8c/seed1077 --distance --n 1000         Frechet distance and KID of fresh samples
    python evaluate.py runs/E8c/seed1077 --frontier 10,20,50 --n 500 distances over NFE, appended to its results.jsonl
    python evaluate.py runs/E6/seed1077 --against runs/E5/seed1077   paired differences of what both have measured
    python evaluate.py runs/E6/seed1077 --curvature                  Hessian traces of its last checkpoint
    python evaluate.py --stats cifar10 --n 5000                      reference statistics, floor and ceiling
"""

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import CheckpointError, append_jsonl, load_checkpoint, lock, read_jsonl, replace_file
from config import MAX_SAMPLES, Config, ConfigError, config_from_dict, one_line
from curvature import quadratic_forms, rademacher, summarise
from data import DataError, load_images, to_model_range, to_uint8
from diffusion import BETAS, Diffusion, ddim_sample, ddpm_sample, spaced_timesteps
from fid import (
    Estimate,
    FeatureError,
    FeatureStats,
    extract,
    feature_network,
    frechet_estimate,
    kid_estimate,
    load_npz,
)
from model import UNet
from parallel import PeerError, first, from_first, map_shared
from rng import generator
from weighting import loss_weights

CHUNK = 100           # samples that share one stream of noise
CPU_BATCH = 20        # of a chunk, that a CPU's caches hold the activations of: at base 64, 1.3 times the speed of 100
PROFILE_POINTS = 21   # timesteps of the per-t profile: 0, 50, 100, ... 999 at T = 1000
T_BINS = 8            # of the Hessian trace, over [0, T)
SAMPLE = 10_000       # training images whose features are kept, as KID's reference


class RunError(RuntimeError):
    """A run directory that is missing or not one; one line."""


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises RunError."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise RunError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise RunError(f"{path}: not a JSON object")
    return content


def build(config: Config, device) -> tuple[UNet, Diffusion]:
    """The network (weights from torch's global generator) and the schedule of a config."""
    model = UNet(**dataclasses.asdict(config.model)).to(device, memory_format=torch.channels_last)
    betas = BETAS[config.diffusion.beta_schedule](config.diffusion.num_timesteps)
    return model, Diffusion(betas.to(device))


def another_version(run_dir: Path, error: Exception) -> RunError:
    """The error for a checkpoint that is whole and yet not what this code writes."""
    return RunError(f"{run_dir}: its checkpoint is of another version of this code ({type(error).__name__})")


def saved_config(saved: dict, run_dir: Path) -> Config:
    """The config that a checkpoint holds. Raises RunError, ConfigError."""
    if not isinstance(saved.get("config"), dict):
        raise RunError(f"{run_dir}: its checkpoint holds no config: not one of this code")
    return config_from_dict(saved["config"], str(run_dir))


def load_run(run_dir: Path, device) -> tuple[Config, int, UNet, UNet, Diffusion]:
    """(config, step, raw model, EMA model, diffusion) of a run's newest checkpoint, both models in eval mode.

    Raises RunError where run_dir is no run directory, CheckpointError where it holds no good checkpoint.
    """
    if not (run_dir / "checkpoints").is_dir():
        raise RunError(f"{run_dir}: not a run directory with checkpoints; give one such as runs/smoke/seed1077")
    state = load_checkpoint(run_dir / "checkpoints", device, warn=lambda line: print(line, file=sys.stderr))
    config = saved_config(state, run_dir)
    model, diffusion = build(config, device)
    ema = copy.deepcopy(model)
    try:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    except (KeyError, RuntimeError) as error:
        raise another_version(run_dir, error) from error
    return config, state["step"], model.eval(), ema.eval(), diffusion


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, every module's mode as before outside."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def in_batches(model: UNet) -> Callable[[Tensor, Tensor], Tensor]:
    """The model, called on CPU_BATCH examples at a time where it is on a CPU."""
    if next(model.parameters()).device.type != "cpu":
        return model
    return lambda x_t, t: torch.cat([model(*part) for part in zip(x_t.split(CPU_BATCH), t.split(CPU_BATCH),
                                                                  strict=True)])


def sample_images(model: UNet, diffusion: Diffusion, n: int, sampler: str, nfe: int, seed: int, eta: float = 0.0,
                  progress: str | None = None) -> Tensor:
    """n samples, uint8 (n, 3, 32, 32) on the CPU, drawn in chunks whose noise depends only on (seed, chunk).

    sampler: "ddpm" or "ddim" (eta is DDIM's). Chunk i starts from the same x_T whatever the model, sampler and nfe,
    so two arms of a comparison can be paired sample by sample. progress: label of a bar, or None for no bar.
    """
    if sampler not in ("ddpm", "ddim"):
        raise ValueError(f"sampler {sampler!r}: must be 'ddpm' or 'ddim'")
    device = next(model.parameters()).device
    shape = (model.image_channels, model.image_size, model.image_size)
    sample = partial(ddim_sample, eta=eta) if sampler == "ddim" else ddpm_sample

    def chunk(i: int) -> Tensor:
        x_T = torch.randn(min(CHUNK, n - i * CHUNK), *shape, generator=generator(seed, "x_T", i)).to(device)
        x_0 = sample(in_batches(model), diffusion, x_T, nfe, generator=generator(seed, "sampler_noise", i))
        return to_uint8(x_0).cpu()

    with eval_mode(model):
        return torch.cat(map_shared(chunk, math.ceil(n / CHUNK), progress))


def extract_shared(network: nn.Module, images: Tensor, progress: str | None = None) -> np.ndarray:
    """Features of uint8 images (N, 3, H, W), float32 (N, network.dim), a chunk of images at a time."""
    chunks = images.split(CHUNK)
    return torch.cat(map_shared(lambda i: extract(network, chunks[i]), len(chunks), progress)).numpy()


@torch.no_grad()
def per_t_profile(model: UNet, diffusion: Diffusion, images: Tensor) -> tuple[list[int], list[float]]:
    """(t, mse): the mean unweighted eps-MSE over held-out images uint8 (N, 3, 32, 32) at each of a grid of t.

    Image, t and eps are the same for every model, step, arm and seed, and dropout is off: a fixed measuring stick.
    """
    device = next(model.parameters()).device
    ts = spaced_timesteps(diffusion.T, min(PROFILE_POINTS, diffusion.T)).flip(0).tolist()

    def mse_at(i: int) -> float:
        eps, total = torch.randn(images.shape, generator=generator(0, "profile_eps", i)), 0.0
        for x, e in zip(images.split(CPU_BATCH), eps.split(CPU_BATCH), strict=True):
            t = torch.full((len(x),), ts[i], dtype=torch.int64, device=device)
            mse = diffusion.eps_mse(model, to_model_range(x.to(device)), t, e.to(device))
            total += mse.double().sum().item()
        return total / len(images)

    with eval_mode(model):
        return ts, map_shared(mse_at, len(ts))


def profile_record(step: int, model: UNet, ema: UNet, diffusion: Diffusion, images: Tensor) -> dict:
    """One line of per_t.jsonl: the profiles of raw and EMA weights on the same images, t and eps."""
    ts, raw = per_t_profile(model, diffusion, images)
    _, averaged = per_t_profile(ema, diffusion, images)
    return {"step": step, "n": len(images), "t": ts, "eps_mse_raw": raw, "eps_mse_ema": averaged}


def curvature_record(config: Config, step: int, model: UNet, diffusion: Diffusion, images: Tensor) -> dict:
    """One line of curvature.jsonl: Hutchinson traces of the run's loss and of the unweighted loss, dropout off, fp32.

    Probe j has its own images, t, eps and v: functions of (seed, j), the same at every step and in every arm. Each
    probe's examples spread over [0, T), and all P * B examples together fill as many strata of it. The two traces
    weigh the same quadratic forms v^T H_i v, so they tell a flatter loss from a smaller weight; t_bins holds the mean
    trace of the unweighted loss in each of 8 equal ranges of t.
    """
    P, B, T, device = config.curvature.num_probes, config.train.batch_size, diffusion.T, images.device
    params = list(model.parameters())

    def probe(j: int) -> tuple[Tensor, Tensor]:
        rng = generator(config.seed, "curvature", j)
        x_0 = to_model_range(images[torch.randint(len(images), (B,), generator=rng).to(device)])
        stratum = torch.arange(B) * P + j
        t = ((stratum + torch.rand(B, generator=rng, dtype=torch.float64)) * (T / (P * B))).long()
        eps = torch.randn(x_0.shape, generator=rng).to(device)
        v = rademacher(params, rng)
        losses = partial(diffusion.eps_mse, model, x_0, t.to(device), eps)
        return quadratic_forms(losses, params, v).cpu(), t

    with eval_mode(model):
        forms, t = (torch.stack(parts) for parts in zip(*map_shared(probe, P), strict=True))  # each (P, B)
    w = loss_weights(diffusion.snr, config.loss.weighting, config.loss.gamma).cpu()
    snr = diffusion.snr.cpu()[t].mean(dim=1)
    record = {"step": step, "num_probes": P, "batch_size": B, "curvature/snr_mean_samples": snr.tolist()}
    for name, weights in (("hutch_trace", w[t]), ("hutch_trace_unweighted", torch.ones_like(forms))):
        trace = summarise((weights * forms).mean(dim=1).tolist())
        record |= {f"curvature/{name}_{key}": getattr(trace, key) for key in ("mean", "std", "stderr", "samples")}
    bins = t * T_BINS // T
    record["curvature/hutch_trace_t_bins"] = [forms[bins == b].mean().item() if (bins == b).any() else None
                                              for b in range(T_BINS)]
    return record


# ---- distances: samples against the training images ----

class Distances:
    """Frechet distance and KID of samples, with their error, their floor and their ceiling.

    A distance alone means little: at finite n it is biased, and every network has its own scale. So each comes with
    floor (n training images against the statistics of all), floor_test (n test images) and ceiling (n images of
    uniform noise), in the same features and at the same n. Statistics and context are made once and cached in `root`.
    """

    def __init__(self, network: nn.Module, data_name: str, train: Tensor, test: Tensor, root: str | Path):
        """train, test: uint8 (N, 3, 32, 32), of which the first is the reference."""
        self.network, self.data_name, self.train, self.test, self.root = network, data_name, train, test, Path(root)

    @property
    def origin(self) -> dict[str, str]:
        return {"features": self.network.name, "weights_hash": self.network.weights_hash, "data_hash": self.data_hash}

    @cached_property
    def data_hash(self) -> str:
        return hashlib.sha256(self.train.cpu().numpy()).hexdigest()

    def check_cache(self) -> None:
        """Raise RunError or FeatureError now, where the cache would be refused at the first milestone."""
        def check_root():
            nearest = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK):
                raise RunError(f"eval.stats_root = {self.root}: {nearest} is not a folder that can be written to")
            return self.reference_path.exists()

        if from_first(check_root):
            _ = self.reference

    @property
    def reference_path(self) -> Path:
        return self.root / f"{self.data_name}_{self.network.name}_train.npz"

    def _cached_reference(self) -> FeatureStats | None:
        path = self.reference_path
        if not path.exists():
            return None
        stats = FeatureStats.load(path)
        if stats.dim != self.network.dim:
            raise RunError(f"{path}: {stats.dim} features, but {self.network.name} has {self.network.dim}; remove "
                           "it to have it made again, or give another eval.stats_root")
        for key, value in self.origin.items():
            if getattr(stats, key) not in (None, value):
                raise RunError(f"{path}: made with {key} {getattr(stats, key)[:12]}, not {value[:12]}; remove it "
                               "to have it made again, or give another eval.stats_root")
        return stats

    @cached_property
    def reference(self) -> FeatureStats:
        """Statistics of all training images, from the cache or made now. Raises RunError for stale ones."""
        stats = from_first(self._cached_reference)
        if stats is None:
            stats = FeatureStats(self.network.dim, **self.origin)
            features = extract_shared(self.network, self.train, progress=f"{self.reference_path.name}, once")
            for part in np.split(features, range(1000, len(features), 1000)):
                stats.update(part)
            stats.sample = features[:SAMPLE]
            if first():
                self.root.mkdir(parents=True, exist_ok=True)
                stats.save(self.reference_path)
        if stats.sample is None:  # statistics published elsewhere
            stats.sample = extract_shared(self.network, self.train[:SAMPLE], progress="reference of KID")
        return stats

    def context(self, n: int) -> dict[str, float | None]:
        """floor, floor_test, ceiling of the Frechet distance, kid_floor_test and kid_ceiling, at n images."""
        path = self.root / f"{self.data_name}_{self.network.name}_context.json"
        cache = from_first(lambda: read_json(path) if path.exists() else {})
        if cache.get("origin") != self.origin:
            cache = {"origin": self.origin}
        if str(n) not in cache:
            noise = torch.randint(256, (n, *self.train.shape[1:]), dtype=torch.uint8, generator=generator(0, "ceiling"))
            sets = {"floor": self.train[:n], "floor_test": self.test[:n], "ceiling": noise}
            context = dict.fromkeys(["floor", "floor_test", "ceiling", "kid_floor_test", "kid_ceiling"])
            for name, images in sets.items():
                if len(images) == n:  # a set too small for this n has no figure at this n
                    features = extract_shared(self.network, images, progress=f"{name} at n = {n}, once")
                    context[name] = frechet_estimate(features, self.reference).value
                    if name != "floor":  # the training images are themselves KID's reference
                        context[f"kid_{name}"] = kid_estimate(features, self.reference.sample).value
            cache[str(n)] = context
            if first():
                self.root.mkdir(parents=True, exist_ok=True)
                replace_file(path, json.dumps(cache, indent=2).encode())
        return cache[str(n)]

    def measure(self, features: np.ndarray) -> tuple[dict, dict[str, Estimate]]:
        """The fields of a results line for features (n, d), and the two estimates under their metric's name."""
        fd, kid = metric_names(self.network.name)
        estimates = {fd: frechet_estimate(features, self.reference), kid: kid_estimate(features, self.reference.sample)}
        record = {"n": len(features), "features": self.network.name,
                  "reference": f"{self.data_name} train, n = {self.reference.n or 'unknown'}"}
        for name, estimate in estimates.items():
            record |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
        return record | self.context(len(features)), estimates


def metric_names(features: str) -> tuple[str, str]:
    """Names of the Frechet distance and KID: only Inception's are FID and KID as published."""
    return ("val/fid", "val/kid") if features == "inception" else (f"val/fd_{features}", f"val/kid_{features}")


def influence_path(run_dir: Path, r: dict) -> Path:
    """Where the influences of a results line's samples are kept, for paired comparisons."""
    return run_dir / "influence" / f"step_{r['step']:06d}_{r['sampler']}{r['nfe']}_{r['features']}_n{r['n']}.npz"


def save_influence(run_dir: Path, record: dict, estimates: dict[str, Estimate]) -> None:
    path = influence_path(run_dir, record)
    path.parent.mkdir(exist_ok=True)
    npz = io.BytesIO()
    np.savez(npz, **{name: estimate.influence.astype(np.float32) for name, estimate in estimates.items()})
    replace_file(path, npz.getvalue())


def paired_stderr(influence_b: np.ndarray, influence_a: np.ndarray) -> float:
    """Standard error of the difference of two estimates from their influences, sample i of both from the same x_T."""
    pull = influence_b.astype(np.float64) - influence_a
    return float(pull.std(ddof=1) / len(pull)**0.5)


def paired_differences(run_a: Path, run_b: Path) -> list[dict]:
    """b minus a for every distance that both runs have measured alike, with the error of the difference.

    Alike is of one kind, sampler, nfe, n and so on, and at one step, or both at the end of their run. Runs of one seed
    start sample i from the same x_T (common random numbers), so their samples' influences are correlated, and the
    error of the difference is that of the paired influences. Raises RunError where two runs have no measurement in
    common, or different seeds.
    """
    if Run(run_a).seed != Run(run_b).seed:
        raise RunError(f"{run_a} and {run_b} have different seeds, so their samples are not paired")

    def point(r):
        step = None if r["kind"] == "final" else r["step"]
        return step, *(r[key] for key in ("kind", "sampler", "nfe", "n", "features", "reference"))

    others = {point(r): r for r in read_jsonl(run_b / "results.jsonl") if "sampler" in r}
    differences = []
    for a in read_jsonl(run_a / "results.jsonl"):
        b = others.get(point(a)) if "sampler" in a else None
        if b is None:
            continue
        paths = influence_path(run_a, a), influence_path(run_b, b)
        for path in paths:
            if not path.exists():
                raise RunError(f"{path}: missing, so the error of the difference cannot be told")
        influence_a, influence_b = (load_npz(path) for path in paths)
        record = {"step": b["step"], "step_a": a["step"]}
        record |= {key: a[key] for key in ("kind", "sampler", "nfe", "n", "features", "reference")}
        for name in metric_names(a["features"]):
            if not len(influence_a.get(name, ())) == len(influence_b.get(name, ())) == a["n"]:
                raise RunError(f"{paths[0]} and {paths[1]}: do not hold the {a['n']} samples of {name} each")
            record |= {name: b[name] - a[name],
                       f"{name}_stderr": paired_stderr(influence_b[name], influence_a[name])}
        differences.append(record)
    if not differences:
        raise RunError(f"{run_a} and {run_b} have no distance in common")
    return differences


class Run:
    """A run directory, read and never written: config and logs. Raises RunError where `path` is none."""

    def __init__(self, path: Path):
        if not (path / "config.json").exists():
            raise RunError(f"{path}: not a run directory (no config.json)")
        self.path, self.config = path, config_from_dict(read_json(path / "config.json"), str(path / "config.json"))
        self.exp, self.seed = self.config.exp, self.config.seed
        self._logs: dict[str, list[dict]] = {}

    def log(self, name: str) -> list[dict]:
        """The lines of NAME.jsonl. Raises RunError where there are none."""
        if not self.has(name):
            raise RunError(f"{self.path}: no line in {name}.jsonl yet")
        return self._logs[name]

    def has(self, name: str) -> bool:
        """Whether NAME.jsonl has a line."""
        if name not in self._logs:
            self._logs[name] = read_jsonl(self.path / f"{name}.jsonl")
        return bool(self._logs[name])

    @property
    def finished(self) -> bool:
        """Whether it has reached its last step and measured all that was due: timing.jsonl's last line comes last."""
        return self.has("timing") and self.log("timing")[-1]["step"] == self.config.train.total_steps

    def results(self, kind: str) -> list[dict]:
        """The distances measured as kind "milestone", "final" or "frontier"; maybe none."""
        return [r for r in self.log("results") if r["kind"] == kind and "sampler" in r]


def find_runs(root: Path, exp: str) -> list[Run]:
    """The runs of an experiment below root, by seed; none where it was not run. Raises RunError, ConfigError."""
    if not root.is_dir():
        raise RunError(f"{root}: no such folder of runs; give --runs DIR, where DIR/{exp}/seedSEED are run directories")
    return sorted((Run(path.parent) for path in (root / exp).glob("seed*/config.json")), key=lambda run: run.seed)


def frontier(config: Config, step: int, ema: UNet, diffusion: Diffusion, distances: Distances, run_dir: Path, n: int,
             nfes: list[int], samplers: list[str]) -> None:
    """Append to results.jsonl the distances of n samples for each sampler and NFE that it does not hold already."""
    path = run_dir / "results.jsonl"
    for sampler in samplers:
        for nfe in nfes:
            point = {"step": step, "kind": "frontier", "sampler": sampler, "nfe": nfe, "n": n,
                     "features": distances.network.name}
            record = next((r for r in read_jsonl(path) if point.items() <= r.items()), None)
            if record is None:
                samples = sample_images(ema, diffusion, n, sampler, nfe, config.seed, progress=f"{sampler} {nfe}")
                features = extract_shared(distances.network, samples, progress="features")
                measured, estimates = distances.measure(features)
                record = point | measured
                save_influence(run_dir, record, estimates)
                append_jsonl(path, record)
            print(json.dumps(record), flush=True)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")


def check_device(name: str) -> torch.device:
    """The torch.device of that name, or RunError if it is not of this machine.

    On CUDA it also makes convolutions repeatable and fp32 mean fp32: mixed precision is train.amp's business.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("must be cpu, cuda or cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def run_script(main) -> None:
    """Exit with main()'s status; what the user can mend becomes one line on stderr and status 2."""
    sys.stdout.reconfigure(errors="surrogateescape")  # a path need not be UTF-8
    warnings.simplefilter("once")
    warnings.formatwarning = lambda message, *_, **__: f"{Path(sys.argv[0]).name}: warning: {message}\n"
    try:
        sys.exit(main())
    except (ConfigError, DataError, CheckpointError, FeatureError, PeerError, RunError, OSError) as error:
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":  # the same in all processes
            print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def numbers(text: str) -> list[int]:
    """ "10,20" -> [10, 20], for argparse."""
    return [int(part) for part in text.split(",")]


def samplers(text: str) -> list[str]:
    """ "ddim,ddpm" -> ["ddim", "ddpm"], for argparse."""
    names = text.split(",")
    if not set(names) <= {"ddim", "ddpm"}:
        raise argparse.ArgumentTypeError(f"{text!r}: must name ddim, ddpm or both")
    return names


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # an error is one line
    parser.add_argument("run_dir", type=Path, nargs="?", help="such as runs/E8c/seed1077")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--distance", action="store_true", help="sample from the EMA weights and measure")
    what.add_argument("--frontier", type=numbers, metavar="NFE,NFE", help="distances at each NFE, appended to the run")
    what.add_argument("--curvature", action="store_true", help="Hessian traces at the raw weights")
    what.add_argument("--against", type=Path, metavar="RUN_DIR", help="another run of the same seed")
    what.add_argument("--stats", choices=["cifar10", "shapes"], help="make the statistics of these images; no RUN_DIR")
    parser.add_argument("--features", choices=["inception", "lite0"], help="the run's by default, else inception")
    parser.add_argument("--weights", help="Inception weights; the run's by default")
    parser.add_argument("--sampler", choices=["ddpm", "ddim"], help="the run's milestone sampler by default")
    parser.add_argument("--samplers", type=samplers, metavar="S,S", help="of --frontier; ddim,ddpm by default")
    parser.add_argument("--nfe", type=int, help="the run's by default")
    parser.add_argument("--n", type=int, help="number of samples; the run's milestone number by default")
    parser.add_argument("--data-root", help="where CIFAR-10 lies; the run's by default, else data")
    parser.add_argument("--stats-root", help="folder of reference statistics; the run's by default, else stats")
    add_device_option(parser)
    args = parser.parse_args(argv)
    if (args.run_dir is None) == (args.stats is None):
        parser.error("give either RUN_DIR or --stats")
    measures = args.stats or args.distance or args.frontier
    reads = {"--features": measures, "--weights": measures, "--n": measures, "--stats-root": measures,
             "--sampler": args.distance, "--nfe": args.distance, "--samplers": args.frontier,
             "--data-root": not args.against}
    for option, read in reads.items():
        if getattr(args, option[2:].replace("-", "_")) is not None and not read:
            parser.error(f"{option} has no effect here; it goes with --distance, --frontier or --stats")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.against:
        for record in paired_differences(args.against, args.run_dir):
            print(json.dumps(record))
        return 0
    device = check_device(args.device)
    if args.n is not None and not 2 <= args.n <= MAX_SAMPLES:
        raise RunError(f"--n {args.n}: must be from 2 to {MAX_SAMPLES}")
    if args.stats:
        network = feature_network(args.features or "inception", args.weights, device)
        images = [load_images(args.stats, args.data_root or "data", train) for train in (True, False)]
        distances = Distances(network, args.stats, *images, args.stats_root or "stats")
        distances.check_cache()
        n = args.n or 5000
        print(json.dumps({"n": n, **distances.origin, "reference_n": distances.reference.n, **distances.context(n)}))
        return 0

    config, step, model, ema, diffusion = load_run(args.run_dir, device)
    train, test = (load_images(config.data.name, args.data_root or config.data.root, split) for split in (True, False))
    if args.curvature:
        print(json.dumps(curvature_record(config, step, model, diffusion, train.to(device))))
        return 0
    if not (args.distance or args.frontier):
        print(json.dumps(profile_record(step, model, ema, diffusion, test[:config.eval.profile_images])))
        return 0
    features = args.features or config.eval.features
    if features == "none":
        raise RunError(f"{args.run_dir}: its config has eval.features = none; give --features lite0 or inception")
    n, nfe = args.n or config.eval.n_samples, config.eval.nfe if args.nfe is None else args.nfe
    sampler = args.sampler or config.eval.sampler
    for each in args.frontier or [nfe]:
        if not 1 <= each <= diffusion.T:
            option = "--frontier" if args.frontier else "--nfe"
            raise RunError(f"{option} {each}: must be from 1 to T = {diffusion.T}")
    network = feature_network(features, args.weights or config.eval.inception_weights, device)
    distances = Distances(network, config.data.name, train, test, args.stats_root or config.eval.stats_root)
    distances.check_cache()
    if args.frontier:
        with lock(args.run_dir):
            frontier(config, step, ema, diffusion, distances, args.run_dir, n, args.frontier,
                     args.samplers or ["ddim", "ddpm"])
        return 0
    samples = sample_images(ema, diffusion, n, sampler, nfe, config.seed, progress="sampling")
    record, _ = distances.measure(extract_shared(network, samples, progress="features"))
    print(json.dumps({"step": step, "sampler": sampler, "nfe": nfe, **record}))
    return 0


if __name__ == "__main__":
    run_script(main)
