"""Figures from run directories.

    python plots.py --all                                    every figure of experiments.toml whose runs are there
    python plots.py fid_vs_steps_e5e6 --runs DIR             one of them, from the runs in DIR
    python plots.py --kind per_t --kind grids --exps E5 E6   any kind of figure, of any experiments

FIGURES holds a function per kind: from runs, of one or several seeds, to a Figure with its caption. Raises UserError.
"""

import re
from functools import partial
from itertools import cycle
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from config import load_tables
from diffusion import BETAS, PREDICTIONS, SAMPLERS, Diffusion
from errors import UserError, argument_parser, nearest, run_script
from fid import metric_name
from runs import Run, build, find_runs, paired_differences, weights_of
from weighting import WEIGHTINGS, loss_weights

matplotlib.rcParams.update({
    "figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "legend.frameon": False, "svg.hashsalt": "plots", "axes.formatter.min_exponent": 4,
    "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.08, "errorbar.capsize": 3})
SMOOTH = 5  # records of a running mean, at least
# Colour, dash, marker of (weighting, gamma) in every figure; colour-blind readers tell them apart (Okabe & Ito).
LOOKS = {("constant", None): ("#000000", "-", "o"), ("minsnr", 5.0): ("#d55e00", "--", "s"),
         ("minsnr_norm", 5.0): ("#009e73", "-.", "^"), ("minsnr", 3.0): ("#0072b2", ":", "D"),
         ("minsnr", 1.0): ("#56b4e9", (0, (5, 1, 1, 1, 1, 1)), "v")}
SPARE = [("#cc79a7", (0, (8, 2)), "P"), ("#e69f00", (0, (3, 3)), "X"), ("#999999", (0, (1, 2)), "*")]
DASHES = dict(zip(SAMPLERS, cycle(("-", "--", "-.", ":"))))  # in a figure with several samplers


def looks(runs: list[Run]) -> dict[Run, dict]:
    """Each run's arguments of errorbar(): its arm's look, or a spare one if an earlier experiment has the same arm.

    Of the seeds of an experiment, every second one has open markers. The label has prediction and betas if they differ.
    """
    by_exp, left, spare, faces = {}, dict(LOOKS), cycle(SPARE), {}
    differ = [key for key in ("prediction", "beta_schedule")
              if len({getattr(run.config.diffusion, key) for run in runs}) > 1]
    for run in {run.exp: run for run in runs}.values():
        kind, order = run.config.loss.weighting, len(by_exp)  # the later the thinner, so that equal curves are seen
        gamma = run.config.loss.gamma if WEIGHTINGS[kind].reads_gamma else None
        color, dash, marker = left.pop((kind, gamma), None) or next(spare)
        label = [f"{run.exp}: {kind}", f"$\\gamma$ = {gamma:g}" if gamma else ""]
        label += [getattr(run.config.diffusion, key) for key in differ]
        by_exp[run.exp] = {"label": ", ".join(filter(None, label)),
                           "color": color, "linestyle": dash, "linewidth": max(1.0, 2.6 - 0.8 * order), "elinewidth": 1,
                           "marker": marker, "markersize": max(3.0, 6.5 - 1.5 * order)}
        faces[run.exp] = cycle((color, "white"))
    return {run: by_exp[run.exp] | {"markerfacecolor": next(faces[run.exp])} for run in runs}


def finish(ax, runs: list[Run], caption: str) -> Figure:
    """ax's figure, with the legend above, and the caption and the seeds below."""
    entries = {h.get_label(): h for ax in ax.figure.axes for h in ax.get_legend_handles_labels()[0]}
    ax.figure.legend(entries.values(), entries.keys(), loc="outside upper center", handlelength=3.5,
                     ncols=2 if len(entries) == 4 else 3)
    seeds = sorted({run.seed for run in runs})
    caption += f" Seeds: {', '.join(map(str, seeds))}." if seeds else ""
    caption += " Every second one has open markers." if len(seeds) > 1 else ""
    ax.figure.supxlabel(fill(caption, int(ax.figure.get_figwidth() * 15.5)), x=0.01, ha="left", fontsize=8)
    return ax.figure


def need(found, runs, what: str):
    """found. Raises UserError if it is empty."""
    if not found:
        raise UserError(f"{', '.join(str(run.path) for run in runs)}: no {what}")
    return found


def logged(run: Run, name: str) -> list[dict]:
    """The lines of NAME.jsonl. Raises UserError if there are none."""
    return need(run.log(name), [run], f"line in {name}.jsonl yet")


def baselines(runs: list[Run]) -> dict[Run, Run]:
    """Of each run of the later experiments, the first experiment's run of the same seed, if there is one."""
    own = {run.seed: run for run in runs if run.exp == runs[0].exp}
    return {run: own[run.seed] for run in runs if run.exp != runs[0].exp and run.seed in own}


def changes(base: Run, run: Run, kind: str) -> list[dict]:
    """The paired differences of this kind, with the Frechet distance and its error in percent of the baseline's."""
    key = metric_name("fd", base.config.eval.features)
    return [d | {name: 100 * d[name] / d[f"{key}_baseline"] for name in (key, f"{key}_stderr")}
            for d in paired_differences(base.path, run.path) if d["kind"] == kind and key in d]


def columns(records: list[dict], *keys: str) -> list[np.ndarray]:
    return [np.array([record[key] for record in records]) for key in keys]


def smooth(y: np.ndarray, window: int = SMOOTH) -> np.ndarray:
    """Running mean over `window` records (one more if that is even); over fewer at both ends."""
    return np.array([y[max(0, i - window // 2):i + window // 2 + 1].mean() for i in range(len(y))])


def weights(runs: list[Run], arms: list[tuple[str, float | None]], until: int = 999) -> Figure:
    ax = Figure((6.5, 3.6)).subplots()
    for kind, gamma in arms:
        w, (color, dash, marker) = loss_weights(Diffusion(BETAS["linear"]()).snr, kind, gamma), LOOKS[kind, gamma]
        ax.plot(w, color=color, linestyle=dash, marker=marker, markevery=[w.argmax()],
                label=f"{kind} {gamma or ''}\nmean {w.mean():.6f}\n{w.max():.4f} from t = {w.argmax()} on")
    ax.set(xlabel="timestep t", ylabel="loss weight w(t)", xlim=(0, until), ylim=(0, 1.2))
    return finish(ax, [], "Weighting and gamma; linear betas, T = 1000. Markers: the first t with the largest weight.")


def snr_vs_t(runs: list[Run]) -> Figure:
    ax = Figure((6.5, 3.6)).subplots()
    for (name, betas), dash in zip(BETAS.items(), cycle(("-", "--", ":"))):
        ax.semilogy(Diffusion(betas(), "v").snr, color="#000000", linestyle=dash, label=f"{name} betas")
    for gamma in (1.0, 3.0, 5.0):
        color, dash, _ = LOOKS["minsnr", gamma]
        ax.axhline(gamma, color=color, linestyle=dash, linewidth=1, label=f"$\\gamma$ = {gamma:g}")
    ax.set(xlabel="timestep t", ylabel="SNR(t)", xlim=(0, 999))
    return finish(ax, [], "T = 1000. Min-SNR gives a timestep with SNR above gamma a weight below 1.")


def weight_atlas(runs: list[Run]) -> Figure:
    """Every weighting as a weight on the eps-MSE, and the share of each t in the gradient at equal errors."""
    axes, spare = Figure((8.5, 6.6)).subplots(2, 2, sharex=True).flat, cycle(SPARE)
    processes = [Diffusion(BETAS["linear"](), prediction) for prediction in PREDICTIONS]
    for i, (kind, (_, reads_gamma)) in enumerate(WEIGHTINGS.items()):
        gamma = 5.0 if reads_gamma else None
        color, dash, _ = LOOKS.get((kind, gamma)) or next(spare)
        look = {"color": color, "linestyle": dash, "lw": max(1.5, 2.5 - i / 2), "label": f"{kind} {gamma or ''}"}
        axes[0].plot(loss_weights(processes[0].snr, kind, gamma), **look)
        for ax, d in zip(axes[1:], processes, strict=True):
            w = loss_weights(d.snr, kind, gamma, d.prediction)
            ax.plot(w / w.mean(), **look)
            ax.set(title=f"{d.prediction}-prediction", ylim=(0, 6), ylabel="T x share of gradient")
    for d, dash in zip(processes[1:], (":", "--"), strict=True):
        axes[0].plot(1 / d.eps_per_mse, color="#000000", linestyle=dash, label=f"constant, {d.prediction}-prediction")
    axes[0].set(title="any prediction", ylabel="weight on the eps-MSE", yscale="log", xlim=(0, 999))
    for ax in axes[2:]:
        ax.set(xlabel="timestep t", xticks=[0, 200, 400, 600, 800, 999])
    return finish(axes[0], [], "Weighting and gamma; linear betas, T = 1000. Shares if the error of what is predicted "
                               "is 1 at all t: 1 is an even share; cut at 6; those of minsnr_norm are minsnr's.")


def distance_axis(ax, own: dict[Run, list[dict]]) -> tuple[tuple[str, str], str]:
    """Name the y axis; draw the first line's floor and ceiling. Returns (keys of value and error, caption's part).

    Raises UserError if a run has no line.
    """
    records = [r for run in own for r in need(own[run], [run], "such distance in results.jsonl yet")]
    features = next(iter(own)).config.eval.features
    key = metric_name("fd", features)
    ax.set_ylabel("FID" if key == "val/fid" else f"Fréchet distance ({features})")
    for end, text in (("floor", "floor: training images"), ("ceiling", "ceiling: noise")):
        if (y := records[0][f"{key}_{end}"]) is not None:
            ax.axhline(y, color="#777777", linestyle=":")
            ax.annotate(text, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
            ax.axhline(0, linewidth=0).sticky_edges.y.append(0)  # the axis begins here
    parts = dict.fromkeys(f"{r['kind']} {r['sampler'].upper()} NFE {r['nfe']}, n = {r['n']:,}" for r in records)
    return (key, f"{key}_stderr"), f"Distances: {'; '.join(parts)}; {features} features; bars: one standard error."


def distance(ax, runs: list[Run]) -> str:
    own = {run: run.results("milestone") + [r for r in run.results("final") if r["sampler"] == run.config.eval.sampler]
           for run in runs}
    keys, text = distance_axis(ax, own)
    for run, look in looks(runs).items():
        course(ax, own[run], keys, look)
    final = any(r["kind"] == "final" for records in own.values() for r in records)
    return text + " Stars: final; do not compare different n." * final


def course(ax, records: list[dict], keys: tuple[str, str], look: dict) -> None:
    """Milestones as a line, and what was measured at the end as stars."""
    if points := [r for r in records if r["kind"] == "milestone"]:
        ax.errorbar(*columns(points, "step", *keys), **look)
    for r in [r for r in records if r["kind"] == "final"]:
        ax.errorbar(*columns([r], "step", *keys), **look | {
            "marker": "*", "label": None, "markersize": 2 * look["markersize"]})


def difference(ax, runs: list[Run]) -> str:
    """In percent of the first experiment's distance at the same seed and step. A line of milestones has its seed."""
    key, look = metric_name("fd", runs[0].config.eval.features), looks(runs)
    for run, base in baselines(runs).items():
        points = [d for kind in ("milestone", "final") for d in changes(base, run, kind)
                  if d["step"] == d["step_a"] and d["sampler"] == run.config.eval.sampler]
        course(ax, points, (key, f"{key}_stderr"), look[run])
        if len(milestones := [d for d in points if d["kind"] == "milestone"]) > 1:
            end = milestones[-1]["step"], milestones[-1][key]
            ax.annotate(f"seed {run.seed}", end, (-6, 6), ha="right", fontsize=8, textcoords="offset points")
    ax.axhline(0, color="#000000", linewidth=1)
    ax.set_ylabel(f"difference from\n{runs[0].exp} (%)")
    return "Differences: of paired samples, seed by seed."


def log(ax, runs: list[Run], key: str, name: str, clip: bool = False) -> str:
    for run, look in looks(runs).items():
        x, y = columns(logged(run, "loss"), "step", key)
        window = max(SMOOTH, run.config.train.total_steps // 20 // run.config.log.every)
        ax.errorbar(x, smooth(y, window), **look, markevery=max(1, len(x) // 20))
        if clip:
            ax.plot(x, y, ".", markersize=2, alpha=0.35, color=look["color"])
            ax.axhline(run.config.train.grad_clip, color="#777777", linestyle=":")
    ax.set(yscale="log", ylabel=name)
    more = "; dots: single steps, before clipping (dotted line)" if clip else ""
    return f"{name[0].upper() + name[1:]}: mean over a twentieth of a run, {SMOOTH} records at least{more}."


def trace(ax, runs: list[Run], name: str = "hutch_trace_unweighted", of: str = "unweighted") -> str:
    for run, look in looks(runs).items():
        records = logged(run, "curvature")
        x, *both = columns(records, "step", f"curvature/{name}_mean", f"curvature/{name}_stderr")
        mean, error = map(smooth, both)
        ax.errorbar(x, mean, **look, markevery=max(1, len(x) // 20))
        ax.fill_between(x, mean - error, mean + error, color=look["color"], alpha=0.18, linewidth=0)
    ax.axhline(0, linewidth=0).sticky_edges.y.append(0)
    ax.set_ylabel(f"Hessian trace of {of} loss")
    return (f"Traces: {records[0]['num_probes']} probes of {records[0]['batch_size']} images, the same at all steps "
            f"and in all runs; mean over {SMOOTH} records; band: one standard error of one record.")


def over_steps(panels: list, runs: list[Run], columns=1, size=(6.5, 3.8), **grid) -> Figure:
    """panel(ax, runs) draws the runs and returns its part of the caption."""
    if len({run.exp for run in runs}) == 1:  # nothing to take a difference from
        panels = [panel for panel in panels if panel is not difference]
    axes = Figure(size).subplots(len(panels) // columns, columns, sharex=True, squeeze=False, **grid)
    sentences = [panel(ax, runs) for panel, ax in zip(panels, axes.flat, strict=True)]
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    return finish(ax, runs, " ".join(dict.fromkeys(sentences)))


def profile(runs: list[Run], key: str, name: str, weighted: bool = False) -> Figure:
    """A key of per_t.jsonl at the last step that all have; below, its ratio to the first experiment's, seed by seed."""
    own = {run: {(r["step"], r["n"], *r["t"]): r for r in logged(run, "per_t")} for run in runs}
    last = max(need(set.intersection(*map(set, own.values())), runs, "per_t.jsonl line of one step, n and t in all"))
    (step, n, *t), base, axes = last, {}, Figure((6.5, 5.4)).subplots(2, sharex=True, height_ratios=[3, 2])
    for run, look in looks(runs).items():
        y = np.array(own[run][last][key])
        if weighted:
            d = build(run.config, "cpu")[1]
            y *= (weights_of(run.config, d) / d.eps_per_mse)[t].numpy()
        axes[0].errorbar(t, y, **look)
        if run.exp == runs[0].exp:
            base[run.seed] = y
        if run.seed in base:
            axes[1].errorbar(t, y / base[run.seed], **look)
    axes[0].set(yscale="log", ylabel=name)
    axes[1].set(xlabel="timestep t", ylabel=f"ratio to {runs[0].exp}")
    return finish(axes[0], runs, f"{name} at step {step:,}, on {n} held-out images. Ratios within a seed.")


def curvature_vs_distance(runs: list[Run]) -> Figure:
    """Both in percent of the first experiment's at the same seed and milestone."""
    ax, pairs, look = Figure((6.5, 4)).subplots(), baselines(runs), looks(runs)
    key, at = metric_name("fd", runs[0].config.eval.features), "curvature/hutch_trace_unweighted_mean"
    for run, base in need(pairs, runs, "pair of two experiments at one seed").items():
        traces = [{r["step"]: r[at] for r in logged(one, "curvature")} for one in (base, run)]
        points = [d | {at: 100 * (traces[1][d["step"]] / traces[0][d["step"]] - 1)}
                  for d in changes(base, run, "milestone") if all(d["step"] in of for of in traces)]
        need(points, [base, run], "milestone in results.jsonl with a trace, in both and with the same features")
        ax.errorbar(*columns(points, at, key, f"{key}_stderr"), **look[run])
        for d in points:
            ax.annotate(f"{d['step']:,}", (d[at], d[key]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    for line in (ax.axhline, ax.axvline):
        line(0, color="#000000", linewidth=1)
    ax.set(xlabel=f"difference of the Hessian trace from {runs[0].exp} (%)",
           ylabel=f"difference of the distance from {runs[0].exp} (%)")
    return finish(ax, runs, "At milestones, by step; trace of the unweighted loss; bars: one standard error of the "
                            "distance.")


def snr_geometry(runs: list[Run]) -> Figure:
    axes = Figure((8, 3.9)).subplots(1, 2, sharex=True)
    for run, look in looks(runs).items():
        steps, probes = logged(run, "loss"), logged(run, "curvature")[-SMOOTH:]
        look |= {"linestyle": "none", "alpha": 0.6, "markersize": 4}
        axes[0].errorbar(*columns(steps[len(steps) // 2:], "snr/mean", "train/grad_global_L2"), **look)
        snr, traces = columns(probes, "curvature/snr_mean_samples", "curvature/hutch_trace_samples")
        axes[1].errorbar(snr[-1], traces.mean(axis=0), **look)
    axes[0].set(xscale="log", yscale="log", xlabel="mean SNR of the batch", ylabel="gradient norm (L2)")
    axes[1].set(xlabel="mean SNR of the probe", ylabel="Hessian trace of the arm's own loss")
    return finish(axes[0], runs, f"Left: steps of training's second half. Right: probes, mean of {SMOOTH} records.")


def frontier(runs: list[Run]) -> Figure:
    """At the last step, and the largest n there, that all runs with a frontier have; runs without one are left out."""
    features = runs[0].config.eval.features
    own = {run: [r for r in run.results("frontier") if r["features"] == features] for run in runs}
    exps = {run.exp for run in runs if own[run]}
    runs = [run for run in runs if own[run] or run.exp not in exps]
    step, n = max(need(set.intersection(*({(r["step"], r["n"]) for r in own[run]} for run in runs)), runs,
                       "frontier of one step, n and features in all; evaluate.py RUN_DIR --frontier 10,20,50 adds one"))
    own = {run: [r for r in own[run] if (r["step"], r["n"]) == (step, n)] for run in runs}
    axes = Figure((6.5, 5.8)).subplots(min(2, len(exps)), sharex=True, squeeze=False)[:, 0]
    (keys, _), pairs = distance_axis(axes[0], own), baselines(runs)
    for run, look in looks(runs).items():
        panels = {axes[0]: own[run]}
        if run in pairs:
            panels[axes[1]] = [d for d in changes(pairs[run], run, "frontier") if (d["step"], d["n"]) == (step, n)]
            axes[1].axhline(0, color="#000000", linewidth=1)
            axes[1].set_ylabel(f"difference from {runs[0].exp} (%)")
        for ax, records in panels.items():
            for sampler in sorted({r["sampler"] for r in records}):
                points = sorted((r for r in records if r["sampler"] == sampler), key=lambda r: r["nfe"])
                ax.errorbar(*columns(points, "nfe", *keys), **look | {
                    "linestyle": DASHES[sampler], "label": f"{look['label']}, {sampler.upper()}"})
    nfes = sorted({r["nfe"] for run in runs for r in own[run]})
    axes[-1].set(xscale="log", xlabel="NFE (network calls per sample)", xticks=nfes, xticklabels=nfes)
    axes[-1].minorticks_off()
    return finish(ax, runs, f"EMA weights at step {step:,}, n = {n:,}, {features} features; differences of paired "
                            "samples; bars: one standard error.")


def grids(runs: list[Run]) -> Figure:
    """At the first seed and the last step that all experiments have: a row per sampler; first, training images."""
    seeds = set.intersection(*({run.seed for run in runs if run.exp == other.exp} for other in runs))
    shown = [run for run in runs if run.seed == min(seeds, default=None)]
    names = [{path.name for path in (run.path / "grids").glob("step_*.png")} for run in shown]
    found = sorted(need(seeds and set.intersection(*names), runs, "grid of the same seed and step in all"))
    step = max((name.split("_")[1] for name in found), key=int)
    rows, data = [name for name in found if name.split("_")[1] == step], shown[0].path / "grids" / "data.png"
    first = int(data.exists())
    axes = Figure((3.4 * (len(shown) + first), 3.6 * len(rows))).subplots(len(rows), len(shown) + first, squeeze=False)
    panels = [(axes[0, 0], "training images", data)] * first
    for row, name in zip(axes, rows, strict=True):
        sampler = re.sub(r"(\d+)", r" \1", name.removesuffix(".png").split("_")[2]).upper()  # "DDPM 50"
        panels += [(ax, f"{look['label']}, {sampler}", run.path / "grids" / name)
                   for ax, (run, look) in zip(row[first:], looks(shown).items(), strict=True)]
    for ax in axes.flat:
        ax.axis("off")
    for ax, title, path in panels:
        ax.imshow(Image.open(path), interpolation="nearest")
        ax.set_title(title)
    return finish(ax, shown, f"EMA weights at step {int(step):,}; sampler and NFE above. In a row, the same cell "
                             "starts from the same noise.")


loss = partial(log, key="train/eps_mse_mean", name="unweighted train eps-MSE")
gradient = partial(log, key="train/grad_global_L2", name="gradient norm (L2)", clip=True)
FORMULAS = {
    "snr_vs_t": snr_vs_t, "weight_atlas": weight_atlas,
    "weights_raw_and_normalised": partial(weights, arms=[("constant", None), ("minsnr", 5.0), ("minsnr_norm", 5.0)]),
    "weight_curves": partial(weights, arms=[("minsnr", 1.0), ("minsnr", 3.0), ("minsnr", 5.0)], until=400)}
FIGURES = FORMULAS | {
    "distance_vs_steps": partial(over_steps, [distance, difference], size=(6.5, 5.6)),
    "grad_norm": partial(over_steps, [gradient]),
    "distance_and_loss_vs_steps": partial(over_steps, [distance, difference, loss], size=(6.5, 7)),
    "curvature_vs_steps": partial(over_steps, [partial(trace, name="hutch_trace", of="own weighted"), trace],
                                  columns=2, size=(7.5, 3.8), sharey=True),
    "step_curves": partial(over_steps, [loss, distance, gradient, trace], columns=2, size=(8.5, 6.2)),
    "per_t": partial(profile, key="eps_mse_ema", name="eps-MSE of EMA weights"),
    "effective_loss": partial(profile, key="eps_mse_raw", name="w(t) MSE of raw weights", weighted=True),
    "curvature_vs_distance": curvature_vs_distance, "snr_geometry": snr_geometry, "frontier": frontier, "grids": grids}


def draw(kind: str, exps: list[str], root: Path, **options) -> Figure:
    """The figure of a kind from the runs of these experiments in root. Raises UserError if it cannot be drawn."""
    if kind not in FIGURES:
        raise UserError(f"unknown figure {kind!r}{nearest(kind, [*load_tables('figures'), *FIGURES])}")
    runs = [run for exp in exps for run in find_runs(root, exp)]
    missing = [exp for exp in exps if exp not in {run.exp for run in runs}]
    if missing or not (exps or kind in FORMULAS):
        raise UserError(f"no run of {', '.join(missing) or 'any experiment'} in {root}")
    try:
        return FIGURES[kind](runs, **options)
    except KeyError as error:
        raise UserError(f"{', '.join(exps)}: a log in {root} lacks {error}; other features, or version?") from error


def save(fig: Figure, out: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg, the same on every call. Returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    for path in paths:
        fig.savefig(path, metadata={"Date": None})
    return paths


def main(argv: list[str] | None = None) -> int:
    tables = load_tables("figures")
    parser = argument_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of experiments.toml: {', '.join(tables)}")
    parser.add_argument("--all", action="store_true", help="every figure whose runs are there; the others are listed")
    parser.add_argument("--kind", action="append", default=[], choices=FIGURES, help="with --exps")
    parser.add_argument("--exps", nargs="+", default=[], metavar="EXP", help="experiments whose runs --kind draws")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder with RUNS/EXP/seedSEED; default runs")
    parser.add_argument("--out", type=Path, help="folder to write to; default RUNS/figures")
    args = parser.parse_args(argv)
    if [bool(args.names), args.all, bool(args.kind)].count(True) != 1 or (args.exps and not args.kind):
        parser.error("give names of figures, or --all, or --kind with --exps")
    todo = {name: tables.get(name, {"kind": name}) for name in (tables if args.all else args.names)}
    todo |= {"_".join([kind, *args.exps]): {"kind": kind, "runs": args.exps} for kind in args.kind}
    for name, table in todo.items():
        try:
            fig = draw(table.pop("kind"), table.pop("runs", []), args.runs, **table)
            print(*save(fig, args.out or args.runs / "figures", name))
        except (UserError, OSError) as error:
            if not args.all:
                raise UserError(f"{name}: {error}") from error
            print(f"{name}: left out: {error}")
    return 0


if __name__ == "__main__":
    run_script(main)
