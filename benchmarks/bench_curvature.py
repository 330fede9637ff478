"""Seconds per Hutchinson probe beside one training step and PyHessian, interleaved in one process: medians.

    pip install -r tests/requirements-peers.txt
    python benchmarks/bench_curvature.py [--threads 2] [--repeats 7]
"""

import argparse
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import pyhessian

import train
from config import load_config
from curvature import hutchinson_trace, quadratic_forms, rademacher
from data import make_shapes
from rng import generator
from weighting import loss_weights


class EpsModel(nn.Module):
    """PyHessian wants model(inputs): the network at fixed t."""

    def __init__(self, model: nn.Module, t: torch.Tensor):
        super().__init__()
        self.model, self.t = model, t

    def forward(self, x_t):
        return self.model(x_t, self.t)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Using backward")
    images = make_shapes(512)
    for base in (32, 64):
        config = load_config("E6", overrides=["data.name=shapes", f"model.base_channels={base}"])
        state, diffusion = train.new_state(config, torch.device("cpu"))
        w = loss_weights(diffusion.snr, "minsnr", 5.0).float()
        for _ in range(20):  # away from the zero-initialised layers
            train.train_step(config, state, diffusion, w, images)
        probed = train.copy.deepcopy(state.model).eval()
        params, rng = list(probed.parameters()), generator(0, "bench")
        x_0, eps = torch.randn(4, 3, 32, 32, generator=rng), torch.randn(4, 3, 32, 32, generator=rng)
        t = torch.tensor([100, 350, 600, 850])
        v = rademacher(params, generator(0, "v"))
        losses = partial(diffusion.eps_mse, probed, x_0, t, eps)
        peer_model = EpsModel(train.copy.deepcopy(probed), t)
        peer = pyhessian.hessian(peer_model, nn.MSELoss(), data=(diffusion.q_sample(x_0, t, eps), eps), cuda=False)

        work = {
            "training step": lambda c=config, s=state, d=diffusion, w=w: train.train_step(c, s, d, w, images),
            "Taylor mode (all examples)": lambda f=losses, p=params, v=v: quadratic_forms(f, p, v),
            "double backward (one loss)": lambda f=losses, p=params: hutchinson_trace(
                lambda _: f().mean(), p, 1, generator(0, "v")),
            "PyHessian (one loss)": lambda p=peer: p.trace(maxIter=1, tol=0),
        }
        times = {name: [] for name in work}
        for i in range(args.repeats + 1):
            for name, run in work.items():
                start = time.perf_counter()
                run()
                if i:  # the first round warms up
                    times[name].append(time.perf_counter() - start)
        step = statistics.median(times["training step"])
        for name, seconds in times.items():
            s = statistics.median(seconds)
            print(f"base {base}  {name:28s} {s:7.3f} s = {s / step:5.2f} steps, 16 of them {16 * s / step:6.1f} steps",
                  flush=True)


if __name__ == "__main__":
    main()
