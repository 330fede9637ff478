"""Train one experiment of experiments.toml.

    python train.py --exp smoke                                        about a minute, no data, no network
    python train.py --exp E8c --data-root DIR                          the real thing, into runs/E8c/seed1077
    python train.py --exp E8c --set loss.gamma=3 --seed 1 --out runs_gamma3
    python train.py --exp E8c --profile cpu                            evaluated at a size for two CPU cores
    python train.py --exp E8c --resume                                 go on from the last checkpoint
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import (
    LAST,
    LOCK,
    PREVIOUS,
    append_jsonl,
    filter_jsonl,
    load_checkpoint,
    lock,
    read_jsonl,
    replace_file,
    save_checkpoint,
)
from config import PATHS, SETTABLE, Config, flatten, list_experiments, load_config
from cost import measure_units, memory, phases
from data import batch_indices, grid_png, load_images, to_model_range
from diffusion import Diffusion
from evaluate import (
    CHUNK,
    Distances,
    Run,
    RunError,
    add_device_option,
    another_version,
    build,
    check_device,
    curvature_record,
    extract_shared,
    metric_names,
    profile_record,
    read_json,
    run_script,
    sample_images,
    save_influence,
    saved_config,
)
from fid import feature_network
from model import UNet
from parallel import first, from_first, gathered, in_turn, joined, largest, mean, own_device, rank, share, world
from rng import generator, seed_global
from weighting import loss_weights

MAY_CHANGE = ("train.total_steps", *PATHS)  # on resume
LOGS = ("loss.jsonl", "results.jsonl", "per_t.jsonl", "curvature.jsonl", "timing.jsonl")


# ---- one training step ----

@dataclass
class State:
    """All that training changes. A checkpoint holds it but for the last two; training goes on from it bit for bit."""
    step: int                               # updates done
    model: UNet
    ema: UNet                               # exponential moving average of model's weights, always in eval mode
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler            # does nothing unless training runs in fp16
    window: Tensor                          # float64 (2,): sums of loss and eps_mse since the last log line
    skipped: Tensor                         # int64 (): steps whose fp16 gradient overflowed, so that the model stayed
    failed: Tensor                          # int64 (): the first step that was not finite, or -1; never saved
    network: Callable[[Tensor, Tensor], Tensor]  # the model as training calls it: shared among processes, compiled

    def state_dict(self, config: Config) -> dict:
        return {"config": dataclasses.asdict(config), "step": self.step, "model": self.model.state_dict(),
                "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "window": self.window, "skipped": self.skipped}

    def load_state_dict(self, saved: dict) -> None:
        self.step = saved["step"]
        self.window.copy_(saved["window"])
        self.skipped.copy_(saved["skipped"])
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        if saved["scaler"]:  # of a run in fp16
            self.scaler.load_state_dict(saved["scaler"])


def amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, or None for plain fp32: bf16 where the GPU has it, else fp16."""
    if not config.train.amp or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def new_state(config: Config, device: torch.device) -> tuple[State, Diffusion]:
    seed_global(config.seed, "init")
    model, diffusion = build(config, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(config, device) == torch.float16)
    window, (skipped, failed) = torch.zeros(2, dtype=torch.float64, device=device), torch.tensor([0, -1], device=device)
    network = model
    if world() > 1:
        network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if config.train.compile:  # on CUDA into CUDA graphs: at batch 4 a GPU waits for its launches
        network = torch.compile(network, mode="reduce-overhead" if device.type == "cuda" else "default")
    return State(0, model, ema, optimizer, scaler, window, skipped, failed, network), diffusion


def ema_decay(decay: float, step: int) -> float:
    """Decay of update `step` (from 0), warmed up so that the random initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: UNet, model: UNet, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model. The network has parameters only, no buffers."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class NonFiniteError(FloatingPointError):
    """Something is NaN or infinite at a step. `dump` is what one needs to look into it, ready for JSON."""

    def __init__(self, what: str, step: int, **dump):
        super().__init__(f"step {step}: {what}")
        self.dump = {"step": step, "what": what, **dump}


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; from pinned memory, since the host waits for a copy from any other."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def autocast(config: Config, device: torch.device) -> torch.autocast:
    dtype = amp_dtype(config, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def backward(config: Config, state: State, diffusion: Diffusion, w: Tensor, images: Tensor) -> dict[str, Tensor]:
    """The gradient of the batch that (seed, state.step) determines, left in the model's .grad.

    w: float32 (T,), the loss weights. images: uint8 (N, 3, 32, 32). Returns, of the whole batch, loss, eps_mse and
    grad_norm, each (), indices and t (B,); and of this process's examples own_losses and own_eps_mse.
    """
    seed, step, device = config.seed, state.step, images.device
    indices = batch_indices(seed, step, config.train.batch_size, len(images))
    t = torch.randint(diffusion.T, indices.shape, generator=generator(seed, "t", step))
    eps = torch.randn(*indices.shape, *images.shape[1:], generator=generator(seed, "eps", step))
    seed_global(seed, f"dropout/{rank()}" if rank() else "dropout", step, device)

    state.optimizer.zero_grad()  # before the forward pass, which needs the memory
    own = share(len(indices))  # drawn for the whole batch, so that the number of processes changes none of it
    x_0 = to_model_range(images[sent(indices[own], device)])  # (B, 3, 32, 32), B here and below this process's
    t = sent(t, device)
    with autocast(config, device):
        eps_mse = diffusion.eps_mse(state.network, x_0, t[own], sent(eps[own], device))  # (B,)
    losses = w[t[own]] * eps_mse  # the one line in which the arms of the study differ
    loss = losses.mean()

    state.scaler.scale(loss).backward()  # several processes: the mean of their gradients
    state.scaler.unscale_(state.optimizer)  # before clipping, which must see the true gradient
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()])
    loss, mse = mean(torch.stack([loss.detach(), eps_mse.detach().mean()])).unbind()
    return {"loss": loss, "eps_mse": mse, "grad_norm": grad_norm, "indices": indices, "t": t,
            "own_losses": losses.detach(), "own_eps_mse": eps_mse.detach()}


def train_step(config: Config, state: State, diffusion: Diffusion, w: Tensor, images: Tensor) -> dict[str, Tensor]:
    """One update of model, optimiser and EMA; returns what backward does. The host waits for nothing here.

    Where loss or gradient are not finite, model and optimiser stay, and stay from there on: raise_if_failed tells. An
    overflow of fp16's scaled gradient is no failure: that step is skipped.
    """
    batch = backward(config, state, diffusion, w, images)
    loss, grad_norm = batch["loss"], batch["grad_norm"]
    finite = loss.isfinite() & grad_norm.isfinite()
    overflow = loss.isfinite() & ~finite & (state.scaler.scale(torch.ones_like(loss)) > 1)
    state.failed = torch.where((state.failed < 0) & ~(finite | overflow), state.step, state.failed)
    state.skipped += overflow
    # What a GradScaler would set: fused Adam reads both on the device. It divides gradients by the one, which clips
    # them without a pass of its own, and does nothing where the other is 1.
    state.optimizer.grad_scale = ((grad_norm + 1e-6) / config.train.grad_clip).clamp(min=1)
    state.optimizer.found_inf = (~finite | (state.failed >= 0)).float()
    state.optimizer.step()
    state.scaler.update()  # lowers the scale after an overflow
    update_ema(state.ema, state.model, ema_decay(config.ema.decay, state.step))

    state.step += 1
    state.window += torch.stack([loss, batch["eps_mse"]])
    return batch


def raise_if_failed(config: Config, state: State, diffusion: Diffusion, w: Tensor, images: Tensor,
                    batch: dict[str, Tensor]) -> None:
    """Raise NonFiniteError for the first step whose loss or gradient was not finite. Waits for the device.

    batch: of the last step. An earlier one is repeated, to be looked into: it is a function of seed, step and weights,
    and these have not moved since.
    """
    if state.failed < 0:
        return
    what = "loss {}, gradient norm {}"
    if state.failed < state.step - 1:
        state.step = int(state.failed)
        batch = backward(config, state, diffusion, w, images)
        what = f"loss or gradient not finite; repeated, {what}"
    step, loss, grad_norm = int(state.failed) + 1, batch["loss"], batch["grad_norm"]

    def everywhere(own: Tensor) -> list:
        return [_json_number(x) for part in gathered(own.cpu()) for x in part]

    raise NonFiniteError(what.format(loss.item(), grad_norm.item()), step, seed=config.seed,
                         batch_indices=batch["indices"].tolist(), t=batch["t"].tolist(), loss=_json_number(loss),
                         loss_per_example=everywhere(batch["own_losses"]),
                         eps_mse_per_example=everywhere(batch["own_eps_mse"]), grad_norm=_json_number(grad_norm),
                         grad_norm_per_module=_grad_norms(state.model))


def _json_number(x: Tensor) -> float | str:
    """JSON has no NaN and no infinity: those become "nan", "inf" and "-inf"."""
    return x.item() if math.isfinite(x) else str(x.item())


def _grad_norms(model: torch.nn.Module) -> dict[str, float | str]:
    """The gradient norm of each module's own parameters."""
    own = {name: [p.grad for p in module.parameters(recurse=False)] for name, module in model.named_modules()}
    return {name: _json_number(torch.nn.utils.get_total_norm(grads)) for name, grads in own.items() if grads}


def log_record(config: Config, state: State, diffusion: Diffusion, w: Tensor, batch: dict[str, Tensor]) -> dict:
    """One line of loss.jsonl: the batch of this step, and the window's means since the line before."""
    grad_norm = batch["grad_norm"].item()  # not finite in a step that the fp16 scaler skipped: logged as null
    snr, window = diffusion.snr[batch["t"]], (state.window / config.log.every).tolist()
    state.window.zero_()
    return {"step": state.step,
            "train/loss": batch["loss"].item(), "train/eps_mse": batch["eps_mse"].item(),
            "train/loss_mean": window[0], "train/eps_mse_mean": window[1],
            "train/grad_global_L2": grad_norm if math.isfinite(grad_norm) else None,
            "train/weight_mean": w[batch["t"]].mean().item(), "train/skipped_steps": state.skipped.item(),
            "snr/mean": snr.mean().item(), "snr/min": snr.min().item(), "snr/max": snr.max().item()}


# ---- one run ----

class Stopped(Exception):  # noqa: N818 (not an error)
    """SIGTERM or Ctrl-C has arrived; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


class StopRequest:
    """Turns SIGTERM and Ctrl-C into Stopped, raised only where the training state is whole.

    That is at check(stop.signal), between two steps, and anywhere within `with stop.at_any_time()`: for measurements,
    which may take an hour and change nothing that a checkpoint holds.
    """

    def __init__(self):
        self.signal, self._at_any_time = 0, False

    def _handle(self, number: int, frame) -> None:
        self.signal = number
        if self._at_any_time:
            raise Stopped(number)

    @staticmethod
    def check(number: int) -> None:
        if number:
            raise Stopped(number)

    @contextlib.contextmanager
    def at_any_time(self) -> Iterator[None]:
        self._at_any_time = True
        try:
            self.check(self.signal)
            yield
        finally:
            self._at_any_time = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Inside, the two signals are handled here; outside, as before."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Clock:
    """Seconds of each phase since step `since`, the last line of timing.jsonl or the start of this process."""

    def __init__(self, since: int):
        self.seconds, self.since = Counter(), since

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def train(config: Config, run_dir: Path, device: torch.device, images: Tensor, held_out: Tensor,
          distances: Distances | None, saved: dict | None) -> None:
    """Train from `saved` (a checkpoint's content, or None for step 0) to config.train.total_steps.

    images, held_out: uint8 (N, 3, 32, 32), to train on and for the per-t profile. A checkpoint of step k is written
    after line k of loss.jsonl and before what is measured at step k, which changes nothing: measuring leaves out what
    is in the logs already, so a run that is stopped there goes on there. Raises Stopped, with a checkpoint of the
    moment written; NonFiniteError; OSError, as on a full disk.
    """
    state, diffusion = new_state(config, device)
    if saved is not None:
        try:
            state.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            raise another_version(run_dir, error) from error
    images, total = images.to(device), config.train.total_steps
    w = loss_weights(diffusion.snr, config.loss.weighting, config.loss.gamma).float()
    step_args = config, state, diffusion, w, images
    clock, saved_at = Clock(state.step), state.step

    def save():
        nonlocal saved_at
        if saved_at != state.step:
            raise_if_failed(*step_args, batch)
            if not all(weight.isfinite().all() for weight in state.model.parameters()):
                raise NonFiniteError("weights are not finite, after an update by a finite gradient", state.step)
            if first():
                with clock.timed("checkpoint"):
                    save_checkpoint(run_dir / "checkpoints", state.state_dict(config))
            saved_at = state.step

    with StopRequest().installed() as stop, tqdm(total=total, initial=state.step, desc=config.exp, unit="step",
                                                 disable=None if first() else True) as progress:
        try:
            while True:
                if state.step > 0 and measures(config, state.step):
                    if world() > 1:
                        save()  # a process that ends while it measures takes the others with it
                    with stop.at_any_time():
                        measure(config, state, diffusion, images, held_out, distances, run_dir, clock)
                if first() and state.step > 0 and (state.step % config.log.every == 0 or state.step == total):
                    log_timing(config, run_dir, state.step, clock)
                if state.step == total:
                    if first():
                        (run_dir / "failure.json").unlink(missing_ok=True)  # of an earlier attempt
                    return

                with clock.timed("train"):
                    batch = train_step(*step_args)
                    step = state.step
                    saves = step % config.train.checkpoint_every == 0 or step % config.eval.every == 0 or step == total
                    # On CUDA to look at what has been computed means to wait for it, so only where it must be.
                    look = device.type == "cpu" or step % config.log.every == 0 or saves or measures(config, step)
                    if look:
                        raise_if_failed(*step_args, batch)
                progress.update()
                if step % config.log.every == 0:
                    record = log_record(config, state, diffusion, w, batch)
                    if first():
                        append_jsonl(run_dir / "loss.jsonl", record)
                    progress.set_postfix(loss=f"{record['train/loss_mean']:.4f}")
                if saves:
                    save()
                if look or world() == 1:
                    stop.check(largest(stop.signal, device))  # all processes stop at one step
        except Stopped:
            save()
            raise


def log_timing(config: Config, run_dir: Path, step: int, clock: Clock) -> None:
    """One line of timing.jsonl for what this process has done since the line before; the clock starts again."""
    if not logged(run_dir / "timing.jsonl", step):
        steps = step - clock.since
        speed = config.train.batch_size * steps / clock.seconds["train"] if steps else None
        append_jsonl(run_dir / "timing.jsonl", {"step": step, "images_per_second": speed,
                                                **{f"seconds/{phase}": s for phase, s in clock.seconds.items()}})
    clock.seconds.clear()
    clock.since = step


def logged(path: Path, step: int) -> list[dict]:
    """The lines that a log has for a step."""
    return [record for record in read_jsonl(path) if record["step"] == step]


def logged_by_first(path: Path, step: int) -> list[dict]:
    """The lines that process 0 finds: the others may read before or after it writes."""
    return from_first(lambda: logged(path, step))


def append_measured(path: Path, record: dict) -> None:
    """Append a line of measurements. Raises NonFiniteError for one that is NaN or infinite."""
    bad = [key for key, value in record.items() if any(
        isinstance(x, float) and not math.isfinite(x) for x in (value if isinstance(value, list) else [value]))]
    if bad:
        raise NonFiniteError(f"measured for {path.name}, but not finite: {', '.join(bad)}", record["step"])
    if first():
        append_jsonl(path, record)


def measures(config: Config, step: int) -> bool:
    """Whether measure() has anything to do at this step."""
    everies = (config.curvature.every, config.eval.every, config.grid.every)
    return step == config.train.total_steps or any(every and step % every == 0 for every in everies)


def measure(config: Config, state: State, diffusion: Diffusion, images: Tensor, held_out: Tensor,
            distances: Distances | None, run_dir: Path, clock: Clock) -> None:
    """Measure and draw what is due at state.step and not yet in the run directory."""
    step, last = state.step, state.step == config.train.total_steps
    if config.curvature.every and step % config.curvature.every == 0:
        with clock.timed("curvature"):  # in a file of its own: loss.jsonl is the same with and without it
            if not logged_by_first(run_dir / "curvature.jsonl", step):
                record = curvature_record(config, step, state.model, diffusion, images)
                append_measured(run_dir / "curvature.jsonl", record)
    if step % config.eval.every == 0 or last:
        with clock.timed("evaluate"):
            evaluate_step(config, state, diffusion, held_out, distances, run_dir)
    if step % config.grid.every == 0 or last:
        with clock.timed("grid"):
            draw_grid(config, state, diffusion, run_dir)


def evaluate_step(config: Config, state: State, diffusion: Diffusion, held_out: Tensor,
                  distances: Distances | None, run_dir: Path) -> None:
    """Append the per-t profile, and one line of results per distance: the milestone's, and at the end the final ones.

    At the end a milestone takes the first samples of a final evaluation where these are the same whole chunks.
    """
    step, ev = state.step, config.eval
    profiles = logged_by_first(run_dir / "per_t.jsonl", step)
    if not profiles:
        profiles = [profile_record(step, state.model, state.ema, diffusion, held_out)]
        append_measured(run_dir / "per_t.jsonl", profiles[0])
    means = {f"val/{key}": sum(profiles[0][key]) / len(profiles[0][key]) for key in ("eps_mse_raw", "eps_mse_ema")}
    due = [("milestone", ev.sampler, ev.n_samples)] if step % ev.every == 0 else []
    if step == config.train.total_steps:
        due += [("final", sampler, ev.final_n_samples) for sampler in ev.final_samplers]
    done = {(r["kind"], r.get("sampler")) for r in logged_by_first(run_dir / "results.jsonl", step)}
    if distances is None:
        for kind in dict.fromkeys(kind for kind, _, _ in due):
            if (kind, None) not in done:
                append_measured(run_dir / "results.jsonl", {"step": step, "kind": kind, **means})
        return

    due = [(kind, sampler, n) for kind, sampler, n in due if (kind, sampler) not in done]
    longest = {sampler: max(n for _, other, n in due if other == sampler) for _, sampler, _ in due}
    features = {}
    for kind, sampler, n in due:
        drawn = longest[sampler] if n % CHUNK == 0 else n  # whole chunks are the same however many follow
        if (sampler, drawn) not in features:
            samples = sample_images(state.ema, diffusion, drawn, sampler, ev.nfe, config.seed, progress="samples")
            features[sampler, drawn] = extract_shared(distances.network, samples, progress="features")
        record, estimates = distances.measure(features[sampler, drawn][:n])
        record = {"step": step, "kind": kind, "sampler": sampler, "nfe": ev.nfe, **record, **means}
        if first():
            name = metric_names(ev.features)[0]
            milestones = [r for r in read_jsonl(run_dir / "results.jsonl") if r["kind"] == "milestone"]
            if kind == "final" and milestones:
                best = min(milestones, key=lambda r: r[name])
                record |= {f"{name}_min": best[name], f"{name}_min_step": best["step"]}
            save_influence(run_dir, record, estimates)
        append_measured(run_dir / "results.jsonl", record)


def draw_grid(config: Config, state: State, diffusion: Diffusion, run_dir: Path) -> None:
    """EMA samples from the same noise at every step, so that the grids of a run show one picture forming."""
    grid = config.grid
    path = run_dir / "grids" / f"step_{state.step:06d}_{grid.sampler}{grid.nfe}.png"
    if from_first(path.exists):
        return
    samples = sample_images(state.ema, diffusion, grid.n, grid.sampler, grid.nfe, config.seed, progress="grid")
    if first():
        path.parent.mkdir(exist_ok=True)
        replace_file(path, grid_png(samples))


# ---- the run directory ----

def environment(device: torch.device) -> dict:
    """What besides config and seed may change a result: for env.json."""
    def git(*command):
        try:
            out = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return out.stdout.strip() if out.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(), "processes": world(), "command": " ".join(sys.argv)}


def check_start(run_dir: Path, resume: bool, overwrite: bool) -> None:
    """Raise RunError unless run_dir is free, or to be gone on with, or to be overwritten."""
    is_run = (run_dir / "config.json").exists()
    if resume and not is_run:
        raise RunError(f"{run_dir}: no run to resume; drop --resume to start it")
    free = not run_dir.exists() or {path.name for path in run_dir.iterdir()} <= {LOCK, "config.json.tmp"}
    if resume or free or (is_run and overwrite):
        return
    if overwrite:
        raise RunError(f"{run_dir}: not a run directory (no config.json), so --overwrite leaves it alone")
    if not is_run:
        raise RunError(f"{run_dir}: exists and is not a run directory (no config.json); give another --out")
    run = Run(run_dir)
    if run.finished:
        raise RunError(f"{run_dir}: a finished run of {run.config.train.total_steps} steps; --overwrite deletes it, "
                       "--out DIR goes elsewhere")
    raise RunError(f"{run_dir}: an unfinished run; --resume goes on with it, --overwrite deletes it, --out DIR goes "
                   "elsewhere")


def resumable(config: Config, run_dir: Path) -> dict | None:
    """The checkpoint to go on from, on the CPU, or None where the run was stopped before its first. Raises RunError."""
    saved, started = None, Run(run_dir).config
    if any((run_dir / "checkpoints" / name).exists() for name in (LAST, PREVIOUS)):
        saved = load_checkpoint(run_dir / "checkpoints", warn=lambda line: print(line, file=sys.stderr))
        started = saved_config(saved, run_dir)
    old, new = flatten(started), flatten(config)
    for key in ("exp", *SETTABLE):
        if old[key] != new[key] and key not in MAY_CHANGE:
            raise RunError(f"{run_dir}: its checkpoint has {key} = {json.dumps(old[key])}, this command "
                           f"{json.dumps(new[key])}; give --set '{key}={json.dumps(old[key])}', or another --out")
    if new["train.total_steps"] < old["train.total_steps"]:
        raise RunError(f"{run_dir}: was started with train.total_steps = {old['train.total_steps']}; it may grow on "
                       f"resume, not shrink to {new['train.total_steps']}")
    reached = max((r["step"] for name in LOGS for r in read_jsonl(run_dir / name)), default=0)
    if saved is None:
        if reached > min(started.train.checkpoint_every, started.eval.every, started.train.total_steps):
            raise RunError(f"{run_dir}: its logs reach step {reached}, but its checkpoints are gone; put them back, or "
                           "--overwrite the run")
        print(f"{run_dir}: stopped before its first checkpoint; starting from step 0")
        return None
    again = f"; steps {saved['step'] + 1} to {reached} are repeated" if reached > saved["step"] else ""
    print(f"{run_dir}: going on from step {saved['step']}{again}")
    return saved


def rewind_logs(config: Config, run_dir: Path, step: int) -> None:
    """Drop what a run that reached `step` without stopping would not have written by then."""
    total = config.train.total_steps
    for name in LOGS:
        every = config.eval.every if name in ("results.jsonl", "per_t.jsonl") else 1

        def keep(record, every=every):
            if record.get("kind") == "frontier":  # not training's: it would not measure it again
                return True
            due = record["step"] % every == 0 and record.get("kind") != "final"
            return record["step"] <= step and (due or record["step"] == total)

        filter_jsonl(run_dir / name, keep)
    due = range(config.log.every, step + 1, config.log.every)
    missing = sorted({*due} - {record["step"] for record in read_jsonl(run_dir / "loss.jsonl")})
    if missing:
        print(f"{run_dir / 'loss.jsonl'}: lacks the lines of steps {missing}, which cannot be made again",
              file=sys.stderr)


def prepare(config: Config, run_dir: Path, device: torch.device, resume: bool) -> dict | None:
    """Make run_dir, whose lock is held, ready; return the checkpoint to go on from, or None. Raises RunError."""
    saved = resumable(config, run_dir) if resume else None
    env_path, env = run_dir / "env.json", environment(device)
    if resume:
        rewind_logs(config, run_dir, 0 if saved is None else saved["step"])
        started = read_json(env_path) if env_path.exists() else env
        env = {**started, "resumed": [*started.get("resumed", []), env]}
    else:
        for path in sorted(run_dir.iterdir(), key=lambda path: path.name == "config.json"):  # that one last: while it
            if path.name != LOCK:                                                          # is there, this is a run
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    replace_file(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=2).encode())
    replace_file(env_path, json.dumps(env, indent=2).encode())
    return saved


# ---- the command ----

def describe(config: Config, model: UNet) -> str:
    """The resolved config, a key a line, and the size of the network."""
    lines = [f"{key} = {value}" for key, value in flatten(config).items()]
    return "\n".join([*lines, f"parameters = {sum(p.numel() for p in model.parameters()):,}"])


def dry_run(config: Config, device: torch.device) -> None:
    """Print the resolved config and what each phase will cost, from a few steps on random images."""
    state, diffusion = new_state(config, device)
    print(describe(config, state.model))
    w = loss_weights(diffusion.snr, config.loss.weighting, config.loss.gamma).float()
    images = torch.randint(256, (64, 3, 32, 32), generator=generator(0, "dry_run"), dtype=torch.uint8).to(device)
    x_0 = to_model_range(images[torch.arange(config.train.batch_size) % len(images)])
    t = torch.zeros(len(x_0), dtype=torch.int64, device=device)
    with autocast(config, device):
        held = memory(state.model, lambda: diffusion.eps_mse(state.network, x_0, t, x_0))
    unit = measure_units(config, lambda: train_step(config, state, diffusion, w, images), state.ema, diffusion, images)
    print(f"\nestimate on {device}, {torch.get_num_threads()} threads:")
    minutes = 0.0
    for phase in phases(config):
        each = phase.seconds(unit)
        minutes += phase.count * each / 60
        print(f"  {phase.name:14s} {phase.count:>7,} x {each:10.3f} s = {phase.count * each / 60:8.1f} min")
    print(f"  {'all':14s} {minutes:35.1f} min")
    print("memory of training: " + " + ".join(f"{n / 2**20:.0f} MiB ({what})" for what, n in held.items()))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # an error is one line
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--exp", help="an experiment of experiments.toml, such as E8c")
    what.add_argument("--list", action="store_true", help="print the experiments and exit")
    parser.add_argument("--profile", help="a table of [profiles] in experiments.toml, laid over the experiment")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key of the config; repeatable")
    parser.add_argument("--seed", type=int, help="short for --set seed=SEED")
    parser.add_argument("--data-root", help="short for --set data.root=DATA_ROOT")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the run goes to OUT/EXP/seedSEED")
    add_device_option(parser)
    parser.add_argument("--dry-run", action="store_true",
                        help="print the resolved config and an estimate of its cost; write nothing")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    start.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same place")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        for name in list_experiments():
            print(f"{name:6s} {load_config(name).title}")
        return 0
    overrides = list(args.set)
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    if args.data_root is not None:
        overrides.append(f"data.root={json.dumps(args.data_root, ensure_ascii=False)}")
    config = load_config(args.exp, overrides=overrides, profile=args.profile)
    device = check_device(own_device(args.device))
    if args.dry_run:
        dry_run(config, device)
        return 0

    with joined(device):
        return run(args, config, device)


def run(args: argparse.Namespace, config: Config, device: torch.device) -> int:
    """The run that the command line asks for. All that can be refused is refused before anything is written."""
    run_dir = args.out / config.exp / f"seed{config.seed}"

    def check() -> None:
        if config.train.batch_size % world():
            raise RunError(f"train.batch_size = {config.train.batch_size}: does not split over {world()} processes")
        check_start(run_dir, args.resume, args.overwrite)

    from_first(check)
    images, test = in_turn(lambda: [load_images(config.data.name, config.data.root, split) for split in (True, False)])
    distances = None
    if config.eval.features != "none":
        network = in_turn(lambda: feature_network(config.eval.features, config.eval.inception_weights, device))
        distances = Distances(network, config.data.name, images, test, config.eval.stats_root)
        distances.check_cache()
    with contextlib.ExitStack() as stack:
        def start() -> dict | None:
            stack.enter_context(lock(run_dir))
            check_start(run_dir, args.resume, args.overwrite)  # again: another process may have been faster
            if config.train.amp and device.type != "cuda":
                print(f"train.amp: mixed precision needs CUDA; on {device.type} this run trains in fp32")
            return prepare(config, run_dir, device, args.resume)

        launcher = "python" if world() == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        command = [arg for arg in sys.argv if arg not in ("--overwrite", "--resume")]
        go_on = f"go on with: {launcher} {shlex.join([*command, '--resume'])}"
        try:
            train(config, run_dir, device, images, test[:config.eval.profile_images], distances, from_first(start))
        except Stopped as stopped:
            if first():
                print(f"train.py: stopped by {signal.Signals(stopped.signal).name}; {go_on}", file=sys.stderr)
            return 128 + stopped.signal
        except NonFiniteError as error:
            if first():
                replace_file(run_dir / "failure.json", json.dumps(error.dump, indent=2, allow_nan=False).encode())
                print(f"train.py: {error}; see {run_dir / 'failure.json'}. The last checkpoint is untouched. A resume "
                      "repeats it: every step is a function of seed and step", file=sys.stderr)
            return 1
        except OSError as error:
            raise RunError(f"{error}; the last checkpoint is untouched: mend this, then {go_on}") from error
    if first():
        print(f"{config.exp}: {config.train.total_steps} steps done; see {run_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
