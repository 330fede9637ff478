import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvature import hutchinson_trace, rademacher
from diffusion import Diffusion, linear_betas
from model import UNet
from rng import generator, seed_global
from taylor import quadratic_forms

D = Diffusion(linear_betas())
B, C = 3, 4


def randn(*shape, index=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(0, "taylor", index))


# x: an input that does not move. h(e) moves, with all three Taylor coefficients. p: parameters.
RULES = {
    "silu": lambda x, h, p: F.silu(h),
    "softmax": lambda x, h, p: torch.softmax(h.flatten(2), dim=-1),
    "conv2d": lambda x, h, p: F.conv2d(h, p["conv"], p["scale"], 2, 1),
    "conv2d without bias": lambda x, h, p: F.conv2d(h, p["conv"], padding=1),
    "conv2d of a constant": lambda x, h, p: F.conv2d(x, p["first"], p["scale"]),
    "linear": lambda x, h, p: F.linear(h.flatten(1), p["linear"], p["scale"]),
    "group_norm": lambda x, h, p: F.group_norm(h, 2, p["scale"], p["shift"], 1e-2),
    "dropout, off": lambda x, h, p: F.dropout(h, 0.5, False),
    "cat": lambda x, h, p: torch.cat([h, F.silu(h)], dim=1),
    "pad": lambda x, h, p: F.pad(h, (0, 1, 0, 1), value=0.0),
    "interpolate": lambda x, h, p: F.interpolate(h, scale_factor=2, mode="nearest"),
    "constant - jet": lambda x, h, p: x[:, :1] - h,
    "jet + jet, jet + constant": lambda x, h, p: h + F.silu(h) + 0.5,
    "jet * jet, jet * constant": lambda x, h, p: (h * 0.7) * F.silu(h),
    "matmul": lambda x, h, p: (h @ F.silu(h).transpose(2, 3)) @ x[:, :1],
    "unbind": lambda x, h, p: h.reshape(B, 2, 2, 16).unbind(2)[0] * h.reshape(B, 2, 2, 16).unbind(2)[1],
    "index": lambda x, h, p: h * h.flatten(2).mean(2)[:, :, None, None],
    "permute": lambda x, h, p: h * h.permute(0, 1, 3, 2),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_against_two_derivatives_along_the_line(rule):
    """c2 of example i's loss is half of d^2/de^2 loss_i(theta + e v), which autograd gives."""
    x = randn(B, 3, 4, 4)
    p = {"first": randn(C, 3, 1, 1, index=1), "conv": randn(C, C, 3, 3, index=2) / 4,
         "linear": randn(C, 64, index=3) / 8, "scale": randn(C, index=4), "shift": randn(C, index=5)}
    p = {name: nn.Parameter(value) for name, value in p.items()}
    v = {name: randn(*value.shape, index=6 + i) for i, (name, value) in enumerate(p.items())}

    def losses(p):
        h = F.silu(F.conv2d(x, p["first"], p["shift"]))
        return (RULES[rule](x, h, p) + 1.0).square().flatten(1).mean(dim=1)

    forms = quadratic_forms(lambda: losses(p), p.values(), v.values())
    e = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for form, loss in zip(forms, losses({name: p[name].detach() + e * v[name] for name in p}), strict=True):
        slope, = torch.autograd.grad(loss, e, create_graph=True)
        bend, = torch.autograd.grad(slope, e, retain_graph=True)
        assert abs(bend.item()) > 1e-3 and form.item() == pytest.approx(bend.item(), rel=1e-9)


def randomised(net):
    g = generator(0, "w")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return net.eval()


def batch(n, dtype):
    x_0, eps = (randn(n, 3, 32, 32, index=i).to(dtype) for i in (20, 21))
    return x_0, torch.linspace(5, 995, n).long(), eps


@pytest.mark.parametrize("attention", [(), (16,)])
def test_forms_of_a_network_equal_double_backward_example_by_example(attention):
    seed_global(0, "init")
    net = randomised(UNet(8, (1, 2), 1, attention)).double()
    params, args = list(net.parameters()), batch(4, torch.float64)
    forms = quadratic_forms(lambda: D.eps_mse(net, *args), params, rademacher(params, generator(0, "v")))
    assert forms.shape == (4,) and forms.dtype == torch.float64
    for i in range(4):
        one = hutchinson_trace(lambda _, i=i: D.eps_mse(net, *args)[i], params, 1, generator(0, "v"))
        assert forms[i].item() == pytest.approx(one.mean, rel=1e-4)


def test_forms_of_the_real_network_in_fp32_and_nothing_is_left_behind():
    seed_global(0, "init")
    net = randomised(UNet(32))
    params, args = list(net.parameters()), batch(2, torch.float32)
    state, counts = torch.get_rng_state(), []
    for _ in range(2):
        forms = quadratic_forms(lambda: D.eps_mse(net, *args), params, rademacher(params, generator(0, "v")))
        gc.collect()
        counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert counts[0] == counts[1] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in params)
    whole = hutchinson_trace(lambda _: D.eps_mse(net, *args).mean(), params, 1, generator(0, "v"))
    assert forms.mean().item() == pytest.approx(whole.mean, rel=1e-3)


def test_dropout_and_functions_without_a_rule_are_refused():
    net = UNet(8, (1,), 1, ())
    params, args = list(net.parameters()), batch(1, torch.float32)
    with pytest.raises(ValueError, match="dropout"):
        quadratic_forms(lambda: D.eps_mse(net.train(), *args), params, rademacher(params, None))
    p = nn.Parameter(torch.ones(3, 3))
    for function, name in ((lambda h: h.tanh(), "tanh"), (torch.tanh, "tanh"), (F.relu, "relu")):
        with pytest.raises((NotImplementedError, AttributeError), match=name):
            quadratic_forms(lambda f=function: f(F.linear(torch.ones(1, 3), p)), [p], [torch.ones(3, 3)])
    q = nn.Parameter(torch.ones(3))
    for function in (lambda h: h * q, lambda h: h + q, lambda h: h * torch.tanh(q), lambda h: h * torch.cat([q]),
                     lambda h: h * q.chunk(1)[0]):
        with pytest.raises((NotImplementedError, AttributeError)):  # never as a constant
            quadratic_forms(lambda f=function: f(F.linear(torch.ones(1, 3), p)), [p, q], [torch.ones(3, 3), q.data])
