"""docs/experiments/swap.py: two networks in one chain of samples."""

import pytest
import torch
from conftest import tiny_network

import swap
from errors import UserError
from runs import paired_differences, read_jsonl

WITH_FID = ["eval.features=inception", "eval.n_samples=20", "eval.final_n_samples=20"]


@pytest.fixture
def two_runs(run_train, tmp_path, monkeypatch):
    for module in ("train.feature_network", "evaluate.feature_network"):
        monkeypatch.setattr(module, tiny_network)
    monkeypatch.setattr(swap, "feature_network", tiny_network)
    return [run_train(exp, *WITH_FID, f"eval.stats_root='{tmp_path}/s'") for exp in ("E5", "E6")]


def test_unmixed_lines_are_what_the_runs_have_measured(two_runs, capsys):
    lines = swap.swap(two_runs, at=500)
    assert [(r["noisy"], r["clean"]) for r in lines] == [("E5", "E5"), ("E5", "E6"), ("E6", "E5"), ("E6", "E6")]
    for r, run_dir in ((lines[0], two_runs[0]), (lines[3], two_runs[1])):
        measured = [m for m in read_jsonl(run_dir / "results.jsonl") if m["kind"] == "milestone"][-1]
        assert {key: r[key] for key in ("val/fid", "val/kid", "n", "nfe", "step", "val/fid_floor")} == {
            key: measured[key] for key in ("val/fid", "val/kid", "n", "nfe", "step", "val/fid_floor")}
    assert lines[0]["val/fid_difference"] == lines[0]["val/fid_difference_stderr"] == 0
    pair = [d for d in paired_differences(*two_runs) if d["kind"] == "milestone"][-1]
    assert lines[3]["val/kid_difference"] == pytest.approx(pair["val/kid"])
    assert lines[3]["val/kid_difference_stderr"] == pytest.approx(pair["val/kid_stderr"], rel=1e-4)
    assert len({r["val/fid"] for r in lines}) == 4  # each half matters
    assert capsys.readouterr().out.count("\n") == 4


def test_two_seeds_of_one_experiment_are_swapped_at_a_milestone(two_runs, run_train, tmp_path):
    """The control of the swap: the samples of both start from the noise of the first one's seed."""
    other = run_train("E5", *WITH_FID, f"eval.stats_root='{tmp_path}/s'", seed=1078)
    lines = swap.swap([two_runs[0], other], at=500, n=10, milestone=6)
    assert [(r["noisy"], r["clean"]) for r in lines] == [
        (a, b) for a in ("E5/1077", "E5/1078") for b in ("E5/1077", "E5/1078")]
    assert {(r["step"], r["seed"], r["n"]) for r in lines} == {(6, 1077, 10)}
    assert len({r["val/fid"] for r in lines}) == 4
    assert lines[0]["val/fid"] == swap.swap(two_runs, at=500, n=10, milestone=6)[0]["val/fid"]
    more = swap.swap(two_runs, at=500, n=10, nfe=3, milestone=6)
    assert more[0]["nfe"] == 3 and more[0]["val/fid"] != lines[0]["val/fid"]
    with pytest.raises(UserError, match="seed"):
        swap.swap([other, two_runs[1]], at=500)


def test_each_network_has_its_side_of_the_boundary():
    class Named(torch.nn.Module):
        image_channels, image_size = 3, 32

        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x_t, t):
            return torch.full_like(x_t, self.value)

    both = swap.Switched(noisy=Named(1.0), clean=Named(2.0), at=130)
    x = torch.zeros(2, 3, 32, 32)
    assert [both(x, torch.full((2,), t)).unique().item() for t in (0, 129, 130, 999)] == [2, 2, 1, 1]


def test_what_cannot_be_swapped_is_refused(two_runs, run_train, tmp_path):
    with pytest.raises(UserError, match="E5"):
        swap.swap([two_runs[0]] * 2, at=500)
    other = run_train("E6", *WITH_FID, "diffusion.beta_schedule=cosine", f"eval.stats_root='{tmp_path}/s'", out="b")
    with pytest.raises(UserError, match="diffusion.beta_schedule"):
        swap.swap([two_runs[0], other], at=500)
    other = run_train("E6", *WITH_FID, "diffusion.prediction=v", f"eval.stats_root='{tmp_path}/s'", out="c")
    with pytest.raises(UserError, match="diffusion.prediction"):
        swap.swap([two_runs[0], other], at=500)
    for nfe in (0, 1001):
        with pytest.raises(UserError, match=f"--nfe {nfe}.*1000"):
            swap.swap(two_runs, at=500, nfe=nfe)
    with pytest.raises(UserError, match="--at 1000.*999"):
        swap.swap(two_runs, at=1000)
    for n in (-3, 0, 1):
        with pytest.raises(UserError, match=f"--n {n}"):
            swap.swap(two_runs, at=500, n=n)
