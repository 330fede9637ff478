"""Figures, one function per kind, from run directories alone.

    python plots.py --all                                    every figure of experiments.toml whose runs are there
    python plots.py fid_vs_steps_e5e6 --runs DIR             one of them, from runs below DIR
    python plots.py --kind per_t --kind grids --exps E5 E6   any kind of figure, of any runs

A function takes runs (of one or several seeds) and returns a Figure with its caption; what it lacks is a RunError.
"""

import argparse
import re
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from checkpoint import CheckpointError
from config import ConfigError, list_experiments, load_tables
from diffusion import BETAS, Diffusion
from evaluate import Run, RunError, find_runs, metric_names, paired_differences, run_script
from weighting import loss_weights

matplotlib.rcParams.update({
    "figure.dpi": 130, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "legend.frameon": False, "svg.hashsalt": "plots",
})
SMOOTH = 5  # records of a running mean; of log lines as many as a twentieth of the run has, where that is more

# One look per arm in every figure: hues that colour-blind readers tell apart (Okabe & Ito), and for print in grey also
# a dash and a marker of its own.
LOOKS = {("constant", None): ("#000000", "-", "o"), ("minsnr", 5.0): ("#d55e00", "--", "s"),
         ("minsnr_norm", 5.0): ("#009e73", "-.", "^"), ("minsnr", 3.0): ("#0072b2", ":", "D"),
         ("minsnr", 1.0): ("#56b4e9", (0, (5, 1, 1, 1, 1, 1)), "v")}
DASHES = {"ddim": "-", "ddpm": "--"}  # where one figure has both samplers
MORE_LOOKS = [("#cc79a7", (0, (8, 2)), "P"), ("#e69f00", (0, (3, 3)), "X"), ("#999999", (0, (1, 2)), "*")]


def arm(run: Run) -> tuple[str, float | None]:
    loss = run.config.loss
    return loss.weighting, None if loss.weighting == "constant" else loss.gamma


def looks(runs: list[Run]) -> dict[str, dict]:
    """Keyword arguments of plot() by experiment: the arm's own look, and a spare one for a second of the same arm."""
    taken, spare, by_exp = set(), iter(MORE_LOOKS), {}
    for run in runs:
        if run.exp in by_exp:
            continue
        look = LOOKS.get(arm(run)) if arm(run) not in taken else None
        taken.add(arm(run))
        look = look or next(spare, None)
        if look is None:
            raise RunError(f"{run.exp}: a figure tells at most {len(MORE_LOOKS)} arms apart beyond the study's")
        order = len(by_exp)  # the later the thinner, so that of two equal curves both are seen
        by_exp[run.exp] = {"color": look[0], "linestyle": look[1], "marker": look[2],
                           "linewidth": max(1.0, 2.6 - 0.8 * order), "markersize": max(3.0, 6.5 - 1.5 * order)}
    return by_exp


def label(run: Run) -> str:
    weighting, gamma = arm(run)
    return f"{run.exp}: {weighting}" + (f", $\\gamma$ = {gamma:g}" if gamma else "")


def line(ax, run: Run, look: dict, x, y, **more):
    """Plot a run's line; its markers at most twenty, so that dense lines stay lines."""
    every = max(1, len(x) // 20)
    return ax.plot(x, y, **{**look, "markevery": every, "label": label(run), **more})


def subplots(*args, figsize: tuple[float, float], **kwargs):
    """As pyplot's, without its global list of open figures and its windows."""
    fig = Figure(figsize=figsize, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06))
    return fig, fig.subplots(*args, **kwargs)


def log_axis(axis) -> None:
    """A log scale with plain numbers, also at 2 and 5 where it spans few powers of ten."""
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if high < 5 * low:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    elif high < 100 * low:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(fig: Figure, axes, extra=()) -> None:
    """One legend above the panels, an entry per label."""
    entries = {text: handle for ax in axes for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    entries |= {handle.get_label(): handle for handle in extra}
    fig.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(3, len(entries)),
               handlelength=3.5)


def finish(fig: Figure, caption: str) -> Figure:
    """Put the caption below the panels; it is part of the figure, so that none is shown without it."""
    width = int(fig.get_figwidth() * 15.5)
    fig.supxlabel("\n".join(textwrap.wrap(caption, width)), x=0.01, ha="left", fontsize=8, color="#333333")
    return fig


def smooth(y, window: int = SMOOTH) -> np.ndarray:
    """Running mean over `window` records, or one more where that is even; over fewer at both ends."""
    y, half = np.asarray(y, dtype=float), window // 2
    return np.array([y[max(0, i - half):i + half + 1].mean() for i in range(len(y))])


def lines_smoothed(run: Run) -> int:
    """Log lines of a running mean, so that it is equally smooth however often a run has logged."""
    return max(SMOOTH, run.config.train.total_steps // 20 // run.config.log.every)


def smoothed_steps(runs: list[Run]) -> str:
    return " and ".join(f"{n:,}" for n in sorted({lines_smoothed(run) * run.config.log.every for run in runs}))


def seeds_note(runs: list[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    return f"Seed {seeds[0]}." if len(seeds) == 1 else f"One line per seed: {', '.join(map(str, seeds))}."


def column(records: list[dict], key: str) -> list:
    return [record[key] for record in records]


# ---- from formulas ----

def schedule(name: str = "linear") -> Diffusion:
    return Diffusion(BETAS[name]())


def weights_raw_and_normalised(runs: list[Run]) -> Figure:
    """Min-SNR weights at gamma 5, raw and divided by their mean over t."""
    fig, ax = subplots(figsize=(6.5, 3.6))
    snr = schedule().snr
    for kind in ("constant", "minsnr", "minsnr_norm"):
        w = loss_weights(snr, kind, 5.0).numpy()
        color, dash, _ = LOOKS[kind, None if kind == "constant" else 5.0]
        ax.plot(w, color=color, linestyle=dash, label=f"{kind}, mean {w.mean():.4g}")
    ax.set(xlabel="timestep t", ylabel="loss weight w(t)", xlim=(0, 999), ylim=(0, 1.2))
    legend(fig, [ax])
    mean = loss_weights(snr, "minsnr", 5.0).mean().item()
    return finish(fig, f"Linear betas, T = 1000, gamma = 5. The raw weight has mean E_t[w] = {mean:.6f} over all t; "
                       f"normalising multiplies it by {1 / mean:.4f}, so that its mean is 1.")


def weight_curves(runs: list[Run]) -> Figure:
    """Raw Min-SNR weights at gamma 1, 3, 5, and where each reaches 1."""
    fig, ax = subplots(figsize=(6.5, 3.6))
    snr, first = schedule().snr, []
    for gamma in (1.0, 3.0, 5.0):
        w = loss_weights(snr, "minsnr", gamma)
        color, dash, marker = LOOKS["minsnr", gamma]
        first.append(int((w == 1).nonzero()[0]))
        ax.plot(w, color=color, linestyle=dash, label=f"$\\gamma$ = {gamma:g}, mean {w.mean():.4f}")
        ax.plot(first[-1], 1, color=color, marker=marker, linestyle="none")
    ax.set(xlabel="timestep t", ylabel="loss weight w(t)", xlim=(0, 400), ylim=(0, 1.08))
    legend(fig, [ax])
    return finish(fig, "min(SNR, gamma) / SNR on linear betas, T = 1000; shown to t = 400, beyond which all are 1. "
                       f"Markers: first t with w = 1, at {', '.join(map(str, first))}.")


def snr_vs_t(runs: list[Run]) -> Figure:
    """SNR of both schedules, and the levels at which Min-SNR clamps it."""
    fig, ax = subplots(figsize=(6.5, 3.6))
    for name, color, dash in (("linear", "#000000", "-"), ("cosine", "#999999", "--")):
        ax.semilogy(schedule(name).snr.numpy(), color=color, linestyle=dash, label=f"{name} betas")
    for gamma in (1.0, 3.0, 5.0):
        color, dash, _ = LOOKS["minsnr", gamma]
        ax.axhline(gamma, color=color, linestyle=dash, linewidth=1, label=f"$\\gamma$ = {gamma:g}")
    ax.set(xlabel="timestep t", ylabel="SNR(t)", xlim=(0, 999))
    legend(fig, [ax])
    return finish(fig, "SNR = alphas_cumprod / (1 - alphas_cumprod), T = 1000. Left of where a curve crosses its "
                       "gamma, Min-SNR weighs a timestep by less than 1.")


# ---- from runs ----

def distance_key(runs: list[Run]) -> tuple[str, str]:
    """The metric that all runs have measured, and its name on an axis."""
    features = {run.config.eval.features for run in runs}
    if len(features) > 1 or "none" in features:
        raise RunError(f"features are {', '.join(sorted(features))}: no distance that all of these runs have measured")
    return distance_name(features.pop())


def distance_name(features: str) -> tuple[str, str]:
    """The Frechet distance of these features as a metric, and as an axis names it."""
    key = metric_names(features)[0]
    return key, "FID" if key == "val/fid" else f"Fréchet distance ({features})"


def setting(records: list[dict]) -> str:
    """ "DDPM NFE 50, n = 500", of records that agree; each kind once where they do not."""
    kinds = {f"{r['sampler'].upper()} NFE {r['nfe']}, n = {r['n']:,}": None for r in records}
    return " and ".join(kinds) + f", {records[0]['features']} features"


def draw_context(ax, records: list[dict]) -> None:
    """Floor and ceiling at the n of the records, as lines with their names."""
    for name, text in (("floor", "floor: training images"), ("ceiling", "ceiling: uniform noise")):
        if records[0][name] is not None:
            ax.axhline(records[0][name], color="#777777", linestyle=(0, (1, 1)), linewidth=1)
            ax.annotate(text, (1, records[0][name]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                        fontsize=7.5, color="#555555")
    ax.set_ylim(bottom=0)
    ax.margins(y=0.12)


def draw_distance(ax, runs: list[Run], until: int | None = None) -> str:
    """Milestones with their errors, finals as stars; returns what the caption must say."""
    (key, name), look, milestones, finals = distance_key(runs), looks(runs), [], []
    for run in runs:
        points = [r for r in run.results("milestone") if until is None or r["step"] <= until]
        line(ax, run, look[run.exp], column(points, "step"), column(points, key))
        ax.errorbar(column(points, "step"), column(points, key), column(points, f"{key}_stderr"), fmt="none",
                    ecolor=look[run.exp]["color"], capsize=3)
        milestones += points
        for r in run.results("final") if until is None else []:
            color = look[run.exp]["color"]
            ax.plot(r["step"], r[key], marker="*", markersize=2 * look[run.exp]["markersize"], linestyle="none",
                    color=color, markerfacecolor=color if r["sampler"] == "ddpm" else "white")
            finals.append(r)
    if not milestones + finals:
        raise RunError(f"{', '.join(run.exp for run in runs)}: no distance measured yet")
    draw_context(ax, milestones or finals)
    ax.set_ylabel(name)
    text = f"Bars: one standard error. Milestones: {setting(milestones)}." if milestones else ""
    if finals:
        text += f" Stars: final, {setting(finals)} (filled DDPM, open DDIM)"
        text += "; another n than the milestones', so not to be compared with them." if (
            {r["n"] for r in finals} != {r["n"] for r in milestones}) else "."
    return text


def distance_vs_steps(runs: list[Run]) -> Figure:
    """Distance at each milestone and at the end, between floor and ceiling."""
    fig, ax = subplots(figsize=(6.5, 3.8))
    caption = draw_distance(ax, runs)
    ax.set_xlabel("training step")
    legend(fig, [ax])
    return finish(fig, f"{caption} {seeds_note(runs)}")


def draw_loss(ax, runs: list[Run], until: int | None = None) -> str:
    look = looks(runs)
    for run in runs:
        records = [r for r in run.log("loss") if until is None or r["step"] <= until]
        errors = smooth(column(records, "train/eps_mse_mean"), lines_smoothed(run))
        line(ax, run, look[run.exp], column(records, "step"), errors)
    ax.set_yscale("log")
    log_axis(ax.yaxis)
    ax.set_ylabel("train eps-MSE")
    return f"unweighted eps-MSE, so that arms compare: running mean over {smoothed_steps(runs)} steps."


def distance_and_loss_vs_steps(runs: list[Run], until: int | None = None) -> Figure:
    """Distance, and on a second axis below it the training error. until: last step shown."""
    fig, axes = subplots(2, 1, figsize=(6.5, 5.6), sharex=True, height_ratios=[3, 2])
    caption = draw_distance(axes[0], runs, until)
    caption += " Below: the " + draw_loss(axes[1], runs, until)
    axes[1].set_xlabel("training step")
    legend(fig, [axes[0]])
    return finish(fig, f"{caption} {seeds_note(runs)}")


def draw_grad_norm(ax, runs: list[Run]) -> str:
    look = looks(runs)
    for run in runs:
        records = [r for r in run.log("loss") if r["train/grad_global_L2"] is not None]
        steps, norms = column(records, "step"), column(records, "train/grad_global_L2")
        ax.plot(steps, norms, linestyle="none", marker=".", markersize=2, alpha=0.35, color=look[run.exp]["color"])
        line(ax, run, look[run.exp], steps, smooth(norms, lines_smoothed(run)))
    ax.axhline(run.config.train.grad_clip, color="#777777", linestyle=(0, (1, 1)), linewidth=1)
    ax.annotate("clip", (1, run.config.train.grad_clip), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=7.5, color="#555555")
    ax.set_yscale("log")
    log_axis(ax.yaxis)
    ax.set_ylabel("gradient norm (global L2)")
    return ("Gradient norm before clipping: dots are single steps, lines the mean of those logged within "
            f"{smoothed_steps(runs)} steps.")


def grad_norm(runs: list[Run]) -> Figure:
    """Global gradient norm before clipping."""
    fig, ax = subplots(figsize=(6.5, 3.6))
    caption = draw_grad_norm(ax, runs)
    ax.set_xlabel("training step")
    legend(fig, [ax])
    return finish(fig, f"{caption} Each arm's norm is that of its own loss. {seeds_note(runs)}")


def last_profiles(runs: list[Run]) -> list[dict]:
    """Each run's per-t profile at the last step that all of them have. Raises RunError."""
    common = set.intersection(*({r["step"] for r in run.log("per_t")} for run in runs))
    if not common:
        raise RunError(f"{', '.join(run.exp for run in runs)}: no step at which all have a per-t profile")
    profiles = [next(r for r in run.log("per_t") if r["step"] == max(common)) for run in runs]
    if any((r["t"], r["n"]) != (profiles[0]["t"], profiles[0]["n"]) for r in profiles):
        raise RunError(f"{', '.join(run.exp for run in runs)}: profiles of other timesteps or numbers of images")
    return profiles


def baseline_of(run: Run, runs: list[Run]) -> Run:
    """The first experiment's run of the same seed. Raises RunError where there is none."""
    for other in runs:
        if (other.exp, other.seed) == (runs[0].exp, run.seed):
            return other
    raise RunError(f"{run.path}: nothing of {runs[0].exp} with seed {run.seed} to compare it with")


def per_t(runs: list[Run]) -> Figure:
    """Held-out eps-MSE of each timestep, and its ratio to the first arm's of the same seed."""
    fig, axes = subplots(2, 1, figsize=(6.5, 5.4), sharex=True, height_ratios=[3, 2])
    look, profiles = looks(runs), dict(zip(runs, last_profiles(runs), strict=True))
    first = profiles[runs[0]]
    for run, profile in profiles.items():
        line(axes[0], run, look[run.exp], profile["t"], profile["eps_mse_ema"])
        ratio = np.divide(profile["eps_mse_ema"], profiles[baseline_of(run, runs)]["eps_mse_ema"])
        line(axes[1], run, look[run.exp], profile["t"], ratio)
    axes[0].set(yscale="log", ylabel="held-out eps-MSE")
    log_axis(axes[0].yaxis)
    axes[1].set(xlabel="timestep t", ylabel=f"ratio to {runs[0].exp}")
    legend(fig, [axes[0]])
    return finish(fig, f"Unweighted eps-MSE of the EMA weights at step {first['step']:,} on {first['n']} fixed "
                       f"held-out images with fixed eps. {seeds_note(runs)}")


def effective_loss(runs: list[Run]) -> Figure:
    """w(t) MSE(t): how much each timestep contributes to what an arm minimises."""
    fig, ax = subplots(figsize=(6.5, 3.8))
    look, profiles = looks(runs), last_profiles(runs)
    for run, profile in zip(runs, profiles, strict=True):
        snr = Diffusion(BETAS[run.config.diffusion.beta_schedule](run.config.diffusion.num_timesteps)).snr
        w = loss_weights(snr, run.config.loss.weighting, run.config.loss.gamma)[profile["t"]].numpy()
        line(ax, run, look[run.exp], profile["t"], w * profile["eps_mse_raw"])
    ax.set(yscale="log", xlabel="timestep t", ylabel="w(t) eps-MSE(t)")
    log_axis(ax.yaxis)
    legend(fig, [ax])
    return finish(fig, f"Loss weight times held-out eps-MSE of the raw weights at step {profiles[0]['step']:,}, on "
                       f"{profiles[0]['n']} fixed images. {seeds_note(runs)}")


def draw_curvature(ax, runs: list[Run], key: str, name: str) -> None:
    look = looks(runs)
    for run in runs:
        records = run.log("curvature")
        steps, mean = column(records, "step"), smooth(column(records, f"curvature/{key}_mean"))
        error = smooth(column(records, f"curvature/{key}_stderr"))
        line(ax, run, look[run.exp], steps, mean)
        ax.fill_between(steps, mean - error, mean + error, color=look[run.exp]["color"], alpha=0.18, linewidth=0)
    ax.set(ylabel=name)


def curvature_caption(runs: list[Run]) -> str:
    first = runs[0].log("curvature")[0]
    return (f"Hutchinson, {first['num_probes']} probes of {first['batch_size']} images, the same at every step and in "
            f"every arm; running mean over {SMOOTH} records; band: one standard error of a record, which smoothing "
            "does not shrink, as its probes repeat.")


def curvature_vs_steps(runs: list[Run]) -> Figure:
    """Hessian traces of each arm's own loss and of the unweighted loss."""
    fig, axes = subplots(1, 2, figsize=(7.5, 3.8), sharey=True)
    draw_curvature(axes[0], runs, "hutch_trace", "Hessian trace")
    draw_curvature(axes[1], runs, "hutch_trace_unweighted", "")
    axes[0].set(title="of the arm's own loss", xlabel="training step", ylim=(0, None))
    axes[1].set(title="of the unweighted loss", xlabel="training step")
    legend(fig, [axes[0]])
    return finish(fig, f"{curvature_caption(runs)} A weight below 1 alone lowers the left one. {seeds_note(runs)}")


def curvature_vs_distance(runs: list[Run]) -> Figure:
    """Trace of the unweighted loss against the distance, milestone by milestone."""
    fig, ax = subplots(figsize=(6.5, 4))
    (key, name), look, used = distance_key(runs), looks(runs), []
    for run in runs:
        traces = {r["step"]: r for r in run.log("curvature")}
        points = [r for r in run.results("milestone") if r["step"] in traces]
        if not points:
            raise RunError(f"{run.path}: no milestone at which the curvature was measured")
        at = [traces[r["step"]] for r in points]
        x, y = column(at, "curvature/hutch_trace_unweighted_mean"), column(points, key)
        line(ax, run, look[run.exp], x, y, markevery=1)
        ax.errorbar(x, y, column(points, f"{key}_stderr"), column(at, "curvature/hutch_trace_unweighted_stderr"),
                    fmt="none", ecolor=look[run.exp]["color"], alpha=0.5, capsize=2)
        below = list(look).index(run.exp) % 2  # else the labels of two arms that are close cover each other
        for i in sorted({0, len(points) - 1}):
            ax.annotate(f"{points[i]['step']:,}", (x[i], y[i]), textcoords="offset points", fontsize=7.5,
                        xytext=(6, -12) if below else (-6, 6), ha="left" if below else "right",
                        color=look[run.exp]["color"])
        used += points
    ax.set(xlabel="Hessian trace of the unweighted loss", ylabel=name)
    ax.margins(0.15)
    legend(fig, [ax])
    return finish(fig, f"One point per milestone ({setting(used)}), the first and the last with their step; bars: one "
                       f"standard error of each. {seeds_note(runs)}")


def step_curves(runs: list[Run]) -> Figure:
    """Loss, distance, gradient norm and trace over the steps."""
    fig, axes = subplots(2, 2, figsize=(8.5, 6.2), sharex=True)
    caption = ["Training error: the " + draw_loss(axes[0, 0], runs), draw_distance(axes[0, 1], runs),
               draw_grad_norm(axes[1, 0], runs), curvature_caption(runs)]
    draw_curvature(axes[1, 1], runs, "hutch_trace_unweighted", "Hessian trace (unweighted loss)")
    axes[1, 1].set_ylim(bottom=0)
    for ax in axes[1]:
        ax.set_xlabel("training step")
    legend(fig, [axes[0, 0]])
    return finish(fig, f"{' '.join(caption)} {seeds_note(runs)}")


def snr_geometry(runs: list[Run]) -> Figure:
    """Do batches of high SNR have large gradients or large curvature?"""
    fig, axes = subplots(1, 2, figsize=(8, 3.9))
    look = looks(runs)
    for run in runs:
        records = [r for r in run.log("loss") if r["train/grad_global_L2"] is not None]
        records = records[len(records) // 2:]
        probes = run.log("curvature")[-1]
        traces = np.mean([r["curvature/hutch_trace_samples"] for r in run.log("curvature")[-SMOOTH:]], axis=0)
        for ax, x, y, size in ((axes[0], column(records, "snr/mean"), column(records, "train/grad_global_L2"), 3),
                               (axes[1], probes["curvature/snr_mean_samples"], traces, 5)):
            line(ax, run, look[run.exp], x, y, linestyle="none", markersize=size, alpha=0.6, markevery=1)
            ax.set(xscale="log", xlabel="mean SNR of the batch")
    axes[0].set(yscale="log", ylabel="gradient norm (global L2)")
    log_axis(axes[0].yaxis)
    axes[1].set_ylabel("Hessian trace of the arm's own loss")
    legend(fig, [axes[0]])
    return finish(fig, f"Left: logged steps of the second half of training, one point each. Right: one point per "
                       f"probe, mean of the last {SMOOTH} records (v^T H v can be negative). {seeds_note(runs)}")


def grids(runs: list[Run]) -> Figure:
    """The last grid of samples that all runs have drawn: a row for each seed that all experiments have."""
    exps = list(dict.fromkeys(run.exp for run in runs))
    by_seed = {run.seed: [other for other in runs if other.seed == run.seed] for run in runs}
    rows = [row for _, row in sorted(by_seed.items()) if [run.exp for run in row] == exps]
    if not rows:
        raise RunError(f"{', '.join(str(run.path) for run in runs)}: no seed that all of {', '.join(exps)} have")
    shown = [run for row in rows for run in row]
    names = set.intersection(*({p.name for p in (run.path / "grids").glob("step_*_*.png")} for run in shown))
    if not names:
        raise RunError(f"{', '.join(str(run.path) for run in shown)}: no grid of one step in all of them")
    name, several = max(names), len(rows) > 1
    fig, axes = subplots(len(rows), len(exps), figsize=(3.6 * len(exps), 0.3 + 3.7 * len(rows)), squeeze=False)
    for ax, run in zip(axes.flat, shown, strict=True):
        ax.imshow(Image.open(run.path / "grids" / name), interpolation="nearest")
        ax.set(title=label(run) + (f", seed {run.seed}" if several else ""), xticks=[], yticks=[])
        ax.grid(False)
    step, sampler, nfe = re.fullmatch(r"step_(\d+)_([a-z]+)(\d+)\.png", name).groups()
    alike = "each of a row." if several else f"each. Seed {rows[0][0].seed}."
    return finish(fig, f"EMA samples at step {int(step):,}, {sampler.upper()} NFE {nfe}; the same noise in the same "
                       f"cell of {alike}")


def frontier_points(runs: list[Run]) -> dict[Run, list[dict]]:
    """The frontier at its last step of each run that has one, in the features and at the largest n that all these have.

    Raises RunError where an experiment has no such run.
    """
    measured = [run for run in runs if run.has("results") and run.results("frontier")]
    for run in runs:
        if run.exp not in {other.exp for other in measured}:
            raise RunError(f"{run.path}: no frontier; measure it by evaluate.py {run.path} --frontier 10,20,50,100")
    common = set.intersection(*({(r["features"] == run.config.eval.features, r["n"], r["features"])
                                 for r in run.results("frontier")} for run in measured))
    if not common:
        raise RunError(f"{', '.join(run.exp for run in measured)}: no frontier of one n and one features in all")
    _, n, features = max(common)
    points = {run: [r for r in run.results("frontier") if (r["n"], r["features"]) == (n, features)] for run in measured}
    return {run: [r for r in own if r["step"] == max(column(own, "step"))] for run, own in points.items()}


def draw_by_nfe(ax, run: Run, look: dict, points: list[dict], key: str) -> None:
    """A metric with its error against NFE, a line per sampler."""
    for sampler, dash in DASHES.items():
        chosen = sorted((r for r in points if r["sampler"] == sampler), key=lambda r: r["nfe"])
        if chosen:
            nfe, y = column(chosen, "nfe"), column(chosen, key)
            line(ax, run, look, nfe, y, linestyle=dash, markevery=1)
            ax.errorbar(nfe, y, column(chosen, f"{key}_stderr"), fmt="none", ecolor=look["color"], capsize=3)


def relative_to(base: Run, run: Run, points: list[dict], key: str) -> list[dict]:
    """Of each point that both runs have, the paired difference and its error in percent of the baseline's value."""
    def point(r):
        return tuple(r[name] for name in ("kind", "step", "sampler", "nfe", "n", "features"))

    wanted, of = {point(r) for r in points}, {point(r): r[key] for r in base.results("frontier")}
    return [d | {name: 100 * d[name] / of[point(d)] for name in (key, f"{key}_stderr")}
            for d in paired_differences(base.path, run.path) if point(d) in wanted]


def frontier(runs: list[Run]) -> Figure:
    """Distance against NFE by sampler; below, where arms have it at one step, relative to the first, paired by seed."""
    points = frontier_points(runs)
    runs, used = list(points), [r for own in points.values() for r in own]
    key, name = distance_name(used[0]["features"])
    paired = {run: relative_to(baseline_of(run, runs), run, own, key) for run, own in points.items()
              if run.exp != runs[0].exp}
    both, look = any(paired.values()), looks(runs)
    fig, axes = subplots(1 + both, 1, figsize=(6.5, 5.8 if both else 4), sharex=True, squeeze=False,
                         height_ratios=[3, 2][:1 + both])
    axes = axes[:, 0]
    for run, own in points.items():
        draw_by_nfe(axes[0], run, look[run.exp], own, key)
    draw_context(axes[0], used)
    axes[0].set_ylabel(name)
    if both:
        for run, differences in paired.items():
            draw_by_nfe(axes[1], run, look[run.exp], differences, key)
        axes[1].axhline(0, color=look[runs[0].exp]["color"], linewidth=1)
        axes[1].set_ylabel(f"relative to {runs[0].exp} (%)")
    nfes = sorted({r["nfe"] for r in used})
    axes[-1].set(xscale="log", xlabel="NFE (network calls per sample)")
    axes[-1].set_xticks(nfes, map(str, nfes))
    axes[-1].minorticks_off()
    samplers = [Line2D([], [], color="#777777", linestyle=dash, label=sampler.upper())
                for sampler, dash in DASHES.items() if sampler in column(used, "sampler")]
    handles = {run.exp: Line2D([], [], color=look[run.exp]["color"], marker=look[run.exp]["marker"], label=label(run))
               for run in runs}
    fig.legend(handles=[*handles.values(), *samplers], loc="outside upper center", ncols=2)
    steps = " and ".join(f"{step:,}" for step in sorted({r["step"] for r in used}))
    below = " Below: differences of paired samples." if both else ""
    return finish(fig, f"EMA weights at step {steps}, n = {used[0]['n']:,}, {used[0]['features']} features; bars: one "
                       f"standard error.{below} {seeds_note(runs)}")


FORMULAS = {f.__name__: f for f in (weights_raw_and_normalised, weight_curves, snr_vs_t)}
FROM_RUNS = {f.__name__: f for f in (distance_vs_steps, distance_and_loss_vs_steps, grad_norm, per_t, effective_loss,
                                     curvature_vs_steps, curvature_vs_distance, step_curves, snr_geometry, grids,
                                     frontier)}


# ---- the command ----

def draw(kind: str, exps: list[str], root: Path, **options) -> Figure:
    """The figure of a kind from the runs of these experiments below root. Raises RunError where it cannot be drawn."""
    if kind in FORMULAS:
        return FORMULAS[kind]([])
    for exp in exps:
        if exp not in list_experiments():
            raise RunError(f"unknown experiment {exp!r}; there are {', '.join(list_experiments())}")
    runs = {exp: find_runs(root, exp) for exp in exps}
    missing = [exp for exp in exps if not runs[exp]]
    if missing:
        raise RunError(f"no run of {', '.join(missing)} in {root}")
    try:
        return FROM_RUNS[kind]([run for exp in exps for run in runs[exp]], **options)
    except KeyError as error:
        raise RunError(f"a log of {', '.join(exps)} lacks {error}: of another version of this code") from error


def save(fig: Figure, out: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg, which depend on nothing but the figure (no date, no random ids)."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        fig.savefig(path, metadata=metadata)
    return paths


def parse_args(argv: list[str] | None, names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # an error is one line
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of experiments.toml: {', '.join(names)}")
    parser.add_argument("--all", action="store_true", help="every figure whose runs are there; the others are listed")
    parser.add_argument("--kind", action="append", default=[], choices=[*FORMULAS, *FROM_RUNS], help="with --exps")
    parser.add_argument("--exps", nargs="+", default=[], metavar="EXP", help="whose runs --kind draws")
    parser.add_argument("--runs", type=Path, help="folder of runs, RUNS/EXP/seedSEED; runs by default")
    parser.add_argument("--out", type=Path, help="folder to write to; RUNS/figures by default")
    args = parser.parse_args(argv)
    if [bool(args.names), args.all, bool(args.kind)].count(True) != 1:
        parser.error("give names of figures, or --all, or --kind with --exps")
    if args.runs is not None and not args.runs.is_dir():
        parser.error(f"--runs {args.runs}: no such folder")
    args.runs = args.runs or Path("runs")
    if bool(args.exps) != any(kind in FROM_RUNS for kind in args.kind):
        parser.error("--kind and --exps go together, but for the kinds that are drawn from formulas")
    unknown = [name for name in args.names if name not in names]
    if unknown:
        parser.error(f"unknown figure {unknown[0]!r}; there are {', '.join(names)}")
    return args


def main(argv: list[str] | None = None) -> int:
    tables = load_tables("figures")
    args = parse_args(argv, list(tables))
    if args.kind:
        todo = {"_".join([kind, *args.exps]): {"kind": kind, "runs": args.exps} for kind in args.kind}
    else:
        todo = {name: table for name, table in tables.items() if args.all or name in args.names}
    left_out = []
    for name, table in todo.items():
        options = {"until": table["until"]} if "until" in table else {}
        try:
            figure = draw(table["kind"], table.get("runs", []), args.runs, **options)
        except (RunError, CheckpointError, ConfigError, OSError) as error:
            left_out.append(f"{name}: left out: {error}")
        else:
            print(*save(figure, args.out or args.runs / "figures", name))
    if left_out and not args.all:
        raise RunError("; ".join(left_out))
    print(*left_out, sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
