"""What must survive: kills, signals, full disks, NaN, two processes in one place. On real processes where needed."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import same, small_run_flags

import train
from checkpoint import load_checkpoint, load_file
from runs import read_jsonl

LOGS = ("loss.jsonl", "results.jsonl", "per_t.jsonl", "curvature.jsonl")
EVERYTHING = ["curvature.every=25", "curvature.num_probes=2", "log.every=2", "train.checkpoint_every=3",
              "eval.every=20", "grid.every=50"]


def flags(out, *overrides):
    return ["--exp", "smoke", "--device", "cpu", "--out", out, *small_run_flags(*overrides)]


def contents(run_dir):
    """All that a run writes as a pure function of config and seed: weights, EMA, optimiser, logs, grids."""
    files = [*(run_dir / name for name in LOGS), *(run_dir / "grids").iterdir()]
    files = {str(file.relative_to(run_dir)): file.read_bytes() for file in files if file.exists()}
    milestones = {path.name: load_file(path) for path in (run_dir / "checkpoints").glob("step_*.pt")}
    return files | milestones | load_checkpoint(run_dir / "checkpoints")


def wait_for(condition, child, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, Path(child.outputs[1]).read_text()
        time.sleep(0.005)


# ---- kills ----

# Each dies inside the second checkpoint that the process writes, at another point of it.
DIES_AT = {stage: f"""
import builtins, os, signal
from pathlib import Path
import checkpoint
seen = []
def die(name):
    seen.append(name)
    if seen.count(name) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
if {stage!r} == "half written":
    def opened(path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        if Path(path).name == "next.pt.tmp":
            class Half:
                def __enter__(self): return self
                def __exit__(self, *_): file.close()
                def write(self, content):
                    file.write(content[:len(content) // 2])
                    file.flush()
                    die("half written")
                    file.write(content[len(content) // 2:])
                flush, fileno = file.flush, file.fileno
            return Half()
        return file
    checkpoint.open = opened
else:
    real = os.replace
    def replace(source, target):
        if Path(target).name == {stage!r}:
            die({stage!r})
        real(source, target)
    os.replace = replace
""" for stage in ("half written", "next.pt", "previous.pt", "last.pt")}


@pytest.mark.parametrize("kills", [12, pytest.param(24, marks=pytest.mark.long)])
def test_kill_anywhere(server, tmp_path, kills):
    """Killed at random moments and inside checkpoint writes, again and again: the same run, to the last byte."""
    overrides = [*EVERYTHING, f"train.total_steps={15 * kills}"]  # more than they let pass
    whole = server.start("train.py", *flags(tmp_path / "whole", *overrides), cwd=tmp_path).wait(10 * kills)
    assert whole.status == 0, whole.err
    run_dir, killed, fates, rng = tmp_path / "killed" / "smoke" / "seed1077", 0, [], random.Random(0)
    stages = list(DIES_AT)
    while killed < kills:
        stage = stages[killed // 3 % len(stages)] if killed % 3 == 2 else None
        child = server.start("train.py", *flags(tmp_path / "killed", *overrides), "--resume", cwd=tmp_path,
                             before=DIES_AT.get(stage, ""))
        if stage is None:  # after up to seven new log lines, of about 420 bytes, and then at any moment
            log, lines = run_dir / "loss.jsonl", rng.randrange(8)
            reached = (log.stat().st_size if log.exists() else 0) + 420 * lines
            wait_for(lambda: not lines or (log.exists() and log.stat().st_size >= reached), child)  # noqa: B023
            time.sleep(rng.uniform(0, 0.05 if lines else 0.6))
            child.kill()
        done = child.wait()
        assert done.status in (-signal.SIGKILL, 0), done.err
        assert "Traceback" not in done.err
        if done.status == 0:
            break
        killed += 1
        fates.append(stage or "any")
    assert killed == kills, f"finished after {killed} kills; make it longer"
    assert killed < 12 or set(fates) == {"any", *DIES_AT}
    step = load_checkpoint(run_dir / "checkpoints")["step"]
    print(f"{killed} kills, at step {step} of {15 * kills} after the last")
    done = server.start("train.py", *flags(tmp_path / "killed", *overrides), "--resume", cwd=tmp_path).wait(10 * kills)
    assert done.status == 0, done.err
    whole, survived = contents(tmp_path / "whole" / "smoke" / "seed1077"), contents(run_dir)
    assert whole.keys() == survived.keys()
    assert [name for name in whole if not same(whole[name], survived[name])] == []


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_checkpoints_and_says_how_to_resume(server, tmp_path, number, status):
    overrides = [*EVERYTHING, "train.checkpoint_every=1000", "train.total_steps=40"]
    command, run_dir = flags(tmp_path / "a b", *overrides), tmp_path / "a b" / "smoke" / "seed1077"
    child = server.start("train.py", *command, cwd=tmp_path)
    wait_for(lambda: len(read_jsonl(run_dir / "loss.jsonl")) >= 3, child)
    child.kill(number)
    done = child.wait()
    assert done.status == status and len(done.err.splitlines()) == 1, done.err
    assert f"stopped by {number.name}" in done.err and "--resume" in done.err and "'" in done.err  # quoted path
    assert read_jsonl(run_dir / "loss.jsonl")[-1]["step"] <= load_checkpoint(run_dir / "checkpoints")["step"] < 40
    assert server.run("train.py", *command, "--resume", cwd=tmp_path).status == 0
    assert server.run("train.py", *flags(tmp_path / "whole", *overrides), cwd=tmp_path).status == 0
    assert same(contents(run_dir), contents(tmp_path / "whole" / "smoke" / "seed1077"))


def test_a_stop_request_waits_for_the_measurement_and_a_second_one_does_not(run_train, monkeypatch):
    """The checkpoint was written before, so that nothing is lost either way."""
    real, before = train.evaluate.measure, signal.getsignal(signal.SIGTERM)

    def measure(config, run_dir, step, *args):
        assert load_checkpoint(run_dir / "checkpoints")["step"] == step
        signal.raise_signal(signal.SIGINT)
        if twice:
            signal.raise_signal(signal.SIGINT)
        real(config, run_dir, step, *args)

    whole = run_train("E2", out="whole")
    for twice in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if twice else AssertionError):
            patch.setattr(train.evaluate, "measure", measure)
            run_train("E2", out=f"stopped{twice}")
        assert signal.getsignal(signal.SIGTERM) == before
        assert (whole.parents[2] / f"stopped{twice}/E2/seed1077/per_t.jsonl").exists() != twice
        assert same(contents(run_train("E2", out=f"stopped{twice}", flags=["--resume"])), contents(whole))


# ---- a full disk ----

@pytest.mark.parametrize("culprit", ["next.pt", "loss.jsonl"])
def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(server, tmp_path, culprit):
    run_dir = tmp_path / "runs" / "smoke" / "seed1077"
    overrides = ["train.total_steps=40", "log.every=1", "eval.every=40", "grid.every=40",
                 f"train.checkpoint_every={6 if culprit == 'next.pt' else 1000}"]
    command = flags(tmp_path / "runs", *overrides)
    limit = {"next.pt": 15_000, "loss.jsonl": 4_000}[culprit]
    done = server.run("train.py", *command, cwd=tmp_path, file_limit=limit)
    assert done.status == 2 and len(done.err.splitlines()) == 1 and "Traceback" not in done.err, done.err
    assert "File too large" in done.err and culprit in done.err and "--resume" in done.err
    assert not list(run_dir.glob("checkpoints/*"))
    assert server.run("train.py", *command, "--resume", cwd=tmp_path).status == 0
    assert server.run("train.py", *flags(tmp_path / "whole", *overrides), cwd=tmp_path).status == 0
    assert same(contents(tmp_path / "whole" / "smoke" / "seed1077"), contents(run_dir))


# ---- NaN and infinity ----

FAULT = """
import torch, train
real = train.Diffusion.eps_mse
def eps_mse(self, model, x_0, t, eps):
    mse = real(self, model, x_0, t, eps)
    eps_mse.calls += model.training
    bad = model.training and eps_mse.calls == 6
    return mse + {} if bad else mse
eps_mse.calls = 0
train.Diffusion.eps_mse = eps_mse
"""


@pytest.mark.parametrize("fault", ['float("nan")', 'float("inf")', "(mse - mse.detach()).sqrt()"])
def test_a_step_that_is_not_finite_ends_the_run_before_anything_of_it_is_written(server, tmp_path, fault):
    """Injected at step 6: in the loss, or in the gradient alone (the derivative of sqrt at 0 is infinite)."""
    overrides = [*EVERYTHING, "log.every=4", "train.total_steps=12"]
    command, run_dir = flags(tmp_path / "failed", *overrides), tmp_path / "failed" / "smoke" / "seed1077"
    done = server.run("train.py", *command, cwd=tmp_path, before=FAULT.format(fault))
    assert done.status == 1 and len(done.err.splitlines()) == 1, done.err
    assert "not finite" in done.err and "--set log.every=1" in done.err
    saved = load_checkpoint(run_dir / "checkpoints")
    assert saved["step"] <= 6 and all(torch.isfinite(p).all() for p in saved["model"].values())
    assert [r["step"] for r in read_jsonl(run_dir / "loss.jsonl")] == [4]
    done = server.run("train.py", *command, "--resume", "--set", "log.every=1", cwd=tmp_path,
                      before=FAULT.format(fault).replace("== 6", f"== {6 - saved['step']}"))
    assert done.status == 1 and "step 6" in done.err  # repeated, and found
    assert server.run("train.py", *command, "--resume", cwd=tmp_path).status == 0
    assert server.run("train.py", *flags(tmp_path / "whole", *overrides), cwd=tmp_path).status == 0
    a, b = contents(run_dir), contents(tmp_path / "whole" / "smoke" / "seed1077")
    a.pop("loss.jsonl"), b.pop("loss.jsonl")  # log.every was 1 for a while
    assert same(a, b)


@pytest.mark.parametrize("override", ["eval.every=1", "train.checkpoint_every=1"])
def test_a_run_that_diverges_ends_in_one_line(server, tmp_path, override):
    """Wherever it shows first: in weights that are to be saved, or in a measurement."""
    command = flags(tmp_path, "train.total_steps=60", "train.lr=1e30", override)
    for resume in ([], ["--resume"]):
        done = server.run("train.py", *command, *resume, cwd=tmp_path)
        assert done.status == 1 and len(done.err.splitlines()) == 1 and "Traceback" not in done.err, done.err


# ---- two processes in one place ----

def test_a_second_process_is_refused_until_the_first_is_gone(server, tmp_path):
    overrides = [*EVERYTHING, "train.total_steps=100000"]
    run_dir = tmp_path / "smoke" / "seed1077"
    first = server.start("train.py", *flags(tmp_path, *overrides), cwd=tmp_path)
    wait_for(lambda: read_jsonl(run_dir / "timing.jsonl"), first)
    for flag in ("--resume", "--overwrite"):
        second = server.start("train.py", *flags(tmp_path, *overrides), flag, cwd=tmp_path).wait(20)
        assert second.status == 2 and f"process {first.pid}" in second.err and len(second.err.splitlines()) == 1
    first.kill()
    first.wait()
    child = server.start("train.py", *flags(tmp_path, *overrides), "--resume", cwd=tmp_path)
    lines = len(read_jsonl(run_dir / "timing.jsonl"))
    wait_for(lambda: len(read_jsonl(run_dir / "timing.jsonl")) > lines, child)
    child.kill()
    child.wait()
