import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from conftest import SMALLEST, TINY, set_flags, tiny_network

import evaluate
import train
from config import load_config
from curvature import hutchinson_trace, summarise
from data import grid_png, load_images, make_shapes
from diffusion import Diffusion, linear_betas
from distances import Distances, image_statistics
from errors import UserError
from evaluate import (
    best_mean_slope,
    curvature_record,
    per_t_profile,
    profile_timesteps,
    sample_images,
)
from fid import FeatureStats, extract, frechet_distance, kid
from model import UNet
from rng import generator, seed_global
from runs import load_run, paired_differences, read_jsonl
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
    net.middle.eval()
    modes = [m.training for m in net.modules()]
    for sampler in ("ddpm", "ddim"):
        few, many = (sample_images(net, D, n, sampler, 3, seed=1) for n in (4, 10))
        assert many.shape == (10, 3, 32, 32) and many.dtype == torch.uint8
        assert torch.equal(few, many[:4]) and not torch.equal(many[:4], many[4:8])
        assert not torch.equal(few, sample_images(net, D, 4, sampler, 3, seed=2))
    assert [m.training for m in net.modules()] == modes


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


def test_timesteps_of_the_profile():
    dense, even = profile_timesteps(1000, "dense"), profile_timesteps(1000, "even")
    assert len(even) == 21 and even[:3] == [0, 50, 100] and even[-1] == 999
    assert dense == sorted({*range(0, 151, 5), *even}) and len(dense) == 48
    assert profile_timesteps(7, "even") == profile_timesteps(7, "dense") == list(range(7))


def test_profile_is_a_fixed_measuring_stick(net):
    images = make_shapes(25)
    first, slopes = per_t_profile(net, D, images, [0, 500])
    torch.manual_seed(9)  # dropout is off, and nothing depends on the global generator
    assert per_t_profile(net, D, images, [0, 500]) == (first, slopes) and net.training
    eps = torch.randn(25, 3, 32, 32, generator=generator(0, "profile_eps", 1))  # against the formula, at t = 500
    ac = D.alphas_cumprod[500].float()
    with torch.no_grad():
        x_0 = images.float() / 127.5 - 1
        x_t = ac.sqrt() * x_0 + (1 - ac).sqrt() * eps
        output = net.eval()(x_t, torch.full((25,), 500))
    assert first[1] == pytest.approx((output - eps).square().mean().item(), rel=1e-4)
    of_v, _ = per_t_profile(net, Diffusion(linear_betas(), "v"), images, [0, 500])  # the same output taken for v
    eps_hat = (1 - ac).sqrt() * x_t + ac.sqrt() * output
    assert of_v[1] == pytest.approx((eps_hat - eps).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_slope_of_the_best_linear_denoiser_of_channel_means(prediction):
    """A network that knows best_mean_slope is found to have it, whatever it predicts; another slope is found too."""
    images, ts, d = make_shapes(400), [50, 500, 999], Diffusion(linear_betas(), prediction)
    best = best_mean_slope(D, images, ts)
    assert best[0] < 0.02 < best[1] < 0.2 < 0.9 < best[2] < 1

    class Linear(UNet):
        """eps_hat = slope * channel mean of x_t + offset."""
        def __init__(self, slopes, offset):
            super().__init__(8, (1,), 1, ())
            self.slopes, self.offset = dict(zip(ts, slopes, strict=True)), offset

        def forward(self, x_t, t):
            signal, noise = (a.item() ** 0.5 for a in (d.alphas_cumprod[t[0]], 1 - d.alphas_cumprod[t[0]]))
            eps_hat = self.slopes[t[0].item()] * x_t.mean(dim=(2, 3), keepdim=True) + self.offset + 0 * x_t
            return {"eps": eps_hat, "x0": (x_t - noise * eps_hat) / signal,
                    "v": (eps_hat - noise * x_t) / signal}[prediction]

    (least, slope), (more, other) = (per_t_profile(Linear(*args), d, images, ts)
                                     for args in ((best, 0), ([0.3] * 3, 1)))
    assert slope == pytest.approx(best, rel=1e-3) and other == pytest.approx([0.3] * 3, rel=1e-3)
    assert all(x < y for x, y in zip(least, more, strict=True))
    a = images.double().mean(dim=(2, 3)) / 127.5  # eps of exactly the variance and correlation that are expected
    a = (a - a.mean(dim=0)).flatten()
    eps = torch.randn(len(a), dtype=torch.float64, generator=generator(1, "test"))
    eps -= (eps @ a) / (a @ a) * a
    eps *= (399 * 3 / 1024) ** 0.5 / eps.norm()
    for t, expected in zip(ts, best, strict=True):
        ac = D.alphas_cumprod[t]
        x_t = ac.sqrt() * a + (1 - ac).sqrt() * eps
        assert (x_t @ eps) / (x_t @ x_t) == pytest.approx(expected, rel=1e-4)


def test_a_distance_is_told_with_its_error_and_what_it_is_held_against():
    r = {"features": "lite0", "sampler": "ddim", "nfe": 50, "n": 2000, "val/fd_lite0": 123.45,
         "val/fd_lite0_stderr": 2.5, "val/fd_lite0_floor": 51.2, "val/fd_lite0_ceiling": None}
    text = evaluate.sentence(r)
    assert all(fact in text for fact in ("DDIM 50", "2,000", "val/fd_lite0 123.5 +- 2.5", "training images 51.2"))
    assert "noise" not in text and "noise 900.0" in evaluate.sentence(r | {"val/fd_lite0_ceiling": 900.0})


def test_statistics_of_known_images():
    flat = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
    stripes = flat.clone()
    stripes[..., ::2] = 17  # 10 levels from column to column, none from row to row
    assert image_statistics(flat) == {"channel_mean_sd": 0, "neighbour_rms": 0}
    assert image_statistics(stripes)["neighbour_rms"] == pytest.approx(50**0.5)
    flat[0, 0] = 13  # one channel of one image: variances 18, 0, 0
    assert image_statistics(flat)["channel_mean_sd"] == pytest.approx(6**0.5)


@pytest.mark.parametrize("flags", [
    ["run", "--n", "10"], ["run", "--curvature", "--nfe", "5"], ["run", "--sampler", "ddim"], ["run", "--seed", "1"],
    ["run", "--frontier", "2", "--seed", "1"], ["run", "--probes", "4"], ["run", "--curvature", "--probes", "1"],
    ["run", "--distance", "--n", "1"], ["--stats", "shapes", "--nfe", "5"],
    ["--stats", "shapes", "--features", "lite0", "--weights", "x"], [], ["run", "--stats", "shapes"],
    *(["--diffusers", "DIR", *more] for more in ([], ["--frontier", "2"], ["--curvature"], ["--distance", "run"],
                                                 ["--distance", "--step", "1"], ["--distance", "--stats", "shapes"])),
])
def test_options_without_effect_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(flags)
    assert stop.value.code == 2 and "error" in capsys.readouterr().err


# ---- distances ----

@pytest.fixture
def distances(tmp_path):
    return Distances(tiny_network(), "shapes", make_shapes(300), make_shapes(200, "test"), tmp_path / "stats")


def test_a_distance_comes_with_its_context(distances):
    samples = make_shapes(400)[300:]
    record, estimates = distances.measure(samples, extract(tiny_network(), samples).numpy())
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


def test_statistics_and_context_are_made_once(distances, monkeypatch):
    reference, context = distances.reference, distances.context(50)
    assert reference.n == 300 and np.array_equal(reference.sample, extract(tiny_network(), distances.train).numpy())
    args = (tiny_network(), "shapes", distances.train, distances.test, distances.root)
    cache = json.loads(distances.context_path.read_text())
    distances.context_path.write_text(json.dumps(cache | {"origin": {"weights_hash": "other"}, "50": {}}))
    assert Distances(*args).context(50) == context  # made again, since it was that of another network
    older = {key: value for key, value in context.items() if "kid" not in key}
    distances.context_path.write_text(json.dumps(cache | {"50": older}))
    assert Distances(*args).context(50) == context  # made before there was KID
    monkeypatch.setattr("distances.extract", None)  # would fail if called
    again = Distances(*args)
    assert np.array_equal(again.reference.cov, reference.cov) and again.context(50) == context


@pytest.mark.filterwarnings("ignore:.*unknown origin")
@pytest.mark.parametrize(("fact", "change"), [
    ("another data_hash", lambda d: setattr(d, "train", d.train + 1)),
    ("another weights_hash", lambda d: setattr(d.network, "weights_hash", "other")),
    ("another features", lambda d: (setattr(d.network, "name", "lite0"),
                                    d.reference_path.rename(d.root / "shapes_lite0_train.npz"))),
    ("another dim", lambda d: np.savez(d.reference_path, mu=np.zeros(5), sigma=np.eye(5))),
    ("shapes_inception_train.npz is not a folder", lambda d: setattr(d, "root", d.reference_path / "stats")),
])
def test_statistics_of_something_else_are_refused(distances, fact, change):
    _ = distances.reference
    change(distances)
    with pytest.raises(UserError, match=fact):
        Distances(distances.network, "shapes", distances.train, distances.test, distances.root)


def test_statistics_published_elsewhere_are_used_with_a_warning(distances):
    distances.root.mkdir()
    np.savez(distances.root / "shapes_inception_train.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.warns(UserWarning, match="unknown origin"):
        distances = Distances(tiny_network(), "shapes", distances.train, distances.test, distances.root)
        record, _ = distances.measure(make_shapes(50), extract(tiny_network(), make_shapes(50)).numpy())
    assert record["reference"] == "shapes train, n = unknown"
    assert record["val/fid"] == pytest.approx(frechet_distance(
        *(lambda s: (s.mean, s.cov))(FeatureStats(6).update(extract(tiny_network(), make_shapes(50)))),
        np.zeros(6), np.eye(6)), rel=1e-9)


# ---- in training, and the command ----

ARMS = set_flags(*TINY, *SMALLEST, "train.lr=1e-2", "ema.decay=0.9", "eval.features=inception", "eval.n_samples=20",
                 "curvature.every=6", "curvature.num_probes=2", "eval.nfe=3")


images_once = cache(load_images)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """E3 and E4 with distances. 20 samples are two whole chunks; those at the end are 15 of E3 and 10 of E4."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "feature_network", tiny_network)
        patch.setattr(train, "load_images", images_once)
        patch.setattr(evaluate, "CHUNK", 10)
        for exp, *own in (("E3", "eval.final_n_samples=15"), ("E4", "eval.final_n_samples=10", "eval.profile_t=dense")):
            assert train.main(["--exp", exp, "--device", "cpu", "--out", str(root / "runs"), *ARMS,
                               *set_flags(f"eval.stats_root='{root}/stats'", *own)]) == 0
    return root / "runs"


@pytest.fixture
def arms(trained, tmp_path, monkeypatch):
    """A copy of both runs."""
    monkeypatch.setattr(evaluate, "feature_network", tiny_network)
    monkeypatch.setattr(evaluate, "load_images", images_once)
    monkeypatch.setattr(evaluate, "CHUNK", 10)
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs" / "E3" / "seed1077", tmp_path / "runs" / "E4" / "seed1077"


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """What evaluate.py prints, one record a line. It writes to this folder's `stats`, never where the run says."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        capsys.readouterr()
        assert evaluate.main([*map(str, args), "--device", "cpu"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    yield run
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "stats"}


def test_distances_in_training(arms):
    results = read_jsonl(arms[1] / "results.jsonl")
    assert [(r["step"], r["kind"], r["sampler"], r["n"]) for r in results] == [
        (6, "milestone", "ddpm", 20), (12, "milestone", "ddpm", 20),
        (12, "final", "ddpm", 10), (12, "final", "ddim", 10)]
    assert sorted(path.name for path in (arms[1] / "grids").iterdir()) == [
        "data.png", "step_000006_ddim2.png", "step_000006_ddpm3.png", "step_000012_ddim2.png",
        "step_000012_ddim3.png", "step_000012_ddpm3.png"]
    config, _, _, ema, diffusion = load_run(arms[1], "cpu", 6)
    samples = sample_images(ema, diffusion, 20, "ddpm", 3, config.seed)[:config.grid.n]
    assert (arms[1] / "grids" / "step_000006_ddpm3.png").read_bytes() == grid_png(samples)
    metrics = {f"val/{name}{part}" for name in ("fid", "kid")
               for part in ("", "_stderr", "_floor", "_floor_test", "_ceiling")}
    for r, profile in zip(results, [read_jsonl(arms[1] / "per_t.jsonl")[i] for i in (0, 1, 1, 1)], strict=True):
        assert r.keys() == metrics | {"step", "kind", "sampler", "nfe", "n", "features", "reference", "precision",
                                      "val/eps_mse_raw", "val/eps_mse_ema", *(
                                          f"samples/{name}{of}" for name in ("channel_mean_sd", "neighbour_rms")
                                          for of in ("", "_train"))}
        for key in ("eps_mse_raw", "eps_mse_ema"):
            assert r[f"val/{key}"] == pytest.approx(np.mean(profile[key]))
    assert len({r["val/fid"] for r in results}) == 4


def test_the_command_repeats_what_training_measured(arms, command):
    """At a milestone too, and whether samples were drawn alone or are the first of more."""
    for run in arms:
        for flags, log in (((), "per_t.jsonl"), (("--curvature",), "curvature.jsonl")):
            assert command(run, *flags, "--step", 6) + command(run, *flags) == read_jsonl(run / log)
    assert [read_jsonl(run / "per_t.jsonl")[0]["t"] for run in arms] == [
        profile_timesteps(1000, kind) for kind in ("even", "dense")]
    for run, n in zip(arms, (15, 10), strict=True):
        results = read_jsonl(run / "results.jsonl")
        for r, flags in zip(results, (("--step", 6), (), ("--n", n), ("--n", n, "--sampler", "ddim")), strict=False):
            printed, = command(run, "--distance", *flags)
            assert printed.pop("seed") == 1077 and printed.items() <= r.items()
    printed, = command(arms[0], "--distance", "--seed", 5, "--nfe", 2)
    assert (printed["seed"], printed["nfe"], printed["n"]) == (5, 2, 20)
    assert command(arms[0], "--distance", "--seed", 5)[0]["val/fid"] not in [
        r["val/fid"] for r in (printed, *read_jsonl(arms[0] / "results.jsonl"))]
    with pytest.raises(UserError, match="NFE 5000"):
        command(arms[0], "--distance", "--nfe", 5000)


def test_the_frontier_is_appended_point_by_point(arms, command, monkeypatch):
    other, run_dir = arms
    before, real, calls = (run_dir / "results.jsonl").read_text(), evaluate.sample_images, []

    def sample_images(model, diffusion, n, sampler, nfe, *args, **kwargs):
        calls.append((sampler, nfe))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, diffusion, n, sampler, nfe, *args, **kwargs)

    monkeypatch.setattr(evaluate, "sample_images", sample_images)
    flags = ("--frontier", "3,4", "--n", 20)
    with pytest.raises(KeyboardInterrupt):
        command(run_dir, *flags)
    points = command(run_dir, *flags)
    assert calls == [("ddpm", 3), ("ddpm", 4), ("ddim", 3), ("ddim", 3), ("ddim", 4)]  # what was there was not repeated
    assert command(run_dir, *flags) == points and len(calls) == 5
    assert (run_dir / "results.jsonl").read_text().startswith(before)
    milestone, *_, = (r for r in read_jsonl(run_dir / "results.jsonl") if (r["step"], r["kind"]) == (12, "milestone"))
    assert [r for r in read_jsonl(run_dir / "results.jsonl") if r["kind"] == "frontier"] == points
    assert [(r["sampler"], r["nfe"], r["n"], r["step"]) for r in points] == [
        ("ddpm", 3, 20, 12), ("ddpm", 4, 20, 12), ("ddim", 3, 20, 12), ("ddim", 4, 20, 12)]
    means = {"val/eps_mse_raw", "val/eps_mse_ema"}
    assert {**points[0], "kind": "milestone"} == {key: r for key, r in milestone.items() if key not in means}
    command(run_dir, "--frontier", 3, "--sampler", "ddpm", "--n", 10)
    command(run_dir, "--frontier", 3, "--sampler", "ddpm", "--n", 20, "--step", 6)
    assert calls[5:] == [("ddpm", 3)] * 2  # another n or step is another point
    command(other, "--frontier", "3,4", "--n", 20, "--sampler", "ddim")
    pairs = [(d["kind"], d["nfe"]) for d in paired_differences(other, run_dir)]
    assert pairs == [("milestone", 3)] * 2 + [("frontier", 3), ("frontier", 4)]


def test_traces_with_more_probes_are_appended_once(arms, command, monkeypatch):
    run_dir, (logged,) = arms[1], read_jsonl(arms[1] / "curvature.jsonl")[:1]
    three = ("--curvature", "--probes", 3)
    traces = [*command(run_dir, *three, "--step", 6), *command(run_dir, *three)]
    assert [(r["step"], len(r["curvature/hutch_trace_samples"])) for r in traces] == [(6, 3), (12, 3)]
    monkeypatch.setattr(evaluate, "quadratic_forms", None)  # what is there is not computed again
    assert command(run_dir, *three) == traces[1:]
    monkeypatch.undo()
    two, = command(run_dir, "--curvature", "--probes", 2, "--step", 6)  # another number is another line
    assert two == logged and read_jsonl(run_dir / "traces.jsonl") == [*traces, two]


def test_a_resumed_run_keeps_its_frontier(arms, command, trained, monkeypatch):
    run_dir = arms[0]
    command(run_dir, "--frontier", 2, "--sampler", "ddim", "--n", 20)
    (run_dir / "checkpoints" / "last.pt").unlink()  # so that the resume starts at step 10
    before = read_jsonl(run_dir / "results.jsonl")
    monkeypatch.setattr(train, "feature_network", tiny_network)
    assert train.main(["--exp", "E3", "--device", "cpu", "--out", str(run_dir.parents[1]), "--resume", *ARMS,
                       *set_flags(f"eval.stats_root='{trained.parent}/stats'", "eval.final_n_samples=15")]) == 0
    assert sorted(map(str, read_jsonl(run_dir / "results.jsonl"))) == sorted(map(str, before)) and len(before) == 4


# ---- curvature ----

@pytest.fixture
def probe(net):
    config = load_config("E6", overrides=[*TINY, "curvature.num_probes=3", "loss.gamma=2"])
    return config, net, make_shapes(50)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_both_traces_and_the_bins_come_from_the_same_forms(probe, monkeypatch, prediction):
    (config, net, images), d = probe, Diffusion(linear_betas(), prediction)
    seen, real = [], evaluate.quadratic_forms
    monkeypatch.setattr(evaluate, "quadratic_forms", lambda losses, *a: (seen.append((losses, real(losses, *a))),
                                                                         seen[-1][1])[1])
    record = curvature_record(config, 7, net, d, images)
    assert all(losses.func == d.mse for losses, _ in seen)
    forms, t = torch.stack([f for _, f in seen]), torch.stack([losses.args[2] for losses, _ in seen])
    w = loss_weights(d.snr, "minsnr", 2.0, prediction)[t]
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
