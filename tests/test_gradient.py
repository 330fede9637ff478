"""docs/experiments/gradient.py: how noisy gradients are, against the definitions."""

import json

import pytest
import torch

import gradient
from data import make_shapes, to_model_range
from diffusion import Diffusion, linear_betas
from errors import UserError
from model import UNet
from rng import generator

N = 20


def network(dropout):
    """A small one whose layers all act; a new UNet starts with zeros behind its dropout and at its output."""
    model = UNet(4, (1, 1), 1, (), dropout=dropout)
    for i, p in enumerate(model.parameters()):
        p.data = 0.2 * torch.randn(p.shape, generator=generator(0, "test", i))
    return model


def test_summary_against_sums_over_pairs_and_the_covariance():
    g = torch.randn(N, 7, generator=generator(0, "test")).double() + 0.5
    clean, noisy = g[:6], g[6:]
    parts = torch.stack([clean.sum(dim=0), noisy.sum(dim=0)])
    squares = torch.stack([clean.square().sum(), noisy.square().sum()])
    norm, noise_scale, square_share, cosine = gradient.summary(parts @ parts.T, squares, N).tolist()
    products = g @ g.T
    pairs = products.sum() - products.trace()
    assert norm**2 == pytest.approx(pairs.item() / (N * (N - 1)))
    assert noise_scale * norm**2 == pytest.approx(g.var(dim=0).sum().item())
    assert square_share == pytest.approx((clean.square().sum() / g.square().sum()).item())
    own = [(part @ part.T).sum() - (part @ part.T).trace() for part in (clean, noisy)]
    assert cosine == pytest.approx((products[:6, 6:].sum() / (own[0] * own[1]).sqrt()).item())


def test_each_group_is_left_out_once():
    g = torch.randn(gradient.GROUPS, 2, 5, generator=generator(0, "test")).double() + 1  # an example in each part
    inner = torch.einsum("apd,bqd->apbq", g, g)
    found, n = gradient.without_each(inner, g.square().sum(dim=2), 2 * gradient.GROUPS), 2 * gradient.GROUPS - 2
    for k in range(gradient.GROUPS):
        rest = torch.cat([g[:k], g[k + 1:]])
        norm = (rest.sum(dim=(0, 1)).square().sum() - rest.square().sum()) / (n * (n - 1))
        share = rest[:, 0].square().sum() / rest.square().sum()
        assert found[k, [0, 2]].tolist() == pytest.approx([norm.sqrt().item(), share.item()])


def test_a_cosine_that_is_lost_in_noise_is_not_a_number():
    inner, squares = torch.tensor([[1.0, 5], [5, 1]]).double(), torch.tensor([2.0, 2]).double()  # both products below 0
    norm, *_, cosine = gradient.summary(inner, squares, N)
    assert norm > 0 and cosine.isnan()


def test_sums_are_those_of_the_gradients_of_single_examples():
    model, images = network(dropout=0.0), make_shapes(8)
    diffusion = Diffusion(linear_betas())
    w = torch.linspace(0.1, 2, 1000).double()
    inner, squares = gradient.sums(model, diffusion, images, [torch.ones(1000).double(), w], 500, N)
    gradients, ts = [], []
    for i in range(N):
        rng = generator(0, "gradient", i)
        x_0 = to_model_range(images[torch.randint(8, (1,), generator=rng)])
        t = torch.randint(1000, (1,), generator=rng)
        eps = torch.randn(x_0.shape, generator=rng)
        loss = diffusion.mse(model, x_0, t, eps).sum()
        gradients.append(torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(model.parameters()))]).double())
        ts.append(t.item())
    g, clean = torch.stack(gradients), torch.tensor(ts) < 500
    for k, scale in enumerate((torch.ones(N).double(), w[ts])):
        scaled = g * scale[:, None]
        assert squares[k].sum(dim=0).tolist() == pytest.approx(
            [scaled[part].square().sum().item() for part in (clean, ~clean)])
        a, b = scaled[clean].sum(dim=0), scaled[~clean].sum(dim=0)
        assert inner[k].sum(dim=(0, 2)).flatten().tolist() == pytest.approx(
            [(x @ y).item() for x, y in ((a, a), (a, b), (b, a), (b, b))], rel=1e-4)
        third = scaled[3::10]  # the group of examples 3 and 13
        assert inner[k, 3, :, 3].sum().item() == pytest.approx(third.sum(dim=0).square().sum().item(), rel=1e-4)


def test_all_networks_see_the_same_dropout_masks():
    model, images, w = network(dropout=0.5), make_shapes(8), [torch.ones(1000).double()]
    (a, _), (b, _) = (gradient.sums(model, Diffusion(linear_betas()), images, w, 500, N) for _ in range(2))
    (c, _) = gradient.sums(model.eval(), Diffusion(linear_betas()), images, w, 500, N)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_command(run_train, capsys):
    runs = [str(run_train(exp)) for exp in ("E5", "E6")]
    capsys.readouterr()
    assert gradient.main([*runs, "--n", "40", "--at", "500", "--step", "6"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["network"], r["loss"], r["step"]) for r in lines] == [
        (network, loss, 6) for network in ("E5", "E6") for loss in ("E5", "E6")]
    own, crossed = lines[:2]
    assert own["noise_scale_ratio"] == 1 and own["noise_scale_ratio_stderr"] == 0 < own["noise_scale_stderr"]
    assert crossed["noise_scale_ratio"] == pytest.approx(crossed["noise_scale"] / own["noise_scale"])
    assert crossed["square_share"] < own["square_share"]  # Min-SNR's weight is below 1 at clean timesteps
    for flags, error in ((["--n", "15"], "--n 15"), (["--at", "0"], "--at 0")):
        with pytest.raises(UserError, match=error):
            gradient.main([*runs, *flags])
    with pytest.raises(UserError, match="seed"):
        gradient.main([runs[0], str(run_train("E6", seed=5))])


def test_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(gradient.GROUPS, 4, generator=generator(0, "test")).double()
    without = (x.sum(dim=0) - x) / (gradient.GROUPS - 1)
    assert torch.allclose(gradient.jackknife(without), x.std(dim=0) / gradient.GROUPS**0.5)
