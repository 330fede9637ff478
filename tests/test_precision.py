"""precision.py: what bf16 changes in samples and in training."""

import json
import shutil

import pytest
import torch

import precision
from runs import Run, influence_path, read_jsonl


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def line(change, stderr=3.0):
    return {"exp": "E1", "seed": 5, "step": 100, "sampler": "ddpm", "nfe": 50, "n": 2000,
            "metric": "fd", "fp32": 500.0, "fp32_stderr": stderr, "change": change, "change_stderr": 0.1}


def test_a_third_of_the_sampling_error_decides():
    assert "0 of 2 do." in precision.sampling([line(0.99), line(-0.99)])
    assert "1 of 2 do, so" in precision.sampling([line(0.99), line(-1.01)])


def test_training_is_compared_at_equal_steps(run_train):
    runs = [run_train("E5", out=name) for name in ("a", "b")]
    for run, values in zip(runs, ({100: 1.0, 200: 2.0, 2100: 1.0}, {100: 1.1, 200: 2.2, 300: 9.0, 2100: 9.0}),
                           strict=True):
        write_jsonl(run / "loss.jsonl", [{"step": step, "train/eps_mse_mean": value} for step, value in values.items()])
    assert precision.training({"name": tuple(map(Run, runs))}).endswith("| name | 2 | +9.53 % | 0.00 % |")


@pytest.mark.long
def test_samples_differ_by_the_precision_alone(run_train, tmp_path, capsys, monkeypatch):
    stats = f"{tmp_path}/stats"
    run = run_train("E5", "eval.features=lite0", "eval.n_samples=4", "eval.final_n_samples=4",
                    f"eval.stats_root='{stats}'")
    args = [str(run), "--n", "4", "--stats-root", stats, "--out", str(tmp_path)]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert precision.main(args) == 0
    lines = read_jsonl(tmp_path / "precision.jsonl")
    assert [(r["sampler"], r["metric"]) for r in lines] == [
        (sampler, metric) for sampler in ("ddpm", "ddim") for metric in ("val/fd_lite0", "val/kid_lite0")]
    for r in lines:
        assert r["change"] != 0 < r["change_stderr"] < r["fp32_stderr"]

    (final,) = [r for r in Run(run).log("results") if (r["step"], r["kind"]) == (12, "final")]  # fp32, DDIM
    bf16 = final | {"precision": "bf16", "val/fd_lite0": final["val/fd_lite0"] + 2}
    write_jsonl(run / "results.jsonl", [final, bf16])
    shutil.copy(influence_path(run, final), influence_path(run, bf16))
    (tmp_path / "precision.jsonl").unlink()
    assert precision.main(args) == 0
    logged = next(r for r in read_jsonl(tmp_path / "precision.jsonl") if r["sampler"] == final["sampler"])
    assert (logged["fp32"], logged["change"]) == (final["val/fd_lite0"], pytest.approx(2)), "what the run has is used"

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(precision.UserError, match="bf16"):
        precision.main(args)
