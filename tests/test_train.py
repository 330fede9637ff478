"""Whole runs of train.py: determinism, resume, common random numbers, what is written, what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import TINY, same, tiny_network

import train
from checkpoint import load_checkpoint, read_jsonl
from config import load_config
from data import DataError, make_shapes
from evaluate import RunError
from rng import generator
from weighting import loss_weights

PURE = ("loss.jsonl", "results.jsonl", "per_t.jsonl")  # pure functions of config and seed


def losses(run_dir, every=1):
    return [r for r in read_jsonl(run_dir / "loss.jsonl") if r["step"] % every == 0]


def assert_same_runs(a, b):
    for name in PURE:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [load_checkpoint(run / "checkpoints") for run in (a, b)]
    for key in ("step", "model", "ema", "optimizer", "window"):
        assert same(states[0][key], states[1][key]), key


def small(*overrides):
    return load_config("E2", overrides=[*TINY, *overrides])


# ---- determinism ----

def test_one_seed_gives_one_run_and_another_seed_another(run_train):
    a, b, c = run_train("E2", out="a"), run_train("E2", out="b"), run_train("E2", out="c", seed=1)
    assert_same_runs(a, b)
    assert not {r["train/loss"] for r in losses(a)} & {r["train/loss"] for r in losses(c)}


def test_evaluation_and_logging_do_not_touch_training(run_train):
    """E1, E5 and E7a train alike however often each of them is logged, measured, drawn or saved."""
    common = ("train.total_steps=30",)
    a = run_train("E1", *common, "log.every=1", "eval.every=30", "grid.every=30", "train.checkpoint_every=30")
    b = run_train("E5", *common, "log.every=1", "eval.every=4", "grid.every=7", "eval.profile_images=3")
    c = run_train("E7a", *common, "log.every=2", "eval.every=11", "grid.every=5", "grid.sampler=ddpm", "grid.n=3")
    assert len(losses(a)) == 30 and losses(a) == losses(b)
    window = ("train/loss_mean", "train/eps_mse_mean")  # the only figures that depend on how often one logs
    strip = [{k: v for k, v in r.items() if k not in window} for r in losses(a, every=2)]
    assert strip == [{k: v for k, v in r.items() if k not in window} for r in losses(c)]
    states = [load_checkpoint(run / "checkpoints") for run in (a, b, c)]
    for key in ("model", "ema", "optimizer"):
        assert same(states[0][key], states[1][key]) and same(states[0][key], states[2][key])


def test_two_arms_see_the_same_images_t_and_eps(run_train):
    a, b = run_train("E1", "log.every=1"), run_train("E2", "log.every=1")
    assert [r["snr/mean"] for r in losses(a)] == [r["snr/mean"] for r in losses(b)]
    assert losses(a)[0]["train/eps_mse"] == losses(b)[0]["train/eps_mse"]  # same weights until the first update
    assert [r["train/weight_mean"] for r in losses(a)] == [1.0] * 12
    assert [r["train/loss"] for r in losses(a)] == [r["train/eps_mse"] for r in losses(a)]
    assert min(r["train/weight_mean"] for r in losses(b)) < 0.9
    assert min(r["train/loss"] / r["train/eps_mse"] for r in losses(b)) < 0.9


# ---- resume ----

@pytest.mark.parametrize("stop", [5, 7, 12])
def test_stop_and_resume_is_the_uninterrupted_run(run_train, stop):
    whole = run_train("E2", "train.total_steps=20", out="whole")
    run_train("E2", f"train.total_steps={stop}", out="parts")
    parts = run_train("E2", "train.total_steps=20", out="parts", flags=["--resume"])
    assert_same_runs(whole, parts)
    assert len(json.loads((parts / "env.json").read_text())["resumed"]) == 1


def test_resume_keeps_curvature_distances_and_influence(run_train, tmp_path, monkeypatch):
    """All that a run may write, stopped between milestones."""
    monkeypatch.setattr("train.feature_network", tiny_network)
    extra = ("curvature.every=2", "curvature.num_probes=2", "eval.features=inception", "eval.n_samples=20",
             "eval.final_n_samples=20", f"eval.stats_root='{tmp_path}/stats'")
    whole = run_train("E6", *extra, "train.total_steps=14", out="whole")
    run_train("E6", *extra, "train.total_steps=8", out="parts")
    parts = run_train("E6", *extra, "train.total_steps=14", out="parts", flags=["--resume"])
    assert_same_runs(whole, parts)
    assert (whole / "curvature.jsonl").read_bytes() == (parts / "curvature.jsonl").read_bytes()
    for file in (whole / "influence").iterdir():
        assert file.read_bytes() == (parts / "influence" / file.name).read_bytes()
    assert [r["step"] for r in read_jsonl(parts / "results.jsonl")] == [6, 12, 14]


def test_a_kill_inside_the_first_checkpoint_resumes_from_the_start(run_train, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("checkpoint.os.replace", killed)
        patch.setattr("train.replace_file", lambda path, content: path.write_bytes(content))
        run_train("E2", out="killed")
    resumed = run_train("E2", out="killed", flags=["--resume"])
    assert_same_runs(run_train("E2", out="whole"), resumed)


def test_a_run_stopped_before_its_first_checkpoint_resumes_from_the_start(run_train, monkeypatch, capsys):
    whole, real = run_train("E2", out="whole"), train.train_step

    def killed_after_step_4(config, state, *args):
        if state.step == 4:
            raise KeyboardInterrupt
        return real(config, state, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.train_step", killed_after_step_4)
        run_train("E2", out="stopped")
    stopped = run_train("E2", out="stopped", flags=["--resume"])
    assert "starting from step 0" in capsys.readouterr().out
    assert_same_runs(whole, stopped)


def test_what_a_resume_refuses(run_train):
    run_dir = run_train("E2", "train.total_steps=6")
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    for override, message in [("loss.gamma=3", "loss.gamma = 5.0, this command 3.0"),
                              ("model.base_channels=12", "model.base_channels = 8"),
                              ("train.total_steps=3", "may grow on resume, not shrink to 3"),
                              ("train.amp=false", "give --set 'train.amp=true'")]:
        with pytest.raises(RunError, match=message):
            run_train("E2", "train.total_steps=6", override, flags=["--resume"])
    with pytest.raises(RunError, match="no run to resume"):
        run_train("E2", out="elsewhere", flags=["--resume"])
    with pytest.raises(RunError, match="a finished run of 6 steps; --overwrite deletes it"):
        run_train("E2", "train.total_steps=6")
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    run_train("E2", "train.total_steps=6", flags=["--overwrite"])


def test_overwrite_deletes_nothing_but_runs(tmp_path, run_train):
    folder = tmp_path / "runs" / "E2" / "seed1077"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not a run directory"):
        run_train("E2", flags=["--overwrite"])
    assert (folder / "thesis.tex").read_text() == "years of work"


# ---- the step ----

def test_a_step_against_one_written_out_by_hand():
    """Batch, loss, clipping, Adam and EMA of two steps, from the formulas."""
    config, device = small("loss.gamma=0.001", "train.grad_clip=0.001", "model.dropout=0.3"), torch.device("cpu")
    state, diffusion = train.new_state(config, device)
    images = make_shapes(50)
    w = loss_weights(diffusion.snr, "minsnr", 0.001).float()
    twin, _ = train.new_state(config, device)
    m, v = ([torch.zeros_like(p) for p in twin.model.parameters()] for _ in range(2))
    average = [p.detach().clone() for p in twin.model.parameters()]
    for step in range(2):
        out = train.train_step(config, state, diffusion, w, images)

        g = {name: generator(1077, name, step) for name in ("t", "eps")}
        order = torch.randperm(50, generator=generator(1077, "epoch", 0))
        x_0 = images[order[4 * step:4 * step + 4]].float() / 127.5 - 1
        t, eps = torch.randint(1000, (4,), generator=g["t"]), torch.randn(4, 3, 32, 32, generator=g["eps"])
        ac = diffusion.alphas_cumprod[t].float()[:, None, None, None]
        train.seed_global(1077, "dropout", step)
        eps_hat = twin.model(ac.sqrt() * x_0 + (1 - ac).sqrt() * eps, t)
        snr = ac.flatten() / (1 - ac.flatten())
        loss = (torch.minimum(snr, torch.tensor(0.001)) / snr * ((eps_hat - eps) ** 2).mean((1, 2, 3))).mean()
        grads = torch.autograd.grad(loss, list(twin.model.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        assert out["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        assert out["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4) and norm > 0.001
        assert out["t"].tolist() == t.tolist()
        decay = (1 + step) / (10 + step)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(twin.model.parameters(), grads, strict=True)):
                g = g * 0.001 / norm
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
                p -= 1e-4 * (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                average[i] = decay * average[i] + (1 - decay) * p
    for p, q in zip(state.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)  # each step moves a weight by up to 1e-4
    for p, q in zip(state.ema.parameters(), average, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_ema_warm_up_forgets_the_random_initial_weights():
    """Without it 13.5 % of them would be left after 2,000 steps at decay 0.999."""
    decays = [train.ema_decay(0.999, step) for step in range(20_000)]
    assert decays[0] == 0.1 and decays[-1] == 0.999 and decays == sorted(decays)
    left = torch.tensor(decays[:2000], dtype=torch.float64).log().sum().exp().item()
    assert left < 1e-9 < 0.13 < 0.999**2000


def test_a_loss_scale_changes_nothing(monkeypatch):
    """As fp16 scales its loss: clipping and the logged norm must see the true gradient, whatever the scale."""
    config, results = small(), []
    for enabled in (False, True):
        state, diffusion = train.new_state(config, torch.device("cpu"))
        state.scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10)
        w = loss_weights(diffusion.snr, "minsnr", 5.0).float()
        out = [train.train_step(config, state, diffusion, w, make_shapes(50)) for _ in range(3)]
        results.append((torch.stack([o["grad_norm"] for o in out]), state.model.state_dict()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=0)
    for a, b in zip(results[0][1].values(), results[1][1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_training_agrees_with_plain():
    results = []
    for compiled in ("false", "true"):
        config = small(f"train.compile={compiled}", "model.dropout=0", "model.channel_mults=[1]",
                       "model.attn_resolutions=[]")
        state, diffusion = train.new_state(config, torch.device("cpu"))
        w, images = loss_weights(diffusion.snr, "minsnr", 5.0).float(), make_shapes(50)
        out = [train.train_step(config, state, diffusion, w, images) for _ in range(4)]
        results.append((torch.tensor([[o["loss"], o["grad_norm"]] for o in out]), state))
    assert results[1][1].network is not results[1][1].model
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    for p, q in zip(results[0][1].model.parameters(), results[1][1].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)  # each step moves a weight by up to 1e-4

    config = small("train.compile=true", "model.dropout=0.5", "model.channel_mults=[1]", "model.attn_resolutions=[]")
    twice = []
    for _ in range(2):  # masks of its own, yet a function of seed and step
        state, diffusion = train.new_state(config, torch.device("cpu"))
        twice.append([train.train_step(config, state, diffusion, w, images)["loss"].item() for _ in range(3)])
    assert twice[0] == twice[1] and len(set(twice[0])) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("amp", ["false", "true"])
def test_no_step_waits_for_the_gpu(amp):
    config, device = small(f"train.amp={amp}"), torch.device("cuda")
    state, diffusion = train.new_state(config, device)
    w, images = loss_weights(diffusion.snr, "minsnr", 5.0).float(), make_shapes(50).to(device)
    train.train_step(config, state, diffusion, w, images)  # the first one makes the optimiser's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train.train_step(config, state, diffusion, w, images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.stride() == p.stride() for p in state.model.parameters())  # as fused Adam wants it


def test_dropout_is_on_in_training_and_off_in_the_average():
    state, _ = train.new_state(small(), torch.device("cpu"))
    assert state.model.training and not state.ema.training
    assert not any(p.requires_grad for p in state.ema.parameters())


def test_mixed_precision_is_for_cuda_only():
    config = load_config("E1")
    assert config.train.amp and train.amp_dtype(config, torch.device("cpu")) is None
    off = dataclasses.replace(config, train=dataclasses.replace(config.train, amp=False))
    assert train.amp_dtype(off, torch.device("cuda")) is None


def test_a_loss_that_is_not_finite_stops_the_run(run_train, monkeypatch, capsys):
    with pytest.raises(AssertionError):
        run_train("E2", "train.lr=1e30")
    error = capsys.readouterr().err
    assert "train.py: step" in error and ("norm nan" in error or "norm inf" in error)


# ---- what is written ----

def test_the_run_directory(run_train, capsys):
    run_dir = run_train("E2")
    assert "trains in fp32" in capsys.readouterr().out
    records = losses(run_dir)
    assert [r["step"] for r in records] == [3, 6, 9, 12]
    for r in records:
        assert r["snr/min"] <= r["snr/mean"] <= r["snr/max"] and 0 < r["train/weight_mean"] <= 1
        assert r["train/loss"] <= r["train/eps_mse"] and r["train/grad_global_L2"] > 0
    assert [(r["step"], r["kind"]) for r in read_jsonl(run_dir / "results.jsonl")] == [
        (6, "milestone"), (12, "milestone"), (12, "final")]
    assert [r["step"] for r in read_jsonl(run_dir / "per_t.jsonl")] == [6, 12]
    assert sorted(p.name for p in (run_dir / "grids").iterdir()) == ["step_000006_ddim2.png", "step_000012_ddim2.png"]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["exp"] == "E2" and config["loss"] == {"weighting": "minsnr", "gamma": 5.0}
    env = json.loads((run_dir / "env.json").read_text())
    assert {"git_commit", "git_dirty", "torch", "device", "threads", "command"} <= env.keys()
    assert read_jsonl(run_dir / "timing.jsonl")[-1]["seconds/train"] > 0


def test_window_means_are_the_means_of_all_steps_between_two_lines(run_train):
    each, third = run_train("E2", "log.every=1", out="a"), run_train("E2", "log.every=3", out="b")
    every = losses(each)
    for i, record in enumerate(losses(third)):
        for key in ("train/loss", "train/eps_mse"):
            mean = sum(r[key] for r in every[3 * i:3 * i + 3]) / 3
            assert record[f"{key}_mean"] == pytest.approx(mean, rel=1e-12)


def test_training_learns(run_train):
    """A tiny smoke training: the error on held-out images falls to a fraction of that of a network that says 0."""
    run_dir = run_train("smoke", "model.base_channels=16", "train.total_steps=60", "train.lr=3e-3", "log.every=20",
                        "train.batch_size=8", "eval.every=60", "grid.every=60", "ema.decay=0.9", "model.dropout=0")
    assert losses(run_dir)[-1]["train/eps_mse_mean"] < 0.35
    assert read_jsonl(run_dir / "results.jsonl")[-1]["val/eps_mse_ema"] < 0.35


def test_dry_run_and_list_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sets = [arg for override in [*TINY, "eval.features=lite0"] for arg in ("--set", override)]
    assert train.main(["--exp", "E8c", "--dry-run", "--device", "cpu", *sets]) == 0
    out = capsys.readouterr().out
    assert "loss.gamma = 5.0" in out and "parameters = " in out and "train               12 x" in out
    assert train.main(["--list"]) == 0
    assert "E8c    Min-SNR, gamma 5, base 64, 5k steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(DataError, match="no route"):
        train.main(["--exp", "E8c", "--device", "cpu", "--data-root", str(tmp_path / "none"), "--out",
                    str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_the_real_experiment_on_real_images(cifar10_root, tmp_path):
    """A few steps of E8c as it stands: base 64 on CIFAR-10."""
    assert train.main(["--exp", "E8c", "--device", "cpu", "--data-root", str(cifar10_root), "--out", str(tmp_path),
                       "--set", "train.total_steps=4", "--set", "log.every=2", "--set", "grid.n=1", "--set",
                       "grid.nfe=1", "--set", "eval.profile_images=1", "--set", "eval.features=none"]) == 0
    run_dir = tmp_path / "E8c" / "seed1077"
    assert [r["step"] for r in losses(run_dir)] == [2, 4]
    assert all(0.5 < r["train/eps_mse"] < 1.5 for r in losses(run_dir))  # it starts at "eps_hat = 0"
