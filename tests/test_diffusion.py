import itertools
import math

import pytest
import torch

from diffusion import (
    BETAS,
    PREDICTIONS,
    SAMPLERS,
    Diffusion,
    cosine_betas,
    ddim_sample,
    ddpm_sample,
    linear_betas,
    linear_zero_snr_betas,
    spaced_timesteps,
)
from rng import generator

D = Diffusion(linear_betas())
MEAN, STD = 0.3, 0.5  # of the exact-denoiser tests: every pixel of x_0 is N(0.3, 0.5^2)


def exact_denoiser(diffusion):
    """E[eps | x_t] in closed form for Gaussian x_0."""
    def model(x_t, t):
        ac = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1).to(x_t.dtype)
        return (1 - ac).sqrt() * (x_t - ac.sqrt() * MEAN) / (ac * STD**2 + 1 - ac)
    return model


def oracle(diffusion, x_0):
    """The eps that leads to x_t from this very x_0."""
    def model(x_t, t):
        ac = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (x_t - ac.sqrt() * x_0) / (1 - ac).sqrt()
    return model


def saying(prediction, diffusion, eps_model):
    """eps_model with its output converted: it now says x_0 or v of the same guess."""
    def model(x_t, t):
        ac, eps_hat = diffusion.alphas_cumprod[t].reshape(-1, 1, 1, 1).to(x_t), eps_model(x_t, t)
        x_0_hat = (x_t - (1 - ac).sqrt() * eps_hat) / ac.sqrt()
        return {"eps": eps_hat, "x0": x_0_hat, "v": ac.sqrt() * eps_hat - (1 - ac).sqrt() * x_0_hat}[prediction]
    return model


def noise(*shape, dtype=torch.float64, index=0):
    return torch.randn(*shape, dtype=dtype, generator=generator(0, "test", index))


def moments_of_exact_chain(nfe, eta, d=D):
    """Mean and std that sampling must end with: the chain is linear and Gaussian, so they follow step by step."""
    ts = torch.linspace(999, 0, nfe, dtype=torch.float64).round().long().tolist()
    mean, var = 0.0, 1.0
    for i, t in enumerate(ts):
        ac_t = d.alphas_cumprod[t].item()
        ac_s = d.alphas_cumprod[ts[i + 1]].item() if i + 1 < nfe else 1.0
        slope = math.sqrt(ac_t) * STD**2 / (ac_t * STD**2 + 1 - ac_t)  # of E[x_0 | x_t]
        offset = MEAN * (1 - slope * math.sqrt(ac_t))
        var_s = eta**2 * (1 - ac_s) / (1 - ac_t) * (1 - ac_t / ac_s)
        on_eps = math.sqrt(1 - ac_s - var_s) / math.sqrt(1 - ac_t)
        on_x0 = math.sqrt(ac_s) - on_eps * math.sqrt(ac_t)
        gain = on_eps + on_x0 * slope
        mean, var = gain * mean + on_x0 * offset, gain**2 * var + var_s
    return mean, math.sqrt(var)


# ---- schedules ----

def test_linear_schedule_closed_forms():
    assert D.T == 1000 and D.betas.dtype == D.alphas_cumprod.dtype == D.snr.dtype == torch.float64
    assert D.betas[0].item() == 1e-4 and D.betas[-1].item() == pytest.approx(0.02, abs=1e-15)
    assert D.betas.sum().item() == pytest.approx(10.05, abs=1e-9)
    assert D.snr[0].item() == pytest.approx(9999, rel=1e-12)
    assert D.snr[-1].item() == pytest.approx(4.036e-5, rel=1e-4)
    assert (D.snr.diff() < 0).all()
    assert 1 / D.alphas_cumprod[-1].sqrt().item() == pytest.approx(157, abs=1)  # what an error in eps costs at t = 999


def test_cosine_schedule():
    betas = cosine_betas()
    assert betas.shape == (1000,) and betas.dtype == torch.float64 and betas.max().item() == 0.999
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (0, 501)]
    assert Diffusion(betas).alphas_cumprod[500].item() == pytest.approx(f[1] / f[0], rel=1e-12)


def test_zero_terminal_snr():
    """sqrt(alphas_cumprod) is that of linear betas, moved and stretched to end at 0 and start where it did."""
    d = Diffusion(linear_zero_snr_betas(), "v")
    assert d.alphas_cumprod[-1] == d.snr[-1] == 0 and d.alphas_cumprod[0].item() == pytest.approx(1 - 1e-4, rel=1e-12)
    root, linear = d.alphas_cumprod.sqrt(), D.alphas_cumprod.sqrt()
    stretch = (root / (linear - linear[-1]))[:-1]
    torch.testing.assert_close(stretch, stretch[0].expand(999), rtol=1e-9, atol=0)
    for betas in (linear_zero_snr_betas(), torch.ones(1), linear_zero_snr_betas().float()):
        with pytest.raises(ValueError, match="betas.*x0 or v"):
            Diffusion(betas)
    with pytest.raises(ValueError, match="betas"):
        Diffusion(torch.tensor([0.1, 1.0, 0.1]), "v")


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("T", [1, 50, 1000])
def test_every_schedule_has_the_length_asked_for(name, T):
    diffusion = Diffusion(BETAS[name](T), "v")
    assert diffusion.T == T and diffusion.snr.shape == (T,) and torch.isfinite(diffusion.snr).all()


@pytest.mark.parametrize("name", BETAS)
def test_float32_schedules_and_those_of_a_scheduler(name):
    """A scheduler's float32 alphas_cumprod cost 5e-4 of snr at t = 0, where 1 - alphas_cumprod cancels."""
    betas = BETAS[name]()
    exact, upcast = Diffusion(betas, "v"), Diffusion(betas.float(), "v")
    assert upcast.betas.dtype == upcast.snr.dtype == torch.float64 and upcast.prediction == "v"
    torch.testing.assert_close(upcast.snr, exact.snr, rtol=2e-5, atol=0)
    taken = Diffusion.from_alphas_cumprod(exact.alphas_cumprod, "v")
    torch.testing.assert_close(taken.snr, exact.snr, rtol=1e-10, atol=0)
    torch.testing.assert_close(taken.betas, betas, rtol=1e-10, atol=0)
    single = exact.alphas_cumprod.float()
    rounded = Diffusion.from_alphas_cumprod(single, "x0")
    torch.testing.assert_close(rounded.snr, single.double() / (1 - single.double()), rtol=1e-10, atol=0)
    worst = (rounded.snr / exact.snr - 1)[exact.snr > 0].abs().max().item()
    assert rounded.prediction == "x0" and 1e-5 < worst < 6e-4


def test_a_prediction_that_does_not_exist():
    with pytest.raises(ValueError, match="'epsilon'.*eps"):
        Diffusion(linear_betas(), "epsilon")


@pytest.mark.parametrize("betas", [torch.tensor([0.1, 1.0], dtype=torch.float64),
                                   torch.tensor([0.0, 0.1], dtype=torch.float64), linear_betas(4).reshape(2, 2),
                                   torch.tensor([0.1, math.nan], dtype=torch.float64)])
def test_bad_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        Diffusion(betas)


# ---- forward process and loss ----

def test_q_sample_is_eq_4_at_each_examples_own_t_and_keeps_the_type():
    x_0, eps = noise(3, 3, 4, 4, dtype=torch.float32), noise(3, 3, 4, 4, dtype=torch.float32, index=1)
    x_t = D.q_sample(x_0, torch.tensor([0, 500, 999]), eps)
    ac = [math.prod(1 - (1e-4 + i * (0.02 - 1e-4) / 999) for i in range(t + 1)) for t in (0, 500, 999)]
    expected = torch.stack([math.sqrt(a) * x + math.sqrt(1 - a) * e for a, x, e in zip(ac, x_0, eps, strict=True)])
    torch.testing.assert_close(x_t, expected)  # the type too


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predict_x0_from_the_target_is_x0(prediction):
    d = Diffusion(linear_betas(), prediction)
    x_0, eps, t = noise(4, 3, 8, 8), noise(4, 3, 8, 8, index=1), torch.tensor([0, 10, 500, 999])
    target, ac = d.target(x_0, t, eps), d.alphas_cumprod[t][:, None, None, None]
    by_hand = {"eps": eps, "x0": x_0, "v": ac.sqrt() * eps - (1 - ac).sqrt() * x_0}[prediction]
    torch.testing.assert_close(target, by_hand, rtol=0, atol=0)
    torch.testing.assert_close(d.predict_x0(d.q_sample(x_0, t, eps), t, target), x_0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mse_is_of_the_target_and_eps_mse_the_same_error_in_eps(prediction):
    d = Diffusion(linear_betas(), prediction)
    x_0, eps, t = noise(4, 3, 8, 8), noise(4, 3, 8, 8, index=1), torch.tensor([0, 10, 500, 999])
    mse = d.mse(lambda x_t, t: torch.zeros_like(x_t), x_0, t, eps)
    torch.testing.assert_close(mse, d.target(x_0, t, eps).square().mean((1, 2, 3)))
    assert mse.shape == (4,) and mse.dtype == torch.float64
    assert d.mse(lambda x_t, t: x_t, x_0.float(), t, eps.float()).dtype == torch.float32

    def guess(x_t, t):
        return 0.3 * x_t + 0.1

    direct = (eps - guess(d.q_sample(x_0, t, eps), t)).square().mean((1, 2, 3))
    torch.testing.assert_close(d.eps_mse(saying(prediction, d, guess), x_0, t, eps), direct, rtol=1e-10, atol=0)
    assert d.eps_mse(saying(prediction, d, oracle(d, x_0)), x_0, t, eps).max() < 1e-12


# ---- samplers ----

@pytest.mark.parametrize("T", [1, 11, 1000])
def test_spaced_timesteps_are_the_nearest_to_even_spacing(T):
    assert torch.equal(spaced_timesteps(T, T), torch.arange(T - 1, -1, -1))
    assert spaced_timesteps(T, 1).tolist() == [T - 1]
    for nfe in range(2, T + 1):
        ts = spaced_timesteps(T, nfe)
        assert ts.shape == (nfe,) and ts.dtype == torch.int64 and ts[0] == T - 1 and ts[-1] == 0
        assert (ts.diff() < 0).all()
        exact = (T - 1) * torch.arange(nfe - 1, -1, -1)  # times nfe - 1, in integers
        assert (2 * ((nfe - 1) * ts - exact).abs() <= nfe - 1).all()  # at most half a timestep away


@pytest.mark.parametrize("nfe", [0, -1, 1001])
@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_impossible_nfe(sampler, nfe):
    with pytest.raises(ValueError, match=f"nfe={nfe}"):
        sampler(exact_denoiser(D), D, torch.zeros(1, 3, 4, 4), nfe)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_impossible_eta(eta):
    with pytest.raises(ValueError, match="eta"):
        ddim_sample(exact_denoiser(D), D, torch.zeros(1, 3, 4, 4), 10, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("nfe, prediction", [*((nfe, "eps") for nfe in (2, 10, 50, 200)), (50, "x0"), (50, "v")])
def test_exact_gaussian(nfe, eta, prediction):
    """A perfect denoiser must end with the chain's analytic mean and std (n = 120,000 pixels)."""
    x_T, d = noise(10, 3, 64, 64), Diffusion(linear_betas(), prediction)
    model = saying(prediction, d, exact_denoiser(d))
    mean, std = moments_of_exact_chain(nfe, eta)
    samples = [ddim_sample(model, d, x_T, nfe, eta, generator(0, "z"), clip_x0=False)]
    if eta == 1:
        samples.append(ddpm_sample(model, d, x_T, nfe, generator(0, "z"), clip_x0=False))
    for x_0 in samples:
        assert x_0.mean().item() == pytest.approx(mean, abs=0.006)
        assert x_0.std().item() == pytest.approx(std, abs=0.004)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_exact_gaussian_from_zero_snr(prediction, eta):
    """x_T is then pure noise, and the first x_0_hat is the mean of the data."""
    d = Diffusion(linear_zero_snr_betas(), prediction)

    def model(x_t, t):
        ac = d.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        signal, noise = ac.sqrt(), (1 - ac).sqrt()
        x_0_hat = MEAN + signal * STD**2 / (signal**2 * STD**2 + noise**2) * (x_t - signal * MEAN)
        return x_0_hat if prediction == "x0" else (signal * x_t - x_0_hat) / noise

    x_0 = ddim_sample(model, d, noise(10, 3, 64, 64), 50, eta, generator(0, "z"), clip_x0=False)
    mean, std = moments_of_exact_chain(50, eta, d)
    assert x_0.mean().item() == pytest.approx(mean, abs=0.006) and x_0.std().item() == pytest.approx(std, abs=0.004)


@pytest.mark.parametrize("sampler, mean, std", [(ddim_sample, 0.298, 0.472), (ddpm_sample, 0.299, 0.442)])
def test_exact_gaussian_at_nfe_50_against_the_studys_numbers(sampler, mean, std):
    x_0 = sampler(exact_denoiser(D), D, noise(40, 3, 64, 64), 50, generator=generator(0, "z"), clip_x0=False)
    assert x_0.mean().item() == pytest.approx(mean, abs=0.003)
    assert x_0.std().item() == pytest.approx(std, abs=0.003)


def test_full_chain_equals_the_textbook_chain():
    """At nfe = T the respaced coefficients must be those of Ho et al., Algorithm 2, which is in terms of betas."""
    d = Diffusion(linear_betas(40))
    model, x_T = exact_denoiser(d), noise(2, 3, 8, 8)
    x_t, rng = x_T, generator(0, "z")
    for t in reversed(range(40)):
        alpha, ac = 1 - d.betas[t], d.alphas_cumprod[t]
        x_t = (x_t - d.betas[t] / (1 - ac).sqrt() * model(x_t, torch.tensor([t, t]))) / alpha.sqrt()
        if t > 0:
            sigma = ((1 - d.alphas_cumprod[t - 1]) / (1 - ac) * d.betas[t]).sqrt()
            x_t = x_t + sigma * torch.randn(x_t.shape, generator=rng, dtype=x_t.dtype)
    x_0 = ddpm_sample(model, d, x_T, 40, generator(0, "z"), clip_x0=False)
    torch.testing.assert_close(x_0, x_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("T, nfe", [(1000, 1), (1000, 7), (1000, 50), (1000, 1000), (7000, 3)])
def test_ddim_with_eta_one_equals_ddpm(T, nfe, clip):
    """At T = 7000 and nfe = 3, rounding leaves 1 - ac_s - sigma^2 below 0, which must count as 0."""
    d = Diffusion(linear_betas(T))
    model, x_T = exact_denoiser(d), noise(2, 3, 8, 8)
    a = ddpm_sample(model, d, x_T, nfe, generator(0, "z"), clip)
    b = ddim_sample(model, d, x_T, nfe, 1.0, generator(0, "z"), clip)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_clipping_is_on_by_default():
    """A denoiser that predicts x_0 = 3 everywhere ends at 1 with clipping, at 3 without."""
    x_0 = torch.full((1, 3, 8, 8), 3.0, dtype=torch.float64)
    for sample, prediction in itertools.product(SAMPLERS.values(), PREDICTIONS):
        d = Diffusion(linear_betas(), prediction)
        args = (saying(prediction, d, oracle(d, x_0)), d, noise(1, 3, 8, 8), 10)
        assert sample(*args).max().item() == pytest.approx(1, abs=1e-9)
        assert sample(*args, clip_x0=False).min().item() == pytest.approx(3, abs=1e-9)


def test_clipped_ddim_takes_eps_from_the_clipped_x0():
    """One step from t = 999 to t = 0 by hand, then one to the clean image, with eta = 0."""
    x_T, x_0 = noise(1, 3, 8, 8), torch.full((1, 3, 8, 8), 3.0, dtype=torch.float64)
    seen = []
    ddim_sample(lambda x, t: (seen.append(x), oracle(D, x_0)(x, t))[1], D, x_T, 2)
    ac_t, ac_s = D.alphas_cumprod[[999, 0]]
    eps = (x_T - ac_t.sqrt() * 1.0) / (1 - ac_t).sqrt()
    torch.testing.assert_close(seen[1], ac_s.sqrt() * 1.0 + (1 - ac_s).sqrt() * eps, rtol=0, atol=1e-12)


def test_a_sampler_leaves_its_input_and_the_global_random_state_alone():
    x_T = noise(1, 3, 8, 8)
    kept, state = x_T.clone(), torch.get_rng_state()
    for sample in SAMPLERS.values():
        sample(exact_denoiser(D), D, x_T, 5, generator=generator(0, "z"))
    assert torch.equal(x_T, kept) and torch.equal(state, torch.get_rng_state())
