"""Several processes under torchrun, on the CPU: the same run, shared out."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from conftest import ROOT, small_run_flags

import parallel
from checkpoint import load_checkpoint
from errors import UserError
from runs import read_jsonl

EVERYTHING = ["model.dropout=0", "model.attn_resolutions=[16]", "train.total_steps=12", "train.batch_size=4",
              "train.checkpoint_every=4", "log.every=2", "eval.every=6", "grid.every=6", "curvature.every=6",
              "curvature.num_probes=3", "eval.features=inception", "eval.n_samples=30", "eval.final_n_samples=120"]


TINY = """
import data
import torch
from conftest import tiny_network
data.SHAPES_TRAIN = data.SHAPES_TEST = 150
train.feature_network = tiny_network
torch.cpu.get_capabilities = dict  # no bf16, on any machine
"""


def everything(stats):
    return small_run_flags(*EVERYTHING, f"eval.stats_root={json.dumps(str(stats))}")


def start(processes, out, *more, before=""):
    """torchrun train.py, or python where there is one process, with a small feature network and `before` run first."""
    folder = out.parent / "patched"
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    paths = [str(ROOT), str(ROOT / "tests")]
    script.write_text(f"import sys\nsys.path[:0] = {paths}\nimport train\n{TINY}{before}\n"
                      "from errors import run_script\nrun_script(train.main)\n")
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), "--exp", "smoke", "--device", "cpu",
               "--out", str(out), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                            start_new_session=True)


def finish(process, seconds=150):
    """(status, stdout, stderr); everything that it has started is killed if it does not end."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def ours(err):
    """The lines of stderr that are not torchrun's own."""
    return [line for line in err.splitlines() if line.startswith("train.py")]


def logs(run_dir):
    return {name: read_jsonl(run_dir / f"{name}.jsonl") for name in ("loss", "per_t", "curvature", "results")}


def close(a, b):
    """Equal but for rounding."""
    if isinstance(a, float):
        return a == pytest.approx(b, rel=2e-3, abs=1e-5)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "runs"
    status, _, err = finish(start(1, out, *everything(out)))
    assert status == 0, err
    return out / "smoke" / "seed1077"


def test_two_processes_make_the_run_of_one(alone, tmp_path):
    """Same batches, t, eps and update, so logs and weights agree but for rounding; and each line is written once."""
    before = """
real = train.train_step
def checked(config, state, *args):
    batch = real(config, state, *args)
    assert all(p.grad.stride() == p.stride() for p in state.model.parameters()), "fused Adam wants equal strides"
    return batch
train.train_step = checked
"""
    status, out, err = finish(start(2, tmp_path / "runs", *everything(tmp_path), before=before))
    run_dir = tmp_path / "runs" / "smoke" / "seed1077"
    assert status == 0, err
    assert out.count("12 steps done") == out.count("fp32 is used") == 1
    assert json.loads((run_dir / "env.json").read_text())["processes"] == 2
    one, two = logs(alone), logs(run_dir)
    assert {name: len(lines) for name, lines in two.items()} == {"loss": 6, "per_t": 2, "curvature": 2, "results": 3}
    for name, lines in one.items():
        assert close(lines, two[name]), name
    assert [p.name for p in sorted((run_dir / "grids").iterdir())] == [p.name for p in sorted(
        (alone / "grids").iterdir())]
    a, b = (load_checkpoint(path / "checkpoints") for path in (alone, run_dir))
    for key in ("model", "ema"):
        for name, weight in a[key].items():
            torch.testing.assert_close(b[key][name], weight, rtol=0, atol=2e-4)  # 12 steps of up to 3e-3
    influences = [numpy.load(next((path / "influence").glob("*n120.npz")))["val/fid"] for path in (alone, run_dir)]
    assert numpy.corrcoef(*influences)[0, 1] > 0.99  # samples in their order


@pytest.mark.long
def test_a_killed_process_ends_all_and_the_run_goes_on_with_another_number(alone, tmp_path):
    """SIGKILL to process 1 at step 7; resumed by one process, from step 6, it ends like the undisturbed run."""
    before = """
import os, signal
real = train.train_step
def killed(config, state, *args):
    if state.step == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(config, state, *args)
train.train_step = killed
"""
    out = tmp_path / "runs"
    status, _, err = finish(start(2, out, *everything(alone.parents[1]), before=before))
    run_dir = out / "smoke" / "seed1077"
    assert status != 0 and "Signal 9 (SIGKILL)" in err
    assert ours(err) in ([], ["train.py: error: process 0 of 2: another process has ended"])  # if torchrun is slower
    assert load_checkpoint(run_dir / "checkpoints")["step"] == 6
    status, printed, err = finish(start(1, out, "--resume", *everything(alone.parents[1])))
    assert status == 0, err
    assert "resuming from step 6" in printed
    assert all(close(lines, logs(run_dir)[name]) for name, lines in logs(alone).items())


@pytest.mark.long
def test_sigterm_to_torchrun_leaves_a_checkpoint_and_the_command_that_resumes(alone, tmp_path):
    out = tmp_path / "runs"
    slow = "import time\nreal = train.train_step\ntrain.train_step = lambda *a: time.sleep(0.2) or real(*a)"
    process = start(2, out, *everything(alone.parents[1]), before=slow)
    run_dir, deadline = out / "smoke" / "seed1077", time.monotonic() + 100
    while not read_jsonl(run_dir / "loss.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    (line,) = ours(err)
    assert status != 0 and "SIGTERM" in line and "torchrun --nproc-per-node 2 " in line
    assert line.endswith(" --resume")
    assert 2 <= load_checkpoint(run_dir / "checkpoints")["step"] < 12
    status, _, err = finish(start(2, out, "--resume", *everything(alone.parents[1])))
    assert status == 0, err
    assert all(close(lines, logs(run_dir)[name]) for name, lines in logs(alone).items())


@pytest.mark.parametrize("flags, message", [
    (["--set", "train.batch_size=5"], "2 processes"), (["--set", "train.batch=5"], "train.batch"),
    (["--set", "data.name=cifar10", "--data-root", str(ROOT / "tests" / "test_house.py")], "cifar10: "),
])
@pytest.mark.long
def test_what_cannot_work_is_refused_once(tmp_path, flags, message):
    status, _, err = finish(start(2, tmp_path / "runs", *small_run_flags(), *flags))
    (line,) = ours(err)
    assert status != 0
    assert message in line and not (tmp_path / "runs").exists()


def test_a_device_that_is_not_there(monkeypatch):
    for name in ("cuda:77", "gpu", "meta"):
        with pytest.raises(UserError, match=f"--device {name}"):
            parallel.check_device(name)
    monkeypatch.setenv("LOCAL_RANK", "77")
    with pytest.raises(UserError, match="--device cuda:77"):
        parallel.check_device("cuda")


def test_without_a_terminal_progress_is_a_line_a_minute_after_half_a_minute(monkeypatch, capsys):
    clock = itertools.count(0, 5)  # seconds: each look at the clock takes five
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    for _ in parallel.bar(range(60), "samples"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("samples:") and "/60" in line for line in lines)
    shown = [int(re.search(r"(\d+)/60", line)[1]) for line in lines]
    assert 3 <= len(shown) <= 8 and shown[0] >= 6 and shown == sorted(set(shown))
