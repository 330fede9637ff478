"""One process, or several under torchrun: which one this is, and the few things that they tell each other.

Every process runs the same program in step. What is random is drawn for the whole and cut by process, what falls into
independent pieces is shared out by map_shared, and process 0 alone reads and writes the run directory. With one
process every function here is the identity.
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


def own_device(name: str) -> str:
    """Under torchrun, "cuda" is the GPU of this process's number on its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name


class PeerError(RuntimeError):
    """Another process has gone; one line."""


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Inside, the processes that torchrun has started know each other. Nothing happens where it has started none.

    Raises PeerError where another of them ends within.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Longer than any piece of map_shared takes. A process that dies is seen at once by gloo, and by torchrun.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error)):
            raise PeerError(f"process {rank()} of {world()}: another process has ended") from error
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


def largest(number: int, device: torch.device) -> int:
    """The largest of every process's number. Waits for the device."""
    if world() == 1:
        return number
    x = torch.tensor(number, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def gathered(own: X) -> list[X]:
    """Every process's object, by rank. Tensors must be on the CPU."""
    if world() == 1:
        return [own]
    boxes: list = [None] * world()
    dist.all_gather_object(boxes, own)
    return boxes


def from_first(value: Callable[[], X]) -> X:
    """What value() is in process 0, for all: for what depends on files. Where it raises there, all of them end."""
    if world() == 1:
        return value()
    box = [None, True]
    try:
        if first():
            box = [value(), False]
    finally:
        dist.broadcast_object_list(box, src=0)
    if box[1]:
        sys.exit(2)  # process 0 says why
    return box[0]


def in_turn(value: Callable[[], X]) -> X:
    """value() of each process, the first on each machine before the others: it may download what they then find.

    Where it raises in one, all of them end.
    """
    if world() == 1:
        return value()
    result = error = None
    for turn in (True, False):
        if (os.environ["LOCAL_RANK"] == "0") == turn:
            try:
                result = value()
            except Exception as e:  # raised below, when the others know
                error = e
        if any(gathered(error is not None)):
            if error is None:
                sys.exit(2)
            raise error
    return result


def map_shared(function: Callable[[int], X], count: int, progress: str | None = None) -> list[X]:
    """[function(0), ..., function(count - 1)], of which each process calls every world()-th.

    The pieces are the same however many processes share them. progress: label of a bar, or None for no bar.
    """
    own = range(rank(), count, world())
    bar = tqdm(own, desc=progress, leave=False, disable=None if progress and first() else True)
    parts = gathered([function(i) for i in bar])
    return [parts[i % world()][i // world()] for i in range(count)]
