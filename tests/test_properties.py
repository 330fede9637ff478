"""Properties that must hold for every input, with inputs drawn by hypothesis.

The default is 40 fixed examples of each property; `pytest -m long` draws 1,000 new ones.
"""

import contextlib
import dataclasses
import io
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoint import load_checkpoint, save_checkpoint
from config import LEAVES, SETTABLE, Config, ConfigError, config_from_dict, flatten, list_experiments, load_config
from diffusion import Diffusion, ddim_sample, ddpm_sample, spaced_timesteps
from fid import FeatureStats, frechet_distance
from weighting import loss_weights, min_snr


def holds_for(*strategies):
    """Make a test of check, a function of one argument per strategy. Its examples are the same each time."""
    def decorate(check):
        @pytest.mark.parametrize("n", [40, pytest.param(1000, marks=pytest.mark.long)])
        def test(n):
            settings(max_examples=n, deadline=None, derandomize=True, database=None,
                     suppress_health_check=[HealthCheck.too_slow])(given(*strategies)(check))()
        return test
    return decorate


# ---- config overrides ----

numbers = st.one_of(st.integers(), st.floats(), st.integers(-3, 70), st.sampled_from([10**400, 2**63, 2**63 - 1]))
scalars = st.one_of(numbers.map(str), st.text(max_size=20), st.booleans().map(lambda b: str(b).lower()),
                    st.sampled_from(["minsnr", "linear", "cosine", "ddim", "none", "cifar10", "", "nan", "-inf"]))
values = st.one_of(scalars, st.lists(scalars, max_size=4).map(lambda xs: f"[{', '.join(xs)}]"))
keys = st.one_of(st.sampled_from(SETTABLE), st.sampled_from(list(LEAVES)), st.text(max_size=30))


@holds_for(st.sampled_from(list_experiments()), st.lists(st.tuples(keys, values), max_size=3))
@example("E1", [("seed", str(10**400))])  # no float is as large
def test_overrides_give_a_valid_config_or_one_line(exp, pairs):
    overrides = [f"{key}={value}" for key, value in pairs]
    try:
        config = load_config(exp, overrides=overrides)
    except ConfigError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and message.isprintable() and message.startswith("experiments.toml: ")
        return
    assert isinstance(config, Config) and config.exp == exp
    assert config_from_dict(dataclasses.asdict(config), "again") == config
    base, changed = flatten(load_config(exp)), flatten(config)
    assert {k for k in base if base[k] != changed[k]} <= {key.strip() for key, _ in pairs}
    for value in changed.values():
        assert not isinstance(value, float) or math.isfinite(value)
    assert 1 <= config.eval.nfe <= config.diffusion.num_timesteps and config.model.base_channels >= 4


@holds_for(st.sampled_from(SETTABLE), st.one_of(
    st.integers(), st.floats(), st.text(), st.none(), st.lists(st.integers()),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)))
def test_a_damaged_config_is_a_config_error(key, value):
    table = dataclasses.asdict(load_config("E8c"))
    section, _, leaf = key.rpartition(".")
    (table[section] if section else table)[leaf] = value
    try:
        assert flatten(config_from_dict(table, "config.json"))[key] == (
            tuple(value) if isinstance(value, list) else value)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1 and key in str(error)


# ---- schedules, weights, samplers ----

schedules = st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=40).map(
    lambda betas: Diffusion(torch.tensor(betas, dtype=torch.float64)))
seeds = st.integers(0, 2**63 - 1)


def rng(seed):
    return torch.Generator().manual_seed(seed)


@holds_for(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=30), st.floats(1e-4, 1e4), st.floats(1e-4, 1e4))
def test_weights(snr, gamma, other):
    snr = torch.tensor(sorted(snr, reverse=True), dtype=torch.float64)  # as over a schedule
    w = min_snr(snr, gamma)
    assert ((w > 0) & (w <= 1)).all() and (w[snr <= gamma] > 1 - 1e-15).all()
    torch.testing.assert_close(w[snr > gamma] * snr[snr > gamma], torch.full_like(snr[snr > gamma], gamma))
    low, high = sorted([gamma, other])
    assert (min_snr(snr, low) <= min_snr(snr, high)).all()
    assert (w[1:] >= w[:-1]).all()  # never more weight for less noise
    assert (loss_weights(snr, "constant") == 1).all() and torch.equal(loss_weights(snr, "minsnr", gamma), w)
    normalised = loss_weights(snr, "minsnr_norm", gamma)
    assert abs(normalised.mean().item() - 1) < 1e-12
    torch.testing.assert_close(normalised * w.mean(), w)


@holds_for(schedules, st.data(), st.floats(-1, 1), seeds)
def test_samplers_return_the_image_that_an_exact_denoiser_knows(diffusion, data, pixel, seed):
    """All mass on one image: whatever schedule, nfe, eta and x_T, the samplers end there."""
    nfe, clip = data.draw(st.integers(1, diffusion.T)), data.draw(st.booleans())
    x_T = torch.randn(2, 1, 2, 2, generator=rng(seed))
    x_0 = torch.full_like(x_T, pixel)

    def model(x_t, t):
        ac = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        return ((x_t.double() - ac.sqrt() * x_0) / (1 - ac).sqrt()).float()

    a = ddim_sample(model, diffusion, x_T, nfe, data.draw(st.floats(0, 1)), rng(seed), clip)
    b = ddpm_sample(model, diffusion, x_T, nfe, rng(seed), clip)
    last = spaced_timesteps(diffusion.T, nfe)[-1]
    error = 1e-5 / diffusion.alphas_cumprod[last].sqrt().item()  # float32's rounding, amplified by 1 / sqrt(ac)
    torch.testing.assert_close(a, x_0, rtol=0, atol=error)
    torch.testing.assert_close(b, x_0, rtol=0, atol=error)


@holds_for(schedules, st.data(), st.floats(-3, 3), st.floats(-3, 3), seeds)
def test_clipped_samples_stay_in_range_and_ddpm_is_ddim_with_eta_1(diffusion, data, slope, shift, seed):
    """For any network, however wrong."""
    nfe = data.draw(st.integers(1, diffusion.T))
    x_T = torch.randn(3, 1, 2, 2, generator=rng(seed))

    def model(x_t, t):
        assert t.shape == (3,) and t.dtype == torch.int64 and t.min() >= 0 and t.max() < diffusion.T
        return slope * x_t + shift

    samples = [ddpm_sample(model, diffusion, x_T, nfe, rng(seed)),
               ddim_sample(model, diffusion, x_T, nfe, 1.0, rng(seed))]
    for x_0 in samples:
        assert x_0.shape == x_T.shape and torch.isfinite(x_0).all() and x_0.abs().max() <= 1
    torch.testing.assert_close(*samples, rtol=0, atol=1e-3)


# ---- checkpoints ----

@holds_for(st.data())
def test_a_checkpoint_cut_or_changed_anywhere_is_passed_over(data):
    with tempfile.TemporaryDirectory() as name:
        last = Path(name) / "last.pt"
        for step in (1, 2):
            save_checkpoint(last, {"step": step, "config": {}, "w": torch.full((5,), float(step))})
        content = last.read_bytes()
        if data.draw(st.booleans()):
            content = content[:data.draw(st.integers(0, len(content) - 1))]
        else:
            at = data.draw(st.integers(0, len(content) - 1))
            content = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1:]
        last.write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert load_checkpoint(last.parent)["step"] == 1
        assert str(last) in said.getvalue()


# ---- moments and distances ----

@pytest.mark.filterwarnings("ignore:.*the covariance is singular")
@holds_for(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 6), st.floats(-1e4, 1e4), st.data())
def test_moments_do_not_depend_on_how_the_samples_come(seed, n, dim, shift, data):
    x = np.random.default_rng(seed).normal(size=(n, dim)) * 10.0 ** np.arange(-2, dim - 2) + shift
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    streamed, merged = FeatureStats(dim), FeatureStats(dim)
    for part in np.split(x, cuts):
        streamed.update(part)
        merged.merge(FeatureStats(dim).update(part))
    for stats in (streamed, merged):
        assert stats.n == n
        np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-10, atol=1e-10)
        scale = np.sqrt(np.outer(x.var(axis=0), x.var(axis=0))) + 1e-12
        assert (np.abs(stats.cov - np.atleast_2d(np.cov(x.T))) <= 1e-9 * scale + 1e-12 * shift**2).all()


@holds_for(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 6), st.integers(0, 6))
def test_frechet_distance_is_a_distance_whatever_the_ranks(seed, dim, rank1, rank2):
    rng = np.random.default_rng(seed)

    def gaussian(rank):
        root = rng.normal(size=(dim, min(rank, dim)))
        return rng.normal(size=dim), root @ root.T

    a, b = gaussian(rank1), gaussian(rank2)
    d = frechet_distance(*a, *b, method="eigh")
    assert d > -1e-9 and d == pytest.approx(frechet_distance(*b, *a, method="eigh"), abs=1e-6)
    assert frechet_distance(*a, *a, method="eigh") == pytest.approx(0, abs=1e-6)
    shift = rng.normal(size=dim)
    assert frechet_distance(a[0] + shift, a[1], *a, method="eigh") == pytest.approx(shift @ shift, abs=1e-6)
    if min(rank1, rank2) >= dim:  # scipy's sqrtm promises nothing for singular products
        assert d == pytest.approx(frechet_distance(*a, *b, method="sqrtm"), abs=1e-6)
