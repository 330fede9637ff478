"""Command lines that must be refused, and places that must work: the scripts as real processes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_run_flags
from PIL import Image

from runs import read_jsonl

FEW_IMAGES = "import data; data.SHAPES_TRAIN = data.SHAPES_TEST = 20"  # to save time


@pytest.fixture(scope="module")
def place(server, tmp_path_factory):
    """A folder with one of everything that a command line may name."""
    place = tmp_path_factory.mktemp("place")
    command = ["train.py", "--exp", "smoke", *small_run_flags("train.total_steps=2")]
    done = server.run(*command, cwd=place, before=FEW_IMAGES)
    assert done.status == 0, done.err
    (place / "empty").mkdir()
    (place / "text").write_text("hello")
    (place / "images").mkdir()
    (place / "broken").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(place / "images" / f"{i}.png")
    (place / "broken" / "0.png").write_bytes((place / "images" / "0.png").read_bytes()[:40])
    np.save(place / "array.npy", np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(place / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez(place / "other.npz", mu=np.zeros(3), sigma=np.eye(3), n=10)
    np.savez(place / "pickled.npz", np.array([{}], dtype=object))
    shutil.copytree(place / "runs" / "smoke" / "seed1077", place / "damaged")
    for file in (place / "damaged" / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    (place / "no_config" / "smoke" / "seed1077").mkdir(parents=True)
    (place / "no_config" / "smoke" / "seed1077" / "config.json").write_text('{"exp": "smoke"}')
    shutil.copytree(place / "runs", place / "bad_log")
    (place / "bad_log" / "smoke" / "seed1077" / "loss.jsonl").write_text('{"step": 1}\n{}\n')
    return place


RUN = "runs/smoke/seed1077"
REFUSED = [  # one of each kind of fault, with the facts that its line must carry
    ("train.py", "", ["--exp", "--list"]), ("train.py", "--exp smoke --overw", ["--overw"]),
    ("train.py", "--exp smok", ["'smok'", "smoke"]), ("train.py", "--exp smoke --profile studi", ["'studi'", "study"]),
    ("train.py", "--exp smoke --set train.total_step=3", ["train.total_step", "train.total_steps"]),
    ("train.py", "--exp smoke --set train.lr=1e999", ["train.lr", "inf"]),
    ("train.py", "--exp smoke --device cuda:99", ["cuda:99"]),
    ("train.py", "--exp smoke --resume --overwrite", ["--resume", "--overwrite"]),
    ("train.py", "--exp smoke", ["finished", "--overwrite", "--out"]),
    ("train.py", "--exp smoke --out text", ["text", "another --out"]),
    ("train.py", "--exp smoke --out new --set data.name=cifar10 --data-root empty",
     ["download", "https://", "no network in this test", "--data-root", "smoke"]),
    ("train.py", "--exp smoke --out new --set eval.features=lite0 --set eval.stats_root=text", ["eval.stats_root"]),
    ("train.py", "--exp smoke --out new --set eval.features=inception --set eval.inception_weights=none.pth",
     ["none.pth", "eval.features=lite0"]),
    ("train.py", "--exp smoke --out new --set eval.features=inception --set eval.inception_weights=text",
     ["text", "5 bytes"]),
    ("train.py", "--exp smoke --out no_config", ["config.json", "title"]),
    ("sample.py", "missing", ["missing: not a run directory"]), ("sample.py", "damaged", ["last.pt", "previous.pt"]),
    ("sample.py", f"{RUN} --eta nan", ["--eta nan"]),
    ("sample.py", f"{RUN} --nfe 0", ["--nfe 0", "1000"]), ("sample.py", f"{RUN} --nfe 1001", ["--nfe 1001"]),
    ("sample.py", f"{RUN} --n 0", ["--n 0"]), ("sample.py", f"{RUN} --seed -1", ["--seed -1"]),
    ("sample.py", f"{RUN} --sampler ddpm --eta 0.5", ["--eta 0.5", "DDIM"]),
    ("sample.py", f"{RUN} --out text --n 1 --nfe 1", ["text"]), ("sample.py", f"{RUN} --step 1", ["step 1", "000002"]),
    ("plots.py", "", ["--all", "--kind"]), ("plots.py", "weight", ["weight", "weights"]),
    ("plots.py", "grids --runs typo", ["typo"]),
    ("plots.py", "--kind grad_norm --exps smoke --runs bad_log", ["loss.jsonl", "line 2"]),
    ("report.py", "min_snr_11k", ["min_snr_11k", "min_snr_10k"]), ("report.py", "E5 E6", ["E5"]),
    ("report.py", "smoke smoke", ["loss.weighting"]), ("evaluate.py", "", ["RUN_DIR", "--stats"]),
    ("evaluate.py", f"{RUN} --n 5", ["--n"]),
    ("evaluate.py", f"{RUN} --distance", ["eval.features", "--features"]),
    ("evaluate.py", f"{RUN} --frontier 10,2000 --features lite0", ["2000", "1000"]),
    ("fid.py", "images missing --features lite0", ["missing"]), ("fid.py", "images empty --features lite0", ["empty"]),
    ("fid.py", "images broken --features lite0", ["0.png"]),
    ("fid.py", "images pickled.npz --features lite0", ["pickled.npz"]),
    ("fid.py", "images floats.npz --features lite0", ["floats.npz", "float64"]),
    ("fid.py", "images other.npz --features lite0", ["other.npz", "3"]),
    ("fid.py", "images images --features lite0 --weights text", ["--weights"]),
    ("fid.py", "images array.npy --features lite0", ["array.npy"]),
    ("fid.py", "images images --features vgg", ["lite0"]),
    ("fid.py", "images images --features lite0 --device cuda:77", ["--device cuda:77"]),
    ("fid.py", "images empty --save-stats --features lite0", ["empty"]),
    ("fid.py", "images nowhere/stats.npz --save-stats --features lite0", ["nowhere/stats.npz"]),
]
OFFLINE = """
import urllib.request
def refuse(*args, **kwargs):
    raise OSError("no network in this test")
urllib.request.urlopen = refuse
"""


def snapshot(folder):
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*") if p.name != "lock"}


@pytest.mark.parametrize("script, args, facts", REFUSED, ids=[f"{script} {args}" for script, args, _ in REFUSED])
def test_refused_with_one_line_and_nothing_written(server, place, script, args, facts):
    before = snapshot(place)
    done = server.run(script, *args.split(), cwd=place, before=OFFLINE)
    assert done.status == 2, done.err
    *warnings, error = done.err.splitlines()
    assert all(": warning: " in line for line in warnings), done.err
    assert error.startswith(f"{script}: error: ") and all(fact in error for fact in facts), error
    assert snapshot(place) == before


def test_paths_with_spaces_and_other_alphabets(server, tmp_path):
    odd = tmp_path / "mit Leerzeichen, läuft 東京 😀 'q\""
    odd.mkdir()
    flags = ["--exp", "smoke", *small_run_flags("train.total_steps=2", "eval.n_samples=4", "eval.final_n_samples=4",
                                                "eval.features=lite0"),
             "--set", f"eval.stats_root={odd}", "--data-root", odd / "data", "--out", odd / "out"]
    done = server.run("train.py", *flags, cwd=odd, before=FEW_IMAGES)
    assert done.status == 0, done.err
    run_dir = odd / "out" / "smoke" / "seed1077"
    assert json.loads((run_dir / "config.json").read_text())["data"]["root"] == str(odd / "data")
    assert str(run_dir) in done.out and "val/fd_lite0" in read_jsonl(run_dir / "results.jsonl")[-1]
    done = server.run("sample.py", run_dir, "--n", "1", "--nfe", "1", "--npz", cwd=odd)
    assert done.status == 0 and Path(done.out.splitlines()[1]).exists()
    assert server.run("evaluate.py", run_dir, cwd=odd, before=FEW_IMAGES).status == 0
    assert server.run("train.py", *flags, "--resume", cwd=odd, before=FEW_IMAGES).status == 0


def test_a_line_break_in_an_argument_is_still_one_line(server, tmp_path):
    for args in (["a\nb"], ["smoke", "--set", "train.lr=1\nx=2"], ["smoke", "--set", "\n=\r"]):
        done = server.run("train.py", "--exp", *args, cwd=tmp_path)
        assert done.status == 2 and len(done.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def read_only_copy(folder):
    """The checkout as an administrator may install it: nobody may write there."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for file in [*ROOT.glob("*.py"), ROOT / "experiments.toml"]:
        shutil.copy(file, checkout)
        os.chmod(checkout / file.name, 0o444)
    os.chmod(checkout, 0o555)
    return checkout


def test_a_read_only_checkout(server, tmp_path):
    checkout = read_only_copy(tmp_path)
    flags = ["--exp", "smoke", *small_run_flags("train.total_steps=2")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    try:
        done = server.run("train.py", *flags, cwd=elsewhere, unprivileged=True, root=checkout)
        assert done.status == 0 and (elsewhere / "runs" / "smoke" / "seed1077" / "checkpoints").is_dir(), done.err
        done = server.run("train.py", *flags, cwd=checkout, unprivileged=True, root=checkout)
        assert done.status == 2 and "Permission denied" in done.err and "runs" in done.err
        assert len(done.err.splitlines()) == 1 and not (checkout / "runs").exists()
        done = server.run("sample.py", elsewhere / "runs" / "smoke" / "seed1077", "--n", "1", "--nfe", "1",
                          cwd=checkout, unprivileged=True, root=checkout)
        assert done.status == 0, done.err
    finally:
        os.chmod(checkout, 0o755)


@pytest.mark.parametrize("script, args", [
    ("train.py", ["--exp", "smoke", "--resume", *small_run_flags("train.total_steps=2", "log.every=7")]),
    ("sample.py", [RUN]),
    ("sample.py", [RUN, "--n", "1", "--nfe", "1", "--out", "sealed/out"]),
    ("fid.py", ["images", "sealed/stats.npz", "--save-stats", "--features", "lite0"]),
])
def test_a_folder_that_may_not_be_written(server, tmp_path, place, script, args):
    shutil.copytree(place, tmp_path / "place")
    here = tmp_path / "place"
    (here / "sealed").mkdir()
    before = snapshot(here)
    sealed = [here / RUN, here / RUN / "checkpoints", here / "sealed", here / RUN / "lock"]
    for path in sealed:
        os.chmod(path, 0o555)
    try:
        done = server.run(script, *args, cwd=here, unprivileged=True)
    finally:
        for path in sealed:
            os.chmod(path, 0o755)
    assert done.status == 2 and len(done.err.splitlines()) == 1, done.err
    assert "Permission denied" in done.err or "cannot be written" in done.err
    assert snapshot(here) == before


def test_data_that_cannot_be_read_is_refused_by_file_name(server, tmp_path, cifar10_root):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for file in (cifar10_root / "cifar-10-batches-py").iterdir():
        (folder / file.name).symlink_to(file.resolve())
    batch = folder / "data_batch_3"
    content = batch.read_bytes()
    batch.unlink()
    batch.write_bytes(content)
    batch.chmod(0)
    done = server.run("train.py", "--exp", "E1", *small_run_flags("train.total_steps=2"), "--data-root", folder.parent,
                      "--out", tmp_path / "runs", cwd=tmp_path, unprivileged=True)
    assert done.status == 2 and len(done.err.splitlines()) == 1, done.err
    assert "data_batch_3" in done.err and not (tmp_path / "runs").exists()
