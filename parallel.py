"""One process, or several under torchrun: which one this is, and what they tell each other.

Every process runs the same program in step. Random draws are made for the whole batch and cut by process, independent
pieces are shared out by map_shared, and process 0 alone reads and writes the run directory. With one process nothing
is communicated.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from errors import UserError

X = TypeVar("X")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def check_device(name: str) -> torch.device:
    """The device of that name; under torchrun, "cuda" is the GPU with this process's number. Raises UserError.

    On CUDA it also makes convolutions deterministic and turns TF32 off.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("must be cpu, cuda or cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the default of --device


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun has started form a group. Raises UserError if another of them ends early."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The timeout is longer than any piece of map_shared takes. gloo and torchrun see at once that a process has died.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error)):
            raise UserError(f"process {rank()} of {world()}: another process has ended") from error
        raise
    finally:
        dist.destroy_process_group()


def share(n: int) -> slice:
    """This process's part of n things in a row; n must be a multiple of world()."""
    each = n // world()
    return slice(rank() * each, (rank() + 1) * each)


def mean(x: Tensor) -> Tensor:
    """The mean of every process's x."""
    if world() > 1:
        dist.all_reduce(x)
        x /= world()
    return x


def gathered(own: X) -> list[X]:
    """Every process's object, by rank. Tensors must be on the CPU."""
    boxes: list = [own] * world()
    if world() > 1:
        dist.all_gather_object(boxes, own)
    return boxes


def from_first(value: Callable[[], X]) -> X:
    """value() of process 0, for all processes: for what depends on files. If it raises there, all of them end."""
    result = error = None
    if first():
        try:
            result = value()
        except Exception as e:  # raised below, when the others know
            error = e
    result, failed = gathered((result, error is not None))[0]
    if error is not None:
        raise error
    if failed:
        sys.exit(2)  # process 0 says why
    return result


def in_turn(value: Callable[[], X]) -> X:
    """value() of each process. Process 0 goes first, so that it may download what the others then find."""
    own = []
    from_first(lambda: own.append(value()))
    return own[0] if first() else value()


def map_shared(function: Callable[[int], X], count: int, progress: str | None = None) -> list[X]:
    """[function(0), ..., function(count - 1)]; the processes take turns at calling it.

    The pieces are the same however many processes share them. progress: label of a bar, or None for no bar.
    """
    own = range(rank(), count, world())
    bar = tqdm(own, desc=progress, leave=False, disable=None if progress and first() else True)
    parts = gathered([function(i) for i in bar])
    return [parts[i % world()][i // world()] for i in range(count)]
