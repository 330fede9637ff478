"""A run directory: its logs, how it starts and resumes, how it is found and read."""

import json
import shutil

import pytest
from conftest import TINY, set_flags

import train
from errors import UserError
from runs import Run, append_jsonl, find_runs, load_run, read_jsonl


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


def test_a_run_is_not_started_twice(run_train, tmp_path):
    run_dir = run_train("E2", "train.total_steps=6")
    before = files(run_dir)
    with pytest.raises(UserError, match="--resume.*--overwrite.*--out"):
        run_train("E2", "train.total_steps=6")
    assert files(run_dir) == before
    run_train("E2", "train.total_steps=5", flags=["--overwrite"])
    assert Run(run_dir).config.train.total_steps == 5
    (tmp_path / "runs" / "E1" / "seed1077").mkdir(parents=True)
    (tmp_path / "runs" / "E1" / "seed1077" / "thesis.tex").write_text("years of work")
    for flag in ("--overwrite", "--resume"):
        with pytest.raises(UserError, match="not a run directory"):
            run_train("E1", flags=[flag])
    assert (tmp_path / "runs" / "E1" / "seed1077" / "thesis.tex").read_text() == "years of work"


def test_a_resume_refuses_another_config_by_its_key(run_train):
    run_dir = run_train("E2", "train.total_steps=6")
    before = files(run_dir)
    for override, key in [("loss.gamma=3", "loss.gamma"), ("model.base_channels=12", "model.base_channels"),
                          ("train.total_steps=9", "train.total_steps"), ("train.amp=false", "train.amp")]:
        with pytest.raises(UserError, match=key):
            run_train("E2", "train.total_steps=6", override, flags=["--resume"])
    assert files(run_dir) == before
    run_train("E2", "train.total_steps=6", "log.every=1", "data.root='x'", flags=["--resume"])  # these may change
    assert Run(run_dir).config.log.every == 1


def test_a_checkpoint_of_another_run_is_refused(run_train):
    own, other = run_train("E2", "train.total_steps=6"), run_train("E2", "train.total_steps=6", seed=5, out="other")
    shutil.copy(other / "checkpoints" / "last.pt", own / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match="seed"):
        run_train("E2", "train.total_steps=6", flags=["--resume"])


def test_a_resume_without_checkpoints_loses_no_logs(run_train):
    run_dir = run_train("E2")
    shutil.rmtree(run_dir / "checkpoints")
    before = files(run_dir)
    with pytest.raises(UserError, match="step 12.*checkpoints"):
        run_train("E2", flags=["--resume"])
    assert files(run_dir) == before


def test_a_damaged_checkpoint_costs_some_steps_and_says_how_many(run_train, capsys):
    run_dir = run_train("E2")
    expected = {p.name: p.read_bytes() for p in run_dir.glob("*.jsonl") if p.name != "timing.jsonl"}
    last = run_dir / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1])
    capsys.readouterr()
    run_train("E2", flags=["--resume"])
    out, err = capsys.readouterr()
    assert "last.pt" in err and "step 10" in err and "steps 11 to 12" in out
    assert {name: (run_dir / name).read_bytes() for name in expected} == expected


def test_find_and_read(run_train, tmp_path):
    run_dir = run_train("E2")
    run_train("E2", "train.total_steps=5", seed=3)
    assert [run.seed for run in find_runs(tmp_path / "runs", "E2")] == [3, 1077]
    assert find_runs(tmp_path / "runs", "E1") == []
    run = Run(run_dir)
    assert run.finished and run.log("curvature") == [] and run.log("loss")[-1]["step"] == 12
    (run_dir / "done.json").unlink()
    assert not run.finished
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a run directory"):
            Run(wrong)
    (run_dir / "config.json").write_text("[" * 9999)
    with pytest.raises(UserError, match=r"config\.json"):
        Run(run_dir)
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "nowhere", "E1")


def test_weights_of_a_milestone(run_train):
    run_dir = run_train("E2", "train.lr=1e-2")
    early, last = load_run(run_dir, "cpu", 6), load_run(run_dir, "cpu")
    assert (early.step, last.step) == (6, 12) and not early.model.training and not early.ema.training
    for one, two in ((early.model, last.model), (early.ema, last.ema), (early.model, early.ema)):
        assert any((p != q).any() for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(UserError, match="step 7.*000006, 000012"):
        load_run(run_dir, "cpu", 7)


def test_env_tells_what_may_change_a_result(run_train, tmp_path):
    run_dir = run_train("E2", "train.total_steps=6")
    env = json.loads((run_dir / "env.json").read_text())
    assert {"git_commit", "git_dirty", "torch", "numpy", "device", "threads", "processes", "command"} <= env.keys()
    assert train.main(["--exp", "E2", "--device", "cpu", "--out", str(tmp_path / "runs"), "--resume",
                       *set_flags(*TINY, "train.total_steps=6")]) == 0
    assert len(json.loads((run_dir / "env.json").read_text())["resumed"]) == 1
