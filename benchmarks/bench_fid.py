"""Frechet distance and Inception against pytorch-fid, interleaved in one process: medians and their ratio.

    pip install -r tests/requirements-peers.txt
    python benchmarks/bench_fid.py [--threads 2] [--repeats 3]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pytorch_fid import fid_score, inception
from scipy.linalg import sqrtm

from fid import InceptionV3, frechet_distance
from rng import generator

D = 2048


def moments(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Moments of n correlated samples whose spectrum falls by e^10 over 2048 dimensions, as features' do."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0] * np.exp(-np.arange(D) / 200)[:, None]
    x = rng.standard_normal((n, D)) @ mix + 0.01 * seed
    return x.mean(axis=0), np.cov(x, rowvar=False)


def interleaved(name: str, ours, theirs, repeats: int) -> None:
    """Time A B A B ... and print medians, ratio and both results."""
    times, results = ([], []), [None, None]
    for _ in range(repeats):
        for side, work in enumerate((ours, theirs)):
            start = time.perf_counter()
            results[side] = work()
            times[side].append(time.perf_counter() - start)
    a, b = map(statistics.median, times)
    print(f"{name:34s} ours {a:8.3f} s   pytorch-fid {b:8.3f} s   {b / a:6.1f} times   "
          f"values {results[0]:.9g} {results[1]:.9g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # pytorch-fid 0.3.0 asks sqrtm for an argument that SciPy has removed since
    fid_score.linalg.sqrtm = lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), 0.0)

    network = InceptionV3()
    inception.load_state_dict_from_url = lambda *_, **__: network.state_dict()
    peer = inception.InceptionV3().eval()
    x = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "bench"))

    def theirs():
        with torch.no_grad():
            return peer(x / 255)[0].mean().item()

    for warm_up in (lambda: network(x), theirs):
        warm_up()
    interleaved("Inception, batch of 50", lambda: network(x).mean().item(), theirs, 2 * args.repeats + 1)

    reference = moments(5000, 1)
    for n in (5000, 1000):
        sample = moments(n, 2)
        interleaved(f"distance, d = {D}, n = {n}", lambda s=sample: frechet_distance(*s, *reference, method="eigh"),
                    lambda s=sample: fid_score.calculate_frechet_distance(*s, *reference), args.repeats)


if __name__ == "__main__":
    main()
