"""Quadratic forms v^T H v of the Hessian of every example's loss, in one forward pass.

The parameters move along a line, theta(e) = theta + e v. Every quantity computed from them is then a function of e,
and a jet holds its first three Taylor coefficients: c0 + c1 e + c2 e^2. A rule for each function of the network turns
the jets of its inputs into the jet of its output ("Taylor mode"; Griewank & Walther 2008, ch. 13). At the end, c2 of
an example's loss is v^T H v / 2.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Jet:
    """Taylor coefficients c = (c0, c1, c2) of a tensor, all of one shape. Has the operators of a tensor."""

    def __init__(self, c0: Tensor, c1: Tensor, c2: Tensor):
        self.c = (c0, c1, c2)

    shape = property(lambda self: self.c[0].shape)

    def linear(self, f: Callable[[Tensor], Tensor]) -> "Jet":
        """f of this jet, for a linear f."""
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

    def __getattr__(self, name):  # the linear methods of a tensor
        if name not in ("reshape", "transpose", "permute", "flatten", "mean", "float"):
            raise AttributeError(f"Jet has no rule for .{name}")
        return lambda *args, **kwargs: self.linear(lambda a: getattr(a, name)(*args, **kwargs))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"no Taylor rule for {func}")


# ---- rules: like the function of the same name, for jets ----
def _silu(x: Jet, inplace=False) -> Jet:
    x0, x1, x2 = x.c
    s = torch.sigmoid(x0)
    ds, y0 = s * (1 - s), x0 * s
    f1, f2 = torch.addcmul(s, x0, ds), ds * (2 + x0 - 2 * y0)  # first and second derivative at x0
    return Jet(y0, f1 * x1, torch.addcmul(f1 * x2, f2 * x1, x1, value=0.5))


def _softmax(x: Jet, dim: int) -> Jet:
    p0 = torch.softmax(x.c[0], dim)
    e1, e2 = x.c[1], x.c[2] + 0.5 * x.c[1].square()  # exp(x(e) - x0) = 1 + e1 e + e2 e^2
    z1, z2 = (p0 * e1).sum(dim, keepdim=True), (p0 * e2).sum(dim, keepdim=True)  # of the normaliser 1 + z1 e + z2 e^2
    q1 = e1 - z1
    return Jet(p0, p0 * q1, p0 * (e2 - z2 - z1 * q1))


def _weighted(f, x: Tensor | Jet, weight: Jet, bias: Jet | None) -> Jet:
    """f(x, weight, bias) for an f linear in x and in weight. The weight and bias are parameters: their c2 is 0."""
    (w, dw, _), (b, db, _) = weight.c, bias.c if bias is not None else (None,) * 3
    if not isinstance(x, Jet):
        y0 = f(x, w, b)
        return Jet(y0, f(x, dw, db), torch.zeros_like(y0))
    x0, x1, x2 = x.c
    B = len(x0)  # one batch of all coefficients: a CPU convolves it faster than three small ones
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
    v0, v1, v2 = mean(x0 * x0) + eps, 2 * mean(x0 * x1), mean(torch.addcmul(x1 * x1, x0, x2, value=2))  # variance
    r = v0.rsqrt()
    r1, r2 = -0.5 * v1 * r**3, -0.5 * v2 * r**3 + 0.375 * v1 * v1 * r**5  # of variance^(-1/2)
    (w, dw, _), (b, db, _) = ([c.view(1, -1, 1, 1) for c in p.c] for p in (weight, bias))
    f0, f1, f2 = r * w, r1 * w + r * dw, r2 * w + r1 * dw  # (B, C, 1, 1): small, so multiplied first
    y1 = torch.addcmul(torch.addcmul(db, x0, f1), x1, f0)
    y2 = torch.addcmul(torch.addcmul(x2 * f0, x1, f1), x0, f2)
    return Jet(torch.addcmul(b, x0, f0), y1, y2)


def _cat(tensors, dim=0) -> Jet:
    return Jet(*(torch.cat(parts, dim) for parts in zip(*(t.c for t in tensors), strict=True)))


def _dropout(x: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    if training:
        raise ValueError("curvature is measured with dropout off: call model.eval() first")
    return x


RULES = {F.silu: _silu, torch.softmax: _softmax, F.conv2d: _conv2d, F.group_norm: _group_norm, F.dropout: _dropout,
         F.linear: lambda x, weight, bias=None: _weighted(F.linear, x, weight, bias), torch.cat: _cat,
         F.pad: lambda x, *args, **kwargs: x.linear(lambda a: F.pad(a, *args, **kwargs)),
         F.interpolate: lambda x, *args, **kwargs: x.linear(lambda a: F.interpolate(a, *args, **kwargs)),
         Tensor.sub: lambda a, b: b * -1.0 + a}


class _AlongProbe(TorchFunctionMode):
    """In this context, a torch function that is given a parameter or a jet returns a jet."""

    def __init__(self, probe: dict[Tensor, Tensor]):
        super().__init__()
        self.jets = {p: Jet(p.detach(), v, torch.zeros(())) for p, v in probe.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in RULES:
            args = tuple(self._lift(a) for a in args)
            kwargs = {key: self._lift(a) for key, a in kwargs.items()}
        given = [b for a in (*args, *kwargs.values()) for b in (a if isinstance(a, list | tuple) else [a])]
        if func in RULES and any(isinstance(a, Jet) for a in given):
            return RULES[func](*args, **kwargs)
        result = func(*args, **kwargs)
        made = result if isinstance(result, list | tuple) else [result]
        moved = any(isinstance(a, nn.Parameter) and a in self.jets for a in given)
        if moved and any(isinstance(r, Tensor) for r in made):
            raise NotImplementedError(f"no Taylor rule for {func} of a parameter")  # it would count as a constant
        return result

    def _lift(self, a):
        return self.jets.get(a, a) if isinstance(a, nn.Parameter) else a


@torch.no_grad()
def quadratic_forms(losses_fn: Callable[[], Jet], params: Iterable[Tensor], v: Iterable[Tensor]) -> Tensor:
    """v^T H_i v of each example's loss: float64 (B,). v: a vector over params, one tensor for each.

    losses_fn() -> the losses (B,), computed from params by functions in RULES and methods of Jet only. Raises an
    error that names the function if there is another, and ValueError if dropout is on. No .grad is written.
    """
    with _AlongProbe(dict(zip(params, v, strict=True))):
        losses = losses_fn()
    return 2 * losses.c[2].double()
