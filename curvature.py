"""Curvature of a loss at given weights: the trace of its Hessian by Hutchinson's estimator (Hutchinson 1990).

For Rademacher v (entries +-1), E[v^T H v] = tr H. Two exact ways to v^T H v live here:

* hutchinson_trace differentiates any scalar loss twice, backwards: v^T grad(v^T grad L).
* quadratic_forms carries second-order Taylor coefficients forwards through a network (jets, "Taylor mode"; Griewank &
  Walther 2008, ch. 13): with theta(e) = theta + e v, each example's loss is l_0 + l_1 e + l_2 e^2 + ..., and
  v^T H v = 2 l_2. One pass gives the form of *every example*, so that the trace of any weighting of examples and
  timesteps follows from the same pass, where going backwards pays again for each.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class TraceEstimate(NamedTuple):
    """Mean, std over probes, standard error of the mean, and the value of each probe."""
    mean: float
    std: float
    stderr: float
    samples: list[float]


def summarise(samples: Iterable[float]) -> TraceEstimate:
    """The estimate from one value per probe; std and stderr need two probes and are NaN with one."""
    x = torch.tensor(list(samples), dtype=torch.float64)
    std = x.std().item() if len(x) > 1 else math.nan
    return TraceEstimate(x.mean().item(), std, std / len(x)**0.5, x.tolist())


def rademacher(params: Iterable[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """One probe: +-1 with equal chance for every entry of every parameter."""
    device = "cpu" if generator is None else generator.device
    return [(torch.randint(2, p.shape, generator=generator, device=device) * 2 - 1).to(p) for p in params]


def hutchinson_trace(loss_fn: Callable[[int], Tensor], params: Iterable[Tensor], num_probes: int = 16,
                     generator: torch.Generator | None = None) -> TraceEstimate:
    """tr H of a scalar loss over params, by double backward.

    loss_fn(probe_index) -> scalar loss: a new graph at each call, run without autocast. The model should be in eval
    mode: a dropout mask is no property of the loss. Nothing is left behind: no .grad, no graph, no draw
    from the global generator if one is given. Raises ValueError for num_probes < 1, no params, or a loss that is not
    a scalar.
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
        # a parameter that the loss reaches linearly, or not at all, has a gradient without a graph
        pairs = [(g, d) for g, d in zip(gradient, v, strict=True) if g.requires_grad]
        if not pairs:
            samples.append(0.0)
            continue
        Hv = torch.autograd.grad([g for g, _ in pairs], params, [d for _, d in pairs], materialize_grads=True)
        samples.append(sum((h.double() * d).sum() for h, d in zip(Hv, v, strict=True)).item())
    return summarise(samples)


# ---- jets ----

class Jet:
    """Taylor coefficients (c0, c1, c2) of a tensor along e, all of one shape. Operators as a tensor's."""

    def __init__(self, c0: Tensor, c1: Tensor, c2: Tensor):
        self.c = (c0, c1, c2)

    shape = property(lambda self: self.c[0].shape)

    def linear(self, f: Callable[[Tensor], Tensor]) -> "Jet":
        return Jet(*map(f, self.c))

    def __add__(self, other):
        if not isinstance(other, Jet):
            return Jet(self.c[0] + other, *self.c[1:])
        return Jet(*(a + b for a, b in zip(self.c, other.c, strict=True)))

    def _product(self, other, f):
        if not isinstance(other, Jet):
            return self.linear(lambda a: f(a, other))
        (a0, a1, a2), (b0, b1, b2) = self.c, other.c
        return Jet(f(a0, b0), f(a1, b0) + f(a0, b1), f(a2, b0) + f(a1, b1) + f(a0, b2))

    def __mul__(self, other):
        return self._product(other, torch.mul)

    def __matmul__(self, other):
        return self._product(other, torch.matmul)

    def square(self):
        return self * self

    def __getitem__(self, index):
        return self.linear(lambda a: a[index])

    def unbind(self, dim):
        return [Jet(*parts) for parts in zip(*(a.unbind(dim) for a in self.c), strict=True)]

    def __getattr__(self, name):  # methods that act on every coefficient alike
        if name not in ("reshape", "transpose", "permute", "flatten", "mean", "float"):
            raise AttributeError(f"Jet has no rule for .{name}")
        return lambda *args, **kwargs: self.linear(lambda a: getattr(a, name)(*args, **kwargs))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no Taylor rule for {func}")


def _taylor(x: Jet, f0: Tensor, f1: Tensor, f2: Tensor) -> Jet:
    """f(x) from f and its first two derivatives at c0 (Faa di Bruno)."""
    _, x1, x2 = x.c
    return Jet(f0, f1 * x1, torch.addcmul(f1 * x2, f2 * x1, x1, value=0.5))


def _silu(x: Jet, inplace=False) -> Jet:
    x0 = x.c[0]
    s = torch.sigmoid(x0)
    ds, y0 = s * (1 - s), x0 * s
    return _taylor(x, y0, torch.addcmul(s, x0, ds), ds * (2 + x0 - 2 * y0))


def _softmax(x: Jet, dim: int) -> Jet:
    p0 = torch.softmax(x.c[0], dim)
    # exp(x - x0) / its sum under p0: the normaliser's coefficients are moments of x under p0
    e1, e2 = x.c[1], x.c[2] + 0.5 * x.c[1].square()
    z1, z2 = (p0 * e1).sum(dim, keepdim=True), (p0 * e2).sum(dim, keepdim=True)
    q1 = e1 - z1
    return Jet(p0, p0 * q1, p0 * (e2 - z2 - z1 * q1))


def _weighted(f, x: Tensor | Jet, weight: Jet, bias: Jet | None) -> Jet:
    """A layer linear in x and in its weight: weight and bias move along e (their c2 is 0), x may or may not.

    Each of the two weights meets its inputs as one larger batch, which a CPU convolves faster than three small ones.
    """
    (w, dw, _), (b, db, _) = weight.c, bias.c if bias is not None else (None,) * 3
    if not isinstance(x, Jet):
        y0 = f(x, w, b)
        return Jet(y0, f(x, dw, db), torch.zeros_like(y0))
    x0, x1, x2 = x.c
    B = len(x0)
    on_w, on_dw = f(torch.cat([x0, x1, x2]), w, None), f(torch.cat([x0, x1]), dw, None)
    y0, y1, y2 = on_w[:B], on_w[B:2 * B] + on_dw[:B], on_w[2 * B:] + on_dw[B:]
    if b is not None:
        shape = (1, -1) + (1,) * (y0.ndim - 2)
        y0, y1 = y0 + b.view(shape), y1 + db.view(shape)
    return Jet(y0, y1, y2)


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Jet:
    return _weighted(lambda a, w, b: F.conv2d(a, w, b, stride, padding, dilation, groups), x, weight, bias)


def _group_norm(x: Jet, num_groups: int, weight: Jet, bias: Jet, eps: float = 1e-5) -> Jet:
    def mean(a):  # over each group: (B, C, H, W) -> (B, C, 1, 1), the same for the channels of a group
        m = a.mean((2, 3)).view(len(a), num_groups, -1).mean(2, keepdim=True)
        return m.expand(-1, -1, a.shape[1] // num_groups).reshape(len(a), -1, 1, 1)

    x0, x1, x2 = (a - mean(a) for a in x.c)
    v0, v1, v2 = mean(x0 * x0) + eps, 2 * mean(x0 * x1), mean(torch.addcmul(x1 * x1, x0, x2, value=2))
    r = v0.rsqrt()
    r1, r2 = -0.5 * v1 * r**3, -0.5 * v2 * r**3 + 0.375 * v1 * v1 * r**5  # coefficients of v^(-1/2)
    (w, dw, _), (b, db, _) = ([c.view(1, -1, 1, 1) for c in p.c] for p in (weight, bias))
    # x * r * weight + bias, with the small factors (B, C, 1, 1) multiplied first
    f0, f1, f2 = r * w, r1 * w + r * dw, r2 * w + r1 * dw
    y1 = torch.addcmul(torch.addcmul(db, x0, f1), x1, f0)
    y2 = torch.addcmul(torch.addcmul(x2 * f0, x1, f1), x0, f2)
    return Jet(torch.addcmul(b, x0, f0), y1, y2)


def _cat(tensors, dim=0) -> Jet:
    return Jet(*(torch.cat(parts, dim) for parts in zip(*(t.c for t in tensors), strict=True)))


def _dropout(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training:
        raise ValueError("curvature is measured with dropout off: call model.eval() first")
    return x


def _linearly(func):
    return lambda x, *args, **kwargs: x.linear(lambda a: func(a, *args, **kwargs))


RULES = {F.silu: _silu, torch.softmax: _softmax, F.conv2d: _conv2d, F.group_norm: _group_norm, F.dropout: _dropout,
         F.linear: lambda x, weight, bias=None: _weighted(F.linear, x, weight, bias), torch.cat: _cat,
         F.pad: _linearly(F.pad), F.interpolate: _linearly(F.interpolate),
         Tensor.sub: lambda a, b: b * -1.0 + a}


class _AlongProbe(TorchFunctionMode):
    """Inside, the parameters stand for the line theta + e v: torch functions that meet one return jets."""

    def __init__(self, probe: dict[Tensor, Tensor]):
        super().__init__()
        self.jets = {p: Jet(p.detach(), v, torch.zeros(())) for p, v in probe.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in RULES:
            args = tuple(self._lift(a) for a in args)
            kwargs = {key: self._lift(a) for key, a in kwargs.items()}
            first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
            if any(isinstance(a, Jet) for a in (first, *args, *kwargs.values())):
                return RULES[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _lift(self, a):
        return self.jets.get(a, a) if isinstance(a, nn.Parameter) else a


@torch.no_grad()
def quadratic_forms(losses_fn: Callable[[], Jet], params: Iterable[Tensor], v: Iterable[Tensor]) -> Tensor:
    """v^T H_i v of each example's loss: float64 (B,).

    losses_fn() -> the losses (B,), computed from params by functions that have a rule in RULES or a method of Jet;
    NotImplementedError names any other. Nothing is left behind.
    """
    with _AlongProbe(dict(zip(params, v, strict=True))):
        losses = losses_fn()
    return 2 * losses.c[2].double()
