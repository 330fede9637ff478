"""What --dry-run and docs/cost.md say a run does, against what a run does."""

import re

import pytest
import torch
from conftest import ROOT, TINY, tiny_network

import cost
import train
from benchmarks import cost as page
from config import load_config
from evaluate import build
from model import UNet


def counted(config_name, *overrides):
    """{kind: amount} that the phases of a config add up to."""
    config = load_config(config_name, overrides=[*TINY, *overrides])
    total = dict.fromkeys(("step", "call", "feature", "probe"), 0)
    for phase in cost.phases(config):
        for kind, n in phase.work.items():
            total[kind] += phase.count * n
    return total


@pytest.mark.parametrize("n, final_n", [(4, 6), (100, 120)])
def test_the_phases_are_what_a_run_does(run_train, tmp_path, monkeypatch, n, final_n):
    """Counted in the networks and the probe. At whole chunks the last milestone's samples are of the final ones."""
    overrides = ["eval.features=inception", f"eval.n_samples={n}", f"eval.final_n_samples={final_n}",
                 "curvature.every=4", "curvature.num_probes=3", 'eval.final_samplers=["ddpm","ddim"]']
    done, forward = dict.fromkeys(("step", "call", "feature", "probe"), 0), UNet.forward

    def unet(self, x_t, t):
        if isinstance(x_t, torch.Tensor) and not probing:
            done["step" if self.training else "call"] += 1 if self.training else len(x_t)
        return forward(self, x_t, t)

    probing, probe = [], train.curvature_record

    def record(*args):
        probing.append(True)
        line = probe(*args)
        done["probe"] += line["num_probes"]
        probing.clear()
        return line

    def network(*_):
        made = tiny_network()
        made.register_forward_hook(lambda _, inputs, out: done.update(feature=done["feature"] + len(inputs[0])))
        return made

    monkeypatch.setattr(UNet, "forward", unet)
    monkeypatch.setattr("train.curvature_record", record)
    monkeypatch.setattr("train.feature_network", network)
    run_train("E5", *overrides, f"eval.stats_root={tmp_path}")
    assert done == counted("E5", *overrides)


def test_memory_grows_with_the_batch_and_not_with_the_weights():
    config = load_config("E2", overrides=TINY)
    model, diffusion = build(config, "cpu")

    def held(B):
        x_0, t = torch.zeros(B, 3, 32, 32), torch.zeros(B, dtype=torch.int64)
        return cost.memory(model, lambda: diffusion.eps_mse(model, x_0, t, x_0))

    one, four = held(1), held(4)
    parameters = sum(p.numel() for p in model.parameters())
    for found in (one, four):
        assert sum(found.values()) - found["activations"] == 20 * parameters
    assert four["activations"] == pytest.approx(4 * one["activations"], rel=0.02)
    # at least what the norms of the first level must keep: 8 channels of 32x32, twice in each of 3 blocks
    assert one["activations"] > 6 * 4 * 8 * 32 * 32


def test_a_fit_finds_the_coefficients_it_was_made_with():
    rows = [{"base": base, "batch": batch} for base in (8, 16, 32) for batch in (1, 2, 4)]
    for r in rows:
        r["step"] = 0.03 + 2e-12 * r["batch"] * page.step_flops(r["base"]) + 1e-10 * page.parameters(r["base"])
    coefficients, error = page.fit(rows, "step", page.step_columns)
    assert coefficients == pytest.approx([0.03, 2e-12, 1e-10], rel=1e-6) and error < 1e-6


def test_the_page_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "features", lambda quick: {"inception": 0.07, "lite0": 0.003})
    assert page.main(["--quick", "--out", str(tmp_path / "cost.md")]) == 0
    text, kept = (tmp_path / "cost.md").read_text(), (ROOT / "docs" / "cost.md").read_text()
    headings = re.findall(r"^#.*", text, re.M)
    assert headings == re.findall(r"^#.*", kept, re.M) and len(headings) == 3
    for name in (*page.TRAININGS, *page.GPUS):
        assert text.count(f"| {name} |") == kept.count(f"| {name} |") == 1
    assert "nan" not in text and "{" not in text
