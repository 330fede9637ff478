"""A run directory: start or resume it, its logs and environment, find and read it, compare two of them.

runs/E8c/seed1077/ holds config.json, env.json, loss.jsonl, results.jsonl, per_t.jsonl, curvature.jsonl, timing.jsonl,
checkpoints/, grids/, influence/, and done.json once all is measured; traces.jsonl if evaluate.py --probes was called.
"""

import copy
import dataclasses
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import LAST, LOCK, load_checkpoint, load_file, replace_file, synced
from config import PATHS, SETTABLE, Config, config_from_dict, flatten
from diffusion import BETAS, Diffusion
from errors import UserError
from fid import METRICS, Estimate, load_npz, metric_name
from model import UNet
from parallel import precision, world
from weighting import loss_weights

MAY_CHANGE = ("log.every", *PATHS)  # on resume: none of these changes the weights
LOGS = ("loss.jsonl", "results.jsonl", "per_t.jsonl", "curvature.jsonl", "timing.jsonl")


# ---- logs ----

def append_jsonl(path: Path, record: dict) -> None:
    """Append one line, in place of a partial last line that a crash left. FloatingPointError for NaN or infinity."""
    try:
        line = json.dumps(record, allow_nan=False) + "\n"
    except ValueError:
        raise FloatingPointError(f"step {record['step']}: a value for {path.name} is not finite") from None
    with synced(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line.encode())


def parse(text: bytes, where: str) -> dict:
    """The JSON object in text. Raises UserError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):  # of JSON or UTF-8
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object")
    return content


def read_json(path: Path) -> dict:
    return parse(path.read_bytes(), str(path))


def read_jsonl(path: Path) -> list[dict]:
    """All lines but a partial last one; [] for a missing file. Raises UserError for a line that lacks a step."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        records.append(parse(line, f"{path}: line {number}"))
        if type(records[-1].get("step")) is not int:
            raise UserError(f"{path}: line {number} has no step; mend or remove it")
    return records


# ---- start or resume ----

def git(*command: str) -> str | None:
    """What git says about this checkout; None if there is no git or no repository."""
    try:
        return subprocess.check_output(["git", *command], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL,
                                       text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(config: Config, device: torch.device) -> dict:
    """What besides config and seed may change a result, for env.json."""
    status, cpu = git("status", "--porcelain"), torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    cpu += f", {torch.backends.cpu.get_cpu_capability()}"
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "train_precision": precision(config.train.amp, device),
            "sample_precision": precision(config.eval.amp, device),
            "threads": torch.get_num_threads(), "processes": world(), "command": " ".join(sys.argv)}


def check_start(run_dir: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError unless run_dir is new, or a run that is resumed or overwritten."""
    if (run_dir / "config.json").exists():
        if not (resume or overwrite):
            raise UserError(f"{run_dir}: {'a finished' if Run(run_dir).finished else 'an unfinished'} run; --resume "
                            "continues it, --overwrite deletes it, --out DIR writes elsewhere")
    elif not_folder := [path for path in (run_dir, *run_dir.parents) if path.exists() and not path.is_dir()]:
        raise UserError(f"{not_folder[0]}: is not a folder; give another --out")
    elif run_dir.exists() and not {path.name for path in run_dir.iterdir()} <= {LOCK, "config.json.tmp"}:
        raise UserError(f"{run_dir}: exists and is not a run directory (no config.json); give another --out")


def start(config: Config, run_dir: Path, device: torch.device, resume: bool, overwrite: bool) -> dict | None:
    """Prepare run_dir, whose lock the caller holds; return the checkpoint to resume from, or None for step 0.

    Raises UserError, before anything is changed, as check_start does, or if the run cannot be resumed with this config.
    """
    check_start(run_dir, resume, overwrite)  # again: until it had the lock, another process may have been faster
    env, saved = environment(config, device), None
    for key, amp in (("train.amp", config.train.amp), ("eval.amp", config.eval.amp)):
        if amp and precision(amp, device) == "fp32":
            print(f"{key}: {device.type} has no bf16 here, so fp32 is used")
    if resume and (run_dir / "config.json").exists():
        started = read_json(run_dir / "env.json") if (run_dir / "env.json").exists() else env
        saved = resumed(config, run_dir, started, env)
        env = {**started, "resumed": [*started.get("resumed", []), env]}
    else:  # config.json is deleted last: until then this is a run, which --overwrite may delete
        for path in sorted(run_dir.iterdir(), key=lambda path: path.name == "config.json"):
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    replace_file(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2).encode())
    replace_file(run_dir / "env.json", json.dumps(env, indent=2).encode())
    return saved


def resumed(config: Config, run_dir: Path, env_then: dict, env: dict) -> dict | None:
    """Cut the logs back to the checkpoint to resume from, and return it; None if the run ended before its first one.

    Raises UserError, before that, if config or precision are not those that the run was started with, or if the
    weights do not fit the config.
    """
    started, saved = Run(run_dir).config, None
    logs = {path: read_jsonl(path) for name in LOGS if (path := run_dir / name).exists()}
    reached = max((r["step"] for records in logs.values() for r in records), default=0)
    if has_checkpoint(run_dir):
        started, saved = read_checkpoint(run_dir)
    elif reached > min(started.train.checkpoint_every, started.eval.every, started.train.total_steps):
        raise UserError(f"{run_dir}: its logs reach step {reached}, but its checkpoints are gone; put them back, or "
                        "--overwrite the run")
    old, new = flatten(started), flatten(config)
    if started.exp != config.exp:
        raise UserError(f"{run_dir}: its checkpoint is one of {started.exp}, not of {config.exp}; give another --out")
    for key in SETTABLE:
        if old[key] != new[key] and key not in MAY_CHANGE:
            raise UserError(f"{run_dir}: was started with {key} = {json.dumps(old[key])}, this command has "
                            f"{json.dumps(new[key])}; give --set '{key}={json.dumps(old[key])}', or another --out")
    for key in ("train_precision", "sample_precision"):
        if env_then.get(key) != env[key]:
            raise UserError(f"{run_dir}: was started with {key} {env_then.get(key)}, and {env['device']} gives "
                            f"{env[key]}; resume it on {env_then.get('device')}")
    if saved:
        network = build(config, "cpu")[0]
        with fits_config(run_dir):
            for name in ("model", "ema"):
                network.load_state_dict(saved[name])
            saved["optimizer"], saved["sums"]  # a KeyError, if this is the file of a milestone
    step = saved["step"] if saved else 0
    again = f"; steps {step + 1} to {reached} are repeated" if reached > step else ""
    print(f"{run_dir}: resuming from step {step}{again}")
    (run_dir / "done.json").unlink(missing_ok=True)  # training writes it again
    for path, records in logs.items():
        kept = [r for r in records if r["step"] <= step or r.get("kind") == "frontier"]  # which evaluate.py added
        replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return saved


# ---- find and read ----

class Run:
    """A run directory, read and never written. Raises UserError if `path` is not one."""

    def __init__(self, path: Path):
        if not (path / "config.json").exists():
            raise UserError(f"{path}: not a run directory (no config.json); give one such as runs/smoke/seed1077")
        self.path, self.config = path, config_from_dict(read_json(path / "config.json"), str(path / "config.json"))
        self.exp, self.seed = self.config.exp, self.config.seed
        self.finished = (path / "done.json").exists()  # it reached its last step and measured all that was due there
        self.log = lru_cache(lambda name: read_jsonl(path / f"{name}.jsonl"))  # the lines of NAME.jsonl

    def results(self, kind: str) -> list[dict]:
        """The distances of kind "milestone", "final" or "frontier"."""
        return [r for r in self.log("results") if r["kind"] == kind and "sampler" in r]


def find_runs(root: Path, exp: str) -> list[Run]:
    """The runs of an experiment below root, by seed; [] if there are none. Raises UserError if root is no folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give --runs DIR with run directories DIR/{exp}/seedSEED")
    return sorted((Run(path.parent) for path in (root / exp).glob("seed*/config.json")), key=lambda run: run.seed)


def build(config: Config, device) -> tuple[UNet, Diffusion]:
    """The network (weights from torch's global generator) and the diffusion process of a config."""
    model = UNet(**dataclasses.asdict(config.model)).to(device, memory_format=torch.channels_last)
    betas = BETAS[config.diffusion.beta_schedule](config.diffusion.num_timesteps)
    return model, Diffusion(betas.to(device), config.diffusion.prediction)


def weights_of(config: Config, diffusion: Diffusion) -> torch.Tensor:
    """The loss weights of a config, float64 (T,)."""
    return loss_weights(diffusion.snr, config.loss.weighting, config.loss.gamma, diffusion.prediction)


def checkpoint_path(run_dir: Path, step: int | None = None) -> Path:
    """The newest checkpoint, or the weights (raw and EMA) of milestone `step`, which are kept for good."""
    return run_dir / "checkpoints" / (LAST if step is None else f"step_{step:06d}.pt")


def has_checkpoint(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.pt"))


def read_checkpoint(run_dir: Path, device="cpu", step: int | None = None) -> tuple[Config, dict]:
    """Config and content of the newest checkpoint, or of a milestone. Raises UserError if there is none."""
    path = checkpoint_path(run_dir, step)
    if not path.parent.is_dir():
        raise UserError(f"{run_dir}: not a run directory with checkpoints; give one such as runs/smoke/seed1077")
    if step is not None and not path.exists():
        kept = ", ".join(sorted(path.stem.removeprefix("step_") for path in path.parent.glob("step_*.pt")))
        raise UserError(f"{run_dir}: no weights of step {step}; it has kept {kept or 'none'}")
    state = load_checkpoint(path.parent, device) if step is None else load_file(path, device)
    config = config_from_dict(state["config"], f"{run_dir}: checkpoint")
    if not 0 <= state["step"] <= config.train.total_steps:
        raise UserError(f"{path}: step {state['step']} is not one of its {config.train.total_steps} steps")
    return config, state


@contextmanager
def fits_config(run_dir: Path) -> Iterator[None]:
    """Raises UserError if the content of a checkpoint, used inside, does not fit its config."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{run_dir}: its checkpoint does not fit its config: written by another version? "
                        f"({type(error).__name__})") from error


class Loaded(NamedTuple):
    config: Config
    step: int
    model: UNet        # raw weights; both networks are in eval mode
    ema: UNet
    diffusion: Diffusion


def load_run(run_dir: Path, device, step: int | None = None) -> Loaded:
    """The networks of a run at its newest checkpoint, or at milestone `step`. Raises UserError if there is none."""
    config, state = read_checkpoint(run_dir, device, step)
    model, diffusion = build(config, device)
    ema = copy.deepcopy(model)
    with fits_config(run_dir):
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
    if not all(p.isfinite().all() for network in (model, ema) for p in network.parameters()):
        raise UserError(f"{run_dir}: the weights of step {state['step']} are not finite; give an earlier --step")
    return Loaded(config, state["step"], model.eval(), ema.eval(), diffusion)


# ---- paired differences ----

def influence_path(run_dir: Path, r: dict) -> Path:
    """The influences of the samples of a results line, kept for paired comparisons."""
    how = f"{r['sampler']}{r['nfe']}_{r['features']}_n{r['n']}" + "_bf16" * (r["precision"] == "bf16")
    return run_dir / "influence" / f"step_{r['step']:06d}_{how}.npz"


def save_influence(run_dir: Path, record: dict, estimates: dict[str, Estimate]) -> None:
    path, npz = influence_path(run_dir, record), io.BytesIO()
    path.parent.mkdir(exist_ok=True)
    np.savez(npz, **{name: estimate.influence.astype(np.float32) for name, estimate in estimates.items()})
    replace_file(path, npz.getvalue())


def paired_stderr(influence_b: np.ndarray, influence_a: np.ndarray) -> float:
    """Standard error of b - a from the influences (n,) of both; sample i of both starts from the same x_T."""
    pull = influence_b.astype(np.float64) - influence_a
    return float(pull.std(ddof=1) / len(pull)**0.5)


def paired_differences(run_a: Path, run_b: Path) -> list[dict]:
    """b minus a for every distance that both runs have measured in the same way, with the error of the difference.

    The same way: kind, sampler, nfe, n, features, reference, precision and step; final lines match whatever their step.
    Runs of one seed start sample i from the same x_T, so their errors are correlated, and the error of the difference
    comes from the paired influences. [] if they share no distance. Raises UserError if the seeds differ.
    """
    a, b = Run(run_a), Run(run_b)
    if a.seed != b.seed:
        raise UserError(f"{run_a} and {run_b} have different seeds, so their samples are not paired")
    same = ("kind", "sampler", "nfe", "n", "features", "reference", "precision")

    def measured(run: Run) -> dict[tuple, dict]:
        return {(None if r["kind"] == "final" else r["step"], *(r[key] for key in same)): r
                for r in run.log("results") if "sampler" in r}

    differences, of_b = [], measured(b)
    for point, r_a in measured(a).items():
        if point in of_b:
            r_b = of_b[point]
            pulls_a, pulls_b = load_npz(influence_path(run_a, r_a)), load_npz(influence_path(run_b, r_b))
            record = {"step": r_b["step"], "step_a": r_a["step"], **{key: r_a[key] for key in same}}
            names = [metric_name(metric, r_a["features"]) for metric in METRICS]
            for name in (name for name in names if name in r_a and name in r_b):  # a metric may be newer than a run
                if not len(pulls_a.get(name, ())) == len(pulls_b.get(name, ())) == r_a["n"]:
                    raise UserError(f"{influence_path(run_a, r_a)} and that of {run_b}: not {r_a['n']} samples of "
                                    f"{name} each")
                record |= {name: r_b[name] - r_a[name], f"{name}_baseline": r_a[name],
                           f"{name}_stderr": paired_stderr(pulls_b[name], pulls_a[name])}
            differences.append(record)
    return differences
