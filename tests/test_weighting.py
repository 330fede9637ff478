"""Weights against the papers' formulas, and the proof that one loss is meant whatever the network predicts."""

import math

import pytest
import torch

from diffusion import BETAS, PREDICTIONS, Diffusion, linear_betas
from rng import generator
from weighting import SCALES, WEIGHTINGS, loss_weights, min_snr

SNR = Diffusion(linear_betas()).snr
INF = math.inf


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- closed forms ----


@pytest.mark.parametrize("kind, gamma, schedule, means", [  # of eps, v, x0
    ("minsnr", 1, "linear", (0.817311, 0.116977, 0.355698)), ("minsnr", 1, "cosine", (0.642114, 0.183095, 0.633246)),
    ("minsnr", 3, "linear", (0.888422, 0.170431, 0.758472)), ("minsnr", 3, "cosine", (0.775809, 0.284151, 1.422153)),
    ("minsnr", 5, "linear", (0.913073, 0.191863, 1.049711)), ("minsnr", 5, "cosine", (0.824022, 0.326113, 2.003961)),
    ("soft_minsnr", 5, "linear", (0.840937, 0.145563, 0.795316)),
    ("soft_minsnr", 5, "cosine", (0.696840, 0.240522, 1.515801)),
    ("p2", None, "linear", (0.724487,)), ("p2", None, "cosine", (0.504422,)),
    ("debiased", None, "linear", (17.817056,)), ("debiased", None, "cosine", (24.809067,)),
])
def test_means_over_the_schedule(kind, gamma, schedule, means):
    snr = Diffusion(BETAS[schedule]()).snr
    for prediction, mean in zip(("eps", "v", "x0"), means, strict=False):
        assert loss_weights(snr, kind, gamma, prediction).mean().item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("gamma, expected", [(5, [0.5, 1, 1, 1]), (2, [0.2, 0.4, 1, 1]), (20, [1, 1, 1, 1]),
                                             (0.5, [0.05, 0.1, 0.25, 1])])
def test_definition_at_hand_made_snrs(gamma, expected):
    snr = float64(10, 5, 2, 0)
    assert min_snr(snr, gamma).tolist() == loss_weights(snr, "minsnr", gamma).tolist() == pytest.approx(expected)
    mean = sum(expected) / 4
    assert loss_weights(snr, "minsnr_norm", gamma).tolist() == pytest.approx([w / mean for w in expected])
    assert loss_weights(snr.float(), "minsnr", gamma).dtype == torch.float64


@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("gamma", [0.5, 1, 1.7, 3, 5, 7.3, INF])
def test_weights_on_eps_are_to_the_bit_those_of_earlier_runs(schedule, gamma):
    """Runs with min(1, gamma / snr), as it was written before x_0 and v came, can be resumed and compared."""
    snr = Diffusion(BETAS[schedule](), "v").snr
    w = (gamma / snr).clamp(max=1)
    assert torch.equal(loss_weights(snr, "minsnr", gamma), w)
    assert torch.equal(loss_weights(snr, "minsnr_norm", gamma), w / w.mean())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_constant_and_the_limit_of_a_large_gamma(prediction):
    snr = torch.cat([SNR, float64(0)])
    assert torch.equal(loss_weights(snr, "constant", None, prediction), torch.ones_like(snr))
    limit = {"eps": torch.ones_like(snr), "v": snr / (snr + 1), "x0": snr}[prediction]
    for kind, gamma in (("minsnr", INF), ("minsnr", 1e4), ("soft_minsnr", INF)):  # the largest snr is 9999
        torch.testing.assert_close(loss_weights(snr, kind, gamma, prediction), limit, rtol=1e-15, atol=0)
    assert loss_weights(snr, "minsnr_norm", INF, prediction).mean().item() == pytest.approx(1, rel=1e-12)


# ---- one loss, three forms ----

def three_forms(betas):
    """snr (T + 1,), with 0 at the end, and for each prediction the MSE per t and its gradient (T + 1, 4).

    All come from one network, which says v and whose output is converted. Everything is float64.
    """
    ac = torch.cat([Diffusion(betas, "v").alphas_cumprod, float64(0)])
    t, signal, noise = torch.arange(len(ac)), ac.sqrt()[:, None], (1 - ac).sqrt()[:, None]
    x_0, eps = (torch.randn(len(ac), 768, dtype=torch.float64, generator=generator(0, "forms", i)) for i in range(2))

    def mse(prediction, params):
        def model(x_t, t):
            a, b, c, d = params
            v_hat = a * torch.tanh(b * x_t + c * x_t.roll(1, dims=1) + d * t[:, None] / len(t))
            return {"v": v_hat, "x0": signal * x_t - noise * v_hat, "eps": noise * x_t + signal * v_hat}[prediction]

        diffusion = Diffusion(betas[:1], prediction)
        diffusion.alphas_cumprod, diffusion.T = ac, len(ac)  # with snr = 0, which it would refuse for eps
        return diffusion.mse(model, x_0, t, eps)

    params = float64(7, -0.4, 0.2, 0.5)
    return ac / (1 - ac), {
        prediction: (mse(prediction, params), torch.func.jacfwd(lambda p, of=prediction: mse(of, p))(params))
        for prediction in PREDICTIONS}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("schedule", BETAS)
def test_losses_and_gradients_are_equal_whatever_the_network_predicts(schedule):
    """At every t, and at snr = 0. The weight of constant is 1 on another MSE in each form, and that of minsnr_norm has
    another mean: these two factors are taken out first."""
    snr, forms = three_forms(BETAS[schedule]())
    for kind, gamma in [(kind, gamma) for kind, (_, reads_gamma) in WEIGHTINGS.items()
                        for gamma in ((0.5, 1, 5, INF) if reads_gamma else (None,))]:
        weighted = {}
        for prediction, (mse, gradient) in forms.items():
            w = loss_weights(snr, kind, gamma, prediction)
            if kind == "constant":
                w = w * snr / SCALES[prediction](snr.clamp(min=1e-100))
            if kind == "minsnr_norm":
                w = w * loss_weights(snr, "minsnr", gamma, prediction).mean()
            weighted[prediction] = w * mse, w[:, None] * gradient
        loss, gradient = weighted["x0"]
        assert torch.equal(loss > 0, snr > 0) and torch.equal(gradient.norm(dim=1) > 0, snr > 0)
        for other, others_gradient in weighted.values():
            assert ((other - loss).abs() <= 1e-12 * loss).all(), (kind, gamma)
            assert ((others_gradient - gradient).norm(dim=1) <= 1e-12 * gradient.norm(dim=1)).all(), (kind, gamma)


# ---- against what others have published ----

def official(snr, gamma, prediction):
    """TiankaiHang/Min-SNR-Diffusion-Training, guided_diffusion/gaussian_diffusion.py, of 2023-09: "min_snr_5" for x_0
    and eps, "vmin_snr_5" for v."""
    w = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    w = {"eps": w / snr, "v": w / (snr + 1), "x0": w}[prediction]
    w[snr == 0] = 1.0
    return w


def diffusers(snr, gamma, prediction):
    """The examples of diffusers since #6307."""
    w = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    if prediction == "eps":
        w = w / snr
    elif prediction == "v":
        w = w / (snr + 1)
    return w


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_against_the_official_repository_and_diffusers(gamma, prediction):
    ours, zero = loss_weights(SNR, "minsnr", gamma, prediction), float64(0)
    for peer in (official, diffusers):
        torch.testing.assert_close(ours, peer(SNR, gamma, prediction), rtol=1e-14, atol=0)
    limit = 1.0 if prediction == "eps" else 0.0
    assert loss_weights(zero, "minsnr", gamma, prediction).item() == limit
    # Wrong at snr = 0: official has 1 for x_0 and v also, where all other t are weighed by min(snr, gamma) -> 0;
    assert official(zero, gamma, prediction).item() == 1.0
    # diffusers has 0 / 0 for eps.
    assert math.isnan(diffusers(zero, gamma, prediction).item()) == (prediction == "eps")


@pytest.mark.parametrize("wrong, at", [
    (lambda snr, gamma: torch.minimum(snr, gamma) / snr, 999),          # official with "min_snr_5" and v: its #3
    (lambda snr, gamma: torch.minimum(snr, gamma) / snr + 1, 0),        # diffusers before #5238 and #8466
    (lambda snr, gamma: torch.minimum(snr + 1, gamma) / (snr + 1), 999),  # diffusers from #5238 to #6307: its #5654
])
def test_weights_on_v_that_were_published_wrong(wrong, at):
    ours, theirs = loss_weights(SNR, "minsnr", 5.0, "v"), wrong(SNR, float64(5.0))
    assert theirs[at] > 1000 * ours[at]


def test_soft_min_snr_is_k_diffusions():
    """k-diffusion weighs the MSE of (x_0 - c_skip x) / c_out, whose factor of the x_0-MSE is 1 / c_out^2."""
    sigma, sigma_data = (1 / SNR).sqrt(), 0.5
    c_weight = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
    gamma = 1 / sigma_data**2
    torch.testing.assert_close(loss_weights(SNR, "soft_minsnr", gamma, "x0"), c_weight / c_out**2, rtol=1e-12, atol=0)
    on_eps = sigma**2 / (sigma**2 + sigma_data**2)
    torch.testing.assert_close(loss_weights(SNR, "soft_minsnr", gamma), on_eps, rtol=1e-12, atol=0)


# ---- errors ----

@pytest.mark.parametrize("kind, gamma, match", [
    ("min_snr", 5, "'min_snr'.*" + ".*".join(WEIGHTINGS)), ("minsnr", None, "gamma"), ("minsnr_norm", None, "gamma"),
    ("minsnr", 0, "gamma=0"), ("minsnr_norm", -1, "gamma=-1"), ("minsnr", float("nan"), "gamma=nan"),
    ("soft_minsnr", None, "gamma=None"),
])
def test_errors(kind, gamma, match):
    with pytest.raises(ValueError, match=match):
        loss_weights(SNR, kind, gamma)
    if kind == "minsnr":
        with pytest.raises(ValueError, match=match):
            min_snr(SNR, gamma)


@pytest.mark.parametrize("value", [-1.0, math.nan, INF])
@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_an_snr_that_cannot_be(kind, value):
    with pytest.raises(ValueError, match="snr"):
        loss_weights(float64(1, value), kind, 5.0)


def test_a_prediction_that_does_not_exist():
    with pytest.raises(ValueError, match="'velocity'.*eps"):
        loss_weights(SNR, "minsnr", 5.0, "velocity")
