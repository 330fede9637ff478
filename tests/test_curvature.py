import gc
import math

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

import evaluate
from checkpoint import load_checkpoint, read_jsonl
from config import load_config
from curvature import hutchinson_trace, quadratic_forms, rademacher, summarise
from data import make_shapes
from diffusion import Diffusion, linear_betas
from evaluate import curvature_record
from model import Attention, UNet
from rng import generator, seed_global
from weighting import loss_weights

D = Diffusion(linear_betas())


def randomised_unet(base=8, mults=(1, 2), blocks=1, attention=(16,)):
    seed_global(0, "init")
    net, g = UNet(base, mults, blocks, attention).double(), generator(0, "w")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


def batch(B=4, dtype=torch.float64):
    g = generator(0, "batch")
    x_0, eps = (torch.randn(B, 3, 32, 32, generator=g, dtype=dtype) for _ in range(2))
    return x_0, torch.linspace(5, 995, B).long(), eps


@pytest.fixture
def small():
    """A network with every kind of layer, few enough parameters for its whole Hessian, and a loss on it."""
    seed_global(0, "init")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.attention = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), Attention(4, 2)

        def forward(self, x):
            return self.attention(nn.functional.silu(self.norm(self.conv(x))))

    net = Net().double()
    nn.init.normal_(net.attention.proj.weight)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator(0, "x"))
    return list(net.parameters()), lambda _=0: (net(x) - 1).square().mean()


def full_hessian(loss_fn, params):
    """Column by column, by double backward of single entries."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(), params, create_graph=True)])
    rows = [torch.cat([h.flatten() for h in torch.autograd.grad(g, params, retain_graph=True)]) for g in gradient]
    return torch.stack(rows)


# ---- hutchinson_trace ----

def test_one_probe_is_exact_on_a_diagonal_quadratic():
    a, x = torch.arange(1.0, 11), torch.randn(10, requires_grad=True)
    estimate = hutchinson_trace(lambda _: 0.5 * (a * x**2).sum(), [x], num_probes=1, generator=generator(0, "v"))
    assert estimate.mean == pytest.approx(55, rel=1e-6)
    assert estimate.samples == [estimate.mean] and math.isnan(estimate.stderr)


def test_the_trace_of_a_small_network_within_its_stated_error(small):
    params, loss_fn = small
    trace = full_hessian(loss_fn, params).trace().item()
    estimates = [hutchinson_trace(loss_fn, params, 64, generator(seed, "v")) for seed in range(20)]
    assert max(abs(e.mean - trace) / e.stderr for e in estimates) < 3
    means = [e.mean for e in estimates]
    assert abs(np.mean(means) - trace) < 3 * np.std(means, ddof=1) / 20**0.5
    assert 0.6 < np.mean([e.stderr for e in estimates]) / np.std(means, ddof=1) < 1.6
    e = estimates[0]
    assert (e.mean, e.std) == pytest.approx((np.mean(e.samples), np.std(e.samples, ddof=1)))
    assert e.stderr == pytest.approx(e.std / 8)


def test_linear_in_a_loss_scale(small):
    params, loss_fn = small
    one, three = (hutchinson_trace(lambda j, s=s: s * loss_fn(j), params, 4, generator(0, "v")) for s in (1, 3))
    assert three.samples == pytest.approx([3 * x for x in one.samples], rel=1e-12)


def test_linear_and_unused_parameters_have_no_curvature():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert hutchinson_trace(lambda _: (2 * x).sum(), [x, unused], 3).samples == [0.0] * 3
    assert hutchinson_trace(lambda _: (x**2).sum(), [x, unused], 2).samples == [6.0] * 2


@pytest.mark.parametrize(("kwargs", "match"), [({"num_probes": 0}, "num_probes=0"), ({"params": []}, "0 params"),
                                               ({"loss_fn": lambda _: torch.ones(2)}, "must be a scalar")])
def test_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        hutchinson_trace(**{"loss_fn": lambda _: torch.ones(()), "params": [torch.ones(2)], **kwargs})


def test_products_equal_torch_funcs_and_curvlinops_on_a_tanh_mlp():
    seed_global(0, "init")
    mlp = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    g = generator(0, "mlp")
    x, y = torch.randn(16, 5, generator=g, dtype=torch.float64), torch.randn(16, 3, generator=g, dtype=torch.float64)
    names, params = zip(*mlp.named_parameters(), strict=True)

    def loss_of(flat):
        parts = dict(zip(names, [f.view_as(p) for f, p in zip(flat.split([p.numel() for p in params]), params,
                                                              strict=True)], strict=True))
        return nn.functional.mse_loss(torch.func.functional_call(mlp, parts, x), y)

    hessian = torch.func.hessian(loss_of)(torch.cat([p.detach().flatten() for p in params]))
    probes = [torch.cat([d.flatten() for d in v]) for rng in [generator(0, "v")]
              for v in (rademacher(params, rng) for _ in range(5))]
    expected = [(v @ hessian @ v).item() for v in probes]
    ours = hutchinson_trace(lambda _: nn.functional.mse_loss(mlp(x), y), params, 5, generator(0, "v"))
    assert ours.samples == pytest.approx(expected, rel=1e-5)

    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops: tests/requirements-peers.txt")
    operator = curvlinops.HessianLinearOperator(mlp, nn.MSELoss(), list(params), [(x, y)])
    assert ours.samples == pytest.approx([(v @ (operator @ v)).item() for v in probes], rel=1e-5)


def test_the_trace_equals_pyhessians_with_the_same_probes(monkeypatch):
    pyhessian = pytest.importorskip("pyhessian", reason="pyhessian: tests/requirements-peers.txt")
    seed_global(0, "init")
    mlp = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    g = generator(0, "mlp")
    x, y = torch.randn(16, 5, generator=g), torch.randn(16, 3, generator=g)
    rng = generator(0, "v")
    monkeypatch.setattr(torch, "randint_like",  # they draw 0 or 1 and turn 0 into -1
                        lambda p, high, **_: torch.randint(high, p.shape, generator=rng).to(p))
    theirs = pyhessian.hessian(mlp, nn.MSELoss(), data=(x, y), cuda=False).trace(maxIter=6, tol=0)
    mlp.zero_grad()
    ours = hutchinson_trace(lambda _: nn.functional.mse_loss(mlp(x), y), mlp.parameters(), 6, generator(0, "v"))
    assert ours.samples == pytest.approx(theirs, rel=1e-4)


# ---- quadratic forms by Taylor mode ----

@pytest.mark.parametrize("attention", [(), (16,)])
def test_forms_equal_double_backward_example_by_example(attention):
    net = randomised_unet(attention=attention).eval()
    params, (x_0, t, eps) = list(net.parameters()), batch()
    forms = quadratic_forms(lambda: D.eps_mse(net, x_0, t, eps), params, rademacher(params, generator(0, "v")))
    assert forms.shape == (4,) and forms.dtype == torch.float64
    for i in range(4):
        one = hutchinson_trace(lambda _, i=i: D.eps_mse(net, x_0, t, eps)[i], params, 1, generator(0, "v"))
        assert forms[i].item() == pytest.approx(one.mean, rel=1e-4)


def test_forms_of_the_real_network_in_fp32():
    net = randomised_unet(32, (1, 2, 2, 2), 2).float().eval()
    params, (x_0, t, eps) = list(net.parameters()), batch(2, torch.float32)
    forms = quadratic_forms(lambda: D.eps_mse(net, x_0, t, eps), params, rademacher(params, generator(0, "v")))
    whole = hutchinson_trace(lambda _: D.eps_mse(net, x_0, t, eps).mean(), params, 1, generator(0, "v"))
    assert forms.mean().item() == pytest.approx(whole.mean, rel=1e-3)


def test_dropout_and_functions_without_a_rule_are_refused():
    net = UNet(8, (1,), 1, ())
    params, (x_0, t, eps) = list(net.parameters()), batch(1, torch.float32)
    with pytest.raises(ValueError, match="dropout off"):
        quadratic_forms(lambda: D.eps_mse(net.train(), x_0, t, eps), params, rademacher(params, None))
    p = nn.Parameter(torch.ones(3, 3))
    with pytest.raises((NotImplementedError, AttributeError), match="rule"):
        quadratic_forms(lambda: nn.functional.linear(torch.ones(1, 3), p).tanh(), [p], [torch.ones(3, 3)])


# ---- the probe of a run ----

@pytest.fixture
def probe():
    config = load_config("E6", overrides=[*TINY, "curvature.num_probes=3"])
    return config, randomised_unet().float().train(), make_shapes(50)


def test_both_traces_and_the_bins_come_from_the_same_forms(probe, monkeypatch):
    config, net, images = probe
    seen = []
    real = evaluate.quadratic_forms
    monkeypatch.setattr(evaluate, "quadratic_forms", lambda losses, *a: (seen.append((losses, real(losses, *a))),
                                                                         seen[-1][1])[1])
    record = curvature_record(config, 7, net, D, images)
    forms, t = torch.stack([f for _, f in seen]), torch.stack([losses.args[2] for losses, _ in seen])
    w = loss_weights(D.snr, "minsnr", 5.0)[t]
    for key, values in (("hutch_trace", w * forms), ("hutch_trace_unweighted", forms)):
        expected = summarise(values.mean(dim=1).tolist())
        assert record[f"curvature/{key}_mean"] == pytest.approx(expected.mean)
        assert record[f"curvature/{key}_std"] == pytest.approx(expected.std)
        assert record[f"curvature/{key}_stderr"] == pytest.approx(expected.std / 3**0.5)
    assert sorted((t.flatten() * 12 // 1000).tolist()) == list(range(12))  # one t in each of P * B strata
    assert all(row.diff().min() > 150 for row in t)  # and each probe spread over all of [0, T)
    bins = record["curvature/hutch_trace_t_bins"]
    for b in range(8):
        inside = forms[(t >= 125 * b) & (t < 125 * (b + 1))]
        assert bins[b] == pytest.approx(inside.mean().item())
    direct = hutchinson_trace(lambda _: (w[0].float() * seen[0][0]()).mean(), net.eval().parameters(), 1,
                              after_the_batch_of(config, images))
    assert direct.mean == pytest.approx((w * forms).mean(dim=1)[0].item(), rel=1e-3)


def after_the_batch_of(config, images):
    """The generator of probe 0 once images, t and eps are drawn: what v is drawn from."""
    rng, B = generator(config.seed, "curvature", 0), config.train.batch_size
    torch.randint(len(images), (B,), generator=rng)
    torch.rand(B, generator=rng, dtype=torch.float64)
    torch.randn(B, 3, 32, 32, generator=rng)
    return rng


def test_probes_are_the_same_at_every_step_and_in_every_arm(probe):
    config, net, images = probe
    first, later = (curvature_record(config, step, net, D, images) for step in (1, 2))
    assert {**first, "step": 2} == later
    arm = curvature_record(load_config("E5", overrides=[*TINY, "curvature.num_probes=3"]), 1, net, D, images)
    key = "curvature/hutch_trace_unweighted_mean"
    assert arm[key] == first[key] == arm["curvature/hutch_trace_mean"] != first["curvature/hutch_trace_mean"]


def test_a_probe_leaves_nothing_behind(probe):
    config, net, images = probe
    net.middle.eval()
    modes = [m.training for m in net.modules()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    weights, state = [p.detach().clone() for p in net.parameters()], torch.get_rng_state()

    def tensors():
        gc.collect()
        return sum(torch.is_tensor(o) for o in gc.get_objects())

    curvature_record(config, 1, net, D, images)
    before = tensors()
    for step in range(17):  # 51 probes
        curvature_record(config, step, net, D, images)
    assert tensors() == before
    assert [m.training for m in net.modules()] == modes and torch.equal(state, torch.get_rng_state())
    for p, w in zip(net.parameters(), weights, strict=True):
        assert torch.equal(p, w) and torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad


def test_hutchinson_leaves_nothing_behind(small):
    params, loss_fn = small
    state = torch.get_rng_state()
    hutchinson_trace(loss_fn, params, 2, generator(0, "v"))
    gc.collect()
    before = sum(torch.is_tensor(o) for o in gc.get_objects())
    hutchinson_trace(loss_fn, params, 50, generator(0, "v"))
    gc.collect()
    assert sum(torch.is_tensor(o) for o in gc.get_objects()) == before
    assert all(p.grad is None for p in params) and torch.equal(state, torch.get_rng_state())


def test_a_run_is_the_same_with_and_without_the_probe(run_train):
    common = ("log.every=1", "curvature.num_probes=2")
    on = run_train("E5", *common, "curvature.every=2", out="on")
    off = run_train("E5", *common, "curvature.every=0", out="off")
    assert (on / "loss.jsonl").read_bytes() == (off / "loss.jsonl").read_bytes()
    states = [load_checkpoint(run / "checkpoints") for run in (on, off)]
    for key in ("model", "ema"):
        assert all(torch.equal(states[0][key][k], states[1][key][k]) for k in states[0][key])
    assert [r["step"] for r in read_jsonl(on / "curvature.jsonl")] == [2, 4, 6, 8, 10, 12]
    assert not (off / "curvature.jsonl").exists()


def test_the_command_measures_the_last_checkpoint(run_train, capsys):
    run_dir = run_train("E6", "curvature.every=12", "curvature.num_probes=2")
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--curvature", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed == (run_dir / "curvature.jsonl").read_text()
