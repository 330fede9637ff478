"""Properties that must hold for every input, with inputs drawn by hypothesis."""

import dataclasses
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import load_checkpoint, save_checkpoint
from config import LEAVES, SETTABLE, Config, ConfigError, config_from_dict, flatten, list_experiments, load_config
from data import batch_indices, to_model_range, to_uint8
from diffusion import Diffusion, ddim_sample, ddpm_sample, spaced_timesteps
from fid import FeatureStats, frechet_distance
from rng import derive_seed
from weighting import loss_weights, min_snr

pytestmark = pytest.mark.campaign
EXAMPLES = int(os.environ.get("EXAMPLES", 40))  # conftest.py raises it for --campaign
examples = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 40, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


# ---- config overrides ----

numbers = st.one_of(st.integers(), st.floats(), st.integers(-3, 70), st.sampled_from([10**400, 2**63, 2**63 - 1]))
scalars = st.one_of(numbers.map(str), st.text(max_size=20), st.booleans().map(lambda b: str(b).lower()),
                    st.sampled_from(["minsnr", "linear", "cosine", "ddim", "none", "cifar10", "", "nan", "-inf"]))
values = st.one_of(scalars, st.lists(scalars, max_size=4).map(lambda xs: f"[{', '.join(xs)}]"))
keys = st.one_of(st.sampled_from(SETTABLE), st.sampled_from(list(LEAVES)), st.text(max_size=30))


@given(st.sampled_from(list_experiments()), st.lists(st.tuples(keys, values), max_size=3))
@examples
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


@given(st.sampled_from(SETTABLE), st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.lists(st.integers()),
                                            st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)))
@examples
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


@given(st.integers(1, 3000), st.data())
@examples
def test_spaced_timesteps_descend_from_the_last_to_the_first(T, data):
    nfe = data.draw(st.integers(1, T))
    ts = spaced_timesteps(T, nfe)
    assert ts.dtype == torch.int64 and len(ts) == nfe and ts[0] == T - 1
    assert nfe == 1 or (ts[-1] == 0 and (ts[:-1] > ts[1:]).all())
    gaps = (ts[:-1] - ts[1:]).tolist()
    assert not gaps or max(gaps) - min(gaps) <= 1  # as even as integers allow


@given(st.integers(max_value=0) | st.integers(10, 20), st.just(9))
@examples
def test_an_impossible_nfe_is_refused(nfe, T):
    with pytest.raises(ValueError, match="nfe"):
        spaced_timesteps(T, nfe)


@given(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=30), st.floats(1e-4, 1e4), st.floats(1e-4, 1e4))
@examples
def test_weights(snr, gamma, other):
    snr = torch.tensor(snr, dtype=torch.float64)
    w = min_snr(snr, gamma)
    assert ((w > 0) & (w <= 1)).all() and (w[snr <= gamma] > 1 - 1e-15).all()
    torch.testing.assert_close(w[snr > gamma] * snr[snr > gamma], torch.full_like(snr[snr > gamma], gamma))
    low, high = sorted([gamma, other])
    assert (min_snr(snr, low) <= min_snr(snr, high)).all()
    order = snr.argsort()
    assert (w[order][1:] <= w[order][:-1]).all()  # never more weight for less noise
    assert (loss_weights(snr, "constant") == 1).all() and torch.equal(loss_weights(snr, "minsnr", gamma), w)
    normalised = loss_weights(snr, "minsnr_norm", gamma)
    assert abs(normalised.mean().item() - 1) < 1e-12
    torch.testing.assert_close(normalised * w.mean(), w)


@given(st.sampled_from(["minsnr", "minsnr_norm"]), st.floats(max_value=0) | st.sampled_from([math.nan, None]))
@examples
def test_an_impossible_gamma_is_refused(kind, gamma):
    with pytest.raises(ValueError, match="gamma"):
        loss_weights(torch.ones(3, dtype=torch.float64), kind, gamma)


@given(schedules, st.data(), st.floats(-1, 1), seeds)
@examples
def test_samplers_return_the_image_that_an_exact_denoiser_knows(diffusion, data, pixel, seed):
    """All mass on one image: whatever schedule, nfe, eta and x_T, the samplers end there."""
    nfe = data.draw(st.integers(1, diffusion.T))
    x_T = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    x_0 = torch.full_like(x_T, pixel)

    def model(x_t, t):
        ac = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        return ((x_t.double() - ac.sqrt() * x_0) / (1 - ac).sqrt()).float()

    clip = data.draw(st.booleans())
    a = ddim_sample(model, diffusion, x_T, nfe, eta=data.draw(st.floats(0, 1)),
                    generator=torch.Generator().manual_seed(seed), clip_x0=clip)
    b = ddpm_sample(model, diffusion, x_T, nfe, generator=torch.Generator().manual_seed(seed), clip_x0=clip)
    last = spaced_timesteps(diffusion.T, nfe)[-1]
    error = 1e-5 / diffusion.alphas_cumprod[last].sqrt().item()  # float32's rounding, amplified by 1 / sqrt(ac)
    torch.testing.assert_close(a, x_0, rtol=0, atol=error)
    torch.testing.assert_close(b, x_0, rtol=0, atol=error)


@given(schedules, st.data(), st.floats(-3, 3), st.floats(-3, 3), seeds)
@examples
def test_clipped_samples_stay_in_range_and_ddpm_is_ddim_with_eta_1(diffusion, data, slope, shift, seed):
    """For any network, however wrong."""
    nfe = data.draw(st.integers(1, diffusion.T))
    x_T = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(seed))

    def model(x_t, t):
        assert t.shape == (3,) and t.dtype == torch.int64 and t.min() >= 0 and t.max() < diffusion.T
        return slope * x_t + shift

    samples = [ddpm_sample(model, diffusion, x_T, nfe, generator=torch.Generator().manual_seed(seed)),
               ddim_sample(model, diffusion, x_T, nfe, eta=1.0, generator=torch.Generator().manual_seed(seed))]
    for x_0 in samples:
        assert x_0.shape == x_T.shape and torch.isfinite(x_0).all() and x_0.abs().max() <= 1
    torch.testing.assert_close(*samples, rtol=0, atol=1e-3)


# ---- pixels, batches, streams ----

@given(st.lists(st.integers(0, 255), min_size=1, max_size=50), st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
@examples
def test_pixels(levels, anything):
    x = torch.tensor(levels, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(x)), x) and to_model_range(x).abs().max() <= 1
    rounded = to_uint8(torch.tensor(anything))
    clamped = torch.tensor(anything).clamp(-1, 1)
    assert (to_model_range(rounded) - clamped).abs().max() <= 1 / 255 + 1e-6


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 50))
@examples
def test_batches_read_whole_epochs(seed, step, batch_size, n):
    batch = batch_indices(seed, step, batch_size, n)
    assert batch.shape == (batch_size,) and batch.dtype == torch.int64 and batch.min() >= 0 and batch.max() < n
    assert torch.equal(batch, batch_indices(seed, step, batch_size, n))
    whole = torch.cat([batch_indices(seed, s, batch_size, n) for s in range(math.ceil(2 * n / batch_size))])
    for epoch in (whole[:n], whole[n:2 * n]):
        assert epoch.sort().values.tolist() == list(range(n))
    assert torch.equal(whole[:batch_size * 2], batch_indices(seed, 0, 2 * batch_size, n)[:len(whole)])


@given(seeds, st.text(max_size=10), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@examples
def test_two_indices_never_share_a_stream(seed, purpose, i, j):
    assert (derive_seed(seed, purpose, i) == derive_seed(seed, purpose, j)) == (i == j)


# ---- checkpoints ----

@given(st.data())
@examples
def test_a_checkpoint_cut_or_changed_anywhere_is_passed_over(data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in (1, 2):
            save_checkpoint(folder, {"step": step, "w": torch.full((5,), float(step))})
        content = (folder / "last.pt").read_bytes()
        if data.draw(st.booleans()):
            content = content[:data.draw(st.integers(0, len(content) - 1))]
        else:
            at = data.draw(st.integers(0, len(content) - 1))
            content = content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1:]
        (folder / "last.pt").write_bytes(content)
        said = []
        assert load_checkpoint(folder, warn=said.append)["step"] == 1 and "last.pt: damaged" in said[0]


# ---- moments and distances ----

@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 6), st.floats(-1e4, 1e4), st.data())
@examples
def test_moments_do_not_depend_on_how_the_samples_come(seed, n, dim, shift, data):
    x = np.random.default_rng(seed).normal(size=(n, dim)) * 10.0 ** np.arange(-2, dim - 2) + shift
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    parts = np.split(x, cuts)
    streamed, merged = FeatureStats(dim), FeatureStats(dim)
    for part in parts:
        streamed.update(part)
        merged.merge(FeatureStats(dim).update(part))
    for stats in (streamed, merged):
        assert stats.n == n
        np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-10, atol=1e-10)
        scale = np.sqrt(np.outer(x.var(axis=0), x.var(axis=0))) + 1e-12
        assert (np.abs(stats.cov - np.atleast_2d(np.cov(x.T))) <= 1e-9 * scale + 1e-12 * shift**2).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 6), st.integers(0, 6))
@examples
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
