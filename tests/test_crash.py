"""What must survive: kills, signals, full disks, NaN, two processes in one place. On real processes where needed."""

import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import same, small_run_flags

import data
import train
from checkpoint import load_checkpoint, load_file
from diffusion import Diffusion
from rng import generator
from runs import read_jsonl

LOGS = ("loss.jsonl", "results.jsonl", "per_t.jsonl", "curvature.jsonl")
EVERYTHING = ["train.total_steps=24", "train.batch_size=4", "train.checkpoint_every=3", "log.every=2", "eval.every=20",
              "grid.every=14", "curvature.every=9", "curvature.num_probes=2"]
FEW_IMAGES = "import data\ndata.SHAPES_TRAIN = data.SHAPES_TEST = 64\n"  # to save time


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    for name in ("SHAPES_TRAIN", "SHAPES_TEST"):
        monkeypatch.setattr(data, name, 64)


def flags(out, *overrides):
    return ["--exp", "smoke", "--device", "cpu", "--out", str(out), *small_run_flags(*EVERYTHING, *overrides)]


def start(server, folder, *args, before="", **options):
    return server.start("train.py", *args, cwd=folder, before=FEW_IMAGES + before, **options)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    done = start(server, folder, *flags(folder)).wait()
    assert done.status == 0, done.err
    return folder / "smoke" / "seed1077"


def contents(run_dir):
    """All that a run writes as a pure function of config and seed: weights, EMA, optimiser, logs, grids."""
    files = [*(run_dir / name for name in LOGS), *(run_dir / "grids").iterdir()]
    files = {str(file.relative_to(run_dir)): file.read_bytes() for file in files if file.exists()}
    states = {path.name: load_file(path) for path in (run_dir / "checkpoints").glob("step_*.pt")}
    states["last.pt"] = load_checkpoint(run_dir / "checkpoints")
    for state in states.values():
        state.pop("config")  # when to save may differ
    return files | states


def assert_same_run(run_dir, other, *but):
    a, b = contents(run_dir), contents(other)
    assert a.keys() == b.keys()
    assert [name for name in a if name not in but and not same(a[name], b[name])] == []


def wait_for(condition, child, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, Path(child.outputs[1]).read_text()
        time.sleep(0.005)


# ---- kills ----

def dies_at(stage, number):
    """Code that kills its process inside its `number`-th checkpoint: half written, or before one of the renames."""
    return f"""
import os, signal
from pathlib import Path
seen, fsync, replace = [], os.fsync, os.replace
def reach(name, descriptor=None):
    seen.append(name)
    if name == {stage!r} and seen.count(name) == {number}:
        if descriptor is not None:
            os.ftruncate(descriptor, 5000)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = lambda d: (reach(Path(os.readlink(f"/proc/self/fd/{{d}}")).name, d), fsync(d))
os.replace = lambda source, target: (reach(Path(target).name), replace(source, target))
"""


DIES_AT = {stage: dies_at(stage, 2) for stage in ("next.tmp", "next", "previous.pt", "last.pt")}


@pytest.mark.parametrize("kills", [6, pytest.param(24, marks=pytest.mark.long)])
def test_kill_anywhere(server, tmp_path, kills):
    """Killed at random moments and inside checkpoint writes, again and again: the same run, to the last byte."""
    command = [f"train.total_steps={8 * kills}", "eval.every=50", "curvature.every=25"]  # more than they let pass
    undisturbed = start(server, tmp_path, *flags(tmp_path / "whole", *command)).wait(10 * kills)
    assert undisturbed.status == 0, undisturbed.err
    command = [*flags(tmp_path / "killed", *command), "--resume"]
    run_dir, rng = tmp_path / "killed" / "smoke" / "seed1077", random.Random(0)
    fates = ([*DIES_AT, *[None] * 6] * 3)[:kills]
    rng.shuffle(fates)
    for stage in fates:
        child = start(server, tmp_path, *command, before=DIES_AT.get(stage, ""))
        if stage is None:  # after up to two new log lines, of about 420 bytes, and then at any moment
            log, lines = run_dir / "loss.jsonl", rng.randrange(3)
            reached = (log.stat().st_size if log.exists() else 0) + 420 * lines
            wait_for(lambda: not lines or (log.exists() and log.stat().st_size >= reached), child)  # noqa: B023
            time.sleep(rng.uniform(0, 0.05 if lines else 0.4))
            child.kill()
        done = child.wait()
        assert done.status == -signal.SIGKILL, f"{stage}: {done.status} {done.err}"  # 0: make the run longer
    done = start(server, tmp_path, *command).wait(10 * kills)
    assert done.status == 0, done.err
    assert_same_run(run_dir, tmp_path / "whole" / "smoke" / "seed1077")


@pytest.mark.parametrize("stage", ["next.tmp", "next", "last.pt"])
def test_a_kill_inside_the_very_first_checkpoint_costs_only_time(server, tmp_path, stage):
    command = [*flags(tmp_path), "--resume"]
    done = start(server, tmp_path, *command, before=dies_at(stage, 1)).wait()
    assert done.status == -signal.SIGKILL and not (tmp_path / "smoke/seed1077/checkpoints/last.pt").exists()
    done = start(server, tmp_path, *command).wait()
    assert done.status == 0, done.err


# ---- stop requests ----

SLOW = """
import diffusion, time
real = diffusion.Diffusion.mse
def mse(self, model, *args):
    time.sleep(0.05 * model.training)
    return real(self, model, *args)
diffusion.Diffusion.mse = mse
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_checkpoints_and_says_how_to_resume(server, tmp_path, whole, number, status):
    run_dir = tmp_path / "a b" / "smoke" / "seed1077"
    child = start(server, tmp_path, *flags(tmp_path / "a b", "train.checkpoint_every=1000"), before=SLOW)
    wait_for(lambda: len(read_jsonl(run_dir / "loss.jsonl")) >= 2, child)
    child.kill(number)
    done = child.wait()
    assert done.status == status and len(done.err.splitlines()) == 1 and number.name in done.err, done.err
    assert read_jsonl(run_dir / "loss.jsonl")[-1]["step"] <= load_checkpoint(run_dir / "checkpoints")["step"] < 24
    _, script, *args = shlex.split(done.err[done.err.index("python "):])  # the path has a space
    assert "--resume" in args
    done = server.run(script, *args, cwd=tmp_path, before=FEW_IMAGES)
    assert done.status == 0, done.err
    assert_same_run(run_dir, whole)


def test_a_stop_request_waits_for_the_measurement_and_a_second_one_does_not(whole, tmp_path, monkeypatch):
    """The checkpoint was written before, so that nothing is lost either way."""
    real, before = train.evaluate.measure, signal.getsignal(signal.SIGTERM)

    def measure(config, run_dir, step, *args):
        for _ in range((1 + twice) * (step == 20)):  # a milestone, at which no other checkpoint is due
            assert load_checkpoint(run_dir / "checkpoints")["step"] == step
            signal.raise_signal(signal.SIGINT)
        return real(config, run_dir, step, *args)

    for twice in (False, True):
        command, run_dir = flags(tmp_path / str(twice)), tmp_path / str(twice) / "smoke" / "seed1077"
        with monkeypatch.context() as patch:
            patch.setattr(train.evaluate, "measure", measure)
            if twice:
                with pytest.raises(KeyboardInterrupt):
                    train.main(command)
            else:
                assert train.main(command) == 130
        assert signal.getsignal(signal.SIGTERM) == before
        assert load_checkpoint(run_dir / "checkpoints")["step"] == 20
        assert (run_dir / "per_t.jsonl").exists() != twice
    assert train.main([*command, "--resume"]) == 0
    assert_same_run(run_dir, whole)


# ---- what a resume finds ----

@pytest.mark.parametrize("cut", [1, 30, 10**6])
def test_cut_log_lines_and_a_damaged_checkpoint_are_made_again(whole, tmp_path, capsys, cut):
    """The last line of each log lacks its last bytes, or is missing; it is newer than the checkpoint that is left."""
    run_dir = shutil.copytree(whole, tmp_path / "smoke" / "seed1077")
    for name in ("loss.jsonl", "per_t.jsonl", "results.jsonl"):
        *before, last = (run_dir / name).read_bytes().splitlines(keepends=True)
        (run_dir / name).write_bytes(b"".join(before) + last[:-cut])
    last = run_dir / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-cut])
    assert train.main([*flags(tmp_path), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "last.pt" in err and "previous.pt" in err and "step 21" in err and "steps 22 to 24" in out
    assert_same_run(run_dir, whole)


# ---- a full disk ----

@pytest.mark.parametrize("culprit, limit, every", [("next", 15_000, 3), ("loss.jsonl", 5_000, 1000)])
def test_a_full_disk_leaves_the_last_checkpoint(server, tmp_path, whole, monkeypatch, culprit, limit, every):
    command, real = flags(tmp_path, f"train.checkpoint_every={every}", "log.every=1"), train.train_step
    run_dir, last = tmp_path / "smoke" / "seed1077", tmp_path / "smoke" / "seed1077" / "checkpoints" / "last.pt"

    def stopped(config, state, *args):
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(config, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        assert train.main(command) == 143
    good = last.read_bytes()
    done = start(server, tmp_path, *command, "--resume", file_limit=limit).wait()
    assert done.status == 2 and len(done.err.splitlines()) == 1, done.err
    assert "File too large" in done.err and culprit in done.err and "--resume" in done.err
    assert last.read_bytes() == good and load_file(last)["step"] == 5
    assert not list(run_dir.rglob("*.tmp"))  # it may be what fills the disk
    assert train.main([*command, "--resume"]) == 0
    assert_same_run(run_dir, whole, "loss.jsonl")  # log.every is another


# ---- NaN and infinity ----

FAULTS = {"nan": lambda mse: mse + float("nan"), "inf": lambda mse: mse + float("inf"),
          "gradient": lambda mse: mse + (mse - mse.detach()).sqrt()}  # whose derivative at 0 is infinite


def inject(fault):
    """Make update 7 fail, which its eps tells, so that a resume meets it again."""
    real, eps_7 = Diffusion.mse, torch.randn(4, 3, 32, 32, generator=generator(1077, "eps", 6))

    def mse(self, model, x_0, t, eps):
        mse = real(self, model, x_0, t, eps)
        return FAULTS[fault](mse) if torch.equal(eps, eps_7) else mse

    Diffusion.mse = mse


def test_a_step_that_is_not_finite_ends_the_run_and_a_resume_finds_it(server, tmp_path, whole):
    """Step 7 fails, after the checkpoint of step 6, and shows at the log line of step 8."""
    command, run_dir = flags(tmp_path, "log.every=4"), tmp_path / "smoke" / "seed1077"
    fault = "from test_crash import inject\ninject('nan')"
    for more, step in (([], 8), (["--resume"], 8), (["--resume", "--set", "log.every=1"], 7)):
        done = start(server, tmp_path, *command, *more, before=fault).wait()
        assert done.status == 1 and len(done.err.splitlines()) == 1 and f"step {step}" in done.err, done.err
        assert "--resume --set log.every=1" in done.err
        saved = load_checkpoint(run_dir / "checkpoints")
        assert saved["step"] == 6 and all(torch.isfinite(p).all() for p in saved["model"].values())
        assert [r["step"] for r in read_jsonl(run_dir / "loss.jsonl")] == [4]
    assert train.main([*command, "--resume"]) == 0
    assert_same_run(run_dir, whole, "loss.jsonl")  # log.every is another


@pytest.mark.parametrize("fault, override", [("inf", "train.checkpoint_every=7"), ("gradient", "eval.every=7"),
                                             ("gradient", "log.every=7"), ("nan", "grid.every=7")])
def test_nothing_of_a_step_that_is_not_finite_is_written(tmp_path, monkeypatch, capsys, fault, override):
    """It is seen before a checkpoint, a milestone, a log line and a grid, also if the loss itself is finite."""
    monkeypatch.setattr(Diffusion, "mse", Diffusion.mse)  # to be undone
    inject(fault)
    command = flags(tmp_path, "log.every=100", "train.checkpoint_every=100", "curvature.every=0", override)
    for resume in ([], ["--resume"]):
        assert train.main([*command, *resume]) == 1
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "step 7" in err
        names = {path.name for path in (tmp_path / "smoke" / "seed1077").rglob("*") if path.is_file()}
        assert names == {"config.json", "env.json", "lock"}


@pytest.mark.parametrize("override", ["eval.every=1", "train.checkpoint_every=1"])
def test_a_run_that_diverges_ends_in_one_line(tmp_path, capsys, override):
    """Wherever it shows first: in weights that are to be saved, or in a measurement."""
    for resume in ([], ["--resume"]):
        assert train.main([*flags(tmp_path, "train.lr=1e30", override), *resume]) == 1
        err = capsys.readouterr().err
        kept = (tmp_path / "smoke" / "seed1077" / "checkpoints" / "last.pt").exists()
        assert len(err.splitlines()) == 1 and "not finite" in err and f"starts at step {int(kept)} " in err


# ---- two processes in one place ----

def test_a_second_process_is_refused_until_the_first_is_gone(server, tmp_path):
    command, log = flags(tmp_path, "train.total_steps=100000"), tmp_path / "smoke" / "seed1077" / "timing.jsonl"
    first = start(server, tmp_path, *command)
    wait_for(lambda: read_jsonl(log), first)
    try:
        for flag in ("--resume", "--overwrite"):
            second = start(server, tmp_path, *command, flag).wait(20)
            assert second.status == 2 and f"process {first.pid}" in second.err and len(second.err.splitlines()) == 1
    finally:  # else a failure would leave it running
        first.kill()
        first.wait()
    lines = len(read_jsonl(log))
    child = start(server, tmp_path, *command, "--resume")
    wait_for(lambda: len(read_jsonl(log)) > lines, child)
    child.kill()
    child.wait()
