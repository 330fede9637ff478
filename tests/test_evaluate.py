import json

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_network

import evaluate
from checkpoint import load_checkpoint
from config import load_config
from curvature import hutchinson_trace, summarise
from data import make_shapes
from diffusion import Diffusion, linear_betas
from errors import UserError
from evaluate import Distances, curvature_record, eval_mode, per_t_profile, profile_timesteps, sample_images
from fid import FeatureStats, extract, frechet_distance, kid
from model import UNet
from parallel import check_device
from rng import generator, seed_global
from runs import paired_differences, read_jsonl
from weighting import loss_weights

D = Diffusion(linear_betas())


@pytest.fixture
def net():
    """A small network of which every part acts, with dropout on."""
    seed_global(0, "init")
    net = UNet(8, (1, 2), 1, (), 0.5)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator(0, "noise"))
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 900])
    assert not torch.equal(net(x, t), net(x, t))  # dropout acts
    return net.train()


def test_samples_depend_on_seed_and_chunk_only(net, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    for sampler in ("ddpm", "ddim"):
        few, many = (sample_images(net, D, n, sampler, 3, seed=1) for n in (4, 10))
        assert many.shape == (10, 3, 32, 32) and many.dtype == torch.uint8
        assert torch.equal(few, many[:4]) and not torch.equal(many[:4], many[4:8])
        assert not torch.equal(few, sample_images(net, D, 4, sampler, 3, seed=2))
    assert net.training


def test_each_chunk_has_noise_of_its_own(net, monkeypatch):
    streams, real = [], evaluate.generator
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    monkeypatch.setattr(evaluate, "generator", lambda *args: (streams.append(args), real(*args))[1])
    sample_images(net, D, 10, "ddpm", 2, seed=1)
    assert streams == [(1, purpose, i) for i in range(3) for purpose in ("x_T", "sampler_noise")]


def test_samplers_start_from_the_same_noise_and_eta_is_used(net):
    ddpm, ddim = (sample_images(net, D, 2, sampler, 1, seed=1) for sampler in ("ddpm", "ddim"))
    assert torch.equal(ddpm, ddim)  # one step from x_T to x_0 has no noise of its own
    assert not torch.equal(*(sample_images(net, D, 2, "ddim", 5, seed=1, eta=eta) for eta in (0, 1)))


def test_profile_of_a_network_that_says_zero():
    """Then the error is the mean square of eps, 1 at every t."""
    ts = profile_timesteps(1000, "even")
    assert len(ts) == 21 and ts[:3] == [0, 50, 100] and ts[-1] == 999
    mse = per_t_profile(UNet(8, (1,), 1, ()), D, make_shapes(8), ts)
    assert mse == pytest.approx([1.0] * 21, abs=0.05) and len(set(mse)) == 21  # another eps at each t


def test_the_dense_grid_has_every_fifth_timestep_up_to_150():
    dense, even = profile_timesteps(1000, "dense"), profile_timesteps(1000, "even")
    assert dense == sorted({*range(0, 151, 5), *even}) and len(dense) == 48
    assert profile_timesteps(7, "even") == profile_timesteps(7, "dense") == list(range(7))


def test_profile_is_a_fixed_measuring_stick(net):
    images = make_shapes(25)
    first = per_t_profile(net, D, images, [0, 500])
    torch.manual_seed(9)  # dropout is off, and nothing depends on the global generator
    assert per_t_profile(net, D, images, [0, 500]) == first and net.training
    eps = torch.randn(25, 3, 32, 32, generator=generator(0, "profile_eps", 1))  # against the formula, at t = 500
    ac = D.alphas_cumprod[500].float()
    with torch.no_grad():
        x_0 = images.float() / 127.5 - 1
        output = net.eval()(ac.sqrt() * x_0 + (1 - ac).sqrt() * eps, torch.full((25,), 500))
    assert first[1] == pytest.approx((output - eps).square().mean().item(), rel=1e-4)


def test_eval_mode_restores_each_modules_own_mode(net):
    net.middle.eval()
    modes = [m.training for m in net.modules()]
    with pytest.raises(RuntimeError), eval_mode(net):
        assert not any(m.training for m in net.modules())
        raise RuntimeError
    assert [m.training for m in net.modules()] == modes


def test_the_command_measures_a_finished_run(run_train, capsys):
    run_dir = run_train("E1")
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run_dir / "per_t.jsonl").read_text().splitlines()[-1])


def test_errors(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        evaluate.main([str(tmp_path / "nowhere")])
    for name in ("cuda:77", "gpu", "meta"):
        with pytest.raises(UserError, match=f"--device {name}"):
            check_device(name)


# ---- distances ----

@pytest.fixture
def distances(tmp_path):
    return Distances(tiny_network(), "shapes", make_shapes(300), make_shapes(200, "test"), tmp_path / "stats")


def test_a_distance_comes_with_its_context(distances):
    samples = make_shapes(400)[300:]
    record, estimates = distances.measure(extract(tiny_network(), samples).numpy())
    f = [extract(tiny_network(), x).numpy() for x in (samples, distances.train, distances.test[:100])]
    moments = [(x.mean(axis=0), np.cov(x.astype(np.float64), rowvar=False)) for x in f]
    assert record["n"] == 100 and record["features"] == "inception" and record["reference"] == "shapes train, n = 300"
    assert record["val/fid"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-4)
    assert record["val/fid_floor_test"] == pytest.approx(frechet_distance(*moments[2], *moments[1]), rel=1e-4)
    assert record["val/kid"] == pytest.approx(kid(f[0], f[1], subset_size=100)[0], rel=1e-6)
    assert record["val/fid_floor"] < record["val/fid_floor_test"] < record["val/fid_ceiling"]
    assert record["val/fid"] < record["val/fid_ceiling"] and record["val/kid_floor"] is None
    assert record["val/kid_floor_test"] < record["val/kid_ceiling"]
    assert estimates["val/fid"].stderr == record["val/fid_stderr"] > 0


def test_a_set_too_small_for_a_floor_has_none(distances):
    context = distances.context(250)  # there are 200 test images
    assert context["val/fid_floor_test"] is None and context["val/kid_floor_test"] is None
    assert context["val/fid_floor"] > 0 and context["val/fid_ceiling"] > 0


def test_statistics_are_made_once_and_stale_ones_are_refused(distances, monkeypatch):
    reference, context = distances.reference, distances.context(50)
    assert reference.n == 300 and np.array_equal(reference.sample, extract(tiny_network(), distances.train).numpy())
    again = Distances(tiny_network(), "shapes", distances.train, distances.test, distances.root)
    monkeypatch.setattr(evaluate, "extract", None)  # would fail if called
    assert np.array_equal(again.reference.cov, reference.cov) and again.context(50) == context



def test_statistics_of_something_else_are_refused(distances):
    root = distances.root
    _ = distances.reference
    with pytest.raises(UserError, match="data_hash"):
        Distances(tiny_network(), "shapes", distances.train + 1, distances.test, root)
    other = tiny_network()
    other.weights_hash = "other"
    with pytest.raises(UserError, match="weights_hash"):
        Distances(other, "shapes", distances.train, distances.test, root)
    np.savez(root / "shapes_inception_train.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.warns(UserWarning, match="unknown origin"), pytest.raises(UserError, match="dimension 5"):
        Distances(tiny_network(), "shapes", distances.train, distances.test, root)
    (root / "file").write_text("")
    with pytest.raises(UserError, match="stats_root.*file"):
        Distances(tiny_network(), "shapes", distances.train, distances.test, root / "file" / "stats")


@pytest.mark.parametrize("flags", [
    ["run", "--n", "10"], ["run", "--curvature", "--nfe", "5"], ["run", "--sampler", "ddim"],
    ["--stats", "shapes", "--nfe", "5"], [], ["run", "--stats", "shapes"],
])
def test_options_without_effect_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(flags)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err


def test_statistics_published_elsewhere_are_used_with_a_warning(distances):
    distances.root.mkdir()
    np.savez(distances.root / "shapes_inception_train.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.warns(UserWarning, match="unknown origin"):
        distances = Distances(tiny_network(), "shapes", distances.train, distances.test, distances.root)
        record, _ = distances.measure(extract(tiny_network(), make_shapes(50)).numpy())
    assert record["reference"] == "shapes train, n = unknown"
    assert record["val/fid"] == pytest.approx(frechet_distance(
        *(lambda s: (s.mean, s.cov))(FeatureStats(6).update(extract(tiny_network(), make_shapes(50)))),
        np.zeros(6), np.eye(6)), rel=1e-9)


WITH_FID = ("eval.features=inception", "eval.n_samples=20", "eval.final_n_samples=30")


@pytest.fixture
def run_with_fid(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr("train.feature_network", tiny_network)
    return lambda exp, *overrides, **kw: run_train(exp, *WITH_FID, f"eval.stats_root='{tmp_path}/s'", *overrides, **kw)


def test_distances_in_training(run_with_fid):
    run_dir = run_with_fid("E4")  # ends with both samplers
    results = read_jsonl(run_dir / "results.jsonl")
    assert [(r["step"], r["kind"], r["sampler"], r["n"]) for r in results] == [
        (6, "milestone", "ddpm", 20), (12, "milestone", "ddpm", 20),
        (12, "final", "ddpm", 30), (12, "final", "ddim", 30)]
    for r in results:
        assert {"nfe", "features", "reference", "val/fid_floor", "val/fid_ceiling", "val/kid_stderr"} <= r.keys()


def test_a_milestone_at_the_end_is_the_one_that_an_evaluation_of_its_own_gives(run_with_fid, monkeypatch):
    """Whether its samples are drawn alone or are the first chunks of the final ones."""
    monkeypatch.setattr("evaluate.CHUNK", 10)
    shared = run_with_fid("E1", out="a")
    alone = run_with_fid("E1", "eval.final_n_samples=10", out="b")
    milestones = [next(r for r in read_jsonl(run / "results.jsonl") if (r["step"], r["kind"]) == (12, "milestone"))
                  for run in (shared, alone)]
    assert milestones[0] == milestones[1]


def test_paired_differences_of_two_arms(run_with_fid, capsys):
    a, b = run_with_fid("E1", "train.lr=1e-2"), run_with_fid("E2", "train.lr=1e-2")
    differences = paired_differences(a, b)
    assert len(differences) == 3
    for d, r_a, r_b in zip(differences, *(read_jsonl(x / "results.jsonl") for x in (a, b)), strict=True):
        assert d["val/fid"] == r_b["val/fid"] - r_a["val/fid"]
        assert 0 < d["val/fid_stderr"] < 1.01 * np.hypot(r_a["val/fid_stderr"], r_b["val/fid_stderr"])
    capsys.readouterr()
    assert evaluate.main([str(b), "--against", str(a)]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == differences
    other_seed = run_with_fid("E2", seed=1)
    with pytest.raises(UserError, match="different seeds"):
        paired_differences(a, other_seed)


def test_the_distance_command_repeats_a_milestone(run_with_fid, monkeypatch, capsys):
    run_dir = run_with_fid("E1")
    monkeypatch.setattr("evaluate.feature_network", tiny_network)
    capsys.readouterr()
    evaluate.main([str(run_dir), "--distance", "--device", "cpu"])
    printed, milestones = json.loads(capsys.readouterr().out), read_jsonl(run_dir / "results.jsonl")
    assert printed.pop("seed") == 1077 and milestones[1]["step"] == 12 and printed.items() <= milestones[1].items()
    evaluate.main([str(run_dir), "--distance", "--step", "6", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["val/fid"] == milestones[0]["val/fid"]
    evaluate.main([str(run_dir), "--distance", "--seed", "5", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["val/fid"] not in (milestones[0]["val/fid"], milestones[1]["val/fid"])
    evaluate.main([str(run_dir), "--distance", "--n", "10", "--sampler", "ddim", "--nfe", "3", "--device", "cpu"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["n"], printed["sampler"], printed["nfe"]) == (10, "ddim", 3)
    with pytest.raises(UserError, match="NFE 5000"):
        evaluate.main([str(run_dir), "--distance", "--nfe", "5000"])


def test_training_without_weights_is_refused_before_it_starts(run_train, tmp_path):
    with pytest.raises(UserError, match="w.pth.*eval.features=lite0"):
        run_train("E1", "eval.features=inception", f"eval.inception_weights='{tmp_path}/w.pth'")
    assert not (tmp_path / "runs").exists()


def test_the_frontier_is_appended_point_by_point(run_with_fid, monkeypatch, capsys):
    monkeypatch.setattr("evaluate.feature_network", tiny_network)
    run_dir = run_with_fid("E2")
    before, real, calls = (run_dir / "results.jsonl").read_text(), evaluate.sample_images, []

    def sample_images(model, diffusion, n, sampler, nfe, *args, **kwargs):
        calls.append((sampler, nfe))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(model, diffusion, n, sampler, nfe, *args, **kwargs)

    monkeypatch.setattr("evaluate.sample_images", sample_images)
    command, stop_at = [str(run_dir), "--frontier", "2,4", "--n", "20", "--device", "cpu"], 3
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    evaluate.main(command)
    assert calls == [("ddpm", 2), ("ddpm", 4), ("ddim", 2), ("ddim", 2), ("ddim", 4)]  # what was there was not repeated
    evaluate.main(command)
    assert len(calls) == 5
    after = (run_dir / "results.jsonl").read_text()
    assert after.startswith(before)
    points = [r for r in read_jsonl(run_dir / "results.jsonl") if r["kind"] == "frontier"]
    assert [(r["sampler"], r["nfe"], r["n"], r["step"]) for r in points] == [
        ("ddpm", 2, 20, 12), ("ddpm", 4, 20, 12), ("ddim", 2, 20, 12), ("ddim", 4, 20, 12)]
    assert all({"val/fid_stderr", "val/kid", "val/fid_floor", "val/fid_ceiling"} <= r.keys() for r in points)
    milestone = read_jsonl(run_dir / "results.jsonl")[1]  # DDPM, NFE 2, n = 20, at step 12 too
    assert milestone["kind"] == "milestone" and milestone["val/fid"] == points[0]["val/fid"]
    evaluate.main([*command, "--sampler", "ddpm", "--n", "10"])
    assert calls[5:] == [("ddpm", 2), ("ddpm", 4)]  # another n is another point
    other = run_with_fid("E1")
    evaluate.main([str(other), *command[1:]])
    capsys.readouterr()
    evaluate.main([str(run_dir), "--against", str(other)])
    assert [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()][-4:] == ["frontier"] * 4


def test_a_resumed_run_keeps_its_frontier(run_with_fid, monkeypatch):
    monkeypatch.setattr("evaluate.feature_network", tiny_network)
    run_dir = run_with_fid("E2")
    evaluate.main([str(run_dir), "--frontier", "2", "--sampler", "ddim", "--n", "20", "--device", "cpu"])
    (run_dir / "checkpoints" / "last.pt").unlink()  # so that the resume starts at step 10
    before = read_jsonl(run_dir / "results.jsonl")
    run_with_fid("E2", flags=["--resume"])
    after = read_jsonl(run_dir / "results.jsonl")
    assert sorted(map(str, after)) == sorted(map(str, before)) and len(after) == 4


# ---- curvature ----

@pytest.fixture
def probe(net):
    config = load_config("E6", overrides=[*TINY, "curvature.num_probes=3", "loss.gamma=2"])
    return config, net, make_shapes(50)


def test_both_traces_and_the_bins_come_from_the_same_forms(probe, monkeypatch):
    config, net, images = probe
    seen, real = [], evaluate.quadratic_forms
    monkeypatch.setattr(evaluate, "quadratic_forms", lambda losses, *a: (seen.append((losses, real(losses, *a))),
                                                                         seen[-1][1])[1])
    record = curvature_record(config, 7, net, D, images)
    forms, t = torch.stack([f for _, f in seen]), torch.stack([losses.args[2] for losses, _ in seen])
    w = loss_weights(D.snr, "minsnr", 2.0)[t]
    for key, values in (("hutch_trace", w * forms), ("hutch_trace_unweighted", forms)):
        expected = summarise(values.mean(dim=1).tolist())
        for name in ("mean", "std", "stderr", "samples"):
            assert record[f"curvature/{key}_{name}"] == pytest.approx(getattr(expected, name))
    assert sorted((t.flatten() * 12 // 1000).tolist()) == list(range(12))  # one t in each of P * B strata
    assert all(row.diff().min() > 150 for row in t)  # and each probe spread over all of [0, T)
    assert record["curvature/snr_mean_samples"] == pytest.approx(D.snr[t].mean(dim=1).tolist())
    for b, value in enumerate(record["curvature/hutch_trace_t_bins"]):
        assert value == pytest.approx(forms[(t >= 125 * b) & (t < 125 * (b + 1))].mean().item())
    rng, B = generator(0, "curvature", 0), config.train.batch_size  # v is drawn after images, t and eps
    torch.randint(len(images), (B,), generator=rng)
    torch.rand(B, generator=rng, dtype=torch.float64)
    torch.randn(B, 3, 32, 32, generator=rng)
    direct = hutchinson_trace(lambda _: (w[0].float() * seen[0][0]()).mean(), net.eval().parameters(), 1, rng)
    assert direct.mean == pytest.approx((w * forms).mean(dim=1)[0].item(), rel=1e-3)


def test_probes_are_one_set_for_all_steps_arms_and_seeds(probe):
    config, net, images = probe
    first = curvature_record(config, 1, net, D, images)
    assert curvature_record(config, 2, net, D, images) == {**first, "step": 2}
    arm = load_config("E5", overrides=[*TINY, "curvature.num_probes=3", "seed=5"])
    other, key = curvature_record(arm, 1, net, D, images), "curvature/hutch_trace_unweighted_mean"
    assert other[key] == first[key] == other["curvature/hutch_trace_mean"] != first["curvature/hutch_trace_mean"]


def test_a_probe_leaves_nothing_behind(probe):
    config, net, images = probe
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    weights, state = [p.detach().clone() for p in net.parameters()], torch.get_rng_state()
    curvature_record(config, 1, net, D, images)
    assert net.training and torch.equal(state, torch.get_rng_state())
    for p, w in zip(net.parameters(), weights, strict=True):
        assert torch.equal(p, w) and torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad


def test_a_run_is_the_same_with_and_without_the_probe(run_train, capsys):
    common = ("log.every=1", "curvature.num_probes=2")
    on = run_train("E6", *common, "curvature.every=6", out="on")
    off = run_train("E6", *common, "curvature.every=0", out="off")
    assert (on / "loss.jsonl").read_bytes() == (off / "loss.jsonl").read_bytes()
    states = [load_checkpoint(run / "checkpoints") for run in (on, off)]
    for key in ("model", "ema"):
        assert all(torch.equal(states[0][key][k], states[1][key][k]) for k in states[0][key])
    assert not (off / "curvature.jsonl").exists()
    capsys.readouterr()
    printed = ""
    for flags in (["--step", "6"], []):
        assert evaluate.main([str(on), "--curvature", *flags, "--device", "cpu"]) == 0
        printed += capsys.readouterr().out
    assert printed == (on / "curvature.jsonl").read_text()
