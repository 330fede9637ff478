"""What must survive: kills, signals, full disks, NaN, two processes in one place. On real processes where needed."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, same, small_run_flags, tiny_network

import evaluate
import train
from checkpoint import CheckpointError, load_checkpoint, lock, read_jsonl, save_checkpoint
from config import load_config
from diffusion import Diffusion
from evaluate import RunError

LOGS = ("loss.jsonl", "results.jsonl", "per_t.jsonl", "curvature.jsonl")
EVERYTHING = ["curvature.every=25", "curvature.num_probes=2", "log.every=2", "train.checkpoint_every=3",
              "eval.every=20", "grid.every=50"]


def flags(out, *overrides):
    return ["--exp", "smoke", "--device", "cpu", "--out", out, *small_run_flags(*overrides)]


def contents(run_dir):
    """All that a run writes as a pure function of config and seed: weights, EMA, optimiser, logs, grids."""
    files = [*(run_dir / name for name in LOGS), *(run_dir / "grids").iterdir()]
    files = {str(file.relative_to(run_dir)): file.read_bytes() for file in files if file.exists()}
    return files | load_checkpoint(run_dir / "checkpoints")


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


@pytest.mark.campaign
def test_kill_anywhere(server, tmp_path, request):
    """Killed at random moments and inside checkpoint writes, again and again: the same run, to the last byte."""
    kills = 1000 if request.config.getoption("--campaign") else 24
    overrides = [*EVERYTHING, f"train.total_steps={15 * kills}"]  # more than they let pass
    whole = server.start("train.py", *flags(tmp_path / "whole", *overrides), cwd=tmp_path).wait(10 * kills)
    assert whole.status == 0, whole.err
    run_dir, killed, fates, rng = tmp_path / "killed" / "smoke" / "seed1077", 0, [], random.Random(0)
    stages = list(DIES_AT)
    while killed < kills:
        resume = ["--resume"] if (run_dir / "config.json").exists() else []
        stage = stages[killed // 3 % len(stages)] if killed % 3 == 2 else None
        child = server.start("train.py", *flags(tmp_path / "killed", *overrides), *resume, cwd=tmp_path,
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


def test_a_signal_does_not_wait_for_a_measurement(run_train, monkeypatch, tmp_path, capsys):
    """It may take an hour. What it had measured before stays, the rest is measured on resume, and nothing twice."""
    monkeypatch.setattr("train.feature_network", tiny_network)
    extra = ("curvature.every=3", "curvature.num_probes=2", "eval.features=inception", "eval.n_samples=20",
             "eval.final_n_samples=20", f"eval.stats_root='{tmp_path}/stats'")
    whole = run_train("E4", *extra, out="whole")
    before = signal.getsignal(signal.SIGTERM)
    real, calls = train.sample_images, []

    def sample_images(*args, **kwargs):
        calls.append(args)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            raise AssertionError("it waited")
        return real(*args, **kwargs)

    monkeypatch.setattr("train.sample_images", sample_images)
    calls_of_whole = 5  # a milestone and a grid at 6; at 12 both samplers' finals and a grid
    for stop_at in range(1, calls_of_whole + 1):
        calls.clear()
        with pytest.raises(AssertionError, match="143"):
            run_train("E4", *extra, out=f"stopped{stop_at}")
        assert "stopped by SIGTERM" in capsys.readouterr().err
        resumed = run_train("E4", *extra, out=f"stopped{stop_at}", flags=["--resume"])
        assert len(calls) == calls_of_whole + 1
        run_train("E4", *extra, out=f"stopped{stop_at}", flags=["--resume"])
        assert len(calls) == calls_of_whole + 1  # there is nothing left to do
        assert same(contents(resumed), contents(whole))
    assert signal.getsignal(signal.SIGTERM) == before


# ---- what a resume finds ----

def test_a_damaged_checkpoint_costs_some_steps_and_says_how_many(run_train, capsys):
    whole = run_train("E2", "train.total_steps=20", out="whole")
    parts = run_train("E2", "train.total_steps=11", out="parts")
    last = parts / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:-1])
    capsys.readouterr()
    run_train("E2", "train.total_steps=20", out="parts", flags=["--resume"])
    out, err = capsys.readouterr()
    assert "last.pt: damaged" in err and "going back to previous.pt, step 10" in err
    assert "going on from step 10; steps 11 to 11 are repeated" in out
    assert same({k: v for k, v in contents(parts).items() if k in contents(whole)}, contents(whole))


def test_a_damaged_last_checkpoint_does_not_replace_the_good_one_before(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step})
    (tmp_path / "last.pt").write_bytes(b"")
    save_checkpoint(tmp_path, {"step": 3})
    (tmp_path / "last.pt").write_bytes(b"")
    assert load_checkpoint(tmp_path)["step"] == 1


def test_two_damaged_checkpoints_end_the_resume_and_delete_nothing(run_train):
    run_dir = run_train("E2")
    for name in ("last.pt", "previous.pt"):
        (run_dir / "checkpoints" / name).write_bytes(b"")
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"last\.pt: damaged .*previous\.pt: damaged"):
        run_train("E2", flags=["--resume"])
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


@pytest.mark.parametrize("exp, overrides, seed, message", [
    ("E1", [], 1077, 'exp = "E1", this command "E2"'), ("E2", [], 5, "seed = 5, this command 1077"),
    ("E2", ["model.num_res_blocks=2"], 1077, "model.num_res_blocks = 2, this command 1"),
    ("E2", ["loss.weighting=minsnr_norm"], 1077, 'loss.weighting = "minsnr_norm", this command "minsnr"'),
])
def test_a_checkpoint_of_another_run_is_refused_by_name(run_train, exp, overrides, seed, message):
    own, other = run_train("E2"), run_train(exp, *overrides, seed=seed, out="other")
    (own / "checkpoints" / "last.pt").write_bytes((other / "checkpoints" / "last.pt").read_bytes())
    with pytest.raises(RunError, match=message):
        run_train("E2", flags=["--resume"])


@pytest.mark.parametrize("log", LOGS[:3])
def test_a_log_line_cut_at_any_byte_is_made_again(run_train, log):
    """The last checkpoint is of step 10 (of 12): the lines of 12 are to be made again, whole or not."""
    whole = run_train("E2", "log.every=4", "eval.every=12")
    expected, last = contents(whole), whole / "checkpoints" / "last.pt"
    complete = {name: (whole / name).read_bytes() for name in LOGS[:3]}
    checkpoint = (whole / "checkpoints" / "previous.pt").read_bytes()
    line = complete[log].splitlines(keepends=True)[-1]
    for cut in (1, 2, len(line) // 2, len(line) - 1, len(line)):
        for name, content in complete.items():
            (whole / name).write_bytes(content)
        (whole / log).write_bytes(complete[log][:-cut])
        last.write_bytes(checkpoint)
        run_train("E2", "log.every=4", "eval.every=12", flags=["--resume"])
        assert same(contents(whole), expected)


def test_a_line_that_a_checkpoint_counts_on_is_missed(run_train, capsys):
    """Flushing each line should prevent it; a disk may lie, and a user may edit."""
    run_dir = run_train("E2", "train.total_steps=9")
    content = (run_dir / "loss.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "loss.jsonl").write_bytes(content[0] + content[2])
    run_train("E2", "train.total_steps=9", flags=["--resume"])
    assert "loss.jsonl: lacks the lines of steps [6]" in capsys.readouterr().err


def test_a_log_line_that_is_no_json_is_an_error_with_its_number(run_train):
    run_dir = run_train("E2")
    content = (run_dir / "loss.jsonl").read_bytes().splitlines(keepends=True)
    for bad in (b"\0\0\0\n", b"\xff\n", b"[1]\n", b"\n"):
        (run_dir / "loss.jsonl").write_bytes(content[0] + bad + content[1])
        with pytest.raises(CheckpointError, match=r"loss\.jsonl: line 2 is not a JSON object"):
            run_train("E2", flags=["--resume"])


def test_a_resume_without_checkpoints_loses_no_logs(run_train):
    """Who deleted checkpoints/ to free space keeps the logs; only a run killed before its first one starts again."""
    run_dir = run_train("E2")
    for file in (run_dir / "checkpoints").iterdir():
        file.unlink()
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="its logs reach step 12, but its checkpoints are gone"):
        run_train("E2", flags=["--resume"])
    with pytest.raises(RunError, match=r"train.lr = 0.0001, this command 0.5"):
        run_train("E2", "train.lr=0.5", flags=["--resume"])
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}


def test_a_fall_back_keeps_the_frontier(run_train, monkeypatch, tmp_path):
    """Training would not measure it again, and the steps are repeated bit for bit."""
    monkeypatch.setattr("train.feature_network", tiny_network)
    monkeypatch.setattr("evaluate.feature_network", tiny_network)
    extra = ("eval.features=inception", "eval.n_samples=20", "eval.final_n_samples=20",
             f"eval.stats_root='{tmp_path}/stats'")
    run_dir = run_train("E2", *extra)
    evaluate.main([str(run_dir), "--frontier", "2", "--n", "20", "--device", "cpu"])
    before = sorted((run_dir / "results.jsonl").read_text().splitlines())
    (run_dir / "checkpoints" / "last.pt").write_bytes(b"")
    run_train("E2", *extra, flags=["--resume"])
    assert sorted((run_dir / "results.jsonl").read_text().splitlines()) == before


@pytest.mark.parametrize("damage", [lambda s: s.pop("skipped"), lambda s: s.pop("config"),
                                    lambda s: s["model"].pop("conv_in.weight"), lambda s: s.update(config=3)])
def test_a_checkpoint_of_another_version_is_one_line(run_train, damage):
    run_dir = run_train("E2")
    saved = load_checkpoint(run_dir / "checkpoints")
    damage(saved)
    save_checkpoint(run_dir / "checkpoints", saved)
    with pytest.raises(RunError, match="its checkpoint (is of another version of this code|holds no config)"):
        run_train("E2", "train.total_steps=15", flags=["--resume"])


def test_damage_on_real_processes(server, tmp_path):
    """The fallback, the error that names both files, and a log with a bad line, as a user meets them."""
    command = flags(tmp_path, "train.total_steps=6", "train.checkpoint_every=4")
    run_dir = tmp_path / "smoke" / "seed1077"
    assert server.run("train.py", *command, cwd=tmp_path).status == 0
    last, previous = (run_dir / "checkpoints" / name for name in ("last.pt", "previous.pt"))
    whole = contents(run_dir)
    last.write_bytes(last.read_bytes()[:1000])
    done = server.run("train.py", *command, "--resume", cwd=tmp_path)
    assert done.status == 0 and "last.pt: damaged" in done.err and "going back to previous.pt, step 4" in done.err
    assert same(contents(run_dir), whole)
    for path in (last, previous):
        path.write_bytes(b"")
    for script, args in (("train.py", [*command, "--resume"]), ("sample.py", [run_dir])):
        done = server.run(script, *args, cwd=tmp_path)
        assert done.status == 2 and len(done.err.splitlines()) == 1
        assert "last.pt: damaged" in done.err and "previous.pt: damaged" in done.err


# ---- a full disk ----

@pytest.mark.parametrize("culprit", ["next.pt", "loss.jsonl"])
def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(server, tmp_path, culprit):
    run_dir = tmp_path / "runs" / "smoke" / "seed1077"
    overrides = {"next.pt": EVERYTHING, "loss.jsonl": ["train.checkpoint_every=1000", "eval.every=1000", "log.every=1"]}
    short = flags(tmp_path / "runs", *overrides[culprit], "train.total_steps=6")
    assert server.run("train.py", *short, cwd=tmp_path).status == 0
    good = {path.name: path.read_bytes() for path in (run_dir / "checkpoints").iterdir()}
    limit = {"next.pt": len(good["last.pt"]) // 2, "loss.jsonl": 10_000}[culprit]
    command = flags(tmp_path / "runs", *overrides[culprit], "train.total_steps=40")
    done = server.run("train.py", *command, "--resume", cwd=tmp_path, file_limit=limit)
    assert done.status == 2 and len(done.err.splitlines()) == 1 and "Traceback" not in done.err, done.err
    assert "File too large" in done.err and culprit in done.err and "--resume" in done.err
    assert good == {path.name: path.read_bytes() for path in (run_dir / "checkpoints").iterdir()}
    assert server.run("train.py", *command, "--resume", cwd=tmp_path).status == 0
    command = flags(tmp_path / "whole", *overrides[culprit], "train.total_steps=40")
    assert server.run("train.py", *command, cwd=tmp_path).status == 0
    whole, survived = contents(tmp_path / "whole" / "smoke" / "seed1077"), contents(run_dir)
    assert same(whole, {name: survived[name] for name in whole})  # it also drew the grid of its first end


# ---- NaN and infinity ----

@pytest.mark.parametrize("where, value", [("loss", "nan"), ("loss", "inf"), ("gradient", "nan"), ("gradient", "inf")])
def test_a_value_that_is_not_finite_stops_the_run_before_anything_moves(run_train, monkeypatch, capsys, where, value):
    """Injected at step 8; the last checkpoint is of step 7."""
    whole = run_train("E2", "train.checkpoint_every=7", "train.total_steps=7", out="whole")
    real, steps = Diffusion.eps_mse, []
    states, new_state = [], train.new_state

    def eps_mse(self, model, x_0, t, eps):
        per_example = real(self, model, x_0, t, eps)
        if model.training:
            steps.append(t.tolist())
            if len(steps) == 8 and where == "loss":
                per_example = per_example * torch.tensor([1, 1, float(value), 1])
            if len(steps) == 8 and where == "gradient":
                model.conv_in.weight.register_hook(lambda grad: grad * float(value))
            if len(steps) == 8:
                moved.extend(p.detach().clone() for p in state().model.parameters())
        return per_example

    def state():
        return states[-1][0]

    moved = []
    monkeypatch.setattr("train.new_state", lambda *args: states.append(new_state(*args)) or states[-1])
    monkeypatch.setattr(Diffusion, "eps_mse", eps_mse)
    with pytest.raises(AssertionError):  # run_train wants status 0
        run_train("E2", "train.checkpoint_every=7", out="failed")
    run_dir = whole.parents[2] / "failed" / "E2" / "seed1077"
    after = list(state().model.parameters())
    assert len(moved) == len(after) and all(map(torch.equal, moved, after))
    assert all(int(s["step"]) == 7 for s in state().optimizer.state.values())
    assert load_checkpoint(run_dir / "checkpoints")["step"] == 7

    dump = json.loads((run_dir / "failure.json").read_text())
    assert dump["step"] == 8 and dump["seed"] == 1077 and dump["t"] == steps[7]
    assert dump["batch_indices"] == train.batch_indices(1077, 7, 4, 2048).tolist()
    assert len(dump["loss_per_example"]) == len(dump["eps_mse_per_example"]) == 4
    bad = [isinstance(x, str) for x in dump["loss_per_example"]]
    assert bad == ([False, False, True, False] if where == "loss" else [False] * 4)
    norms = dump["grad_norm_per_module"]
    assert len(norms) > 10 and isinstance(norms["conv_in"], str)
    assert where == "loss" or [name for name, norm in norms.items() if isinstance(norm, str)] == ["conv_in"]
    error = capsys.readouterr().err
    assert "train.py: step 8: loss" in error and "failure.json" in error and "A resume repeats it" in error


def test_nan_on_a_real_process(server, tmp_path):
    """Injected at step 6: one line, status 1, a dump; and without the fault a resume makes the whole run."""
    command = flags(tmp_path / "failed", *EVERYTHING, "train.total_steps=12")
    fault = """
import diffusion, torch
real, steps = diffusion.Diffusion.eps_mse, []
def eps_mse(self, model, x_0, t, eps):
    steps.append(model.training)
    return real(self, model, x_0, t, eps) * (float("nan") if steps.count(True) == 6 else 1)
diffusion.Diffusion.eps_mse = eps_mse
"""
    done = server.run("train.py", *command, cwd=tmp_path, before=fault)
    run_dir = tmp_path / "failed" / "smoke" / "seed1077"
    assert done.status == 1 and len(done.err.splitlines()) == 1 and "step 6: loss nan" in done.err
    assert json.loads((run_dir / "failure.json").read_text())["loss_per_example"] == ["nan"] * 8
    assert load_checkpoint(run_dir / "checkpoints")["step"] == 3
    assert server.run("train.py", *command, "--resume", cwd=tmp_path).status == 0
    assert not (run_dir / "failure.json").exists()
    command = flags(tmp_path / "whole", *EVERYTHING, "train.total_steps=12")
    assert server.run("train.py", *command, cwd=tmp_path).status == 0
    assert same(contents(run_dir), contents(tmp_path / "whole" / "smoke" / "seed1077"))


@pytest.mark.parametrize("overrides", [
    ["train.lr=0.5", "curvature.every=1"], ["train.lr=1e30", "eval.every=1"],
    ["train.lr=1e30", "train.checkpoint_every=1"],
])
def test_a_run_that_diverges_ends_in_one_line(server, tmp_path, overrides):
    """Wherever it shows first: in a loss, in weights that are to be saved, or in a measurement."""
    command = flags(tmp_path, "train.total_steps=60", "curvature.num_probes=2", *overrides)
    for resume in ([], ["--resume"]):
        done = server.run("train.py", *command, *resume, cwd=tmp_path)
        assert done.status == 1 and len(done.err.splitlines()) == 1 and "Traceback" not in done.err, done.err
        assert (tmp_path / "smoke" / "seed1077" / "failure.json").exists()


def test_an_overflow_of_fp16_is_counted_and_leaves_model_and_optimiser_alone():
    config = load_config("E2", overrides=TINY)
    state, diffusion = train.new_state(config, torch.device("cpu"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    args = config, state, diffusion, torch.ones(1000), train.load_images("shapes", "")
    train.train_step(*args)
    before = [p.detach().clone() for p in state.model.parameters()]
    hook = state.model.conv_in.weight.register_hook(lambda grad: grad * float("inf"))
    for scale in (2.0, 1.0):
        train.raise_if_failed(*args, train.train_step(*args))
        assert state.scaler.get_scale() == scale
    assert all(map(torch.equal, before, state.model.parameters())) and state.skipped == 2 and state.step == 3
    assert all(int(s["step"]) == 1 for s in state.optimizer.state.values())
    record = train.log_record(*args[:4], {**train_batch(), "grad_norm": torch.tensor(float("inf"))})
    assert record["train/grad_global_L2"] is None and record["train/skipped_steps"] == 2
    hook.remove()
    train.train_step(*args)
    assert not all(map(torch.equal, before, state.model.parameters())) and state.skipped == 2
    twin, _ = train.new_state(config, torch.device("cpu"))
    twin.load_state_dict(state.state_dict(config))
    assert twin.skipped == 2


def test_a_failure_is_held_until_the_host_looks():
    """As on a GPU, where it looks at log steps: nothing moves from the failed step on, and that step is told."""
    config = load_config("E2", overrides=TINY)
    state, diffusion = train.new_state(config, torch.device("cpu"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # at scale 1 it is no overflow of the scaled gradient
    args = config, state, diffusion, torch.ones(1000), train.load_images("shapes", "")
    train.train_step(*args)
    before = [p.detach().clone() for p in state.model.parameters()]
    hook = state.model.conv_in.weight.register_hook(lambda grad: grad * float("inf"))
    t = train.train_step(*args)["t"]
    hook.remove()
    for _ in range(2):
        batch = train.train_step(*args)
    assert all(map(torch.equal, before, state.model.parameters())) and state.skipped == 0
    assert all(int(s["step"]) == 1 for s in state.optimizer.state.values())
    with pytest.raises(train.NonFiniteError, match="step 2: ") as error:
        train.raise_if_failed(*args, batch)
    assert error.value.dump["t"] == t.tolist() and error.value.dump["step"] == 2


def train_batch():
    return {"loss": torch.tensor(1.0), "eps_mse": torch.tensor(1.0), "t": torch.tensor([3, 5])}


# ---- two processes, finished and unfinished runs ----

def test_a_second_process_is_refused_until_the_first_is_gone(server, tmp_path):
    overrides = [*EVERYTHING, "train.total_steps=100000"]
    run_dir = tmp_path / "smoke" / "seed1077"
    first = server.start("train.py", *flags(tmp_path, *overrides), cwd=tmp_path)
    wait_for(lambda: read_jsonl(run_dir / "timing.jsonl"), first)
    for flag in ("--resume", "--overwrite"):
        second = server.start("train.py", *flags(tmp_path, *overrides), flag, cwd=tmp_path).wait(20)
        assert second.status == 2 and f"in use by process {first.pid}" in second.err
        assert len(second.err.splitlines()) == 1
    first.kill()
    first.wait()
    assert (run_dir / "lock").exists()  # but nobody holds it
    child = server.start("train.py", *flags(tmp_path, *overrides), "--resume", cwd=tmp_path)
    lines = len(read_jsonl(run_dir / "timing.jsonl"))
    wait_for(lambda: len(read_jsonl(run_dir / "timing.jsonl")) > lines, child)
    child.kill()
    child.wait()


def test_the_lock_is_one_per_folder(tmp_path):
    with (lock(tmp_path / "a"), lock(tmp_path / "b"), pytest.raises(CheckpointError, match="in use by process"),
          lock(tmp_path / "a")):
        pass
    with lock(tmp_path / "a"):
        pass


def test_an_unfinished_run_asks_for_resume_and_a_finished_one_for_overwrite(run_train, monkeypatch, capsys):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="130"):
        patch.setattr("train.draw_grid", interrupted)
        run_train("E2")
    with pytest.raises(RunError, match="an unfinished run; --resume goes on with it"):
        run_train("E2")
    run_dir = run_train("E2", flags=["--resume"])
    with pytest.raises(RunError, match="a finished run of 12 steps; --overwrite deletes it"):
        run_train("E2")
    (run_dir / "failure.json").write_text("{}")
    run_train("E2", flags=["--overwrite"])
    assert not (run_dir / "failure.json").exists()


@pytest.mark.parametrize("left", [["lock"], ["lock", "config.json.tmp"]])
def test_a_run_killed_before_it_began_may_begin(run_train, tmp_path, left):
    run_dir = tmp_path / "runs" / "E2" / "seed1077"
    run_dir.mkdir(parents=True)
    for name in left:
        (run_dir / name).write_text("")
    assert same(contents(run_train("E2")), contents(run_train("E2", out="other")))
