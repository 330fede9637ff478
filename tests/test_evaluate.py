import json

import numpy as np
import pytest
import torch
from conftest import tiny_network

import evaluate
from checkpoint import read_jsonl
from data import make_shapes
from diffusion import Diffusion, linear_betas
from evaluate import Distances, RunError, check_device, eval_mode, paired_differences, per_t_profile, sample_images
from fid import FeatureError, FeatureStats, extract, frechet_distance, kid
from model import UNet
from rng import seed_global

D = Diffusion(linear_betas())


@pytest.fixture
def net():
    """A small network whose output depends on x_t and t, with dropout on."""
    seed_global(0, "init")
    net = UNet(8, (1, 2), 1, (), 0.5)
    torch.nn.init.normal_(net.conv_out.weight, std=0.02)
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
    with pytest.raises(ValueError, match="sampler 'euler'"):
        sample_images(net, D, 2, "euler", 5, seed=1)


def test_profile_of_a_network_that_says_zero():
    """Then the error is the mean square of eps, 1 at every t."""
    ts, mse = per_t_profile(UNet(8, (1,), 1, ()), D, make_shapes(8))
    assert len(ts) == 21 and ts[:3] == [0, 50, 100] and ts[-1] == 999
    assert mse == pytest.approx([1.0] * 21, abs=0.05) and len(set(mse)) == 21  # another eps at each t


def test_profile_is_a_fixed_measuring_stick(net, monkeypatch):
    images = make_shapes(6)
    first = per_t_profile(net, D, images)
    torch.manual_seed(9)  # dropout is off, and nothing depends on the global generator
    assert per_t_profile(net, D, images) == first and net.training
    monkeypatch.setattr(evaluate, "CHUNK", 4)  # nor on how the images are batched, beyond rounding
    assert per_t_profile(net, D, images)[1] == pytest.approx(first[1], rel=1e-5)


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
    with pytest.raises(RunError, match="not a run directory"):
        evaluate.main([str(tmp_path / "nowhere")])
    for name in ("cuda:77", "gpu", "meta"):
        with pytest.raises(RunError, match=f"--device {name}"):
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
    assert record["floor_test"] == pytest.approx(frechet_distance(*moments[2], *moments[1]), rel=1e-4)
    assert record["val/kid"] == pytest.approx(kid(f[0], f[1], subset_size=100)[0], rel=1e-6)
    assert record["floor"] < record["floor_test"] < record["ceiling"] and record["val/fid"] < record["ceiling"]
    assert record["kid_floor_test"] < record["kid_ceiling"]
    assert estimates["val/fid"].stderr == record["val/fid_stderr"] > 0


def test_a_set_too_small_for_a_floor_has_none(distances):
    context = distances.context(250)  # there are 200 test images
    assert context["floor_test"] is None and context["floor"] > 0 and context["ceiling"] > 0


def test_statistics_are_made_once_and_stale_ones_are_refused(distances, monkeypatch):
    reference, context = distances.reference, distances.context(50)
    assert reference.n == 300 and np.array_equal(reference.sample, extract(tiny_network(), distances.train).numpy())
    again = Distances(tiny_network(), "shapes", distances.train, distances.test, distances.root)
    monkeypatch.setattr(evaluate, "extract", None)  # would fail if called
    assert np.array_equal(again.reference.cov, reference.cov) and again.context(50) == context

    other_images = Distances(tiny_network(), "shapes", distances.train + 1, distances.test, distances.root)
    with pytest.raises(RunError, match="made with data_hash"):
        _ = other_images.reference
    other_weights = tiny_network()
    other_weights.weights_hash = "other"
    with pytest.raises(RunError, match="made with weights_hash"):
        _ = Distances(other_weights, "shapes", distances.train, distances.test, distances.root).reference


def test_statistics_of_another_dimension_are_refused_before_training(distances):
    distances.check_cache()  # nothing cached, nothing to refuse
    distances.root.mkdir()
    np.savez(distances.root / "shapes_inception_train.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.warns(UserWarning, match="unknown origin"), pytest.raises(RunError, match="5 features, but inception"):
        distances.check_cache()


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
        assert {"nfe", "features", "reference", "floor", "ceiling", "val/fid_stderr", "val/kid"} <= r.keys()
    milestones = [r["val/fid"] for r in results[:2]]
    assert results[2]["val/fid_min"] == min(milestones) and "val/fid_min" not in results[0]
    assert results[2]["val/fid_min_step"] == [6, 12][milestones.index(min(milestones))]


def test_a_milestone_at_the_end_is_the_one_that_an_evaluation_of_its_own_gives(run_with_fid, monkeypatch):
    """Whether its samples are drawn alone or are the first chunks of the final ones."""
    monkeypatch.setattr("train.CHUNK", 10)
    monkeypatch.setattr("evaluate.CHUNK", 10)
    shared = run_with_fid("E1", out="a")
    monkeypatch.setattr("train.CHUNK", 7)  # 20 is no multiple of 7: drawn alone
    alone = run_with_fid("E1", out="b")
    assert (shared / "results.jsonl").read_bytes() == (alone / "results.jsonl").read_bytes()


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
    with pytest.raises(RunError, match="different seeds"):
        paired_differences(a, other_seed)


def test_the_distance_command_repeats_a_milestone(run_with_fid, monkeypatch, capsys):
    run_dir = run_with_fid("E1")
    monkeypatch.setattr("evaluate.feature_network", tiny_network)
    capsys.readouterr()
    evaluate.main([str(run_dir), "--distance", "--device", "cpu"])
    printed, milestone = json.loads(capsys.readouterr().out), read_jsonl(run_dir / "results.jsonl")[1]
    assert milestone["step"] == 12 and printed.items() <= milestone.items()
    evaluate.main([str(run_dir), "--distance", "--n", "10", "--sampler", "ddim", "--nfe", "3", "--device", "cpu"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["n"], printed["sampler"], printed["nfe"]) == (10, "ddim", 3)
    with pytest.raises(RunError, match="--nfe 5000"):
        evaluate.main([str(run_dir), "--distance", "--nfe", "5000"])


def test_training_without_weights_is_refused_before_it_starts(run_train, tmp_path):
    with pytest.raises(FeatureError, match="w.pth: no such weights file.*eval.features=lite0"):
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
    assert calls == [("ddim", 2), ("ddim", 4), ("ddpm", 2), ("ddpm", 2), ("ddpm", 4)]  # what was there was not repeated
    evaluate.main(command)
    assert len(calls) == 5
    after = (run_dir / "results.jsonl").read_text()
    assert after.startswith(before)
    points = [r for r in read_jsonl(run_dir / "results.jsonl") if r["kind"] == "frontier"]
    assert [(r["sampler"], r["nfe"], r["n"], r["step"]) for r in points] == [
        ("ddim", 2, 20, 12), ("ddim", 4, 20, 12), ("ddpm", 2, 20, 12), ("ddpm", 4, 20, 12)]
    assert all({"val/fid_stderr", "val/kid", "floor", "ceiling"} <= r.keys() for r in points)
    milestone = read_jsonl(run_dir / "results.jsonl")[1]  # DDPM, NFE 2, n = 20, at step 12 too
    assert milestone["kind"] == "milestone" and milestone["val/fid"] == points[2]["val/fid"]
    evaluate.main([*command, "--samplers", "ddpm", "--n", "10"])
    assert calls[5:] == [("ddpm", 2), ("ddpm", 4)]  # another n is another point
    other = run_with_fid("E1")
    evaluate.main([str(other), *command[1:]])
    capsys.readouterr()
    evaluate.main([str(run_dir), "--against", str(other)])
    assert [json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()][-4:] == ["frontier"] * 4


def test_a_resumed_run_keeps_its_frontier(run_with_fid, monkeypatch):
    monkeypatch.setattr("evaluate.feature_network", tiny_network)
    run_dir = run_with_fid("E2")
    evaluate.main([str(run_dir), "--frontier", "2", "--samplers", "ddim", "--n", "20", "--device", "cpu"])
    run_with_fid("E2", "train.total_steps=15", flags=["--resume"])
    kinds = [(r["kind"], r["step"]) for r in read_jsonl(run_dir / "results.jsonl")]
    assert kinds == [("milestone", 6), ("milestone", 12), ("frontier", 12), ("final", 15)]
