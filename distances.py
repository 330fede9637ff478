"""Distances of samples to the training images, with their errors and what they are to be held against."""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import replace_file
from errors import UserError
from fid import METRICS, Estimate, FeatureStats, extract, metric_name
from parallel import first, from_first, map_shared
from rng import generator
from runs import read_json

CHUNK = 100      # images whose features are extracted at once
SAMPLE = 10_000  # training images whose features are kept, as KID's reference


def extract_shared(network: nn.Module, images: Tensor, label: str = "features") -> np.ndarray:
    """Features of uint8 images (N, 3, H, W), float32 (N, network.dim), a chunk of images at a time."""
    chunks = images.split(CHUNK)
    return torch.cat(map_shared(lambda i: extract(network, chunks[i]), len(chunks), label)).numpy()


def image_statistics(images: Tensor) -> dict[str, float]:
    """Of uint8 images (N >= 2, 3, H, W), in levels of 255, what a distance does not tell apart.

    channel_mean_sd: how far mean colours spread, the standard deviation over images of a channel's mean.
    neighbour_rms: how much texture there is, the root mean square difference of neighbouring pixels.
    """
    means = torch.cat([part.double().mean(dim=(2, 3)) for part in images.split(1000)])  # (N, 3)
    squares = [torch.cat([part.float().diff(dim=d).square().mean(dim=(1, 2, 3)) for part in images.split(1000)])
               for d in (-1, -2)]  # each (N,)
    return {"channel_mean_sd": means.var(dim=0).mean().sqrt().item(),
            "neighbour_rms": torch.cat(squares).double().mean().sqrt().item()}


class Distances:
    """Distances of samples to the training images (Frechet distance and KID), with their errors and context.

    At finite n a distance is biased, and every network has its own scale. So each comes with its floor (n training
    images), floor_test (n test images) and ceiling (n images of uniform noise), in the same features and at the same
    n. The statistics of the training images, and this context, are made once and cached in `root`.
    """

    def __init__(self, network: nn.Module, data_name: str, train: Tensor, test: Tensor, root: str | Path):
        """train, test: uint8 (N, 3, 32, 32); the first is the reference. Raises UserError if root cannot be used."""
        self.network, self.data_name, self.train, self.test, self.root = network, data_name, train, test, Path(root)
        self.reference_path = self.root / f"{data_name}_{network.name}_train.npz"
        self.context_path = self.root / f"{data_name}_{network.name}_context.json"
        self.origin = {"features": network.name, "weights_hash": network.weights_hash,
                       "data_hash": hashlib.sha256(train.cpu().numpy()).hexdigest()}
        self.cached = from_first(self._load_reference)

    def _load_reference(self) -> FeatureStats | None:
        nearest = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"eval.stats_root = {self.root}: {nearest} is not a folder that can be written to")
        if not self.reference_path.exists():
            return None
        stats, expected = FeatureStats.load(self.reference_path), self.origin | {"dim": self.network.dim}
        wrong = [key for key, value in expected.items() if getattr(stats, key) not in (None, value)]
        if wrong:
            raise UserError(f"{self.reference_path}: made from another {', '.join(wrong)}; remove it to have it made "
                            "again, or give another eval.stats_root")
        return stats

    @cached_property
    def reference(self) -> FeatureStats:
        """Statistics of all training images, from the cache or made now."""
        stats = self.cached
        if stats is None:
            stats = FeatureStats(self.network.dim, **self.origin)
            features = extract_shared(self.network, self.train, f"{self.reference_path.name}, once")
            for part in np.split(features, range(1000, len(features), 1000)):
                stats.update(part)
            stats.sample = features[:SAMPLE]
            if first():
                self.root.mkdir(parents=True, exist_ok=True)
                stats.save(self.reference_path)
        if stats.sample is None:  # statistics published elsewhere
            stats.sample = extract_shared(self.network, self.train[:SAMPLE], "reference of KID")
        return stats

    @cached_property
    def train_statistics(self) -> dict[str, float]:
        return image_statistics(self.train)

    def estimates(self, features: np.ndarray) -> dict[str, Estimate]:
        """Every metric of features (n, d), under its name in the logs."""
        return {metric_name(metric, self.network.name): estimate(features, self.reference)
                for metric, estimate in METRICS.items()}

    def context(self, n: int) -> dict[str, float | None]:
        """NAME_floor, NAME_floor_test, NAME_ceiling of every metric at n images.

        None if a set has fewer images, and for the floor of KID, since the training images are its reference.
        """
        cached = from_first(lambda: read_json(self.context_path) if self.context_path.exists() else {})
        if cached.get("origin") != self.origin:
            cached = {"origin": self.origin}
        names = [metric_name(metric, self.network.name) for metric in METRICS]
        if not {f"{name}_ceiling" for name in names} <= cached.get(str(n), {}).keys():  # a metric may be newer
            noise = torch.randint(256, (n, *self.train.shape[1:]), dtype=torch.uint8, generator=generator(0, "ceiling"))
            cached[str(n)] = context = {}
            for kind, images in {"floor": self.train[:n], "floor_test": self.test[:n], "ceiling": noise}.items():
                features = extract_shared(self.network, images, f"{kind} at n = {n}, once")
                for name, estimate in self.estimates(features).items():
                    context[f"{name}_{kind}"] = estimate.value if len(images) == n else None
            context[metric_name("kid", self.network.name) + "_floor"] = None
            if first():
                replace_file(self.context_path, json.dumps(cached, indent=2).encode(), tag=str(os.getpid()))
        return cached[str(n)]

    def measure(self, samples: Tensor, features: np.ndarray) -> tuple[dict, dict[str, Estimate]]:
        """The fields of a results line for samples uint8 (n, 3, 32, 32) with features (n, d), and their estimates."""
        estimates, record = self.estimates(features), {"n": len(features), "features": self.network.name}
        record["reference"] = f"{self.data_name} train, n = {self.reference.n or 'unknown'}"
        for name, estimate in estimates.items():
            record |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
        for name, value in image_statistics(samples).items():
            record |= {f"samples/{name}": value, f"samples/{name}_train": self.train_statistics[name]}
        return record | self.context(len(features)), estimates
