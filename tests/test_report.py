"""report.py on run directories of known numbers."""

import dataclasses
import json
import math

import numpy as np
import pytest

import report
from config import load_config
from errors import UserError
from report import Interval, Measured, holm, interval, over_seeds, verdict

FD = "val/fd_lite0"


def test_the_interval_is_students():
    """t(0.975, 2 degrees) = 4.302653, t(0.95, 2) = 2.919986, t(0.975, 5) = 2.570582: from tables."""
    change = interval([0.1, 0.2, 0.3])
    assert (change.k, change.mean, change.stderr) == (3, pytest.approx(0.2), pytest.approx(0.1 / 3**0.5))
    assert change.at(0.95) == pytest.approx((0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    assert change.at(0.90)[1] == pytest.approx(0.2 + 2.919986 * 0.1 / 3**0.5, rel=1e-6)
    six = interval([1, 2, 3, 4, 5, 6])
    assert six.at(0.95)[0] == pytest.approx(3.5 - 2.570582 * 3.5**0.5 / 6**0.5, rel=1e-6)
    x = 2 * 3**0.5  # of two degrees of freedom the t distribution has a closed form
    assert change.p == pytest.approx(1 - x / math.sqrt(2 + x * x))
    assert interval([0.1]).at(0.95) == (-math.inf, math.inf) and interval([0.1]).p == 1
    assert interval([0.0, 0.0]).p == 1 and interval([0.5, 0.5]).p == 0


def test_holm():
    assert holm([0.03, 0.01]) == [0.03, 0.02] and holm([0.01, 0.04]) == [0.02, 0.04]
    assert holm([0.04, 0.045]) == [0.08, 0.08] and holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("mean, stderr, p, word", [
    (-0.10, 0.01, 0.001, "better"), (0.10, 0.01, 0.001, "worse"), (-0.10, 0.01, 0.06, "undecided, lower"),
    (-0.071, 0.0005, 0.001, "neutral"), (-0.0728, 0.0001, 0.001, "better"),  # ln 0.93 = -0.07257
    (0.0675, 0.00001, 0.001, "neutral"), (0.0680, 0.00001, 0.001, "worse"),  # ln 1.07 = 0.06766
    (0.0, 0.01, 0.9, "neutral"), (0.0, 0.05, 0.9, "undecided"), (0.05, 0.015, 0.01, "undecided, higher"),
])
def test_verdicts(mean, stderr, p, word):
    assert verdict(Interval(6, mean, stderr, p), report.DISTANCE_BAND, p) == word
    assert verdict(Interval(1, mean, math.inf, 1.0), report.DISTANCE_BAND, p) == "undecided (one seed)"


def test_the_bands_are_the_registered_ones():
    assert [math.exp(x) for x in report.DISTANCE_BAND] == pytest.approx([0.93, 1.07])
    assert [math.exp(x) for x in report.TRACE_BAND] == pytest.approx([0.90, 1 / 0.90])


def test_an_arm_over_seeds_is_never_tighter_than_its_samples():
    assert over_seeds([Measured(5, 0.3)]) == Measured(5, 0.3)
    assert over_seeds([Measured(1, 0.1), Measured(3, 0.1)]) == Measured(2, pytest.approx(2**0.5))
    assert over_seeds([Measured(1, 0.4), Measured(1.01, 0.4)]) == Measured(pytest.approx(1.005), pytest.approx(0.4))
    assert str(Measured(12.345, 0.0678)) == "12.345 ± 0.068" and str(Measured(-0.001, 0.1)) == "0.00 ± 0.10"


def make_run(root, exp, seed, distance, trace, *overrides, n=10_000, done=True):
    """A finished run of 10 steps with one final distance (in percent of which KID is a tenth) and one trace."""
    config = load_config(exp, overrides=[f"seed={seed}", "train.total_steps=10", "eval.features=lite0", *overrides])
    run_dir = root / exp / f"seed{seed}"
    (run_dir / "influence").mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (run_dir / "env.json").write_text(json.dumps({"torch": "# 2 | <b>", "device": exp}))
    line = {"step": 10, "kind": "final", "sampler": "ddpm", "nfe": 50, "n": n, "features": "lite0", "reference": "r"}
    for name, value in ((FD, distance), ("val/kid_lite0", distance / 10)):
        line |= {name: value, f"{name}_stderr": 0.5, f"{name}_floor": 1.0, f"{name}_floor_test": None,
                 f"{name}_ceiling": 900.0}
    curvature = {"step": 10} | {f"curvature/{name}_{key}": value for name, value in (
        ("hutch_trace_unweighted", trace), ("hutch_trace", trace / 2)) for key in ("mean", "stderr")}
    profile = {"step": 10, "n": 4, "t": [0, 500], "eps_mse_raw": [9, 9], "eps_mse_ema": [distance / 100, 0.5]}
    loss = [{"step": s, "train/eps_mse_mean": float(s), "train/grad_global_L2": trace} for s in (2, 9, 10)]
    for name, lines in (("results", [line]), ("curvature", [curvature]), ("per_t", [profile]), ("loss", loss)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    pull = np.arange(n) % 2 * float(seed)
    np.savez(run_dir / "influence" / f"step_000010_ddpm50_lite0_n{n}.npz", **{FD: pull * distance / 100,
                                                                             "val/kid_lite0": pull * distance / 1000})
    if done:
        (run_dir / "done.json").write_text("{}")
    return run_dir


@pytest.fixture
def arms(tmp_path):
    """E1 has 100, 200, 300; E2 has 80, 165, 240 at seeds 1, 2, 3, and traces 1.0 and 1.2 times as large."""
    for seed, (one, two, trace) in enumerate([(100, 80, 1.2), (200, 165, 1.25), (300, 240, 1.22)], start=1):
        make_run(tmp_path, "E1", seed, one, 50.0 * seed, n=100)
        make_run(tmp_path, "E2", seed, two, 50.0 * seed * trace, n=100)
    return tmp_path


def run(root, *args, capsys):
    assert report.main([*args, "--runs", str(root)]) == 0
    return capsys.readouterr().out


def test_the_numbers_of_a_comparison(arms, capsys):
    out = run(arms, "E1", "E2", "--factor", "loss.weighting", capsys=capsys)
    y = [math.log(0.8), math.log(165 / 200), math.log(0.8)]
    half = 4.302653 * np.std(y, ddof=1) / 3**0.5
    low, high = (100 * math.expm1(np.mean(y) + sign * half) for sign in (-1, 1))
    (line,) = [line for line in out.splitlines() if line.startswith("| **") and FD in line]
    assert "**better**" in line and f"{100 * math.expm1(np.mean(y)):+.1f} %" in line
    assert f"{low:+.1f} % to {high:+.1f} %" in line and "not refuted" in line
    (line,) = [line for line in out.splitlines() if line.startswith("| **") and "unweighted" in line]
    assert "**worse**" in line and "-10.0 %: refuted" in line
    (line,) = [line for line in out.splitlines() if line.startswith("| final") and FD in line]
    assert "1: -20.0 %" in line and "2: -17.5 %" in line  # relative to the baseline, seed by seed
    paired = np.std(np.arange(100) % 2 * 1.0 * (80 - 100) / 100, ddof=1) / 10  # of seed 1, over 100
    assert f"1: -20.0 % ± {100 * paired / 100:.2g}" in line
    assert "-20.0 %" in next(line for line in out.splitlines() if line.startswith("| t = 0 "))
    assert "| 9.5 | 9.5 | +0.0 %" in out  # the last fifth of steps: 9 and 10
    assert "n = 10,000" in out and "not FID" in out
    assert (arms / "reports" / "E1_E2" / "E1_E2.html").read_text().count("data:image/png") >= 3
    assert out.count("**") == 4  # two verdicts, and no other


def test_text_of_files_cannot_forge_the_page(arms, capsys):
    out = run(arms, "E1", "E2", "--factor", "loss.weighting", capsys=capsys)
    env = arms / "E2" / "seed1" / "env.json"
    env.write_text(json.dumps({"torch": "1\n# Forged\n<script>x</script> | y", "device": "E1"}))
    out = run(arms, "E1", "E2", "--factor", "loss.weighting", capsys=capsys)
    assert "\n# Forged" not in out and "<script>" not in out and "Forged" in out
    assert "<script>" not in (arms / "reports" / "E1_E2" / "E1_E2.html").read_text()


def test_an_unfinished_arm_has_no_verdict(arms, capsys):
    (arms / "E2" / "seed3" / "done.json").unlink()
    out = run(arms, "E1", "E2", "--factor", "loss.weighting", capsys=capsys)
    assert out.count("**none") == 2 and "E2 of seed 3" in out


def test_a_seed_of_one_arm_alone_is_named(arms, capsys):
    make_run(arms, "E1", 9, 100, 50.0, n=100)
    assert "only E1 has it: seed 9" in run(arms, "E1", "E2", "--factor", "loss.weighting", capsys=capsys)


@pytest.mark.parametrize("overrides, facts", [
    (["train.lr=1"], ["train.lr"]), (["loss.weighting=constant"], ["nothing"]),
])
def test_arms_that_differ_in_more_or_less_than_the_factor_are_refused(tmp_path, capsys, overrides, facts):
    make_run(tmp_path, "E1", 1, 100, 50.0, n=10)
    make_run(tmp_path, "E2", 1, 100, 50.0, *overrides, n=10)
    with pytest.raises(UserError) as error:
        run(tmp_path, "E1", "E2", capsys=capsys)
    assert all(fact in str(error.value) for fact in facts)
    assert "Verdict" in run(tmp_path, "E1", "E2", "--force", capsys=capsys)


def test_what_may_differ(tmp_path, capsys):
    make_run(tmp_path, "E1", 1, 100, 50.0, n=10)
    make_run(tmp_path, "E2", 1, 100, 50.0, "eval.every=3", "curvature.every=7", n=10)
    out = run(tmp_path, "E1", "E2", "--factor", "loss.weighting", capsys=capsys)
    assert "undecided (one seed)" in out and "device is E1 for E1, E2 for E2" in out


def test_seeds_of_one_arm_must_have_one_config(tmp_path, capsys):
    for seed, lr in ((1, "1"), (2, "2")):
        for exp in ("E1", "E2"):
            make_run(tmp_path, exp, seed, 100, 50.0, f"train.lr={lr}", n=10)
    with pytest.raises(UserError, match=r"train\.lr.*seeds of one arm"):
        run(tmp_path, "E1", "E2", capsys=capsys)


@pytest.mark.parametrize("names, fact", [(["min_snrr"], "min_snr"), (["E1", "E0"], "E1"), (["E1", "E2"], "E1"),
                                         (["E1", "E2", "E3"], "two")])
def test_what_is_not_there_is_named(tmp_path, capsys, names, fact):
    with pytest.raises(UserError, match=fact):
        run(tmp_path, *names, capsys=capsys)
