"""What a run costs: how often it does what, seconds of each on this machine, and memory. For train.py --dry-run.

A run is made of four kinds of work, each measured once: a training step, a network call per image (samples, grids,
profiles), features per image, and a curvature probe. benchmarks/cost.py fits how these grow: docs/cost.md.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import Config
from data import SHAPES_TEST, SHAPES_TRAIN
from diffusion import Diffusion
from evaluate import CHUNK, PROFILE_POINTS, curvature_record, sample_images
from fid import InceptionV3, Lite0
from model import UNet

N_IMAGES = {"cifar10": (50_000, 10_000), "shapes": (SHAPES_TRAIN, SHAPES_TEST)}  # to train on, to test with


class Phase(NamedTuple):
    """A part of a run: how often it comes, and how much of each kind of work it takes each time."""
    name: str
    count: int
    work: dict[str, int]    # of "step", "call", "feature" and "probe"

    def seconds(self, unit: dict[str, float]) -> float:
        """Seconds of one time, from the seconds of each kind of work."""
        return sum(n * unit[kind] for kind, n in self.work.items())


def phases(config: Config) -> list[Phase]:
    """Everything that a run does. Statistics are made once and kept for other runs."""
    total, ev = config.train.total_steps, config.eval
    profile = 2 * min(PROFILE_POINTS, config.diffusion.num_timesteps) * ev.profile_images
    parts = [Phase("train", total, {"step": 1}),
             Phase("per-t profile", math.ceil(total / ev.every), {"call": profile}),
             Phase("grid", math.ceil(total / config.grid.every), {"call": config.grid.n * config.grid.nfe})]
    if config.curvature.every:
        parts.append(Phase("curvature", total // config.curvature.every, {"probe": config.curvature.num_probes}))
    if ev.features != "none":
        milestones, N, N_test = total // ev.every, *N_IMAGES[config.data.name]
        sizes = {ev.final_n_samples, ev.n_samples} if milestones else {ev.final_n_samples}
        context = sum(n * (1 + (n <= N) + (n <= N_test)) for n in sizes)  # ceiling, floor, floor_test
        parts += [Phase("statistics", 1, {"feature": N + context})]
        if (total % ev.every == 0 and ev.n_samples % CHUNK == 0 and ev.n_samples <= ev.final_n_samples
                and ev.sampler in ev.final_samplers):
            milestones -= 1  # the last one's samples are the first of the final evaluation
        for name, count, n in (("milestone", milestones, ev.n_samples),
                               ("final", len(ev.final_samplers), ev.final_n_samples)):
            parts.append(Phase(name, count, {"call": n * ev.nfe, "feature": n}))
    return parts


def seconds_of(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median time of a few repeats."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure_units(config: Config, step: Callable[[], object], model: UNet, diffusion: Diffusion,
                  images: Tensor) -> dict[str, float]:
    """Seconds of each kind of work that this config asks for. step: does one training step, on the device of images."""
    device, kinds = images.device, {kind for phase in phases(config) for kind in phase.work}
    n = min(CHUNK, config.grid.n)
    unit = {"step": seconds_of(step, 7, device),
            "call": seconds_of(lambda: sample_images(model, diffusion, n, "ddim", 1, config.seed), 3, device) / n}
    if "probe" in kinds:
        record = seconds_of(lambda: curvature_record(config, 0, model, diffusion, images), 1, device)
        unit["probe"] = record / config.curvature.num_probes
    if "feature" in kinds:
        network = {"inception": InceptionV3, "lite0": Lite0}[config.eval.features]().to(device)  # of any weights
        unit["feature"] = seconds_of(lambda: network(images[:50]), 2, device) / len(images[:50])
    return unit


def memory(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that training holds: what is kept per parameter, and what one loss keeps for its gradient."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss()
    return {"weights, gradient, two moments, EMA": 5 * parameters, "activations": sum(kept.values())}
