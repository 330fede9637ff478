"""What is measured on a model: called by train.py at milestones, and a command on a finished run.

    python evaluate.py runs/E8c/seed1077        prints the per-t profile of the run's last checkpoint
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import CheckpointError, load_checkpoint
from config import Config, ConfigError, config_from_dict
from data import DataError, load_images, to_model_range, to_uint8
from diffusion import BETAS, Diffusion, ddim_sample, ddpm_sample, spaced_timesteps
from model import UNet
from rng import generator

CHUNK = 100           # samples that share one stream of noise
PROFILE_POINTS = 21   # timesteps of the per-t profile: 0, 50, 100, ... 999 at T = 1000


class RunError(RuntimeError):
    """A run directory that is missing or not one; one line."""


def build(config: Config, device) -> tuple[UNet, Diffusion]:
    """The network (weights from torch's global generator) and the schedule of a config."""
    model = UNet(**dataclasses.asdict(config.model)).to(device, memory_format=torch.channels_last)
    betas = BETAS[config.diffusion.beta_schedule](config.diffusion.num_timesteps)
    return model, Diffusion(betas.to(device))


def load_run(run_dir: Path, device) -> tuple[Config, int, UNet, UNet, Diffusion]:
    """(config, step, raw model, EMA model, diffusion) of a run's newest checkpoint, both models in eval mode.

    Raises RunError where run_dir is no run directory, CheckpointError where it holds no good checkpoint.
    """
    if not (run_dir / "checkpoints").is_dir():
        raise RunError(f"{run_dir}: not a run directory with checkpoints; give one such as runs/smoke/seed1077")
    state = load_checkpoint(run_dir / "checkpoints", device, warn=lambda line: print(line, file=sys.stderr))
    config = config_from_dict(state["config"], str(run_dir))
    model, diffusion = build(config, device)
    ema = copy.deepcopy(model)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
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


def sample_images(model: UNet, diffusion: Diffusion, n: int, sampler: str, nfe: int, seed: int, eta: float = 0.0,
                  progress: str | None = None) -> Tensor:
    """n samples, uint8 (n, 3, 32, 32) on the CPU, drawn in chunks whose noise depends only on (seed, chunk).

    sampler: "ddpm" or "ddim" (eta is DDIM's). Chunk i starts from the same x_T whatever the model, sampler and nfe,
    so two arms of a comparison can be paired sample by sample. progress: label of a bar, or None for no bar.
    """
    device = next(model.parameters()).device
    shape = (model.image_channels, model.image_size, model.image_size)
    images = []
    chunks = tqdm(range(0, n, CHUNK), desc=progress, leave=False, disable=None if progress else True)
    with eval_mode(model):
        for i, start in enumerate(chunks):
            x_T = torch.randn(min(CHUNK, n - start), *shape, generator=generator(seed, "x_T", i)).to(device)
            noise = generator(seed, "sampler_noise", i)
            if sampler == "ddpm":
                x_0 = ddpm_sample(model, diffusion, x_T, nfe, generator=noise)
            elif sampler == "ddim":
                x_0 = ddim_sample(model, diffusion, x_T, nfe, eta=eta, generator=noise)
            else:
                raise ValueError(f"sampler {sampler!r}: must be 'ddpm' or 'ddim'")
            images.append(to_uint8(x_0).cpu())
    return torch.cat(images)


@torch.no_grad()
def per_t_profile(model: UNet, diffusion: Diffusion, images: Tensor) -> tuple[list[int], list[float]]:
    """(t, mse): the mean unweighted eps-MSE over held-out images uint8 (N, 3, 32, 32) at each of a grid of t.

    Image, t and eps are the same for every model, step, arm and seed, and dropout is off: a fixed measuring stick.
    """
    device = next(model.parameters()).device
    ts = spaced_timesteps(diffusion.T, min(PROFILE_POINTS, diffusion.T)).flip(0).tolist()
    profile = []
    with eval_mode(model):
        for i, t in enumerate(ts):
            eps = torch.randn(images.shape, generator=generator(0, "profile_eps", i))
            total = 0.0
            for j in range(0, len(images), CHUNK):
                x_0 = to_model_range(images[j:j + CHUNK].to(device))
                ts_j = torch.full((len(x_0),), t, dtype=torch.int64, device=device)
                total += diffusion.eps_mse(model, x_0, ts_j, eps[j:j + CHUNK].to(device)).double().sum().item()
            profile.append(total / len(images))
    return ts, profile


def profile_record(step: int, model: UNet, ema: UNet, diffusion: Diffusion, images: Tensor) -> dict:
    """One line of per_t.jsonl: the profiles of raw and EMA weights on the same images, t and eps."""
    ts, raw = per_t_profile(model, diffusion, images)
    _, averaged = per_t_profile(ema, diffusion, images)
    return {"step": step, "n": len(images), "t": ts, "eps_mse_raw": raw, "eps_mse_ema": averaged}


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")


def check_device(name: str) -> torch.device:
    """The torch.device of that name, or RunError if it is not of this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def run_script(main) -> None:
    """Exit with main()'s status; what the user can mend becomes one line on stderr and status 2."""
    try:
        sys.exit(main())
    except (ConfigError, DataError, CheckpointError, RunError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print the per-t profile of a run's last checkpoint as one JSON line.")
    parser.add_argument("run_dir", type=Path, help="such as runs/E8c/seed1077")
    parser.add_argument("--data-root", help="where CIFAR-10 lies, if not where the run found it")
    add_device_option(parser)
    args = parser.parse_args(argv)
    config, step, model, ema, diffusion = load_run(args.run_dir, check_device(args.device))
    held_out = load_images(config.data.name, args.data_root or config.data.root, train=False)
    print(json.dumps(profile_record(step, model, ema, diffusion, held_out[:config.eval.profile_images])))
    return 0


if __name__ == "__main__":
    run_script(main)
