"""The page docs/experiments/why_204.md, held to its script, and the script to the project's samplers."""

import ast
import importlib.util
import math
import re

import pytest
import torch
from conftest import ROOT

from diffusion import Diffusion, linear_betas, spaced_timesteps
from rng import generator

PAGES = ROOT / "docs" / "experiments"
PAGE = (PAGES / "why_204.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split())  # a sentence may be wrapped anywhere

spec = importlib.util.spec_from_file_location("why_204", PAGES / "why_204.py")
why_204 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(why_204)

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


# ---- the pictures ----

def test_the_pictures_show_noise_and_images():
    distance = {shown: why_204.distance_to_images(why_204.sample_images(shown[0], D, shown[1], IMAGES), IMAGES)
                for shown in why_204.SHOWN if shown[1] <= 50}
    assert distance[ADJACENT, 50] > 0.7 * distance[ADJACENT, 0]
    assert distance[RESPACED, 50] < why_204.GRAIN and distance[DDIM, 50] < why_204.GRAIN
    said = ", ".join(f"{distance[shown]:.2f}" for shown in why_204.SHOWN if shown[1] <= 50)
    assert f"from left to right: {said}, 0.05." in PROSE


def test_without_grain_the_last_step_looks_the_image_up(monkeypatch):
    """Why the pictures' x_0 has pixel noise, as the page says."""
    monkeypatch.setattr(why_204, "GRAIN", 0.0)
    assert why_204.distance_to_images(why_204.sample_images(ADJACENT, D, 50, IMAGES, 2), IMAGES) < 1e-6


# ---- the page ----

def test_the_page_holds_the_table_that_the_script_prints():
    assert why_204.table(D) in PAGE
    assert len(re.findall(r"^\| \d", PAGE, flags=re.M)) == len(why_204.NFES)  # and no row besides


def test_the_numbers_of_the_prose():
    ts = spaced_timesteps(1000, 50)
    noise, pull = why_204.noise_and_pull(ADJACENT, D, 50)
    assert set((-ts.diff()).tolist()) == {20, 21} and "20 or 21 apart" in PROSE
    assert f"close to Σ β_t = {D.betas.sum():.2f}" in PROSE and f"take back {D.betas[ts].sum():.2f} of it" in PROSE
    assert f"pure noise has d² = {why_204.frechet(0, 1):.2g}" in PROSE
    assert f"Z has RMS {noise:.3f} and Σ c_t is {pull:.3f}" in PROSE
    assert f"RMS(x_0) ≥ {noise:.3f} \N{MINUS SIGN} {pull:.3f} max_t RMS(eps_hat)" in PROSE
    assert f"The data's RMS is {math.hypot(0.3, 0.5):.3f}" in PROSE
    assert f"an RMS of at least {why_204.needed_rms(D):.2f} at some step" in PROSE
    assert f"In the respaced chain Σ c_t is {why_204.noise_and_pull(RESPACED, D, 50)[1]:.0f}" in PROSE
    assert f"{why_204.N_PIXELS:,} sampled pixels" in PROSE and f"pixel noise of std {why_204.GRAIN}" in PROSE


def test_the_triangle_inequality_that_the_page_rests_on():
    """x_0 is Z - sum c_t eps_hat: constant predictions show Z's RMS and the sum of the c_t in the sampler itself."""
    x_T = torch.randn(1, 10_000, generator=generator(0, "test"), dtype=torch.float64)
    noise, pull = why_204.noise_and_pull(ADJACENT, D, 50)
    z, shifted = (why_204.adjacent_step_ddpm(lambda x_t, t, e=e: torch.full_like(x_t, e), D, x_T, 50, generator(0, "z"))
                  for e in (0.0, 1.0))
    assert z.square().mean().sqrt().item() == pytest.approx(noise, rel=0.03)
    assert (z - shifted).mean().item() == pytest.approx(pull, rel=1e-9)


def test_the_exact_denoisers_rms_stays_below_what_the_page_says():
    x_T = torch.randn(1, 10_000, generator=generator(0, "test"), dtype=torch.float64)
    model, seen = why_204.exact_denoiser(D, torch.full_like(x_T, 0.3), 0.5), []

    def watched(x_t, t):
        seen.append(model(x_t, t))
        return seen[-1]

    why_204.adjacent_step_ddpm(watched, D, x_T, 50, generator(0, "z"))
    largest = max(eps_hat.square().mean().sqrt().item() for eps_hat in seen)
    assert 1.1 < largest < 1.2 < why_204.needed_rms(D) and "stays below 1.2 on this chain" in PROSE


def test_the_figures_are_there_and_small():
    for name in ("why_204.png", "why_204.svg"):
        assert f"({name})" in PAGE and 10_000 < (PAGES / name).stat().st_size < 400_000


def test_the_wrong_sampler_stays_out_of_the_project():
    """diffusion.py has its two samplers and no third, and no module at the root has the notes' one."""
    tree = ast.parse((ROOT / "diffusion.py").read_text())
    takes_x_T = [node.name for node in tree.body
                 if isinstance(node, ast.FunctionDef) and "x_T" in [arg.arg for arg in node.args.args]]
    assert takes_x_T == ["_reverse_process", "ddpm_sample", "ddim_sample"]
    assert [path.name for path in ROOT.glob("*.py") if "adjacent_step" in path.read_text()] == []
