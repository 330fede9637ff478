"""Figures of made-up runs: the lines that are drawn hold the numbers of the logs."""

import dataclasses
import inspect
import json
import shutil

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

import plots
from config import load_config, load_tables
from diffusion import PREDICTIONS, Diffusion, cosine_betas, linear_betas
from errors import UserError
from fid import METRICS, Estimate, metric_name
from runs import Run, find_runs, paired_differences, save_influence
from weighting import WEIGHTINGS, loss_weights

T = [0, 50, 500, 999]
TRACES = ("hutch_trace", "hutch_trace_unweighted")
FD, STDERR = "val/fd_lite0", "val/fd_lite0_stderr"
BLACK, RED, GREY, WHITE = "#000000", "#d55e00", "#777777", "#ffffff"  # of constant, and of minsnr with gamma 5


def write(path, name, records):
    (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(root, exp, seed=1077, *overrides, frontier_n=(20,)):
    """root/exp/seedSEED: 60 steps, logged every 2, milestones every 20, traces every 4; random numbers in all logs."""
    config = load_config(exp, overrides=[f"seed={seed}", "train.total_steps=60", "log.every=2", 'eval.features="lite0"',
                                         "model.base_channels=4", *overrides])
    path, rng = root / exp / f"seed{seed}", np.random.default_rng([*exp.encode(), seed])
    (path / "grids").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    write(path, "loss", [{"step": step} | {key: rng.uniform(0.1, 2) for key in (
        "train/eps_mse_mean", "train/grad_global_L2", "snr/mean")} for step in range(2, 61, 2)])
    write(path, "curvature", [{"step": step, "num_probes": 3, "batch_size": 4} | {
        f"curvature/{name}_{key}": low + rng.uniform()
        for name in TRACES for key, low in (("mean", 50), ("stderr", 1))} | {
        f"curvature/{key}_samples": rng.uniform(1, 9, 3).tolist() for key in ("snr_mean", "hutch_trace")}
        for step in range(4, 61, 4)])
    write(path, "per_t", [{"step": step, "n": 8, "t": T} | {
        f"eps_mse_{kind}": rng.uniform(0.1, 1, 4).tolist() for kind in ("raw", "ema")} for step in (20, 40, 60)])
    results, points = [], [*((step, "milestone", "ddpm", 50, 20) for step in (20, 40, 60)), *(
        (60, "final", sampler, 50, 30) for sampler in ("ddpm", "ddim")), *(
        (60, "frontier", sampler, nfe, n) for n in frontier_n for nfe in (5, 2) for sampler in ("ddim", "ddpm"))]
    for point in points:
        r = {"features": config.eval.features, "reference": "R", "precision": "fp32"}
        r |= zip(("step", "kind", "sampler", "nfe", "n"), point, strict=True)
        estimates = {metric_name(metric, r["features"]): Estimate(rng.uniform(100, 200), rng.uniform(1, 9), rng.normal(
            size=r["n"])) for metric in METRICS}
        save_influence(path, r, estimates)
        for name, (value, stderr, _) in estimates.items():
            r |= {name: value, f"{name}_stderr": stderr, f"{name}_floor": 20 + r["n"], f"{name}_ceiling": 900}
        results.append(r)
    write(path, "results", results)
    for step in (20, 60):
        Image.new("RGB", (2, 2), (seed % 256, step, int(exp[1]))).save(path / "grids" / f"step_{step:06d}_ddim20.png")
    return path


@pytest.fixture
def pair(tmp_path):
    """Runs of E5 (constant) and E6 (minsnr, gamma 5)."""
    return make_run(tmp_path, "E5"), make_run(tmp_path, "E6")


@pytest.fixture
def draw(tmp_path):
    return lambda kind, *exps, **options: plots.draw(kind, [*exps], tmp_path, **options)


def column(path, name, key, **where):
    """The values of a key in the lines of a log that have these other values."""
    return [r[key] for r in Run(path).log(name) if where.items() <= r.items()]


def drawn(ax, label):
    """[(x, y, half lengths of the error bars)] of the lines whose label begins so."""
    return [(*c.lines[0].get_data(), *([np.ptp(end, axis=0).max() / 2 for end in bars.get_segments()]
                                       for bars in c.lines[2]))
            for c in ax.containers if str(c.get_label()).startswith(label)]


def lines(ax, color, marker):
    return [line for line in ax.get_lines() if to_hex(line.get_color()) == color and line.get_marker() == marker]


def caption(fig):
    return " ".join(fig.get_supxlabel().split())


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def running_mean(y, half):
    return [np.mean(y[max(0, i - half):i + half + 1]) for i in range(len(y))]


def test_formulas(draw):
    fig = draw("weights_raw_and_normalised")
    one, raw, normalised = (line.get_ydata() for line in fig.axes[0].get_lines())
    assert (one == 1).all() and raw.max() == 1 and raw[0] == pytest.approx(5.001e-4, rel=1e-3)
    assert normalised.mean() == pytest.approx(1, abs=1e-12) and normalised[500] == pytest.approx(1.0952, abs=1e-4)
    assert all(fact in legend(fig)[1] for fact in ("minsnr 5.0", "0.913073", "t = 130"))
    curves = draw("weight_curves").axes[0].get_lines()
    assert [line.get_markevery() for line in curves] == [[259], [165], [130]]
    assert [line.get_ydata()[100] for line in curves] == pytest.approx([.1171, .3514, .5857], abs=1e-4)
    lines = {line.get_label(): line.get_ydata() for line in draw("snr_vs_t").axes[0].get_lines()}
    linear, cosine = lines["linear betas"], lines["cosine betas"]
    assert linear[0] == pytest.approx(9999) and linear[999] == pytest.approx(4.036e-5, rel=1e-3)
    assert (cosine[1:900] > linear[1:900]).all()
    assert [lines[f"$\\gamma$ = {gamma}"][0] for gamma in (1, 3, 5)] == [1, 3, 5]


def test_the_atlas_draws_every_weighting_in_every_prediction(draw):
    fig = draw("weight_atlas")
    on_eps, *shares = fig.axes
    curves = [[line.get_ydata() for line in ax.get_lines()] for ax in shares]
    assert len(legend(fig)) == len(on_eps.get_lines()) == len(WEIGHTINGS) + 2
    minsnr, of_v = (line.get_ydata() for line in on_eps.get_lines() if line.get_label() in (
        "minsnr 5.0", "constant, v-prediction"))
    assert minsnr[100] == pytest.approx(0.5857, abs=1e-4) and of_v[999] == pytest.approx(24778, rel=1e-4)
    for drawn_in, prediction in zip(curves, PREDICTIONS, strict=True):
        assert len(drawn_in) == len(WEIGHTINGS) and [y.mean() for y in drawn_in] == pytest.approx([1] * len(WEIGHTINGS))
        w = loss_weights(Diffusion(linear_betas()).snr, "p2", None, prediction)
        assert drawn_in[list(WEIGHTINGS).index("p2")] == pytest.approx((w / w.mean()).numpy())


def test_distances_with_errors_finals_floor_and_ceiling(pair, draw):
    fig = draw("distance_vs_steps", "E5", "E6")
    ax, below = fig.axes
    (x, y, error), = drawn(ax, "E6")
    assert x.tolist() == [20, 40, 60] and y.tolist() == column(pair[1], "results", FD, kind="milestone")
    assert error == pytest.approx(column(pair[1], "results", STDERR, kind="milestone"))
    stars = lines(ax, RED, "*")  # of the sampler of the milestones
    assert [star.get_ydata()[0] for star in stars] == column(pair[1], "results", FD, kind="final", sampler="ddpm")
    base, arm = (np.array(column(path, "results", FD, kind="milestone")) for path in pair)
    stderr = [d[STDERR] for d in paired_differences(*pair) if d["kind"] == "milestone"]
    (x, y, error), = drawn(below, "E6")
    assert x.tolist() == [20, 40, 60] and y == pytest.approx(100 * (arm / base - 1)) and not drawn(below, "E5")
    assert error == pytest.approx(100 * np.divide(stderr, base))
    assert [line.get_ydata()[0] for line in lines(ax, GREY, "None")] == [40, 900]  # at the n of the milestones
    assert ax.get_ylabel() == "Fréchet distance (lite0)" and ax.get_ylim()[0] == 0
    assert legend(fig) == ["E5: constant", "E6: minsnr, $\\gamma$ = 5"]
    for fact in ("milestone DDPM NFE 50, n = 20", "final DDPM NFE 50, n = 30", "lite0 features", "Seeds: 1077."):
        assert fact in caption(fig)


def test_only_inception_features_are_called_fid_and_features_do_not_mix(tmp_path, draw):
    make_run(tmp_path, "E5", 1077, 'eval.features="inception"')
    assert draw("distance_vs_steps", "E5").axes[0].get_ylabel() == "FID"
    make_run(tmp_path, "E6")
    for kind in ("distance_vs_steps", "curvature_vs_distance", "frontier"):
        with pytest.raises(UserError, match="features"):
            draw(kind, "E5", "E6")


def test_distance_and_loss(pair, tmp_path, draw):
    above, _, below = draw("distance_and_loss_vs_steps", "E5", "E6").axes
    assert drawn(above, "E5")[0][0].tolist() == [20, 40, 60]
    (x, y), = drawn(below, "E5")
    losses = column(pair[0], "loss", "train/eps_mse_mean")
    assert x.tolist() == list(range(2, 61, 2)) and y == pytest.approx(running_mean(losses, 2))
    assert len(draw("distance_and_loss_vs_steps", "E5").axes) == 2  # no difference without a second experiment


def test_gradient_norms_and_smoothing_over_a_twentieth_of_a_run(pair, tmp_path, draw):
    (ax,) = draw("grad_norm", "E5", "E6").axes
    norms = column(pair[1], "loss", "train/grad_global_L2")
    assert [dots.get_ydata().tolist() for dots in lines(ax, RED, ".")] == [norms]
    assert drawn(ax, "E6")[0][1] == pytest.approx(running_mean(norms, 2))
    assert lines(ax, GREY, "None")[0].get_ydata()[0] == 1  # where clipping begins
    shutil.rmtree(pair[1])
    make_run(tmp_path, "E6", 1077, "train.total_steps=280")  # a twentieth: 14 steps, 7 lines
    assert drawn(draw("grad_norm", "E6").axes[0], "E6")[0][1] == pytest.approx(running_mean(norms, 3))


def test_traces_with_their_band(pair, draw):
    fig = draw("curvature_vs_steps", "E5", "E6")
    for ax, name in zip(fig.axes, TRACES, strict=True):
        mean, error = (running_mean(column(pair[1], "curvature", f"curvature/{name}_{key}"), 2)
                       for key in ("mean", "stderr"))
        assert drawn(ax, "E6")[0][1] == pytest.approx(mean) and ax.get_ylim()[0] == 0
        bands = [collection.get_paths()[0].vertices for collection in ax.collections]
        ends = [bands[1][bands[1][:, 0] == step][:, 1] for step in (4, 32, 60)]
        assert [np.ptp(end) for end in ends] == pytest.approx([2 * error[i] for i in (0, 7, 14)])
        assert ax.get_ylim()[1] > max(band[:, 1].max() for band in bands)
    assert "3 probes of 4 images" in caption(fig)


def test_step_curves_are_the_panels_of_the_other_figures(pair, draw):
    (distance, _, loss), (norm,), (_, trace) = (draw(kind, "E5", "E6").axes for kind in (
        "distance_and_loss_vs_steps", "grad_norm", "curvature_vs_steps"))
    for ax, other in zip(draw("step_curves", "E5", "E6").axes, (loss, distance, norm, trace), strict=True):
        assert ax.get_ylabel() == other.get_ylabel()
        assert drawn(ax, "E6")[0][1].tolist() == drawn(other, "E6")[0][1].tolist()


def test_per_t_of_ema_weights_and_its_ratio_within_a_seed(pair, tmp_path, draw):
    seeds = pair, (make_run(tmp_path, "E5", 1078), make_run(tmp_path, "E6", 1078))
    make_run(tmp_path, "E6", 1079)  # has no baseline
    write(pair[0], "per_t", Run(pair[0]).log("per_t")[:2])  # so that step 40 is the last that all have
    fig = draw("per_t", "E5", "E6")
    upper, lower = (drawn(ax, "E6") for ax in fig.axes)
    assert len(upper) == 3 and len(lower) == 2 and len(legend(fig)) == 2
    for i, paths in enumerate(seeds):
        base, arm = (column(path, "per_t", "eps_mse_ema", step=40)[0] for path in paths)
        assert upper[i][0] == pytest.approx(T) and upper[i][1].tolist() == arm
        assert lower[i][1] == pytest.approx(np.divide(arm, base)) and (drawn(fig.axes[1], "E5")[i][1] == 1).all()
    for fact in ("step 40", "8 held-out images", "1077, 1078, 1079"):
        assert fact in caption(fig)


def test_effective_loss_has_the_weights_of_each_runs_schedule(tmp_path, draw):
    paths = make_run(tmp_path, "E9a"), make_run(tmp_path, "E9b", 1077, "loss.gamma=3.0")
    upper, lower = draw("effective_loss", "E9a", "E9b").axes
    w = loss_weights(Diffusion(cosine_betas()).snr, "minsnr", 3.0)[T].numpy()
    base, arm = (np.array(column(path, "per_t", "eps_mse_raw")[-1]) for path in paths)
    assert w[0] < 1e-3 and drawn(upper, "E9b")[0][1] == pytest.approx(w * arm)
    assert drawn(upper, "E9a")[0][1] == pytest.approx(base)
    assert drawn(lower, "E9b")[0][1] == pytest.approx(w * arm / base)


def test_effective_loss_of_v_prediction_is_the_weighted_mse_of_v(tmp_path, draw):
    path = make_run(tmp_path, "E9b", 1077, "diffusion.prediction=v")
    diffusion = Diffusion(cosine_betas())
    v_mse = np.array(column(path, "per_t", "eps_mse_raw")[-1]) / diffusion.alphas_cumprod[T].numpy()
    w = loss_weights(diffusion.snr, "minsnr", 5.0, "v")[T].numpy()
    assert drawn(draw("effective_loss", "E9b").axes[0], "E9b")[0][1] == pytest.approx(w * v_mse)


def test_gamma_is_named_only_where_it_is_read(tmp_path, draw):
    make_run(tmp_path, "E9b", 1077, "loss.weighting=p2")
    make_run(tmp_path, "E9a", 1077, "loss.weighting=soft_minsnr")
    assert legend(draw("per_t", "E9b", "E9a")) == ["E9b: p2", "E9a: soft_minsnr, $\\gamma$ = 5"]


def test_curvature_against_distance_in_percent_of_the_baseline(pair, draw):
    (ax,) = draw("curvature_vs_distance", "E5", "E6").axes
    (x, y, error), = drawn(ax, "E6")
    base, arm = ([column(path, "curvature", "curvature/hutch_trace_unweighted_mean", step=step)[0]
                  for step in (20, 40, 60)] for path in pair)
    assert x == pytest.approx(100 * (np.divide(arm, base) - 1)) and not drawn(ax, "E5")
    base, arm = (np.array(column(path, "results", FD, kind="milestone")) for path in pair)
    assert y == pytest.approx(100 * (arm / base - 1))
    stderr = [d[STDERR] for d in paired_differences(*pair) if d["kind"] == "milestone"]
    assert error == pytest.approx(100 * np.divide(stderr, base))
    assert [text.get_text() for text in ax.texts] == ["20", "40", "60"]
    with pytest.raises(UserError, match="pair of two experiments"):
        draw("curvature_vs_distance", "E5")


def test_snr_geometry(pair, draw):
    left, right = (drawn(ax, "E6")[0] for ax in draw("snr_geometry", "E5", "E6").axes)
    for values, key in zip(left, ("snr/mean", "train/grad_global_L2"), strict=True):
        assert values.tolist() == column(pair[1], "loss", key)[15:]
    samples = column(pair[1], "curvature", "curvature/hutch_trace_samples")
    assert right[0].tolist() == column(pair[1], "curvature", "curvature/snr_mean_samples")[-1]
    assert right[1] == pytest.approx(np.mean(samples[-5:], axis=0))


def test_frontier_and_paired_differences_in_percent_of_the_baseline(tmp_path, draw):
    pair = make_run(tmp_path, "E5", frontier_n=(20, 40, 80)), make_run(tmp_path, "E6", frontier_n=(20, 40))
    fig = draw("frontier", "E5", "E6")
    for sampler, dash in (("ddim", "--"), ("ddpm", "-")):
        where = {"kind": "frontier", "n": 40, "sampler": sampler}  # 40: the largest that both have
        name = f"E6: minsnr, $\\gamma$ = 5, {sampler.upper()}"
        base, arm = (column(path, "results", FD, **where)[::-1] for path in pair)  # NFE 2 is logged after 5
        (x, y, error), = drawn(fig.axes[0], name)
        assert x.tolist() == [2, 5] and y.tolist() == arm
        assert error == pytest.approx(column(pair[1], "results", STDERR, **where)[::-1])
        (_, y, error), = drawn(fig.axes[1], name)
        stderr = [d[STDERR] for d in paired_differences(*pair) if where.items() <= d.items()][::-1]
        assert y == pytest.approx(100 * (np.divide(arm, base) - 1))
        assert error == pytest.approx(100 * np.divide(stderr, base))
        assert {c.lines[0].get_linestyle() for ax in fig.axes for c in ax.containers if c.get_label() == name} == {dash}
    assert not drawn(fig.axes[1], "E5") and "step 60, n = 40, lite0" in caption(fig)


def test_frontier_leaves_out_runs_without_one(pair, tmp_path, draw):
    assert len(draw("frontier", "E5").axes) == 1
    make_run(tmp_path, "E5", 1078, frontier_n=())
    make_run(tmp_path, "E6", 1079)  # has one, but no baseline
    fig = draw("frontier", "E5", "E6")
    assert "Seeds: 1077, 1079." in caption(fig) and [len(ax.containers) for ax in fig.axes] == [6, 2]


def test_grids_have_a_row_per_sampler_and_the_data_for_scale(pair, tmp_path, draw):
    make_run(tmp_path, "E5", 1076)  # a seed of one experiment only
    for i, path in enumerate(pair):
        Image.new("RGB", (2, 2), (7, 7, i)).save(path / "grids" / "step_000060_ddpm50.png")
    assert [ax.get_title()[:2] for ax in draw("grids", "E5", "E6").axes] == ["E5", "E6"] * 2
    Image.new("RGB", (2, 2), (1, 2, 3)).save(pair[0] / "grids" / "data.png")
    fig = draw("grids", "E5", "E6")
    assert [ax.get_title()[:2] for ax in fig.axes] == ["tr", "E5", "E6", "", "E5", "E6"]  # training images once
    assert [ax.get_title()[-7:] for ax in fig.axes[1::3]] == ["DDIM 20", "DDPM 50"]
    colors = [tuple(image.get_array()[0, 0]) for ax in fig.axes for image in ax.images]
    assert colors == [(1, 2, 3), (1077 % 256, 60, 5), (1077 % 256, 60, 6), (7, 7, 0), (7, 7, 1)]
    assert "step 60" in caption(fig) and "Seeds: 1077." in caption(fig)


def test_an_arm_has_one_look_and_arms_differ_also_in_grey(pair, tmp_path):
    make_run(tmp_path, "E2")  # the arm of E6
    e5, e6, e2 = (find_runs(tmp_path, exp)[0] for exp in ("E5", "E6", "E2"))
    look = plots.looks([e6, e5, e2])
    assert look[e5]["color"] == BLACK and look[e6]["color"] == RED == plots.looks([e5, e2])[e2]["color"]
    make_run(tmp_path, "E5", 1078)
    faces = [look["markerfacecolor"] for look in plots.looks(find_runs(tmp_path, "E5")).values()]
    assert faces == [BLACK, "white"]  # of two seeds
    make_run(tmp_path, "E10b")
    labels = [look["label"] for look in plots.looks([e6, *find_runs(tmp_path, "E10b")]).values()]
    assert labels == ["E6: minsnr, $\\gamma$ = 5, eps", "E10b: minsnr, $\\gamma$ = 5, v"]
    assert look[e2]["color"] not in (BLACK, RED) and look[e6]["linewidth"] > look[e5]["linewidth"]
    every = [*plots.LOOKS.values(), *plots.SPARE]
    assert [len(set(part)) for part in zip(*every, strict=True)] == [len(every)] * 3
    assert np.ptp([np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)) for color in (BLACK, RED)]) > 0.2


@pytest.mark.parametrize("name, kind", [("results", "distance_vs_steps"), ("loss", "grad_norm"), ("per_t", "per_t"),
                                        ("curvature", "curvature_vs_steps"), ("results", "curvature_vs_distance"),
                                        ("frontier", "frontier"), ("curvature", "snr_geometry")])
def test_an_empty_log_is_named(pair, draw, name, kind):
    write(pair[1], name.replace("frontier", "results"), [])
    with pytest.raises(UserError, match=f"E6/seed1077.*{name}"):
        draw(kind, "E5", "E6")


def test_what_cannot_be_compared_is_refused(pair, tmp_path, draw):
    write(pair[1], "per_t", [r | {"n": 9} for r in Run(pair[1]).log("per_t")])
    write(pair[1], "results", [r | {"step": 59} for r in Run(pair[1]).log("results")])
    shutil.rmtree(pair[1] / "grids")
    make_run(tmp_path, "E4", 1078)
    for kind, exp in (("per_t", "E6"), ("effective_loss", "E6"), ("frontier", "E6"), ("grids", "E6"), ("grids", "E4")):
        with pytest.raises(UserError, match=f"{exp}/seed107.*in all"):
            draw(kind, "E5", exp)


def test_what_is_not_there_is_named(pair, draw):
    write(pair[1], "per_t", [{key: r[key] for key in r if key != "eps_mse_ema"} for r in Run(pair[1]).log("per_t")])
    for kind, exps, fact in (("per_t", ["E5", "E6"], "eps_mse_ema"), ("per_t", ["E5", "E8a", "E8b"], "E8a, E8b"),
                             ("per_t", [], "no run"), ("per_tt", ["E5"], "did you mean per_t")):
        with pytest.raises(UserError, match=fact):
            draw(kind, *exps)


def test_all_draws_what_it_can_and_lists_the_rest(pair, tmp_path, capsys):
    (pair[0] / "grids" / "step_000060_ddim20.png").write_bytes(b"no picture")
    (pair[1] / "curvature.jsonl").write_text("garbage\n")
    assert plots.main(["--all", "--runs", str(tmp_path)]) == 0
    names = {"weights", "weight_curves", "weight_atlas", "snr", "fid_vs_steps_e5e6", "frontier_e5e6", "grad_norm_10k"}
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}
    left_out = dict(line.split(": left out: ") for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert left_out.keys() == load_tables("figures").keys() - names
    for name, fact in (("curvature_vs_steps", "curvature.jsonl: line 1"), ("grids_e5e6", "step_000060_ddim20"),
                       ("steps_e8", "E8a, E8b, E8c")):
        assert fact in left_out[name]


def test_a_figure_that_was_asked_for_is_drawn_or_an_error(pair, tmp_path):
    out = ["--runs", str(tmp_path), "--out", str(tmp_path / "out")]
    assert plots.main(["--kind", "per_t", "--kind", "snr_vs_t", "--exps", "E5", "E6", *out]) == 0
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"per_t_E5_E6", "snr_vs_t_E5_E6"}
    for argv, fact in ((["steps_e8"], "steps_e8: no run of E8a"), (["fid_vs_step"], "did you mean fid_vs_steps")):
        with pytest.raises(UserError, match=fact):
            plots.main([*argv, *out])
    for argv in ([], ["--all", "snr"], ["snr", "--exps", "E5"]):
        with pytest.raises(SystemExit, match="2"):
            plots.main([*argv, *out])


def test_a_figure_is_the_same_file_each_time_and_has_no_date(pair, tmp_path):
    for folder in ("a", "b"):
        assert plots.main(["fid_vs_steps_e5e6", "--runs", str(tmp_path), "--out", str(tmp_path / folder)]) == 0
    for suffix in ("png", "svg"):
        a, b = ((tmp_path / folder / f"fid_vs_steps_e5e6.{suffix}").read_bytes() for folder in ("a", "b"))
        assert a == b and len(a) > 5000 and b"<dc:date>" not in a


def test_every_figure_of_the_experiments_has_a_kind_that_takes_its_options():
    for table in load_tables("figures").values():
        kind = table.pop("kind")
        assert ("runs" in table) == (kind not in plots.FORMULAS)
        inspect.signature(plots.FIGURES[kind]).bind(table.pop("runs", []), **table)
