"""Curvature of a loss at given weights: the trace of its Hessian H by Hutchinson's estimator (Hutchinson 1990).

For a Rademacher vector v (entries +-1 with equal chance), E[v^T H v] = tr H. Two exact ways to compute v^T H v:

* hutchinson_trace differentiates a scalar loss twice, backwards: v^T grad(v^T grad L).
* quadratic_forms (taylor.py) needs one forward pass and gives v^T H_i v of every example's loss. So one pass serves
  the trace of any weighting of the examples.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class TraceEstimate(NamedTuple):
    """Mean and standard deviation over probes, standard error of the mean, and the value of each probe."""
    mean: float
    std: float
    stderr: float
    samples: list[float]


def summarise(samples: Iterable[float]) -> TraceEstimate:
    """The estimate from one value per probe. With a single probe, std and stderr are NaN."""
    x = torch.tensor(list(samples), dtype=torch.float64)
    std = x.std().item() if len(x) > 1 else math.nan
    return TraceEstimate(x.mean().item(), std, std / len(x)**0.5, x.tolist())


def rademacher(params: Iterable[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """One probe: a tensor of +-1 with the shape, type and device of each parameter."""
    device = "cpu" if generator is None else generator.device
    return [(torch.randint(2, p.shape, generator=generator, device=device) * 2 - 1).to(p) for p in params]


def hutchinson_trace(loss_fn: Callable[[int], Tensor], params: Iterable[Tensor], num_probes: int = 16,
                     generator: torch.Generator | None = None) -> TraceEstimate:
    """Trace of the Hessian of a scalar loss over params, by double backward.

    loss_fn(probe_index) -> scalar loss. It must build a new graph at each call. Autocast is off for it and for the
    derivatives. Put the model in eval mode first, so that every call sees the same loss. Probes come from
    `generator`, or from torch's global one if None. No .grad is written. Raises ValueError if num_probes < 1, params
    is empty, or the loss is not a scalar.
    """
    params = list(params)
    if num_probes < 1 or not params:
        raise ValueError(f"num_probes={num_probes} and {len(params)} params: must be at least one each")
    samples = []
    for j in range(num_probes):
        v = rademacher(params, generator)
        with torch.enable_grad(), torch.autocast(params[0].device.type, enabled=False):
            loss = loss_fn(j)
            if loss.numel() != 1:
                raise ValueError(f"loss of shape {tuple(loss.shape)}: must be a scalar")
            gradient = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            # if the loss is linear in a parameter, or does not depend on it, its gradient has no graph
            pairs = [(g, d) for g, d in zip(gradient, v, strict=True) if g.requires_grad]
            if not pairs:
                samples.append(0.0)
                continue
            Hv = torch.autograd.grad([g for g, _ in pairs], params, [d for _, d in pairs], materialize_grads=True)
        samples.append(sum((h.double() * d).sum() for h, d in zip(Hv, v, strict=True)).item())
    return summarise(samples)
