"""docs/experiments/why_204.py, held to closed forms and to the project's samplers."""

import math

import pytest
import torch
from conftest import ROOT

import why_204
from diffusion import Diffusion, linear_betas
from rng import generator

PAGES = ROOT / "docs" / "experiments"

D = Diffusion(linear_betas())
IMAGES = why_204.shapes_images()
ADJACENT, RESPACED, DDIM = why_204.ADJACENT, why_204.RESPACED, why_204.DDIM


# ---- closed forms against samples, against each other, against the study ----

@pytest.mark.parametrize("nfe", [10, 50])
@pytest.mark.parametrize("name", [ADJACENT, RESPACED, DDIM])
def test_samples_have_the_moments_that_the_closed_form_says(name, nfe):
    """Two writings of each sampler: eq. 7 in x_0_hat for the samples, eq. 11 in eps_hat for the closed form."""
    n = 10_000
    mean, std = why_204.exact_moments(name, D, nfe)
    sampled_mean, sampled_std = why_204.sampled_moments(name, D, nfe, n)
    assert abs(sampled_mean - mean) < 4 * std / math.sqrt(n)
    assert abs(sampled_std - std) < 4 * std / math.sqrt(2 * n)


def test_adjacent_steps_agree_with_the_closed_form_to_the_last_digits():
    """From one x_T and one z both must give the same x_0: no sampling error is left for a slip to hide in."""
    x_T = torch.tensor([[-1.3, 0.0, 2.1]], dtype=torch.float64)
    model = why_204.exact_denoiser(D, torch.full_like(x_T, why_204.MEAN), why_204.STD)
    x_0 = why_204.adjacent_step_ddpm(model, D, x_T, 50, generator(0, "z"))
    expected, rng = x_T, generator(0, "z")
    for t, on_x, on_eps, sigma in why_204.chain(ADJACENT, D, 50):
        expected = on_x * expected - on_eps * model(expected, torch.tensor([t]))
        if t > 0:
            expected = expected + sigma * torch.randn(x_T.shape, generator=rng, dtype=x_T.dtype)
    torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-12)


def test_at_nfe_1000_the_two_ddpms_are_one():
    adjacent, respaced = (why_204.exact_moments(name, D, 1000) for name in (ADJACENT, RESPACED))
    assert adjacent == pytest.approx(respaced, rel=0, abs=1e-12)
    x_T = torch.randn(1, 100, generator=generator(0, "test"), dtype=torch.float64)
    model = why_204.exact_denoiser(D, torch.full_like(x_T, 0.3), 0.5)
    a, b = (why_204.samplers()[name](model, D, x_T, 1000, generator(0, "z")) for name in (ADJACENT, RESPACED))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_studys_numbers_at_nfe_50():
    mean, std = why_204.exact_moments(ADJACENT, D, 50)
    assert 0.02 <= round(mean, 2) <= 0.04 and 0.94 <= round(std, 2) <= 0.97
    assert why_204.exact_moments(RESPACED, D, 50) == pytest.approx((0.299, 0.442), abs=0.002)
    assert why_204.exact_moments(DDIM, D, 50) == pytest.approx((0.298, 0.472), abs=0.002)


def test_adjacent_steps_are_nearer_to_noise_than_to_data_and_respacing_is_far_better():
    distance = {name: why_204.frechet(*why_204.exact_moments(name, D, 50)) for name in why_204.STEPS}
    noise = why_204.frechet(0, 1)
    assert noise == pytest.approx(0.34) and distance[ADJACENT] > 0.75 * noise
    assert distance[RESPACED] < 0.01 * noise and distance[DDIM] < 0.01 * noise


# ---- the exact denoiser ----

def test_the_denoiser_is_the_best_predictor_of_eps():
    """E[eps | x_t] is where the mean squared error is least: a perturbation in any of these directions costs."""
    means = torch.tensor([[-0.9, 0.9], [0.5, 0.6], [0.1, -0.2]], dtype=torch.float64)  # of unequal norms
    model, rng = why_204.exact_denoiser(D, means, 0.2), generator(0, "test")
    n = 50_000
    which = torch.randint(3, (n,), generator=rng)
    x_0 = means[which] + 0.2 * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    eps = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    for t in (20, 200, 500):
        t = torch.full((n,), t)
        x_t = D.q_sample(x_0, t, eps)
        error = eps - model(x_t, t)
        for direction in (torch.ones(n, 2), x_t, x_t.flip(1), x_t**2, x_t.sin(), x_t.prod(1, keepdim=True)):
            product = (error * direction).flatten()  # has expectation 0 if the prediction is the conditional mean
            assert abs(product.mean()) < 4.5 * product.std() / math.sqrt(product.numel())


# ---- the argument of the page ----

def test_the_triangle_inequality_that_the_page_rests_on():
    """x_0 is Z - sum c_t eps_hat: constant predictions show Z's RMS and the sum of the c_t in the sampler itself."""
    x_T = torch.randn(1, 10_000, generator=generator(0, "test"), dtype=torch.float64)
    noise, pull = why_204.noise_and_pull(ADJACENT, D, 50)
    z, shifted = (why_204.adjacent_step_ddpm(lambda x_t, t, e=e: torch.full_like(x_t, e), D, x_T, 50, generator(0, "z"))
                  for e in (0.0, 1.0))
    assert z.square().mean().sqrt().item() == pytest.approx(noise, rel=0.03)
    assert (z - shifted).mean().item() == pytest.approx(pull, rel=1e-9)
