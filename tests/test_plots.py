"""plots.py: what is drawn is what stands in the logs."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import plots
from config import load_config, load_tables
from errors import UserError
from runs import find_runs, influence_path
from weighting import min_snr

FD, SHIFT = "val/fid", {"E5": 0.0, "E6": 10.0}


def distance(kind, step, sampler, nfe, n, value):
    line = {"step": step, "kind": kind, "sampler": sampler, "nfe": nfe, "n": n, "features": "inception",
            "reference": "r"}
    for name in (FD, "val/kid"):
        line |= {name: value, f"{name}_stderr": value / 50, f"{name}_floor": 5.0, f"{name}_floor_test": None,
                 f"{name}_ceiling": 400.0}
    return line


@pytest.fixture
def root(tmp_path):
    """E5 and E6, seeds 1 and 2, of 40 steps: E6 is 10 above E5 in everything, seed 2 is 1 above seed 1."""
    for exp, shift in SHIFT.items():
        for seed in (1, 2):
            config = load_config(exp, overrides=[f"seed={seed}", "train.total_steps=40", "log.every=1"])
            run_dir, up = tmp_path / exp / f"seed{seed}", shift + seed - 1
            (run_dir / "influence").mkdir(parents=True)
            (run_dir / "grids").mkdir()
            (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
            frontier = [distance("frontier", 40, sampler, nfe, 10, 100 + up + nfe) for sampler in ("ddim", "ddpm")
                        for nfe in (10, 20)]
            steps = range(1, 41)
            logs = {
                "loss": [{"step": s, "train/eps_mse_mean": s + up, "train/grad_global_L2": 2 * s + up, "snr/mean": s}
                         for s in steps],
                "results": [*(distance("milestone", s, "ddpm", 50, 10, 200 + up - s) for s in (20, 40)),
                            distance("final", 40, "ddpm", 50, 30, 120 + up), distance("final", 40, "ddim", 50, 30, 130),
                            *frontier],
                "per_t": [{"step": s, "n": 4, "t": [0, 50, 500], "eps_mse_raw": [2 + up] * 3,
                           "eps_mse_ema": [4 + up] * 3} for s in (20, 40)],
                "curvature": [{"step": s, "num_probes": 2, "batch_size": 4, "curvature/snr_mean_samples": [1.0, 2.0],
                               "curvature/hutch_trace_samples": [s + up, s - up]} | {
                    f"curvature/{name}_{key}": value for name, value in (("hutch_trace", s + up),
                                                                         ("hutch_trace_unweighted", 2 * s + up))
                    for key in ("mean", "stderr")} for s in (20, 40)]}
            for name, lines in logs.items():
                (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
            for r in logs["results"]:
                np.savez(influence_path(run_dir, r), **dict.fromkeys((FD, "val/kid"), np.arange(r["n"]) * (1 + shift)))
            Image.fromarray(np.full((4, 4, 3), int(up), np.uint8)).save(run_dir / "grids" / "step_000040_ddim20.png")
    return tmp_path


def curves(ax):
    """[(label of the arm, x, y, error bars or None)] of a panel's errorbar() calls."""
    found = []
    for box in ax.containers:
        line, _, bars = box.lines
        segments = bars[0].get_segments() if bars else []
        errors = [float(s[1][1] - s[0][1]) / 2 for s in segments] or None
        found.append((str(box.get_label()).split(":")[0], *(np.asarray(d, float).tolist() for d in line.get_data()),
                      errors))
    return found


def draw(root, kind, *exps, **options):
    return plots.draw(kind, list(exps or SHIFT), root, **options)


def test_distances_with_errors_and_context(root):
    (ax,) = draw(root, "distance_vs_steps").axes
    milestones = [c for c in curves(ax) if len(c[1]) == 2]
    assert [c[1] for c in milestones] == [[20, 40]] * 4
    assert [c[2] for c in milestones] == [[180 + u, 160 + u] for u in (0, 1, 10, 11)]
    assert milestones[0][3] == pytest.approx([3.6, 3.2])
    finals = sorted(c[2][0] for c in curves(ax) if len(c[1]) == 1)
    assert finals == [120, 121, 130, 130, 130, 130, 130, 131]
    assert {5.0, 400.0} <= {line.get_ydata()[0] for line in ax.lines} and ax.get_ylabel() == "FID"
    text = ax.figure._supxlabel.get_text()
    assert "n = 10" in text and "n = 30" in text and "DDPM NFE 50" in text and "1, 2" in text


def test_until_cuts_and_the_loss_is_smoothed(root):
    top, bottom = draw(root, "distance_and_loss_vs_steps", until=20).axes
    assert all(c[1] == [20] for c in curves(top))
    (_, x, y, _), *_ = curves(bottom)
    assert x == list(range(1, 21)) and y[10] == pytest.approx(11) and y[0] == pytest.approx(2)  # mean of 1, 2, 3


def test_gradient_norm_has_dots_and_the_clip(root):
    (ax,) = draw(root, "grad_norm").axes
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert dots[0].get_ydata().tolist() == [2 * s for s in range(1, 41)] and len(dots) == 4
    assert any(line.get_ydata()[0] == 1.0 for line in ax.lines)


def test_per_t_shows_ema_weights_and_ratios_within_a_seed(root):
    top, bottom = draw(root, "per_t").axes
    assert [c[2] for c in curves(top)] == [[4] * 3, [5] * 3, [14] * 3, [15] * 3]
    assert [c[2] for c in curves(bottom)] == [[1] * 3, [1] * 3, pytest.approx([14 / 4] * 3), pytest.approx([3] * 3)]


def test_effective_loss_is_weight_times_error_of_raw_weights(root):
    top, _ = draw(root, "effective_loss").axes
    w = min_snr(plots.Diffusion(plots.BETAS["linear"]()).snr, 5.0)[[0, 50, 500]].numpy()
    assert curves(top)[0][2] == [2] * 3 and curves(top)[2][2] == pytest.approx(12 * w)


def test_both_traces(root):
    own, unweighted = draw(root, "curvature_vs_steps").axes
    assert curves(own)[0][2] == [30, 30] and curves(unweighted)[2][2] == [70, 70]  # running means of 20, 40; 50, 90
    assert len(own.collections) >= 4  # bands


def test_trace_against_distance(root):
    (ax,) = draw(root, "curvature_vs_distance").axes
    assert (curves(ax)[0][1], curves(ax)[0][2]) == ([40, 80], [180, 160])


def test_step_curves_and_snr_geometry(root):
    assert len(draw(root, "step_curves").axes) == 4
    left, right = draw(root, "snr_geometry").axes
    assert curves(left)[0][1] == list(range(21, 41)) and curves(left)[0][2] == [2 * s for s in range(21, 41)]
    assert curves(right)[1][2] == [31, 29]


def test_the_frontier_and_its_paired_differences(root):
    top, bottom = draw(root, "frontier").axes
    assert [c[2] for c in curves(top)[:2]] == [[110, 120], [110, 120]]
    (_, x, y, errors), *_ = curves(bottom)
    assert x == [10, 20] and y == pytest.approx([100 * 10 / 110, 100 * 10 / 120])  # relative to the baseline
    paired = np.std(np.arange(10) * 10.0, ddof=1) / 10**0.5
    assert errors == pytest.approx([100 * paired / 110, 100 * paired / 120], rel=1e-6)
    (root / "E6" / "seed1" / "results.jsonl").write_text("")
    (root / "E6" / "seed2" / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="frontier"):
        draw(root, "frontier")


def test_grids_are_rows_of_seeds(root):
    axes = draw(root, "grids").axes
    assert [int(ax.images[0].get_array().max()) for ax in axes] == [0, 10, 1, 11]
    assert ["E5" in ax.get_title() and "seed 1" in ax.get_title() for ax in axes] == [True, False, False, False]


def test_figures_of_formulas(root):
    (ax,) = plots.draw("weight_curves", [], root).axes
    assert [line.get_ydata()[0] for line in ax.lines] == pytest.approx([1e-4, 3e-4, 5e-4], rel=1e-3)
    assert [line.get_markevery() for line in ax.lines] == [[259], [165], [130]]
    (ax,) = plots.draw("weights_raw_and_normalised", [], root).axes
    assert [float(line.get_ydata()[-1]) for line in ax.lines] == pytest.approx([1, 1, 1.0952], rel=1e-4)
    assert plots.draw("snr_vs_t", [], root).axes[0].lines[0].get_ydata()[0] == pytest.approx(9999)


def test_an_arm_has_one_look_and_arms_differ(root):
    looks = plots.looks([run for exp in SHIFT for run in find_runs(root, exp)])
    by_exp = {run.exp: {(look["color"], look["marker"]) for run2, look in looks.items() if run2.exp == run.exp}
              for run in looks}
    assert all(len(found) == 1 for found in by_exp.values()) and by_exp["E5"] != by_exp["E6"]
    assert len({look[0] for look in plots.LOOKS.values()}) == len(plots.LOOKS)


def test_the_command(root, tmp_path, capsys):
    assert plots.main(["--all", "--runs", str(root), "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "fid_vs_steps_e5e6.png" in out and "E1" in out  # drawn; and left out, with what is missing
    for name in ("curvature_vs_steps.png", "curvature_vs_steps.svg"):
        first = (tmp_path / "a" / name).read_bytes()
        plots.main(["curvature_vs_steps", "--runs", str(root), "--out", str(tmp_path / "b")])
        assert (tmp_path / "b" / name).read_bytes() == first  # the same file each time
    with pytest.raises(UserError, match="E1"):
        plots.main(["fid_vs_steps", "--runs", str(root)])
    assert all(table["kind"] in plots.FIGURES for table in load_tables("figures").values())


@pytest.mark.parametrize("log, kind", [("loss", "grad_norm"), ("per_t", "per_t"), ("curvature", "curvature_vs_steps"),
                                       ("results", "distance_vs_steps")])
def test_a_missing_log_is_named(root, log, kind):
    (root / "E6" / "seed2" / f"{log}.jsonl").unlink()
    with pytest.raises(UserError, match=f"E6/seed2.*{log}"):
        draw(root, kind)
