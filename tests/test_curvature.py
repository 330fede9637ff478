import gc
import math

import numpy as np
import pytest
import torch
from torch import nn

from curvature import hutchinson_trace, rademacher, summarise
from model import Attention
from rng import generator, seed_global


@pytest.fixture
def small():
    """The parameters of a network with few enough of them for its whole Hessian, and a loss on it."""
    seed_global(0, "init")
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), Attention(4, 2)).double()
    nn.init.normal_(net[3].proj.weight)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator(0, "x"))
    return list(net.parameters()), lambda _=0: (net(x) - 1).square().mean()


@pytest.fixture
def mlp():
    seed_global(0, "init")
    g = generator(0, "mlp")
    return (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
            torch.randn(16, 5, generator=g), torch.randn(16, 3, generator=g))


def hessian_trace(loss_fn, params):
    """Entry by entry of the diagonal, by double backward."""
    gradient = torch.autograd.grad(loss_fn(), params, create_graph=True)
    return sum(torch.autograd.grad(g.flatten()[i], p, retain_graph=True)[0].flatten()[i].item()
               for g, p in zip(gradient, params, strict=True) for i in range(p.numel()))


def test_summary_of_known_samples():
    assert summarise([1, 2, 6]) == (3, pytest.approx(7**0.5), pytest.approx((7 / 3)**0.5), [1, 2, 6])
    one = summarise(iter([4.0]))
    assert one.mean == 4 and math.isnan(one.std) and math.isnan(one.stderr)


def test_a_probe_is_plus_or_minus_one_at_even_odds():
    params = [torch.zeros(200, 300), torch.zeros(7, dtype=torch.float64)]
    v = rademacher(params, generator(0, "v"))
    assert [(d.shape, d.dtype) for d in v] == [(p.shape, p.dtype) for p in params]
    assert set(v[0].unique().tolist()) == {-1, 1} and abs(v[0].mean().item()) < 4 / 60_000**0.5
    assert abs((v[0][1:] * v[0][:-1]).mean().item()) < 4 / 60_000**0.5  # rows are independent


def test_one_probe_is_exact_on_a_diagonal_quadratic():
    a, x = torch.arange(1.0, 11), torch.randn(10, requires_grad=True)
    estimate = hutchinson_trace(lambda _: 0.5 * (a * x**2).sum(), [x], num_probes=1, generator=generator(0, "v"))
    assert estimate.samples == [pytest.approx(55, rel=1e-6)]


def test_the_trace_of_a_small_network_within_its_stated_error(small):
    params, loss_fn = small
    trace = hessian_trace(loss_fn, params)
    estimates = [hutchinson_trace(loss_fn, params, 64, generator(seed, "v")) for seed in range(20)]
    assert max(abs(e.mean - trace) / e.stderr for e in estimates) < 3
    means = [e.mean for e in estimates]
    assert abs(np.mean(means) - trace) < 3 * np.std(means, ddof=1) / 20**0.5
    assert 0.6 < np.mean([e.stderr for e in estimates]) / np.std(means, ddof=1) < 1.6


def test_linear_and_unused_parameters_have_no_curvature():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert hutchinson_trace(lambda _: (2 * x).sum(), [x, unused], 3).samples == [0.0] * 3
    assert hutchinson_trace(lambda _: (x**2).sum(), [x, unused], 2).samples == [6.0] * 2


def test_the_loss_is_told_which_probe_it_serves():
    x = torch.ones(3, requires_grad=True)
    assert hutchinson_trace(lambda j: j * (x**2).sum(), [x], 4).samples == [0, 6, 12, 18]


def test_the_callers_autocast_and_no_grad_change_nothing():
    x = torch.randn(8, 8, generator=generator(0, "x")).requires_grad_()
    expected = hutchinson_trace(lambda _: (x @ x).square().mean(), [x], 2, generator(0, "v"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert hutchinson_trace(lambda _: (x @ x).square().mean(), [x], 2, generator(0, "v")) == expected


@pytest.mark.parametrize(("kwargs", "match"), [({"num_probes": 0}, "num_probes=0"), ({"params": []}, "0 params"),
                                               ({"loss_fn": lambda _: torch.ones(2)}, "scalar")])
def test_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        hutchinson_trace(**{"loss_fn": lambda _: torch.ones(()), "params": [torch.ones(2)], **kwargs})


def test_products_equal_torch_funcs_and_curvlinops(mlp):
    net, x, y = (part.double() for part in mlp)
    names, params = zip(*net.named_parameters(), strict=True)

    def loss_of(*values):
        return nn.functional.mse_loss(torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,)), y)

    probes = [rademacher(params, rng) for rng in [generator(0, "v")] for _ in range(5)]
    expected = [torch.func.jvp(lambda *p, v=v: torch.func.jvp(loss_of, p, tuple(v))[1], params, tuple(v))[1].item()
                for v in probes]
    ours = hutchinson_trace(lambda _: nn.functional.mse_loss(net(x), y), params, 5, generator(0, "v"))
    assert ours.samples == pytest.approx(expected, rel=1e-10)

    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops: tests/requirements-peers.txt")
    operator = curvlinops.HessianLinearOperator(net, nn.MSELoss(), list(params), [(x, y)])
    flat = [torch.cat([d.flatten() for d in v]) for v in probes]
    assert ours.samples == pytest.approx([(v @ (operator @ v)).item() for v in flat], rel=1e-5)


def test_the_trace_equals_pyhessians_with_the_same_probes(mlp, monkeypatch):
    pyhessian = pytest.importorskip("pyhessian", reason="pyhessian: tests/requirements-peers.txt")
    net, x, y = mlp
    rng = generator(0, "v")
    monkeypatch.setattr(torch, "randint_like",  # they draw 0 or 1 and turn 0 into -1
                        lambda p, high, **_: torch.randint(high, p.shape, generator=rng).to(p))
    theirs = pyhessian.hessian(net, nn.MSELoss(), data=(x, y), cuda=False).trace(maxIter=6, tol=0)
    net.zero_grad()
    ours = hutchinson_trace(lambda _: nn.functional.mse_loss(net(x), y), net.parameters(), 6, generator(0, "v"))
    assert ours.samples == pytest.approx(theirs, rel=1e-4)


def test_nothing_is_left_behind(small):
    params, loss_fn = small
    state = torch.get_rng_state()

    def tensors_after(probes):
        hutchinson_trace(loss_fn, params, probes, generator(0, "v"))
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    assert tensors_after(2) == tensors_after(50)
    assert all(p.grad is None for p in params) and torch.equal(state, torch.get_rng_state())
