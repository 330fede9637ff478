"""What several test files share: networks small enough for seconds, and the folder of real CIFAR-10."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import Server

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from rng import generator  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
SHAPES = data.SHAPES_TRAIN, data.SHAPES_TEST  # as users get them; see few_images

# A run of seconds: every part of a real run, each as small as it goes.
TINY = ["data.name=shapes", "model.base_channels=8", "model.channel_mults=[1,2]", "model.num_res_blocks=1",
        "train.total_steps=12", "train.checkpoint_every=5", "log.every=3", "grid.every=6", "grid.n=4", "grid.nfe=2",
        "eval.every=6", "eval.profile_images=2", "eval.features=none", "eval.nfe=2"]

# And one for tests of many processes: a step takes 15 ms.
SMALLEST = ["model.base_channels=4", "model.channel_mults=[1,1,1]", "model.num_res_blocks=1",
            "model.attn_resolutions=[]", "grid.n=4", "grid.nfe=2", "eval.profile_images=2", "eval.features=none",
            "eval.nfe=2"]


def set_flags(*overrides):
    return [arg for override in overrides for arg in ("--set", override)]


def small_run_flags(*overrides):
    return set_flags(*SMALLEST, *overrides)


def same(a, b):
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tiny_network(*_):
    """A stand-in with the interface of a feature network: six fixed linear features."""
    class Tiny(torch.nn.Module):
        name, dim, weights_hash = "inception", 6, "hash of the tiny network"

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3 * 16, 6, generator=generator(0, "tiny")), False)

        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 4).flatten(1) @ self.weight

    return Tiny()


@pytest.fixture(scope="session", autouse=True)
def few_images():
    """256 shapes are as good as 2,048 for all that is tested here, and made in a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SHAPES_TRAIN", "SHAPES_TEST"):
            patch.setattr(f"data.{name}", 256)
        yield


@pytest.fixture(scope="session", autouse=True)
def fp32():
    """In this process no CPU has bf16, so that machines with it compute the same; tests of bf16 patch this again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cpu.get_capabilities", dict)
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are then those of the processes that tests start, and a busy machine does not slow the tests down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts the scripts as real processes; see processes.py."""
    server = Server(tmp_path_factory.mktemp("outputs"))
    yield server
    server.close()


@pytest.fixture
def run_train(tmp_path):
    """run_train("E1", "log.every=1", out="a") trains in this process and returns the run directory."""
    from train import main

    def run(exp, *overrides, out="runs", flags=(), seed=1077):
        status = main(["--exp", exp, "--device", "cpu", "--seed", str(seed), "--out", str(tmp_path / out), *flags,
                       *set_flags(*TINY, *overrides)])
        assert status == 0
        return tmp_path / out / exp / f"seed{seed}"

    return run


@pytest.fixture(scope="session")
def cifar10_root():
    """The folder with cifar-10-batches-py: $CIFAR10_ROOT, else beside the checkout."""
    root = Path(os.environ.get("CIFAR10_ROOT", ROOT.parent / "shared" / "data" / "cifar10"))
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip(f"no CIFAR-10 in {root}; set CIFAR10_ROOT")
    return root
