"""The Snakefile on a tiny study of generated images, in a copy of the checkout with another experiments.toml."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, same

from checkpoint import load_file, lock
from runs import read_jsonl

pytestmark = [pytest.mark.long, pytest.mark.skipif(importlib.util.find_spec("snakemake") is None, reason=(
    "needs snakemake: pip install -r workflow-requirements.txt"))]

STUDY = """
[profiles.study]
data.name = "shapes"
model = {base_channels = 4, channel_mults = [1, 1, 1], num_res_blocks = 1, attn_resolutions = []}
train = {total_steps = 60, checkpoint_every = 7}
log.every = 1
grid = {every = 60, n = 4, nfe = 2}
eval = {every = 30, profile_images = 2, features = "lite0", nfe = 2, n_samples = 10, final_n_samples = 10}
curvature = {every = 30, num_probes = 2}

[study.primary]
runs = ["E1", "E2"]
seeds = [1077]

[comparisons.min_snr]
title = "A tiny pair"
runs = ["E1", "E2"]
factor = ["loss.weighting"]

[figures.frontier]
kind = "frontier"
runs = ["E1", "E2"]
"""


@pytest.fixture
def checkout(tmp_path):
    """The code with 64 images, a study of two short runs, and less to measure."""
    checkout = tmp_path / "check out"
    shutil.copytree(ROOT / "docs", checkout / "docs", ignore=shutil.ignore_patterns("results"))
    shutil.copytree(ROOT / "profiles", checkout / "profiles")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, checkout)
    workflow = (ROOT / "Snakefile").read_text()
    for much, little in ("--frontier 10,20,50,100,250", "--frontier 2"), ("--probes 256", "--probes 3"):
        assert much in workflow
        workflow = workflow.replace(much, little)
    (checkout / "Snakefile").write_text(workflow)
    experiments = (ROOT / "experiments.toml").read_text()
    (checkout / "experiments.toml").write_text(experiments[:experiments.index("[profiles.study]")] + STUDY)
    images = (ROOT / "data.py").read_text()
    (checkout / "data.py").write_text(images + "\nSHAPES_TRAIN = SHAPES_TEST = 64\n")
    return checkout


def start(checkout, folder, *flags):
    """snakemake in a folder and a process group of its own; what it and its jobs print goes to log.txt there."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-m", "snakemake", "--cores", "2", "--snakefile", checkout / "Snakefile",
                             "--config", "runs=the runs", *flags], cwd=folder, start_new_session=True,
                            stdout=(folder / "log.txt").open("w"), stderr=subprocess.STDOUT)


def run(checkout, folder, *flags):
    """(status, output) of a call that ends by itself."""
    process = start(checkout, folder, *flags)
    try:
        return process.wait(300), (folder / "log.txt").read_text()
    finally:
        kill_all(process)


def kill_all(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def contents(folder):
    """All that is a pure function of config and seed: logs, grids and weights of the runs, and the swap's lines."""
    runs = folder / "the runs"
    files = {path: path.read_bytes() for path in [*runs.rglob("*.jsonl"), *runs.glob("E*/*/grids/*")]
             if path.name != "timing.jsonl"}
    files |= {path: load_file(path) for path in runs.rglob("step_*.pt")}
    return {path.relative_to(folder): content for path, content in files.items()}


def test_a_killed_study_is_the_same_study(checkout, tmp_path):
    """A run that fails, a kill of everything while another trains, and the rest: the same to the last bit."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    status, out = run(checkout, whole, "--until", "measure")  # to save time
    assert status == 0, out
    e1, e2 = (killed / "the runs" / exp / "seed1077" for exp in ("E1", "E2"))

    with lock(e2):  # as if another process worked in it
        status, out = run(checkout, killed)
    assert status == 1 and f"train.py: error: the runs/E2/seed1077: in use by process {os.getpid()}" in out, out
    assert (e1 / "done.json").exists() and not (e2 / "config.json").exists()

    process, log = start(checkout, killed), e2 / "loss.jsonl"
    end = time.monotonic() + 120
    try:
        while not (log.exists() and log.read_bytes().count(b"\n") > 40):
            assert process.poll() is None and time.monotonic() < end, (killed / "log.txt").read_text()
            time.sleep(0.01)
    finally:
        kill_all(process)
    assert not (e2 / "done.json").exists() and (e2 / "checkpoints" / "last.pt").exists()

    status, out = run(checkout, killed, "--unlock")
    assert status == 0, out
    status, out = run(checkout, killed)
    assert status == 0 and "resuming from step" in out, out
    a, b = contents(killed), contents(whole)
    assert len(b) == 22 and [name for name in b if not same(a[name], b[name])] == []
    assert [r["step"] for r in read_jsonl(e1 / "traces.jsonl")] == [30, 60]
    assert {path.name: [(r["step"], r["n"]) for r in read_jsonl(killed / path)] for path in a.keys() - b.keys()} == {
        "E1_1077_E2_1077_step30.jsonl": [(30, 5)] * 4, "E1_1077_E2_1077_step60.jsonl": [(60, 10)] * 4,
        "E1_1077_step60.jsonl": [(60, 5)]}  # the swap, and a control

    assert (killed / "the runs" / "reports" / "min_snr" / "min_snr.md").read_text().count("3 probes") > 1
    assert (killed / "the runs" / "figures" / "frontier.png").exists()
    for path in (killed / "the runs" / "stats").glob("*.npz"):
        path.unlink()  # as in a clone, which has logs only
    status, out = run(checkout, killed)
    assert status == 0 and "Nothing to be done" in out, out
