"""A run directory: its logs, how it starts and resumes, how it is found and read."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import TINY, set_flags

import train
from checkpoint import load_file, save_checkpoint
from config import load_config
from errors import UserError
from fid import Estimate, load_npz
from runs import Run, append_jsonl, find_runs, influence_path, load_run, paired_differences, read_jsonl, save_influence


def test_a_log_survives_a_crash_at_any_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    for step in (1, 2, 3):
        append_jsonl(path, {"step": step, "x": 0.1})
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 3):
        path.write_bytes(whole[:-cut])
        assert [r["step"] for r in read_jsonl(path)] == [1, 2]
        append_jsonl(path, {"step": 3, "x": 0.1})  # takes the place of the cut line
        assert path.read_bytes() == whole
    path.write_bytes(b'{"st')
    append_jsonl(path, {"step": 1, "x": 0.1})
    assert path.read_bytes() == whole[:len(whole) // 3]
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="step 5"):
            append_jsonl(path, {"step": 5, "x": [bad]})
    assert path.read_bytes() == whole[:len(whole) // 3]


@pytest.mark.parametrize("bad", [b"\0\0\n", b"\xff\n", b"[1]\n", b"\n", b'{"step": true}\n', b"[" * 5000 + b"\n"])
def test_a_line_that_is_no_record_is_named(tmp_path, bad):
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 1}\n' + bad + b'{"step": 2}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: line 2"):
        read_jsonl(tmp_path / "a.jsonl")


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    train.main(["--exp", "E2", "--device", "cpu", "--out", str(root), *set_flags(*TINY)])
    return root


@pytest.fixture
def run_dir(trained, tmp_path):
    """A finished run of E2, where run_train("E2") would put it."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs" / "E2" / "seed1077"


def test_a_run_is_not_started_twice(run_dir, run_train, tmp_path):
    before = files(run_dir)
    with pytest.raises(UserError, match="--resume.*--overwrite.*--out"):
        run_train("E2")
    assert files(run_dir) == before
    run_train("E2", "train.total_steps=5", flags=["--overwrite"])
    assert Run(run_dir).config.train.total_steps == 5
    (tmp_path / "runs" / "E1" / "seed1077").mkdir(parents=True)
    (tmp_path / "runs" / "E1" / "seed1077" / "thesis.tex").write_text("years of work")
    for flag in ("--overwrite", "--resume"):
        with pytest.raises(UserError, match="not a run directory"):
            run_train("E1", flags=[flag])
    assert (tmp_path / "runs" / "E1" / "seed1077" / "thesis.tex").read_text() == "years of work"


def test_a_resume_refuses_another_config_by_its_key(run_dir, run_train):
    before = files(run_dir)
    for override, key in [("loss.gamma=3", "loss.gamma"), ("model.base_channels=12", "model.base_channels"),
                          ("train.total_steps=15", "train.total_steps"), ("train.amp=false", "train.amp")]:
        with pytest.raises(UserError, match=key):
            run_train("E2", override, flags=["--resume"])
    assert files(run_dir) == before
    run_train("E2", "log.every=1", "data.root='x'", flags=["--resume"])  # these may change
    assert Run(run_dir).config.log.every == 1


@pytest.mark.parametrize("key", ["train_precision", "sample_precision"])
def test_a_resume_refuses_another_precision(run_dir, run_train, key):
    env = json.loads((run_dir / "env.json").read_text())
    (run_dir / "env.json").write_text(json.dumps(env | {key: "bf16", "device": "fast CPU"}))
    before = files(run_dir)
    with pytest.raises(UserError, match=f"{key} bf16.*fp32.*fast CPU"):
        run_train("E2", flags=["--resume"])
    assert files(run_dir) == before


def test_a_checkpoint_of_another_run_is_refused(run_dir, run_train):
    last = run_dir / "checkpoints" / "last.pt"
    state = load_file(last)
    save_checkpoint(last, state | {"config": state["config"] | {"seed": 5}})
    with pytest.raises(UserError, match="seed = 5.*1077"):
        run_train("E2", flags=["--resume"])


def test_a_resume_without_checkpoints_loses_no_logs(run_dir, run_train):
    shutil.rmtree(run_dir / "checkpoints")
    before = files(run_dir)
    with pytest.raises(UserError, match="step 12.*checkpoints"):
        run_train("E2", flags=["--resume"])
    assert files(run_dir) == before


def test_find_and_read(run_dir, tmp_path):
    shutil.copytree(run_dir, run_dir.with_name("seed3"))
    config = json.loads((run_dir / "config.json").read_text())
    (run_dir.with_name("seed3") / "config.json").write_text(json.dumps(config | {"seed": 3}))
    assert [run.seed for run in find_runs(tmp_path / "runs", "E2")] == [3, 1077]
    assert find_runs(tmp_path / "runs", "E1") == []
    run = Run(run_dir)
    assert run.finished and run.log("curvature") == [] and run.log("loss")[-1]["step"] == 12
    (run_dir / "done.json").unlink()
    assert not Run(run_dir).finished
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a run directory"):
            Run(wrong)
    (run_dir / "config.json").write_text("[" * 9999)
    with pytest.raises(UserError, match=r"config\.json"):
        Run(run_dir)
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "nowhere", "E1")


def test_weights_of_a_milestone(run_dir):
    early, last = load_run(run_dir, "cpu", 6), load_run(run_dir, "cpu")
    assert (early.step, last.step) == (6, 12) and not early.model.training and not early.ema.training
    for one, two in ((early.model, last.model), (early.ema, last.ema), (early.model, early.ema)):
        assert any((p != q).any() for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(UserError, match="step 7.*000006, 000012"):
        load_run(run_dir, "cpu", 7)


# ---- paired differences ----

def measured(path, seed, *lines):
    """A run with these lines (step, kind, n, FID, KID), in which sample i pulls FID by i * FID and KID by -i * KID."""
    path.mkdir()
    config = load_config("E1", overrides=[f"seed={seed}"])
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    for step, kind, n, fid, kid in lines:
        record = {"step": step, "kind": kind, "sampler": "ddim", "nfe": 5, "n": n, "features": "inception",
                  "reference": "shapes train, n = 9", "precision": "fp32", "val/fid": fid, "val/kid": kid}
        append_jsonl(path / "results.jsonl", record)
        save_influence(path, record, {"val/fid": Estimate(fid, 0.0, np.arange(n) * fid),
                                      "val/kid": Estimate(kid, 0.0, np.arange(n) * -kid)})
    append_jsonl(path / "results.jsonl", {"step": 1, "kind": "milestone", "val/eps_mse_ema": 1.0})  # no distance
    return path


def test_paired_differences_against_their_formula(tmp_path):
    a = measured(tmp_path / "a", 1, (2, "milestone", 4, 5.0, 1.0), (4, "milestone", 4, 4.0, 1.0),
                 (4, "final", 6, 4.0, 2.0), (4, "frontier", 8, 9.0, 1.0))
    b = measured(tmp_path / "b", 1, (8, "final", 6, 1.0, 2.5), (2, "milestone", 4, 7.0, 1.0),
                 (6, "milestone", 4, 3.0, 1.0), (4, "frontier", 7, 9.0, 1.0))
    milestone, final = paired_differences(a, b)
    assert [(d["kind"], d["step_a"], d["step"], d["n"]) for d in (milestone, final)] == [
        ("milestone", 2, 2, 4), ("final", 4, 8, 6)]
    assert (milestone["val/fid"], final["val/fid"], final["val/kid"]) == (2.0, -3.0, 0.5)
    for d, name, slope in ((milestone, "val/fid", 2.0), (milestone, "val/kid", 0.0), (final, "val/fid", 3.0),
                           (final, "val/kid", 0.5)):
        n = d["n"]  # the variance of 0, 1, ... n - 1 is n (n + 1) / 12
        assert d[f"{name}_stderr"] == pytest.approx(slope * ((n + 1) / 12)**0.5)
    assert paired_differences(a, measured(tmp_path / "c", 1)) == []


def test_a_point_in_two_precisions_keeps_the_influences_of_both(tmp_path):
    run_dir = measured(tmp_path / "a", 1, (2, "frontier", 4, 5.0, 1.0))
    (fp32,) = Run(run_dir).results("frontier")
    bf16 = fp32 | {"precision": "bf16", "val/fid": 9.0}
    append_jsonl(run_dir / "results.jsonl", bf16)
    save_influence(run_dir, bf16, {name: Estimate(9.0, 0.0, np.full(4, 9.0)) for name in ("val/fid", "val/kid")})
    pairs = paired_differences(run_dir, run_dir)
    assert [(d["precision"], d["val/fid_baseline"]) for d in pairs] == [("fp32", 5.0), ("bf16", 9.0)]
    assert load_npz(influence_path(run_dir, fp32))["val/fid"][1] == 5.0


def test_what_cannot_be_paired_is_refused(tmp_path):
    line = (2, "milestone", 4, 5.0, 1.0)
    a, b, other_seed = (measured(tmp_path / name, seed, line) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    with pytest.raises(UserError, match="seeds"):
        paired_differences(a, other_seed)
    influence = next((b / "influence").iterdir())
    np.savez(influence, **{"val/fid": np.zeros(3), "val/kid": np.zeros(4)})
    with pytest.raises(UserError, match="not 4 samples of val/fid"):
        paired_differences(a, b)
    influence.unlink()
    with pytest.raises(UserError, match=influence.name):
        paired_differences(a, b)


def test_a_run_that_repeats_its_last_steps_is_not_finished(run_train, monkeypatch):
    run_dir = run_train("E2")
    (run_dir / "checkpoints" / "last.pt").unlink()  # of step 12; previous.pt is of step 10

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.train_step", killed)
        run_train("E2", flags=["--resume"])
    assert not Run(run_dir).finished
    assert Run(run_train("E2", flags=["--resume"])).finished
