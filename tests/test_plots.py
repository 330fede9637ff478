"""Figures of the recorded runs in tests/runs (made by record_runs.py): what is drawn, not that a file appeared."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.colors import to_hex, to_rgb
from matplotlib.container import ErrorbarContainer

import plots
from config import ConfigError, load_tables
from diffusion import Diffusion, linear_betas
from evaluate import RunError, find_runs, influence_path, paired_differences
from weighting import loss_weights

RECORDED = ROOT / "tests" / "runs"


@pytest.fixture
def one_seed(tmp_path):
    """The recorded runs of seed 1077, as files that a test may change."""
    for exp in ("E5", "E6"):
        shutil.copytree(RECORDED / exp / "seed1077", tmp_path / exp / "seed1077")
    return tmp_path


def records(root, exp, name, seed=1077):
    return [json.loads(line) for line in (root / exp / f"seed{seed}" / f"{name}.jsonl").read_text().splitlines()]


def lines_of(ax, color):
    return [line for line in ax.get_lines() if to_hex(line.get_color()) == color]


def bars_of(ax):
    return [c for c in ax.containers if isinstance(c, ErrorbarContainer)]


def legend_texts(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def caption(fig):
    return " ".join(fig._supxlabel.get_text().split())


E5, E6 = "#000000", "#d55e00"


# ---- from formulas ----

def test_weights_raw_and_normalised():
    fig = plots.draw("weights_raw_and_normalised", [], RECORDED)
    one, raw, normalised = (line.get_ydata() for line in fig.axes[0].get_lines())
    assert (one == 1).all() and raw.max() == 1 and raw[0] == pytest.approx(5.001e-4, rel=1e-3)
    assert normalised.mean() == pytest.approx(1, abs=1e-12) and normalised.max() == pytest.approx(1.0952, abs=1e-4)
    assert "E_t[w] = 0.913073" in caption(fig) and "1.0952" in caption(fig)
    assert legend_texts(fig) == ["constant, mean 1", "minsnr, mean 0.9131", "minsnr_norm, mean 1"]


def test_weight_curves_mark_where_each_reaches_one():
    fig = plots.draw("weight_curves", [], RECORDED)
    marks = [line.get_xdata()[0] for line in fig.axes[0].get_lines() if line.get_linestyle() == "None"]
    assert marks == [259, 165, 130] and "259, 165, 130" in caption(fig)


def test_snr():
    fig = plots.draw("snr_vs_t", [], RECORDED)
    linear, cosine, *levels = (line.get_ydata() for line in fig.axes[0].get_lines())
    assert linear[0] == pytest.approx(9999) and linear[999] == pytest.approx(4.036e-5, rel=1e-3)
    assert (cosine[1:900] > linear[1:900]).all() and [level[0] for level in levels] == [1, 3, 5]
    assert fig.axes[0].get_yscale() == "log"


# ---- from runs ----

def test_distance_vs_steps(one_seed):
    fig = plots.draw("distance_vs_steps", ["E5", "E6"], one_seed)
    (ax,) = fig.axes
    milestones = [r for r in records(one_seed, "E6", "results") if r["kind"] == "milestone"]
    final = next(r for r in records(one_seed, "E6", "results") if r["kind"] == "final")
    drawn, star = (line for line in lines_of(ax, E6) if line.get_marker() in ("s", "*"))
    assert drawn.get_xdata().tolist() == [20, 40, 60]
    assert drawn.get_ydata().tolist() == [r["val/fd_lite0"] for r in milestones]
    assert star.get_marker() == "*" and star.get_ydata().tolist() == [final["val/fd_lite0"]]
    bars = [bar[2][0].get_segments() for bar in bars_of(ax)]
    assert len(bars) == 2 and len(bars[1]) == 3
    half = (bars[1][0][1][1] - bars[1][0][0][1]) / 2
    assert half == pytest.approx(milestones[0]["val/fd_lite0_stderr"])
    floor, ceiling = (line.get_ydata()[0] for line in ax.get_lines() if to_hex(line.get_color()) == "#777777")
    assert (floor, ceiling) == (milestones[0]["floor"], milestones[0]["ceiling"])
    assert [t.get_text() for t in ax.texts] == ["floor: training images", "ceiling: uniform noise"]
    assert ax.get_ylabel() == "Fréchet distance (lite0)" and ax.get_xlabel() == "training step"
    assert legend_texts(fig) == ["E5: constant", "E6: minsnr, $\\gamma$ = 5"]
    for text in ("DDPM NFE 2, n = 20, lite0 features", "n = 30", "not to be compared with them", "Seed 1077."):
        assert text in caption(fig)


def test_fid_is_named_fid_on_inception_features_only(one_seed):
    for exp in ("E5", "E6"):
        for name in ("config.json", "results.jsonl"):
            path = one_seed / exp / "seed1077" / name
            path.write_text(path.read_text().replace("fd_lite0", "fid").replace("lite0", "inception"))
    fig = plots.draw("distance_vs_steps", ["E5", "E6"], one_seed)
    assert fig.axes[0].get_ylabel() == "FID" and "inception features" in caption(fig)
    shutil.rmtree(one_seed / "E6")
    shutil.copytree(RECORDED / "E6" / "seed1077", one_seed / "E6" / "seed1077")
    with pytest.raises(RunError, match="features are inception, lite0"):
        plots.draw("distance_vs_steps", ["E5", "E6"], one_seed)


def test_distance_and_loss(one_seed):
    fig = plots.draw("distance_and_loss_vs_steps", ["E5", "E6"], one_seed, until=40)
    distance, loss = fig.axes
    assert lines_of(distance, E5)[0].get_xdata().tolist() == [20, 40]
    assert not [line for line in distance.get_lines() if line.get_marker() == "*"]  # the final is past `until`
    logged = [r for r in records(one_seed, "E5", "loss") if r["step"] <= 40]
    (drawn,) = lines_of(loss, E5)
    assert drawn.get_xdata().tolist() == [r["step"] for r in logged] and drawn.get_xdata()[-1] == 40
    values = [r["train/eps_mse_mean"] for r in logged]
    assert drawn.get_ydata()[5] == pytest.approx(np.mean(values[3:8]))
    assert drawn.get_ydata()[0] == pytest.approx(np.mean(values[:3]))
    assert loss.get_ylabel() == "train eps-MSE" and "running mean over 10 steps" in caption(fig)


def test_grad_norm(one_seed):
    (ax,) = plots.draw("grad_norm", ["E5", "E6"], one_seed).axes
    dots, smoothed = lines_of(ax, E6)
    norms = [r["train/grad_global_L2"] for r in records(one_seed, "E6", "loss")]
    assert dots.get_ydata().tolist() == norms and smoothed.get_ydata()[10] == pytest.approx(np.mean(norms[8:13]))
    assert lines_of(ax, "#777777")[0].get_ydata()[0] == 1.0 and ax.texts[0].get_text() == "clip"


def test_runs_that_log_often_are_not_drawn_less_smooth(one_seed):
    (run,) = plots.find_runs(one_seed, "E5")
    assert plots.lines_smoothed(run) == plots.SMOOTH and plots.smoothed_steps([run]) == "10"
    for steps, every, window in ((10_000, 100, 5), (5_000, 10, 25), (50_000, 100, 25)):
        path = one_seed / "E5" / "seed1077" / "config.json"
        config = json.loads(path.read_text())
        config["train"]["total_steps"], config["log"]["every"] = steps, every
        path.write_text(json.dumps(config))
        (run,) = plots.find_runs(one_seed, "E5")
        assert plots.lines_smoothed(run) == window


def test_per_t_and_effective_loss(one_seed):
    last = {exp: records(one_seed, exp, "per_t")[-1] for exp in ("E5", "E6")}
    fig = plots.draw("per_t", ["E5", "E6"], one_seed)
    profile, ratio = (lines_of(ax, E6)[0].get_ydata() for ax in fig.axes)
    assert profile.tolist() == last["E6"]["eps_mse_ema"] and "step 60 on 2 fixed" in caption(fig)
    np.testing.assert_allclose(ratio, np.divide(last["E6"]["eps_mse_ema"], last["E5"]["eps_mse_ema"]))
    (ax,) = plots.draw("effective_loss", ["E5", "E6"], one_seed).axes
    w = loss_weights(Diffusion(linear_betas()).snr, "minsnr", 5.0)[last["E6"]["t"]]
    np.testing.assert_allclose(lines_of(ax, E6)[0].get_ydata(), w * torch.tensor(last["E6"]["eps_mse_raw"]))
    assert lines_of(ax, E5)[0].get_ydata().tolist() == last["E5"]["eps_mse_raw"]


def test_curvature_vs_steps(one_seed):
    fig = plots.draw("curvature_vs_steps", ["E5", "E6"], one_seed)
    logged = records(one_seed, "E6", "curvature")
    for ax, key, title in zip(fig.axes, ("hutch_trace", "hutch_trace_unweighted"),
                              ("of the arm's own loss", "of the unweighted loss"), strict=True):
        mean = [r[f"curvature/{key}_mean"] for r in logged]
        error = [r[f"curvature/{key}_stderr"] for r in logged]
        (drawn,) = lines_of(ax, E6)
        assert drawn.get_ydata()[7] == pytest.approx(np.mean(mean[5:10])) and ax.get_title() == title
        band = ax.collections[1].get_paths()[0].vertices
        at = band[np.isclose(band[:, 0], logged[7]["step"])][:, 1]
        assert at.max() - at.min() == pytest.approx(2 * np.mean(error[5:10])) and ax.get_ylim()[0] == 0
        assert ax.get_ylim()[1] > band[:, 1].max()
    assert "4 probes of 4 images" in caption(fig)


def test_curvature_vs_distance(one_seed):
    fig = plots.draw("curvature_vs_distance", ["E5", "E6"], one_seed)
    traces = {r["step"]: r["curvature/hutch_trace_unweighted_mean"] for r in records(one_seed, "E5", "curvature")}
    drawn = lines_of(fig.axes[0], E5)[0]
    assert drawn.get_xdata().tolist() == [traces[20], traces[40], traces[60]]
    assert [t.get_text() for t in fig.axes[0].texts] == ["20", "60"] * 2 and len(bars_of(fig.axes[0])) == 2
    assert all(bar.has_xerr and bar.has_yerr for bar in bars_of(fig.axes[0]))


def test_step_curves(one_seed):
    fig = plots.draw("step_curves", ["E5", "E6"], one_seed)
    assert [ax.get_ylabel() for ax in fig.axes] == [
        "train eps-MSE", "Fréchet distance (lite0)", "gradient norm (global L2)", "Hessian trace (unweighted loss)"]
    assert all(lines_of(ax, E5) and lines_of(ax, E6) for ax in fig.axes)


def test_snr_geometry(one_seed):
    fig = plots.draw("snr_geometry", ["E5", "E6"], one_seed)
    logged, curvature = records(one_seed, "E6", "loss"), records(one_seed, "E6", "curvature")
    left, right = (lines_of(ax, E6)[0] for ax in fig.axes)
    assert left.get_xdata().tolist() == [r["snr/mean"] for r in logged[15:]] and left.get_linestyle() == "None"
    assert right.get_xdata().tolist() == curvature[-1]["curvature/snr_mean_samples"]
    np.testing.assert_allclose(right.get_ydata(),
                               np.mean([r["curvature/hutch_trace_samples"] for r in curvature[-5:]], axis=0))


def test_grids(one_seed):
    fig = plots.draw("grids", ["E5", "E6"], one_seed)
    assert [ax.get_title() for ax in fig.axes] == ["E5: constant", "E6: minsnr, $\\gamma$ = 5"]
    assert all(ax.images for ax in fig.axes) and "step 60, DDIM NFE 2" in caption(fig)
    titles = [ax.get_title() for ax in plots.draw("grids", ["E5"], RECORDED).axes]
    assert titles == ["E5: constant, seed 1077", "E5: constant, seed 1078"]
    shutil.copytree(RECORDED / "E6" / "seed1078", one_seed / "E6" / "seed1078")  # of one arm alone: not shown
    assert len(plots.draw("grids", ["E5", "E6"], one_seed).axes) == 2
    shutil.rmtree(one_seed / "E6" / "seed1077")
    with pytest.raises(RunError, match="no seed that all of E5, E6 have"):
        plots.draw("grids", ["E5", "E6"], one_seed)
    rows = plots.draw("grids", ["E5", "E6"], RECORDED)
    assert [ax.get_title()[-4:] for ax in rows.axes] == ["1077", "1077", "1078", "1078"]
    assert "in the same cell of each of a row." in caption(rows)


def test_frontier(one_seed):
    fig = plots.draw("frontier", ["E5", "E6"], one_seed)
    points = [r for r in records(one_seed, "E5", "results") if r["kind"] == "frontier"]
    by_dash = {line.get_linestyle(): line for line in lines_of(fig.axes[0], E5) if len(line.get_xdata()) == 2
               and line.get_marker() == "o"}
    for dash, sampler in (("-", "ddim"), ("--", "ddpm")):
        assert by_dash[dash].get_xdata().tolist() == [2, 5]
        assert by_dash[dash].get_ydata().tolist() == [r["val/fd_lite0"] for r in points if r["sampler"] == sampler]
    assert len(bars_of(fig.axes[0])) == 4 and fig.axes[0].get_xscale() == "log"
    assert legend_texts(fig)[2:] == ["DDIM", "DDPM"]
    paired = [d for d in paired_differences(*(one_seed / exp / "seed1077" for exp in ("E5", "E6")))
              if d["kind"] == "frontier"]
    assert len(paired) == len(points) and lines_of(fig.axes[1], E5)[0].get_ydata() == [0, 0]
    for dash, sampler in (("-", "ddim"), ("--", "ddpm")):
        ours, = (x for x in lines_of(fig.axes[1], E6) if x.get_marker() == "s" and x.get_linestyle() == dash)
        assert ours.get_ydata() == pytest.approx([100 * d["val/fd_lite0"] / r["val/fd_lite0"] for d, r in
                                                  zip(paired, points, strict=True) if r["sampler"] == sampler])
    low, high = bars_of(fig.axes[1])[0].lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(200 * paired[0]["val/fd_lite0_stderr"] / points[0]["val/fd_lite0"])


def test_a_frontier_of_one_arm_and_seeds_without_one(one_seed):
    assert len(plots.draw("frontier", ["E5"], one_seed).axes) == 1
    assert "One line per seed: 1077, 1078." in caption(plots.draw("frontier", ["E5", "E6"], RECORDED))
    for exp in ("E5", "E6"):
        shutil.copytree(RECORDED / exp / "seed1078", one_seed / exp / "seed1078")
        path = one_seed / exp / "seed1078" / "results.jsonl"
        path.write_text("".join(text for text in path.open() if "frontier" not in text))
    assert "Seed 1077." in caption(plots.draw("frontier", ["E5", "E6"], one_seed))
    path.write_text((RECORDED / "E6" / "seed1078" / "results.jsonl").read_text())  # of E6 alone
    with pytest.raises(RunError, match="nothing of E5 with seed 1078 to compare it with"):
        plots.draw("frontier", ["E5", "E6"], one_seed)


def test_frontiers_at_other_steps_are_not_paired(one_seed):
    path = one_seed / "E5" / "seed1077" / "results.jsonl"
    path.write_text("".join(json.dumps(r | {"step": 59} if r["kind"] == "frontier" else r) + "\n"
                            for r in records(one_seed, "E5", "results")))
    fig = plots.draw("frontier", ["E5", "E6"], one_seed)
    assert len(fig.axes) == 1 and "at step 59 and 60" in caption(fig) and "Below" not in caption(fig)


def test_several_seeds_are_several_lines_of_one_look_and_one_entry():
    fig = plots.draw("distance_vs_steps", ["E5", "E6"], RECORDED)
    assert len([line for line in lines_of(fig.axes[0], E5) if line.get_marker() == "o"]) == 2
    assert len(legend_texts(fig)) == 2 and "One line per seed: 1077, 1078." in caption(fig)


def test_an_arm_looks_the_same_in_every_figure_and_arms_differ_in_grey():
    def grey(color):
        return np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722))

    for arms in ([("constant", None), ("minsnr", 5.0)], [("minsnr", g) for g in (1.0, 3.0, 5.0)],
                 [("constant", None), ("minsnr", 5.0), ("minsnr_norm", 5.0)]):
        assert len({plots.LOOKS[a][1] for a in arms}) == len({plots.LOOKS[a][2] for a in arms}) == len(arms)
    assert abs(grey(E5) - grey(E6)) > 0.2
    runs = find_runs(RECORDED, "E6")[:1] + find_runs(RECORDED, "E5")[:1]
    assert plots.looks(runs)["E6"]["color"] == plots.looks(runs[:1])["E6"]["color"] == E6
    runs[1].exp, runs[1].config = "E3", runs[0].config  # a second arm of one weighting
    assert plots.looks(runs)["E3"]["color"] not in (E5, E6)


# ---- runs that are not what a figure needs ----

@pytest.mark.parametrize("name, kind", [("results", "distance_vs_steps"), ("loss", "grad_norm"), ("per_t", "per_t"),
                                        ("curvature", "curvature_vs_steps")])
@pytest.mark.parametrize("state", ["missing", "empty", "half a line"])
def test_a_log_without_a_line_is_named(one_seed, name, kind, state):
    log = one_seed / "E6" / "seed1077" / f"{name}.jsonl"
    content = log.read_text()
    log.unlink()
    if state != "missing":
        log.write_text(content[:20] if state == "half a line" else "")
    with pytest.raises(RunError, match=rf"E6/seed1077: no line in {name}\.jsonl yet"):
        plots.draw(kind, ["E5", "E6"], one_seed)


def test_what_else_may_be_missing(one_seed):
    with pytest.raises(RunError, match="no run of E8a"):
        plots.draw("per_t", ["E5", "E8a"], one_seed)
    shutil.rmtree(one_seed / "E6" / "seed1077" / "grids")
    with pytest.raises(RunError, match="no grid of one step in all of them"):
        plots.draw("grids", ["E5", "E6"], one_seed)
    results = one_seed / "E6" / "seed1077" / "results.jsonl"
    results.write_text("".join(line + "\n" for line in results.read_text().splitlines() if "frontier" not in line))
    with pytest.raises(RunError, match="no frontier; measure it by evaluate.py"):
        plots.draw("frontier", ["E5", "E6"], one_seed)
    per_t = one_seed / "E6" / "seed1077" / "per_t.jsonl"
    per_t.write_text(per_t.read_text().replace("eps_mse_ema", "mse"))
    with pytest.raises(RunError, match="lacks 'eps_mse_ema': of another version"):
        plots.draw("per_t", ["E5", "E6"], one_seed)
    (one_seed / "E6" / "seed1077" / "config.json").write_text("{")
    with pytest.raises(RunError, match="config.json: not readable as JSON"):
        plots.draw("per_t", ["E5", "E6"], one_seed)


# ---- the command ----

def test_all_draws_what_it_can_and_lists_the_rest(one_seed, capsys):
    assert plots.main(["--all", "--runs", str(one_seed)]) == 0
    drawn = {p.stem for p in (one_seed / "figures").iterdir()}
    assert drawn == {"weights", "weight_curves", "snr", "fid_vs_steps_e5e6", "curvature_vs_steps", "curvature_vs_fid",
                     "grids_e5e6", "frontier_e5e6"}
    assert {p.suffix for p in (one_seed / "figures").iterdir()} == {".png", ".svg"}
    out = capsys.readouterr().out
    names = load_tables("figures")
    for name in names.keys() - drawn:
        assert f"{name}: left out: no run of" in out


def test_one_figure_is_the_same_file_each_time(one_seed, tmp_path):
    for folder in ("a", "b"):
        assert plots.main(["fid_vs_steps_e5e6", "--runs", str(one_seed), "--out", str(tmp_path / folder)]) == 0
    for suffix in ("png", "svg"):
        a, b = ((tmp_path / folder / f"fid_vs_steps_e5e6.{suffix}").read_bytes() for folder in ("a", "b"))
        assert a == b and len(a) > 5000


def test_a_figure_that_was_asked_for_and_cannot_be_drawn_is_an_error(one_seed):
    with pytest.raises(RunError, match="steps_e8: left out: no run of E8a, E8b, E8c"):
        plots.main(["steps_e8", "--runs", str(one_seed)])
    with pytest.raises(RunError, match="unknown experiment 'E55'"):
        plots.main(["--kind", "per_t", "--exps", "E55", "--runs", str(one_seed)])


def test_a_damaged_run_does_not_keep_all_from_the_other_figures(one_seed, capsys):
    with open(one_seed / "E6" / "seed1077" / "curvature.jsonl", "a") as file:
        file.write("garbage\n")
    (one_seed / "E5" / "seed1077" / "grids" / "step_000060_ddim2.png").write_bytes(b"no picture")
    assert plots.main(["--all", "--runs", str(one_seed)]) == 0
    out = capsys.readouterr().out
    assert (one_seed / "figures" / "fid_vs_steps_e5e6.png").exists()
    assert re.search(r"curvature_vs_steps: left out: .*curvature\.jsonl: line 16 is not a JSON object", out)
    assert re.search(r"grids_e5e6: left out: cannot identify image file .*step_000060_ddim2", out)


def test_the_frontier_is_drawn_at_the_largest_n_that_all_have(one_seed):
    for exp in ("E5", "E6"):
        path = one_seed / exp / "seed1077" / "results.jsonl"
        points = [r for r in records(one_seed, exp, "results") if r["kind"] == "frontier"]
        for n in (40, 80)[:1 + (exp == "E5")]:  # n = 80 in one of them only
            path.write_text(path.read_text() + "".join(json.dumps(r | {"n": n}) + "\n" for r in points))
            for r in points:
                few = np.load(influence_path(path.parent, r))
                np.savez(influence_path(path.parent, r | {"n": n}), **{key: np.resize(few[key], n) for key in few})
    fig = plots.draw("frontier", ["E5", "E6"], one_seed)
    assert "n = 40," in caption(fig) and [len(bars_of(ax)) for ax in fig.axes] == [4, 2]


def test_profiles_are_compared_seed_by_seed(tmp_path):
    fig = plots.draw("per_t", ["E5", "E6"], RECORDED)
    ratios = [line.get_ydata() for line in lines_of(fig.axes[1], E5)]
    assert len(ratios) == 2 and all((ratio == 1).all() for ratio in ratios)
    shutil.copytree(RECORDED, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "E5" / "seed1078")
    with pytest.raises(RunError, match="nothing of E5 with seed 1078 to compare it with"):
        plots.draw("per_t", ["E5", "E6"], tmp_path / "runs")
    path = tmp_path / "runs" / "E6" / "seed1077" / "per_t.jsonl"
    path.write_text(path.read_text().replace('"n": 2', '"n": 3'))
    shutil.rmtree(tmp_path / "runs" / "E6" / "seed1078")
    with pytest.raises(RunError, match="other timesteps or numbers of images"):
        plots.draw("per_t", ["E5", "E6"], tmp_path / "runs")


def test_every_figure_names_a_kind_and_known_runs(tmp_path):
    tables = load_tables("figures")
    for table in tables.values():
        assert table["kind"] in (plots.FROM_RUNS if "runs" in table else plots.FORMULAS)
    for text, message in [('[figures.x]\nkinds = "a"', "unknown key; did you mean kind?"),
                          ("[figures.x]\nkind = 5", "5 is not of type str"),
                          ('[figures.x]\nkind = "per_t"\nruns = ["E5", "E66"]\n[experiments.E5]',
                           "unknown experiment 'E66'")]:
        (tmp_path / "t.toml").write_text(text)
        with pytest.raises(ConfigError, match="t.toml: \\[figures.x\\]") as error:
            load_tables("figures", tmp_path / "t.toml")
        assert message in str(error.value)
