"""A run directory: start or resume it, its logs and environment, find and read it, compare two of them.

runs/E8c/seed1077/ holds config.json, env.json, loss.jsonl, results.jsonl, per_t.jsonl, curvature.jsonl, timing.jsonl,
checkpoints/, grids/, influence/, and done.json once all is measured.
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import LAST, LOCK, load_checkpoint, load_file, naming, replace_file
from config import PATHS, SETTABLE, Config, config_from_dict, flatten
from diffusion import BETAS, Diffusion
from errors import UserError
from fid import METRICS, Estimate, load_npz, metric_name
from model import UNet
from parallel import world

MAY_CHANGE = ("log.every", *PATHS)  # on resume: none of these changes the weights
LOGS = ("loss.jsonl", "results.jsonl", "per_t.jsonl", "curvature.jsonl", "timing.jsonl")


# ---- logs ----

def append_jsonl(path: Path, record: dict) -> None:
    """Append one line and flush it to disk. A partial last line, as a crash leaves it, is removed first.

    Raises FloatingPointError for NaN and infinity, which JSON does not have.
    """
    try:
        line = json.dumps(record, allow_nan=False) + "\n"
    except ValueError:
        raise FloatingPointError(f"step {record['step']}: a value for {path.name} is not finite") from None
    with naming(path), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict]:
    """All whole lines; [] for a missing file. A last line without its newline is what a crash has left: it is ignored.

    Raises UserError for a line that is no JSON object with a step.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # of JSON or UTF-8
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UserError(f"{path}: line {number} is not a JSON object with a step; mend or remove that line")
        records.append(record)
    return records


def read_json(path: Path) -> dict:
    """The object that a JSON file holds. Raises UserError."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


# ---- start or resume ----

def environment(device: torch.device) -> dict:
    """What besides config and seed may change a result, for env.json."""
    def git(*command):
        try:
            out = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return out.stdout.strip() if out.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(), "processes": world(), "command": " ".join(sys.argv)}


def check_start(run_dir: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError unless run_dir is new, or a run that is resumed or overwritten."""
    is_run = (run_dir / "config.json").exists()
    new = not run_dir.exists() or {path.name for path in run_dir.iterdir()} <= {LOCK, "config.json.tmp"}
    if new or (is_run and (resume or overwrite)):
        return
    if not is_run:
        raise UserError(f"{run_dir}: exists and is not a run directory (no config.json); give another --out")
    raise UserError(f"{run_dir}: {'a finished' if Run(run_dir).finished else 'an unfinished'} run; --resume continues "
                    "it, --overwrite deletes it, --out DIR writes elsewhere")


def start(config: Config, run_dir: Path, device: torch.device, resume: bool) -> dict | None:
    """Prepare run_dir, whose lock the caller holds; return the checkpoint to resume from, or None for step 0.

    Raises UserError, before anything is changed, if the run cannot be resumed with this config.
    """
    resume = resume and (run_dir / "config.json").exists()
    saved, env = resumable(config, run_dir) if resume else None, environment(device)
    (run_dir / "done.json").unlink(missing_ok=True)  # training writes it again
    if resume:
        cut_logs(config, run_dir, saved["step"] if saved else 0)
        started = read_json(run_dir / "env.json") if (run_dir / "env.json").exists() else env
        env = {**started, "resumed": [*started.get("resumed", []), env]}
    else:  # config.json is deleted last: until then this is a run, which --overwrite may delete
        for path in sorted(run_dir.iterdir(), key=lambda path: path.name == "config.json"):
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    replace_file(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2).encode())
    replace_file(run_dir / "env.json", json.dumps(env, indent=2).encode())
    return saved


def resumable(config: Config, run_dir: Path) -> dict | None:
    """The checkpoint to resume from, on the CPU; None if the run ended before its first checkpoint."""
    started, saved = Run(run_dir).config, None
    reached = max((r["step"] for name in LOGS for r in read_jsonl(run_dir / name)), default=0)
    if any((run_dir / "checkpoints").glob("*.pt")):
        saved = load_checkpoint(run_dir / "checkpoints")
        started = config_from_dict(saved["config"], f"{run_dir}: checkpoint")
    elif reached > min(started.train.checkpoint_every, started.eval.every, started.train.total_steps):
        raise UserError(f"{run_dir}: its logs reach step {reached}, but its checkpoints are gone; put them back, or "
                        "--overwrite the run")
    old, new = flatten(started), flatten(config)
    for key in ("exp", *SETTABLE):
        if old[key] != new[key] and key not in MAY_CHANGE:
            raise UserError(f"{run_dir}: was started with {key} = {json.dumps(old[key])}, this command has "
                            f"{json.dumps(new[key])}; give --set '{key}={json.dumps(old[key])}', or another --out")
    step = saved["step"] if saved else 0
    again = f"; steps {step + 1} to {reached} are repeated" if reached > step else ""
    print(f"{run_dir}: resuming from step {step}{again}")
    return saved


def cut_logs(config: Config, run_dir: Path, step: int) -> None:
    """Drop the log lines past `step`; training will write them again. Lines that evaluate.py has added stay."""
    for name in LOGS:
        if (run_dir / name).exists():
            kept = [r for r in read_jsonl(run_dir / name) if r["step"] <= step or r.get("kind") == "frontier"]
            replace_file(run_dir / name, "".join(json.dumps(record) + "\n" for record in kept).encode())


# ---- find and read ----

class Run:
    """A run directory, read and never written. Raises UserError if `path` is not one."""

    def __init__(self, path: Path):
        if not (path / "config.json").exists():
            raise UserError(f"{path}: not a run directory (no config.json); give one such as runs/smoke/seed1077")
        self.path, self.config = path, config_from_dict(read_json(path / "config.json"), str(path / "config.json"))
        self.exp, self.seed = self.config.exp, self.config.seed
        self._logs: dict[str, list[dict]] = {}

    def log(self, name: str) -> list[dict]:
        """The lines of NAME.jsonl, [] if there are none."""
        if name not in self._logs:
            self._logs[name] = read_jsonl(self.path / f"{name}.jsonl")
        return self._logs[name]

    @property
    def finished(self) -> bool:
        """Whether it has reached its last step and measured all that was due there."""
        return (self.path / "done.json").exists()

    def results(self, kind: str) -> list[dict]:
        """The distances of kind "milestone", "final" or "frontier"."""
        return [r for r in self.log("results") if r["kind"] == kind and "sampler" in r]


def find_runs(root: Path, exp: str) -> list[Run]:
    """The runs of an experiment below root, by seed; [] if there are none. Raises UserError if root is no folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give --runs DIR with run directories DIR/{exp}/seedSEED")
    return sorted((Run(path.parent) for path in (root / exp).glob("seed*/config.json")), key=lambda run: run.seed)


def build(config: Config, device) -> tuple[UNet, Diffusion]:
    """The network (weights from torch's global generator) and the schedule of a config."""
    model = UNet(**dataclasses.asdict(config.model)).to(device, memory_format=torch.channels_last)
    betas = BETAS[config.diffusion.beta_schedule](config.diffusion.num_timesteps)
    return model, Diffusion(betas.to(device))


class Loaded(NamedTuple):
    config: Config
    step: int
    model: UNet        # raw weights; both networks are in eval mode
    ema: UNet
    diffusion: Diffusion


def load_state(run_dir: Path, load: Callable[[dict], object], state: dict) -> None:
    """load(state); raises UserError if the checkpoint's content does not fit its config."""
    try:
        load(state)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{run_dir}: its checkpoint does not fit its config: written by another version? "
                        f"({type(error).__name__})") from error


def load_run(run_dir: Path, device, step: int | None = None) -> Loaded:
    """The networks of a run at its newest checkpoint, or at milestone `step`. Raises UserError if there is none."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_dir}: not a run directory with checkpoints; give one such as runs/smoke/seed1077")
    if step is not None and not milestone_path(run_dir, step).exists():
        kept = ", ".join(sorted(path.stem.removeprefix("step_") for path in folder.glob("step_*.pt")))
        raise UserError(f"{run_dir}: no weights of step {step}; it has kept {kept or 'none'}")
    state = load_checkpoint(folder, device) if step is None else load_file(milestone_path(run_dir, step), device)
    config = config_from_dict(state["config"], f"{run_dir}: checkpoint")
    model, diffusion = build(config, device)
    ema = copy.deepcopy(model)
    load_state(run_dir, lambda s: (model.load_state_dict(s["model"]), ema.load_state_dict(s["ema"])), state)
    return Loaded(config, state["step"], model.eval(), ema.eval(), diffusion)


def last_path(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / LAST


def milestone_path(run_dir: Path, step: int) -> Path:
    """The weights (raw and EMA) of a milestone, kept for good."""
    return run_dir / "checkpoints" / f"step_{step:06d}.pt"


# ---- paired differences ----

def influence_path(run_dir: Path, r: dict) -> Path:
    """The influences of the samples of a results line, kept for paired comparisons."""
    return run_dir / "influence" / f"step_{r['step']:06d}_{r['sampler']}{r['nfe']}_{r['features']}_n{r['n']}.npz"


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

    The same way: kind, sampler, nfe, n, features, reference and step; final lines match whatever their step. Runs of
    one seed start sample i from the same x_T, so their errors are correlated, and the error of the difference comes
    from the paired influences. [] if they share no distance. Raises UserError if the seeds differ.
    """
    if Run(run_a).seed != Run(run_b).seed:
        raise UserError(f"{run_a} and {run_b} have different seeds, so their samples are not paired")
    same = ("kind", "sampler", "nfe", "n", "features", "reference")

    def measured(run_dir):
        return {(None if r["kind"] == "final" else r["step"], *(r[key] for key in same)): r
                for r in read_jsonl(run_dir / "results.jsonl") if "sampler" in r}

    differences, of_b = [], measured(run_b)
    for point, a in measured(run_a).items():
        if point not in of_b:
            continue
        b = of_b[point]
        pulls_a, pulls_b = load_npz(influence_path(run_a, a)), load_npz(influence_path(run_b, b))
        record = {"step": b["step"], "step_a": a["step"], **{key: a[key] for key in same}}
        for name in (metric_name(metric, a["features"]) for metric in METRICS):
            if not len(pulls_a.get(name, ())) == len(pulls_b.get(name, ())) == a["n"]:
                raise UserError(f"{influence_path(run_a, a)} and that of {run_b}: not {a['n']} samples of {name} each")
            record |= {name: b[name] - a[name], f"{name}_stderr": paired_stderr(pulls_b[name], pulls_a[name])}
        differences.append(record)
    return differences
