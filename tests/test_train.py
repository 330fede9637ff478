"""Whole runs of train.py: determinism, resume, common random numbers, what is written, what is refused."""

import json
import re

import pytest
import torch
from conftest import TINY, same, set_flags, tiny_network

import train
from checkpoint import load_checkpoint
from config import load_config
from data import make_shapes
from rng import generator
from runs import read_jsonl
from weighting import loss_weights

PURE = ("loss.jsonl", "results.jsonl", "per_t.jsonl")  # pure functions of config and seed


def losses(run_dir, every=1):
    return [r for r in read_jsonl(run_dir / "loss.jsonl") if r["step"] % every == 0]


def assert_same_runs(a, b):
    for name in PURE:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    states = [load_checkpoint(run / "checkpoints") for run in (a, b)]
    for key in ("step", "model", "ema", "optimizer", "sums"):
        assert same(states[0][key], states[1][key]), key


def small(*overrides):
    return load_config("E2", overrides=[*TINY, *overrides])


# ---- determinism ----

def test_one_seed_gives_one_run_and_another_seed_another(run_train):
    a, b, c = run_train("E2", out="a"), run_train("E2", out="b"), run_train("E2", out="c", seed=1)
    assert_same_runs(a, b)
    assert not {r["train/loss"] for r in losses(a)} & {r["train/loss"] for r in losses(c)}


def test_evaluation_and_logging_do_not_touch_training(run_train):
    """E1, E5 and E7a train to the same weights however often each of them is logged, measured, drawn or saved."""
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


def test_a_run_of_v_prediction_has_the_weights_of_v(run_train):
    records = losses(run_train("E2", "diffusion.prediction=v", "log.every=1", "train.total_steps=6"))
    assert max(r["train/weight_mean"] for r in records) <= 5 / 6  # the largest min(snr, 5) / (snr + 1)


# ---- resume ----

@pytest.mark.parametrize(("stop", "bf16"), [(3, False), (7, False), (11, False), (7, True)])
def test_a_run_that_ended_anywhere_resumes_to_the_uninterrupted_one(run_train, tmp_path, monkeypatch, stop, bf16):
    """All that a run may write. 5 and 10 have checkpoints, 6 and 12 milestones."""
    monkeypatch.setattr(train, "feature_network", tiny_network)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    extra = ("eval.amp=true", "curvature.every=2", "curvature.num_probes=2", "eval.features=inception",
             "eval.n_samples=20", "eval.final_n_samples=30", f"eval.stats_root='{tmp_path}/stats'")
    whole, real = run_train("E6", *extra, out="whole"), train.train_step

    def killed(config, state, *args):
        if state.step == stop:
            raise KeyboardInterrupt
        return real(config, state, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", killed)
        run_train("E6", *extra, out="parts", flags=["--resume"])  # which starts a run that is not there
    parts = run_train("E6", *extra, out="parts", flags=["--resume"])
    assert_same_runs(whole, parts)
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".jsonl", ".png", ".npz")}
    assert len(files) == 5 + 5 + 3
    for file in files - {next(f for f in files if f.name == "timing.jsonl")}:
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file
    env, used = json.loads((parts / "env.json").read_text()), "bf16" if bf16 else "fp32"
    assert len(env["resumed"]) == 1 and env["train_precision"] == env["sample_precision"] == used
    assert {r["precision"] for r in read_jsonl(parts / "results.jsonl")} == {used}
    for name in ("last.pt", "step_000006.pt"):
        assert (whole / "checkpoints" / name).read_bytes() == (parts / "checkpoints" / name).read_bytes()


# ---- the step ----

@pytest.mark.parametrize("prediction, clip", [("eps", 1e-3), ("eps", 1e3), ("v", 1e3), ("x0", 1e3)])
def test_a_step_against_one_written_out_by_hand(prediction, clip):
    """Batch, loss, clipping (above and below the gradient's norm), Adam and EMA of two steps, from the formulas."""
    config = small("loss.gamma=0.001", f"train.grad_clip={clip}", "model.dropout=0.3",
                   f"diffusion.prediction={prediction}")
    state, diffusion = train.new_state(config, torch.device("cpu"))
    images = make_shapes(50)
    w = loss_weights(diffusion.snr, "minsnr", 0.001, prediction).float()
    twin, _ = train.new_state(config, torch.device("cpu"))
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
        output = twin.model(ac.sqrt() * x_0 + (1 - ac).sqrt() * eps, t)
        snr = ac.flatten() / (1 - ac.flatten())
        target, scale = {"eps": (eps, snr), "x0": (x_0, torch.ones(4)),
                         "v": (ac.sqrt() * eps - (1 - ac).sqrt() * x_0, snr + 1)}[prediction]
        mse = ((output - target) ** 2).mean((1, 2, 3))
        loss = (torch.minimum(snr, torch.tensor(0.001)) / scale * mse).mean()
        assert out["eps_mse"].item() == pytest.approx((mse * snr / scale).mean().item(), rel=1e-4)
        grads = torch.autograd.grad(loss, list(twin.model.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        assert out["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
        assert out["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4) and norm < 1e3
        assert norm > 1e-3 or prediction != "eps"
        assert out["t"].tolist() == t.tolist()
        decay = (1 + step) / (10 + step)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(twin.model.parameters(), grads, strict=True)):
                g = g * min(1, clip / norm)
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
                p -= 1e-4 * (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                average[i] = decay * average[i] + (1 - decay) * p
    moments = [state.optimizer.state[p]["exp_avg"] for p in state.model.parameters()]
    for ours, hand in zip(moments, m, strict=True):  # Adam's step hides the gradient's scale, its moments do not
        torch.testing.assert_close(ours, hand, rtol=1e-3, atol=1e-3 * max(x.abs().max().item() for x in m))
    for p, q in zip(state.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)  # each step moves a weight by up to 1e-4
    for p, q in zip(state.ema.parameters(), average, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


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


def test_ema_warm_up_forgets_the_random_initial_weights():
    """Without it 13.5 % of them would be left after 2,000 steps at decay 0.999."""
    decays = [train.ema_decay(0.999, step) for step in range(20_000)]
    assert decays[0] == 0.1 and decays[-1] == 0.999 and decays == sorted(decays)
    left = torch.tensor(decays[:2000], dtype=torch.float64).log().sum().exp().item()
    assert left < 1e-9 < 0.13 < 0.999**2000


def test_dropout_is_on_in_training_and_off_in_the_average():
    state, _ = train.new_state(small(), torch.device("cpu"))
    assert state.model.training and not state.ema.training
    assert not any(p.requires_grad for p in state.ema.parameters())


# ---- what is written ----

def test_the_run_directory(run_train, capsys):
    run_dir = run_train("E2")
    assert "fp32" in capsys.readouterr().out
    records = losses(run_dir)
    assert [r["step"] for r in records] == [3, 6, 9, 12]
    for r in records:
        assert r["snr/min"] <= r["snr/mean"] <= r["snr/max"] and 0 < r["train/weight_mean"] <= 1
        assert r["train/loss"] <= r["train/eps_mse"] and r["train/grad_global_L2"] > 0
    assert [(r["step"], r["kind"]) for r in read_jsonl(run_dir / "results.jsonl")] == [
        (6, "milestone"), (12, "milestone"), (12, "final")]
    assert [r["step"] for r in read_jsonl(run_dir / "per_t.jsonl")] == [6, 12]
    assert sorted(p.name for p in (run_dir / "grids").iterdir()) == [
        "data.png", "step_000006_ddim2.png", "step_000012_ddim2.png"]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["exp"] == "E2" and config["loss"] == {"weighting": "minsnr", "gamma": 5.0}
    env = json.loads((run_dir / "env.json").read_text())
    assert {"git_commit", "git_dirty", "torch", "numpy", "device", "threads", "processes", "command"} <= env.keys()
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
    assert train.main(["--exp", "E8c", "--dry-run", "--device", "cpu", *set_flags(*TINY, "eval.features=lite0",
                                                                                 "curvature.num_probes=2")]) == 0
    out = capsys.readouterr().out
    assert "loss.gamma = 5.0" in out and "parameters = " in out
    rows = re.findall(r"^  (\D+?) +([\d,]+) x +([\d.]+) s", out, flags=re.M)
    assert [name for name, *_ in rows] == ["training steps", "network calls on an image", "curvature records", "all"]
    counts, seconds = [int(row[1].replace(",", "")) for row in rows], [float(row[2]) for row in rows]
    # 2 milestones of 5,000 and a final of 10,000 samples at NFE 2, 2 grids of 4 at NFE 2, 2 profiles of 2 x 21 x 2
    assert counts[:2] == [12, 2 * 20_000 + 2 * 4 * 2 + 2 * 2 * 21 * 2]
    assert seconds[3] == pytest.approx(sum(c * s for c, s in zip(counts[:3], seconds, strict=False)), rel=0.1, abs=1)
    assert train.main(["--list"]) == 0
    assert "E8c    Min-SNR, gamma 5, base 64, 5k steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_the_real_experiment_on_real_images(cifar10_root, tmp_path):
    """A few steps of E8c as it stands: base 64 on CIFAR-10."""
    assert train.main(["--exp", "E8c", "--device", "cpu", "--data-root", str(cifar10_root), "--out", str(tmp_path),
                       "--set", "train.total_steps=4", "--set", "log.every=2", "--set", "grid.n=1", "--set",
                       "grid.nfe=1", "--set", "eval.profile_images=2", "--set", "eval.features=none"]) == 0
    run_dir = tmp_path / "E8c" / "seed1077"
    assert [r["step"] for r in losses(run_dir)] == [2, 4]
    assert all(0.5 < r["train/eps_mse"] < 1.5 for r in losses(run_dir))  # it starts at "eps_hat = 0"
