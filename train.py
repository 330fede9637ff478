"""Train one experiment of experiments.toml.

    python train.py --exp smoke                                        one to two minutes, no data, no network
    python train.py --exp E8c --data-root DIR                          the real thing, into runs/E8c/seed1077
    python train.py --exp E8c --set loss.gamma=3 --seed 1 --out runs_gamma3
    python train.py --exp E8c --profile study                          measured at a size for CPUs, with Lite0 features
    python train.py --exp E8c --resume                                 start it, or continue from its last checkpoint
"""

import argparse
import copy
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import evaluate
import parallel
import runs
from checkpoint import lock, replace_file, save_checkpoint
from config import Config, flatten, list_experiments, load_config
from data import batch_indices, load_images, make_shapes, to_model_range
from diffusion import Diffusion
from distances import Distances
from errors import UserError, argument_parser, run_script
from estimate import print_estimate
from fid import feature_network
from model import UNet
from parallel import DEVICE, first, from_first, gathered, precision, rank, share, world
from rng import generator, seed_global
from runs import append_jsonl, build, checkpoint_path, fits_config, has_checkpoint, read_checkpoint, weights_of

# ---- one training step ----


@dataclass
class State:
    """All that training changes; a checkpoint holds it, and a run resumed from it is the same to the last bit."""
    step: int                        # updates done
    model: UNet
    network: nn.Module               # the model; in several processes it averages its gradients over them
    ema: UNet                        # exponential moving average of the model's weights, in eval mode
    optimizer: torch.optim.Adam
    sums: Tensor                     # float64 (4,), since the last log line: loss, eps_mse, grad_norm, number of steps

    def state_dict(self) -> dict:
        return {"step": self.step, "model": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "sums": self.sums}

    def load_state_dict(self, saved: dict) -> None:
        self.step = saved["step"]
        self.sums.copy_(saved["sums"])
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])


def new_state(config: Config, device: torch.device) -> tuple[State, Diffusion]:
    seed_global(config.seed, "init")
    model, diffusion = build(config, device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr, fused=True)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    return State(0, model, parallel.replicated(model, device), ema, optimizer, sums), diffusion


def draw_batch(config: Config, step: int, T: int, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, t and eps of a step, functions of (seed, step): drawn for the whole batch, then cut by process."""
    indices = batch_indices(config.seed, step, config.train.batch_size, len(images))
    t = torch.randint(T, indices.shape, generator=generator(config.seed, "t", step))
    eps = torch.randn(*indices.shape, *images.shape[1:], generator=generator(config.seed, "eps", step))
    own, cuda = share(len(indices)), images.device.type == "cuda"
    indices, t, eps = (x[own].pin_memory().to(images.device, non_blocking=True) if cuda else x[own]
                       for x in (indices, t, eps))  # a copy from memory that is not pinned would block the host
    return to_model_range(images[indices]), t, eps


def ema_decay(decay: float, step: int) -> float:
    """Decay of update `step` (from 0). It warms up, so that the random initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


def train_step(config: Config, state: State, diffusion: Diffusion, w: Tensor, images: Tensor) -> dict[str, Tensor]:
    """One update of model and EMA. w: float32 (T,), the loss weights. images: uint8 (N, 3, 32, 32), all of them.

    Returns loss, eps_mse and grad_norm (before clipping), each (), and t (B,).
    """
    x_0, t, eps = draw_batch(config, state.step, diffusion.T, images)
    seed_global(config.seed, f"dropout/{rank()}" if rank() else "dropout", state.step, images.device)
    bf16 = precision(config.train.amp, images.device) == "bf16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        mse = diffusion.mse(state.network, x_0, t, eps)  # (B,)
    loss = (w[t] * mse).mean()  # the one line in which the arms of the study differ
    state.optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.train.grad_clip)
    state.optimizer.step()
    with torch.no_grad():  # ema <- decay * ema + (1 - decay) * model
        decay = ema_decay(config.ema.decay, state.step)
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), 1 - decay)
    state.step += 1
    eps_mse = mse.detach() * diffusion.eps_per_mse[t].to(mse.dtype)
    loss, eps_mse = parallel.mean(torch.stack([loss.detach(), eps_mse.mean()])).unbind()
    state.sums += torch.stack([loss, eps_mse, grad_norm, torch.ones_like(loss)])
    return {"loss": loss, "eps_mse": eps_mse, "grad_norm": grad_norm, "t": t}


def check_finite(state: State) -> None:
    """Raise FloatingPointError if a loss or gradient since the last log line, or a weight, is not finite."""
    if not all(x.isfinite().all() for x in (state.sums, *state.model.parameters(), *state.ema.parameters())):
        raise FloatingPointError(f"step {state.step}: loss, gradient or weights are not finite, at this step or in the "
                                 f"{int(state.sums[3])} steps since the last log line")


def log_record(state: State, diffusion: Diffusion, w: Tensor, batch: dict[str, Tensor]) -> dict:
    """One line of loss.jsonl: the last step's batch, and the means over the steps since the line before."""
    t = torch.cat(gathered(batch["t"].cpu())).to(w.device)
    snr, means = diffusion.snr[t], (state.sums / state.sums[3]).tolist()
    state.sums.zero_()
    return {"step": state.step, "train/loss": batch["loss"].item(), "train/eps_mse": batch["eps_mse"].item(),
            "train/loss_mean": means[0], "train/eps_mse_mean": means[1],
            "train/grad_global_L2": batch["grad_norm"].item(), "train/weight_mean": w[t].mean().item(),
            "snr/mean": snr.mean().item(), "snr/min": snr.min().item(), "snr/max": snr.max().item()}


# ---- one run ----

def train(config: Config, run_dir: Path, device: torch.device, images: Tensor, held_out: Tensor,
          distances: Distances | None, saved: dict | None) -> int:
    """Train from `saved` (a checkpoint's content, or None for step 0) to the end; return the signal that stopped it.

    images, held_out: uint8 (N, 3, 32, 32), to train on and for the per-t profile. The checkpoint
    of a milestone is written before it is measured. A run that ends while it measures resumes with the rest.
    Raises FloatingPointError before anything that is not finite is written.
    """
    state, diffusion = new_state(config, device)
    if saved is not None:
        with fits_config(run_dir):
            state.load_state_dict(saved)
    images, total, every = images.to(device), config.train.total_steps, config.eval.every
    w = weights_of(config, diffusion).float()
    seconds = Counter()

    def save(path: Path, content: dict) -> None:
        check_finite(state)
        if first():
            save_checkpoint(path, {"config": dataclasses.asdict(config), **content})

    def measure() -> None:
        check_finite(state)
        start, kept = time.perf_counter(), checkpoint_path(run_dir, state.step)
        if (state.step % every == 0 or state.step == total) and not from_first(kept.exists):
            save(kept, {key: value for key, value in state.state_dict().items() if key in ("step", "model", "ema")})
        lines = evaluate.measure(config, run_dir, state.step, state.model, state.ema, diffusion, images, held_out,
                                 distances)
        if first():
            for sentence in dict.fromkeys(map(evaluate.sentence, lines)):  # the last milestone and the end may be equal
                progress.write(f"{config.exp}: step {state.step}, {sentence}")
        seconds["seconds/measure"] += time.perf_counter() - start

    with parallel.stop_requests() as stops, parallel.bar(None, config.exp, total=total, initial=state.step) as progress:
        if state.step:
            measure()  # what the last run did not finish
        while state.step < total:
            start = time.perf_counter()
            batch = train_step(config, state, diffusion, w, images)
            seconds["seconds/train"] += time.perf_counter() - start
            progress.update()
            step, done, logs = state.step, state.step == total, state.step % config.log.every == 0
            if logs:
                check_finite(state)
                record = log_record(state, diffusion, w, batch)
                if first():
                    append_jsonl(run_dir / "loss.jsonl", record)
                progress.set_postfix(loss=f"{record['train/loss_mean']:.4f}", refresh=False)
            if step % config.train.checkpoint_every == 0 or step % every == 0 or done:
                save(checkpoint_path(run_dir), state.state_dict())
            if done or any(n and step % n == 0 for n in (every, config.grid.every, config.curvature.every)):
                measure()
            stop = stops() if logs or world() == 1 else []  # several processes ask each other: at log lines only
            if first() and (logs or done or stop):
                append_jsonl(run_dir / "timing.jsonl", {"step": step, **seconds})
                seconds.clear()
            if stop and not done:
                save(checkpoint_path(run_dir), state.state_dict())
                return stop[0]
    if first():
        replace_file(run_dir / "done.json", json.dumps({"step": total}).encode())
    return 0


# ---- the command ----

def dry_run(config: Config, device: torch.device) -> None:
    """Print the resolved config, and how long the run will take."""
    print(*(f"{key} = {value}" for key, value in flatten(config).items()), sep="\n")
    state, diffusion = new_state(config, device)
    print(f"parameters = {sum(p.numel() for p in state.model.parameters()):,}\n")
    w, images = weights_of(config, diffusion).float(), make_shapes(64).to(device)
    print_estimate(config, state.model, diffusion, images,
                   lambda: train_step(config, state, diffusion, w, images)["loss"].item())


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--exp", help="an experiment of experiments.toml, such as E8c")
    what.add_argument("--list", action="store_true", help="print the experiments and exit")
    parser.add_argument("--profile", help="a table of [profiles] in experiments.toml, laid over the experiment")
    override = {"dest": "set", "action": "append", "default": []}
    parser.add_argument("--set", **override, metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--seed", **override, type="seed={}".format, help="short for --set seed=SEED", metavar="SEED")
    parser.add_argument("--data-root", **override, help="short for --set data.root=DATA_ROOT", metavar="DATA_ROOT",
                        type=lambda path: f"data.root={json.dumps(path, ensure_ascii=False)}")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the run goes to OUT/EXP/seedSEED")
    parser.add_argument("--device", default=DEVICE, help="cpu, cuda or cuda:N")
    parser.add_argument("--dry-run", action="store_true", help="print config and cost, write nothing")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--resume", action="store_true", help="start the run, or continue from its last checkpoint")
    begin.add_argument("--overwrite", action="store_true", help="delete an earlier run in the same place")
    args = parser.parse_args(argv)
    if args.list:
        for name in list_experiments():
            print(f"{name:6s} {load_config(name).title}")
        return 0
    config = load_config(args.exp, overrides=args.set, profile=args.profile)
    device = parallel.check_device(args.device)
    if args.dry_run:
        dry_run(config, device)
        return 0
    with parallel.joined(device):
        return run(args, config, device)


def run(args: argparse.Namespace, config: Config, device: torch.device) -> int:
    """The run that the command line asks for. What can be refused is refused before anything is written."""
    run_dir, ev = args.out / config.exp / f"seed{config.seed}", config.eval
    if config.train.batch_size % world():
        raise UserError(f"train.batch_size = {config.train.batch_size}: does not split over {world()} processes")
    from_first(lambda: runs.check_start(run_dir, args.resume, args.overwrite))
    images, test = parallel.in_turn(lambda: [load_images(config.data.name, config.data.root, split)
                                             for split in (True, False)])
    distances = None
    if ev.features != "none":
        network = parallel.in_turn(lambda: feature_network(ev.features, ev.inception_weights, device))
        distances = Distances(network, config.data.name, images, test, ev.stats_root)
    launcher = "python" if world() == 1 else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    again = f"{launcher} {shlex.join([arg for arg in sys.argv if arg not in ('--overwrite', '--resume')])} --resume"
    try:
        with lock(run_dir) if first() else nullcontext():
            saved = from_first(lambda: runs.start(config, run_dir, device, args.resume, args.overwrite))
            number = train(config, run_dir, device, images, test[:ev.profile_images], distances, saved)
    except FloatingPointError as error:
        if first():
            kept = read_checkpoint(run_dir)[1]["step"] if has_checkpoint(run_dir) else 0
            print(f"train.py: error: {error}. No such value was saved. A resumed run starts at step {kept} and fails "
                  f"again, so start again with a lower train.lr (--overwrite). To find the first bad step: "
                  f"{again} --set log.every=1", file=sys.stderr)
        return 1
    except OSError as error:  # such as a full disk
        raise UserError(f"{error}; once that is mended, resume with: {again}") from error
    if number and first():
        print(f"train.py: stopped by {signal.Signals(number).name}; resume with: {again}", file=sys.stderr)
    elif first():
        newest = max((run_dir / "grids").glob("step_*.png"), key=lambda path: (int(path.name.split("_")[1]), path.name))
        print(f"{config.exp}: {config.train.total_steps} steps done. Samples: {newest}\n"
              f"More of them: python sample.py {shlex.quote(str(run_dir))}")
    return 128 + number if number else 0


if __name__ == "__main__":
    run_script(main)
