"""How long a run will take on this machine, from the time of a few of its steps, samples and probes."""

from collections.abc import Callable
from statistics import median
from timeit import repeat

import torch
from torch import Tensor

from config import Config
from diffusion import Diffusion
from evaluate import curvature_record, profile_timesteps, sample_images
from model import UNet


def network_calls(config: Config) -> int:
    """On one image each: all that a run samples, draws and profiles."""
    total, ev, grid = config.train.total_steps, config.eval, config.grid
    samples = total // ev.every * ev.n_samples + len(ev.final_samplers) * ev.final_n_samples
    timesteps = len(profile_timesteps(config.diffusion.num_timesteps, ev.profile_t))
    profile = 2 * ev.profile_images * timesteps  # of raw and EMA weights
    return (ev.nfe * samples * (ev.features != "none") + grid.nfe * grid.n * -(-total // grid.every)
            + profile * -(-total // ev.every))


def print_estimate(config: Config, model: UNet, diffusion: Diffusion, images: Tensor, step: Callable) -> None:
    """Print how often each phase of a run happens and how long it takes. step() trains for one step and waits for it.

    images: uint8 (N, 3, 32, 32), to measure the curvature on.
    """
    n = min(20, config.grid.n)
    phases = [("training steps", config.train.total_steps, step, 1),
              ("network calls on an image", network_calls(config),
               lambda: sample_images(model, diffusion, n, "ddim", 1, 0), n)]
    if config.curvature.every:
        phases.append(("curvature records", config.train.total_steps // config.curvature.every,
                       lambda: curvature_record(config, 0, model, diffusion, images), 1))
    rows = [(name, count, median(repeat(work, number=1, repeat=4)[1:]) / at_once)  # the first one warms up
            for name, count, work, at_once in phases]
    rows.append(("all", 1, sum(count * seconds for _, count, seconds in rows)))
    print(f"estimate on {images.device}, {torch.get_num_threads()} threads, without feature extraction:")
    for name, count, seconds in rows:
        print(f"  {name:26s} {count:>12,} x {seconds:10.4f} s = {count * seconds / 60:8.1f} min")
