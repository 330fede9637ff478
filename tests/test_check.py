"""check.py: a run beside the bands of the study's seeds."""

import json
import math

import pytest
from test_report import edit, make_run

import check
from errors import UserError
from runs import Run


def write_logs(path, scale):
    """eps-MSE of 0.04 `scale` to step 2,000; profile and distance at 10,000 in proportion."""
    logs = {"loss": [{"step": s, "train/eps_mse_mean": 0.04 * scale * (3 if s <= 500 else 1), "train/loss_mean": scale}
                     for s in range(100, 2001, 100)],
            "per_t": [{"step": 10_000, "n": 512, "t": [0, 999], "eps_mse_ema": [0.8 * scale, 0.001 * scale]}],
            "results": [{"step": 10_000, "kind": "milestone", "sampler": "ddpm", "nfe": 50, "n": 2000,
                         "features": "lite0", "val/fd_lite0": 500 * scale, "val/kid_lite0": 0.5 * scale,
                         "samples/channel_mean_sd": 60 * scale, "samples/neighbour_rms": 14 * scale}]}
    for name, lines in logs.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def study(tmp_path):
    """Three seeds of E1 and two of E2."""
    for exp, seed, scale in (("E1", 1, 0.9), ("E1", 2, 1.0), ("E1", 3, 1.1), ("E2", 1, 1.0), ("E2", 2, 1.1)):
        write_logs(make_run(tmp_path / "study", exp, seed), scale)
    return tmp_path / "study"


def test_the_band_is_a_prediction_interval_of_the_logarithm():
    assert check.band([1.0, 2.0]) is None
    mean, sd = math.log(6) / 3, math.sqrt(sum((math.log(x) - math.log(6) / 3)**2 for x in (1, 2, 3)) / 2)
    half = 9.92484 * sd * math.sqrt(4 / 3)  # t table: 99.5 % quantile, 2 degrees of freedom
    assert check.band([1.0, 2.0, 3.0]) == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=1e-5)


def test_a_run_inside_and_one_outside(study, tmp_path, capsys):
    path = make_run(tmp_path / "own", "E5", 9)  # the training of E1, under another name
    write_logs(path, 1.3)
    assert check.main([str(path), "--runs", str(study)]) == 0
    text = capsys.readouterr().out
    assert "outside" not in text and "steps 500 to 1,000 | 0.052" in text and "t = 999" in text
    assert "t = 50" not in text and "steps 4,000" not in text  # not measured
    edit(path / "results.jsonl", lambda r: r | {"val/fd_lite0": 5000.0})
    edit(path / "loss.jsonl", lambda r: r | {"train/loss_mean": 20.0} if r["step"] <= 1000 else r)
    assert check.main([str(path), "--runs", str(study)]) == 1
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "outside**" in line] == [
        "| train/loss_mean, mean of steps 500 to 1,000", "| val/fd_lite0, DDPM 50, n = 2,000, step 10,000"]


def test_a_run_is_not_compared_with_itself(study):
    write_logs(study / "E1" / "seed3", 50)
    with pytest.raises(UserError, match="three seeds"):  # two are left
        check.check(Run(study / "E1" / "seed3"), study)


def test_only_runs_of_the_same_training_are_compared(study, tmp_path):
    path = make_run(tmp_path / "own", "E5", 9, sets=["train.lr=0.1"])
    with pytest.raises(UserError, match="trained in the same way"):
        check.check(Run(path), study)


def test_the_page_has_both_arms(study, tmp_path):
    assert check.main(["--runs", str(study), "--out", str(tmp_path)]) == 0
    (line,) = [line for line in (tmp_path / "bands.md").read_text().splitlines() if "val/fd_lite0" in line]
    assert "450 to 550 (3)" in line and "500 to 550 (2) |  |" in line
