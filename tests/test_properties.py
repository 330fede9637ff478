"""Properties of configs and checkpoints that must hold for every input, with inputs drawn by hypothesis.

The default is 40 fixed examples of each property; `pytest -m long` draws 1,000 new ones.
"""

import contextlib
import dataclasses
import io
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoint import load_checkpoint, save_checkpoint
from config import LEAVES, SETTABLE, Config, ConfigError, config_from_dict, flatten, list_experiments, load_config


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
