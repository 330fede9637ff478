"""Files that a stranger made: each is refused in one line that names it, or accepted and right. Nothing is written.

The inputs are drawn from a fixed seed, so a failure repeats.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALLEST, set_flags, tiny_network

import evaluate
import sample
import train
from checkpoint import load_file, save_checkpoint
from config import EXPERIMENTS, ConfigError, load_config, load_tables
from data import to_uint8
from diffusion import Diffusion, linear_betas
from errors import UserError, run_script
from fid import FeatureStats
from runs import load_run
from weighting import loss_weights

RUN = *SMALLEST, "train.total_steps=2", "log.every=1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    train.main(["--exp", "smoke", "--device", "cpu", "--out", str(root), *set_flags(*RUN)])
    return root / "smoke" / "seed1077"


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "runs" / "smoke" / "seed1077")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def edit(run_dir, change):
    """Replace both checkpoints by changed ones with a right digest, as somebody could who wants to."""
    for path in (run_dir / "checkpoints").glob("*.pt"):
        state = load_file(path)
        save_checkpoint(run_dir / "new.pt", change(state) or state)
        (run_dir / "new.pt").replace(path)


def resume(run_dir):
    return train.main(["--exp", "smoke", "--device", "cpu", "--out", str(run_dir.parents[1]), "--resume",
                       *set_flags(*RUN)])


def weight(state, network, value):
    state[network]["conv_in.weight"][0, 0, 0, 0] = value


CHECKPOINTS = {
    **{f"step {step}": lambda s, step=step: s.update(step=step)
       for step in (-5, -1, 3, 10**18, 2**70, "2", 600.5, True, None, [2], torch.tensor(2))},
    **{f"{network} {value}": lambda s, n=network, v=value: weight(s, n, v)
       for network in ("model", "ema") for value in (float("nan"), float("inf"), float("-inf"))},
    **{f"{network} {value!r}": lambda s, n=network, v=value: s.update({n: v})
       for network in ("model", "ema") for value in ([], {}, 3, None, "weights", {"conv_in.weight": 5})},
    **{f"without {key}": lambda s, key=key: s.pop(key) and None for key in ("model", "ema", "config", "step")},
    "without a weight": lambda s: s.update(model={k: s["model"][k] for k in s["model"] if k != "conv_in.weight"}),
    "another shape": lambda s: s["ema"].update({"conv_in.weight": torch.zeros(2, 3, 3, 3)}),
    "config a list": lambda s: s.update(config=[1]),
    "config without loss": lambda s: s["config"].pop("loss") and None,
    "config of 10^9 channels": lambda s: s["config"]["model"].update(base_channels=10**9),
    "config of NaN": lambda s: s["config"]["train"].update(lr=float("nan")),
    "config with a foreign key": lambda s: s["config"].update(command="rm"),
    "config with a path as name": lambda s: s["config"].update(exp="../../x"),
    "a list": lambda s: [s], "a number": lambda s: 7,
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_validated(run_dir, name):
    edit(run_dir, CHECKPOINTS[name])
    before = files(run_dir)
    for use in (lambda: load_run(run_dir, "cpu"), lambda: load_run(run_dir, "cpu", 2),
                lambda: sample.main([str(run_dir), "--n", "1", "--nfe", "1", "--device", "cpu"]),
                lambda: evaluate.main([str(run_dir), "--device", "cpu"])):
        with pytest.raises(UserError, match="seed1077|smoke"):
            use()
    if not name.endswith(("nan", "inf")):  # a resumed training sees these itself
        with pytest.raises(UserError):
            resume(run_dir)
    assert files(run_dir) == before


def test_a_milestones_file_cannot_be_resumed(run_dir):
    (run_dir / "checkpoints" / "step_000002.pt").replace(run_dir / "checkpoints" / "last.pt")
    before = files(run_dir)
    with pytest.raises(UserError, match="does not fit"):
        resume(run_dir)
    assert files(run_dir) == before


def test_a_run_whose_average_is_not_finite_is_not_done(run_dir):
    (run_dir / "done.json").unlink()
    edit(run_dir, lambda s: weight(s, "ema", float("nan")))
    assert resume(run_dir) == 1 and not (run_dir / "done.json").exists()


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "n": np.array(10)}
STATISTICS = {
    **{f"n = {n!r}": {"n": np.array(n)} for n in ("abc", [1, 2], -3, 0, 1, float("nan"), 1j, "")},
    **{f"mu of {mu.dtype} {mu.shape}": {"mu": mu} for mu in (
        np.array(["a", "b", "c"]), np.zeros(3, complex), np.zeros((3, 1)), np.zeros(()), np.zeros(4), np.zeros(0),
        np.array([0, np.nan, 0]), np.array([0, np.inf, 0]), np.zeros(3, bool))},
    **{f"sigma of {sigma.dtype} {sigma.shape} {i}": {"sigma": sigma} for i, sigma in enumerate((
        np.eye(2), np.zeros(3), np.full((3, 3), np.nan), np.eye(3).astype(complex), np.eye(3).astype(str)))},
    "sample of another dimension": {"sample": np.zeros((4, 2), np.float32)},
    "sample of NaN": {"sample": np.full((4, 3), np.nan, np.float32)},
}


@pytest.mark.filterwarnings("ignore:.*unknown origin")
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_validated(tmp_path, name):
    FeatureStats.load(npz(tmp_path / "good.npz", **GOOD))
    with pytest.raises(UserError, match=r"bad\.npz"):
        FeatureStats.load(npz(tmp_path / "bad.npz", **GOOD | STATISTICS[name]))


NAMES = ["../../x", "/tmp/x", "a/b", "", ".", "..", ".hidden", "a b", "a\nb", "\0", "$\\frac{$", "ü", "-flag"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", ["experiments", "figures", "comparisons"])
def test_a_name_cannot_be_a_path(tmp_path, name, table):
    text = {"experiments": 'extends = "smoke"\ntitle = "t"\nquestion = "q?"', "figures": 'kind = "snr_vs_t"',
            "comparisons": 'title = "t"\nruns = ["E1", "E2"]'}[table]
    path = tmp_path / "mine.toml"
    path.write_text(f"{EXPERIMENTS.read_text()}\n[{table}.{json.dumps(name)}]\n{text}\n")
    with pytest.raises(ConfigError, match="letters, digits"):
        load_config(name, path) if table == "experiments" else load_tables(table, path)


@pytest.mark.filterwarnings("ignore:.*the covariance is singular")
def test_a_foreign_run_does_not_choose_where_is_written(run_dir, tmp_path):
    config = json.loads((run_dir / "config.json").read_text())
    config["eval"]["stats_root"], config["data"]["root"] = str(tmp_path / "theirs"), str(tmp_path / "theirs")
    (run_dir / "config.json").write_text(json.dumps(config))
    edit(run_dir, lambda s: s.update(config=copy.deepcopy(config)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "feature_network", tiny_network)
        patch.setattr(evaluate, "load_images", lambda name, root, split=True: torch.randint(
            256, (30, 3, 32, 32), dtype=torch.uint8) if root == "data" else pytest.fail(f"reads {root}"))
        assert evaluate.main([str(run_dir), "--distance", "--features", "inception", "--n", "4", "--nfe", "1",
                              "--device", "cpu"]) == 0
    assert (tmp_path / "stats").is_dir() and not (tmp_path / "theirs").exists()


def test_a_run_of_another_experiment_is_not_resumed(run_dir):
    edit(run_dir, lambda s: s["config"].update(exp="E5"))
    with pytest.raises(UserError, match="E5.*smoke.*--out") as refusal:
        resume(run_dir)
    assert "--set" not in str(refusal.value)


def test_nan_is_no_pixel():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError):
            to_uint8(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("change", [
    {"t": torch.tensor([-1, 3])}, {"t": torch.tensor([0, 10])}, {"t": torch.tensor([1])}, {"t": torch.tensor(1)},
    {"t": torch.tensor([[1], [2]])}, {"t": torch.tensor([1.0, 2.0])}, {"t": torch.tensor([1, 2], dtype=torch.int32)},
    {"eps": torch.zeros(2, 1, 1, 1)}, {"eps": torch.zeros(3, 4, 4)}, {"eps": torch.zeros(1, 3, 4, 4)}])
def test_no_shape_is_broadcast_and_no_t_wraps_round(change):
    diffusion = Diffusion(linear_betas(10))
    good = {"x_0": torch.zeros(2, 3, 4, 4), "t": torch.tensor([0, 9]), "eps": torch.zeros(2, 3, 4, 4)}
    assert diffusion.eps_mse(lambda x_t, t: x_t, **good).shape == (2,)
    with pytest.raises(ValueError, match=r"t: must|\(B, ...\)"):
        diffusion.q_sample(**good | change)
    with pytest.raises(ValueError, match=r"t: must|\(B, ...\)"):
        diffusion.eps_mse(lambda x_t, t: x_t, **good | change)


def test_the_mean_of_a_batch_normalises_nothing():
    snr = Diffusion(linear_betas()).snr
    with pytest.raises(ValueError, match="whole schedule"):
        loss_weights(snr[torch.tensor([700, 3, 400])], "minsnr_norm", 5.0)


def test_a_lack_of_memory_is_one_line_and_another_fault_is_not(capsys, monkeypatch):
    def fails(error):
        def main():
            raise error
        return main

    monkeypatch.setattr("sys.argv", ["train.py"])
    for error in (RuntimeError("can't allocate memory: you tried to allocate 38654705664 bytes\nat alloc_cpu.cpp"),
                  torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 36 GiB"), MemoryError()):
        with pytest.raises(SystemExit) as status:
            run_script(fails(error))
        lines = capsys.readouterr().err.splitlines()
        assert status.value.code == 2 and len(lines) == 1 and "train.py: error: not enough memory" in lines[0]
    with pytest.raises(RuntimeError, match="illegal"):
        run_script(fails(RuntimeError("CUDA error: an illegal memory access was encountered")))
