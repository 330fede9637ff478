"""One process, or several under torchrun: which one this is, what they tell each other, and when they are to stop.

Random draws are made for the whole batch and cut by process. Process 0 alone reads and writes the run directory.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from errors import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the default of --device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    return rank() == 0


def check_device(name: str) -> torch.device:
    """The device, deterministic and without TF32. Under torchrun, "cuda" is this process's GPU. Raises UserError."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if (kind := torch.device(name).type) not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: {kind} is not supported; give cpu, cuda or cuda:N")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def precision(amp: bool, device: torch.device) -> str:
    """ "bf16" if amp asks for it and the device computes in it (GPUs since Ampere, CPUs with AVX512_BF16 or AMX).

    Else "fp32": emulated bf16 is slower than fp32, and less exact.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities()
        has_bf16 = flags.get("avx512_bf16") or flags.get("amx_bf16")
    return "bf16" if amp and has_bf16 else "fp32"


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, torchrun's processes form a group. They wait 6 hours for each other. Raises UserError if one dies."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(f"process {rank()} of {world()}: another process has ended") from error
        raise
    finally:
        dist.destroy_process_group()


def replicated(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model; with several processes, one that averages its gradients over them."""
    if world() == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def share(n: int) -> slice:
    """This process's part of n things in a row; n must be a multiple of world()."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def mean(x: torch.Tensor) -> torch.Tensor:
    """The mean of every process's x, in place."""
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x


def gathered(own: object) -> list:
    """Every process's object, by rank. Tensors must be on the CPU."""
    boxes = [own] * world()
    if world() > 1:
        dist.all_gather_object(boxes, own)
    return boxes


def from_first(value: Callable):
    """Process 0's value(), in every process: for what is read from files. If it raises in process 0, all end."""
    return gathered(value() if first() else None)[0]


def in_turn(value: Callable):
    """value() of each process. Process 0 goes first, so that it may download what the others then find."""
    own = value() if first() else None
    gathered(None)  # the others wait here for process 0
    return own if first() else value()


@contextmanager
def stop_requests() -> Iterator[Callable[[], list[int]]]:
    """Inside, a function that gives the SIGTERMs and Ctrl-Cs which any process has received since the start.

    A process catches only its first one: a second one acts as usual. All processes must call the function together,
    so that they stop at the same step.
    """
    received = []
    with ExitStack() as handlers:
        def catch(number: int, frame) -> None:
            received.append(number)
            handlers.close()

        for number in (signal.SIGTERM, signal.SIGINT):
            handlers.callback(signal.signal, number, signal.signal(number, catch))
        yield lambda: [number for numbers in gathered(received) for number in numbers]


class Lines:
    """A file for tqdm that prints each update as a line: without a terminal a bar cannot overwrite itself."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)


def bar(steps: Iterable | None, label: str, **options) -> tqdm:
    """A progress bar of process 0; without a terminal a line each minute, the first after half a minute."""
    if not first():
        options["disable"] = True
    elif not sys.stderr.isatty():
        options |= {"file": Lines(), "delay": 30, "mininterval": 60}
    return tqdm(steps, label, **options)


def map_shared(function: Callable, count: int, label: str) -> list:
    """[function(0), ..., function(count - 1)]; the processes share the calls. label: of the progress bar."""
    parts = gathered([function(i) for i in bar(range(rank(), count, world()), label, leave=False)])
    return [parts[i % world()][i // world()] for i in range(count)]
