"""The study's answer, as one figure and one table, from the runs of both arms of [comparisons.min_snr].

    python docs/experiments/answer.py --runs runs

Everything is read at one step: the last one at which all pairs have a milestone. Writes answer.png,
answer.svg and answer.md to --out, and without --out the table into summary.md. A panel or row whose measurement is
missing is left out.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parents[2]))
from check import AT, EXPS, training
from checkpoint import replace_file
from config import default, load_tables
from diffusion import spaced_timesteps
from errors import UserError, argument_parser, run_script
from fid import metric_name
from gradient import GROUPS
from plots import changes, looks, save
from report import DISTANCE, decide, table
from runs import Run, find_runs, read_json, read_jsonl

HERE = Path(__file__).parent
MARKS = "<!-- generated: python docs/experiments/answer.py -->", "<!-- end -->"
SPREAD = "samples/channel_mean_sd", "samples/neighbour_rms"
# Seeds and steps at which blur.py and gradient.py were seen before they were registered; three others are to confirm.
EXPLORED = {(1081, 10_000), (1081, 50_000), (1082, 10_000)}
CONFIRMING = 3


def variation(values: list[float]) -> float:
    return np.std(values, ddof=1) / np.mean(values)


STEADINESS = {  # of training: row of the table -> key of loss.jsonl, and what of its lines
    "Gradient norm of the own loss, mean": ("train/grad_global_L2", np.mean),
    "Gradient norm of the own loss, largest": ("train/grad_global_L2", max),
    "Gradient norm of the own loss, sd / mean": ("train/grad_global_L2", variation),
    "Training eps-MSE, mean": ("train/eps_mse_mean", np.mean),
    "Training eps-MSE, sd / mean": ("train/eps_mse_mean", variation),
    "Own loss, sd / mean": ("train/loss_mean", variation)}


class Arms(NamedTuple):
    """Pairs (baseline, arm) by seed, the step at which all is read, the folder of the runs, and the kind of distances.

    kind: "final" if all runs have finished and the step is their last, else "milestone", which has fewer samples.
    """
    pairs: list[tuple[Run, Run]]
    step: int
    root: Path
    kind: str


def find(root: Path) -> Arms:
    """Raises UserError if no seed has a milestone in both arms, or the seeds have none in common."""
    base, arm = ({run.seed: run for run in find_runs(root, exp)} for exp in EXPS)
    measured = {seed: {r["step"] for r in base[seed].results("milestone")} & {
        r["step"] for r in arm[seed].results("milestone")} for seed in sorted(base.keys() & arm.keys())}
    measured = {seed: steps for seed, steps in measured.items() if steps}
    if not measured:
        raise UserError(f"{root}: no seed has a milestone of both {' and '.join(EXPS)}")
    step = max(set.intersection(*measured.values()), default=None)
    if step is None:
        raise UserError(f"{root}: the seeds {sorted(measured)} have no milestone in common; give another --runs")
    pairs = [(base[seed], arm[seed]) for seed in measured]
    ended = all(any(r["step"] == step and r["sampler"] == run.config.eval.sampler for r in run.results("final"))
                for pair in pairs for run in pair)
    return Arms(pairs, step, root, "final" if ended else "milestone")


def traces(run: Run, step: int) -> dict:
    """The Hessian traces at a step with the most probes; {} if there are none."""
    lines = [r for log in ("curvature", "traces") for r in run.log(log) if r["step"] == step]
    return max(lines, key=lambda r: r["num_probes"], default={})


def distance(run: Run, arms: Arms) -> dict:
    """The results line of the registered sampler."""
    (line,) = [r for r in run.results(arms.kind)
               if r["step"] == arms.step and r["sampler"] == run.config.eval.sampler]
    return line


def profile(run: Run, step: int, key: str = "eps_mse_ema") -> dict[int, float]:
    (line,) = [r for r in run.log("per_t") if r["step"] == step]
    return dict(zip(line["t"], line[key], strict=True)) if key in line else {}


A, B = EXPS
PARTS = "at all t", "above t = 130", "below t = 130"  # timesteps of which the other network draws the samples
ALL, ABOVE, BELOW = SWAPS = [f"Min-SNR {part}" for part in PARTS]
CONTROLS = [f"another vanilla seed {part}" for part in PARTS]
LONGER = "vanilla, twice the steps"


def mixed(one: str, two: str) -> tuple[tuple[str, str], ...]:
    """(network of the noisy timesteps, of the clean ones) for each of PARTS."""
    return (two, two), (two, one), (one, two)


def complete(folder: Path, pattern: str) -> list[list[dict]]:
    """The lines of the logs of this name that have all four; others are still being written."""
    return [lines for path in sorted(folder.glob(pattern)) if len(lines := read_jsonl(path)) == 4]


def swapped(base: Run, step: int, root: Path) -> dict[str, float]:
    """{combination: ratio of Frechet distances} of a seed, from the logs that the workflow writes to RUNS/swap.

    The ratio is to the baseline's own samples.
    """
    s, folder, fd, found = base.seed, root / "swap", metric_name("fd", base.config.eval.features), {}
    for lines in complete(folder, f"{A}_{s}_*_step{step}.jsonl"):
        values, own = {(r["noisy"], r["clean"]): r[fd] for r in lines}, lines[0]
        one, two = own["clean"], lines[-1]["clean"]
        names = SWAPS if two == B else CONTROLS
        found |= {name: values[pair] / own[fd] for name, pair in zip(names, mixed(one, two), strict=True)}
        longer = folder / f"{A}_{s}_step{2 * step}.jsonl"
        if longer.exists() and (r := read_jsonl(longer)[0])["n"] == own["n"]:
            found[LONGER] = r[fd] / own[fd]
    return found


def swaps(arms: Arms) -> dict[str, dict[int, float]]:
    """{combination: {seed: ratio}} of those that were measured."""
    found = {base.seed: swapped(base, arms.step, arms.root) for base, _ in arms.pairs}
    by_name = {name: {seed: ratios[name] for seed, ratios in found.items() if name in ratios}
               for name in (*SWAPS, *CONTROLS, LONGER)}
    return {name: seeds for name, seeds in by_name.items() if seeds}


def averaged(root: Path) -> list[tuple[dict, dict]]:
    """The baseline's and the arm's line of each square that blur.py has logged in RUNS/blur."""
    logs = [read_jsonl(path) for path in sorted((root / "blur").glob("*.jsonl"))]
    return [pair for log in logs for pair in zip(log[::2], log[1::2], strict=False)]  # one may still be being measured


def relative_change(r: dict, own: dict, key: str) -> tuple[float, float]:
    """The change of a distance from that of the samples `own`, and half of its 95 % interval (paired), in percent."""
    return 100 * r[f"{key}_difference"] / own[key], 196 * r[f"{key}_difference_stderr"] / own[key]


def change(ratios: list[float]) -> tuple[float, float, float]:
    """Of ratios arm / baseline, a seed each: mean of the logarithm and its 95 % t-interval, in percent; NaN of one."""
    d = decide([math.log(r) for r in ratios], DISTANCE)
    return tuple(100 * math.expm1(y) for y in (d.mean, *d.interval))


def percent(ratios: list[float]) -> str:
    mean, low, high = change(ratios)
    return f"{mean:+.1f} %" + f" ({low:+.1f} to {high:+.1f})" * (len(ratios) > 1)


def direction(ratios: list[float]) -> str:
    """What the interval of the mean log ratio says; of one seed, the sign of its own."""
    if len(ratios) == 1:
        return f"{'higher' if ratios[0] > 1 else 'lower'} at this seed"
    _, low, high = change(ratios)
    return "higher" if low > 0 else "lower" if high < 0 else "not told apart"


# ---- panels ----

def panel_profile(ax, arms: Arms) -> None:
    for base, arm in arms.pairs:
        one, two = profile(base, arms.step), profile(arm, arms.step)
        ax.plot(one.keys(), [two[t] / one[t] for t in one], color=looks([base, arm])[arm]["color"], linewidth=1)
    ax.axhline(1, color="#000000", linewidth=1)
    ax.axvline(130, color="#777777", linestyle=":")
    ax.set_xscale("function", functions=(lambda t: np.sqrt(np.maximum(t, 0)), np.square))
    ax.set(xlim=(0, 999), xticks=[0, 20, 50, 130, 250, 500, 999], xlabel="timestep t (square-root scale)",
           ylabel="held-out eps-MSE, Min-SNR / vanilla", title="where the weight acts: a line per seed")


def panel_swaps(ax, arms: Arms) -> None:
    found = swaps(arms)
    for y, (name, seeds) in enumerate(found.items()):
        ratios = list(seeds.values())
        ax.plot([100 * (r - 1) for r in ratios], [y] * len(ratios), "o", alpha=0.7,
                color="#d55e00" if "Min-SNR" in name else "#000000")
        if len(ratios) > 2:  # of two, the interval is wider than the axis should be
            mean, low, high = change(ratios)
            ax.plot([mean], [y + 0.25], "|", color="#000000", markersize=8)
            ax.plot([low, high], [y + 0.25] * 2, color="#000000", linewidth=1)
    ax.axvline(0, color="#000000", linewidth=1)
    ax.set(yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5),
           xlabel="change of the distance from vanilla (%)", title="each network on a part of the timesteps")


def panel_frontier(ax, arms: Arms) -> None:
    key = metric_name("fd", arms.pairs[0][0].config.eval.features)
    for base, arm in arms.pairs:
        here = [d for d in changes(base, arm, "frontier") if d["step"] == arms.step]
        here = [d for d in here if d["n"] == max(d["n"] for d in here)]
        for sampler, dash in (("ddpm", "-"), ("ddim", "--")):
            if points := sorted((d["nfe"], d[key]) for d in here if d["sampler"] == sampler):
                ax.plot(*zip(*points, strict=True), dash, marker="s", markersize=3, color="#d55e00",
                        label=f"{sampler.upper()}" if (base, arm) == arms.pairs[0] else None)
    ax.axhline(0, color="#000000", linewidth=1)
    ax.set(xscale="log", xlabel="NFE (network calls per sample)", ylabel="Min-SNR's change of the distance (%)",
           title="over the number of calls")
    ax.legend()


def panel_forest(ax, arms: Arms) -> None:
    key, labels, ratios = metric_name("fd", arms.pairs[0][0].config.eval.features), [], []
    for y, (base, arm) in enumerate(arms.pairs):
        line = distance(arm, arms)
        own = {key: line[key] for key in ("step", "sampler")}
        (d,) = [d for d in changes(base, arm, line["kind"]) if own.items() <= d.items()]
        ratios.append(1 + d[key] / 100)
        ax.errorbar(d[key], y, xerr=1.96 * d[f"{key}_stderr"], marker="s", color="#d55e00")
        labels.append(f"seed {base.seed}")
    if len(ratios) > 1:
        mean, low, high = change(ratios)
        ax.errorbar(mean, len(ratios), xerr=[[mean - low], [high - mean]], marker="D", color="#000000")
        labels.append("mean")
    ax.axvspan(100 * DISTANCE[0] - 100, 100 * DISTANCE[1] - 100, color="#777777", alpha=0.15, linewidth=0)
    ax.axvline(0, color="#000000", linewidth=1)
    ax.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5),
           xlabel=f"change of the distance (%), {line['sampler'].upper()} {line['nfe']}, n = {line['n']:,}",
           title="distance of samples: left of 0, Min-SNR is closer")


def panel_slope(ax, arms: Arms) -> None:
    """Does the network see the mean colour of x_t?"""
    for pair in arms.pairs:
        for run, look in looks(list(pair)).items():
            slope = profile(run, arms.step, "eps_mean_slope_ema")
            ax.plot(slope.keys(), slope.values(), color=look["color"], linestyle=look["linestyle"], linewidth=1,
                    label=look["label"] if pair == arms.pairs[0] else None)
    best = profile(arms.pairs[0][0], arms.step, "eps_mean_slope_best")
    ax.plot(best.keys(), best.values(), color="#0072b2", linewidth=2, label="best linear denoiser")
    ax.set(xlabel="timestep t", ylabel="slope of eps_hat's channel means on x_t's",
           title="how much of the mean colour is seen")
    ax.legend()


def panel_averaged(ax, arms: Arms) -> None:
    """Is the difference in the fine detail? A line per seed and step, a colour per features."""
    lines = {}
    for own, r in averaged(arms.root):
        style = ":" if r.get("equal_saturation") else "--" if r["step"] != arms.step else "-"
        point = f"{r['square']} x {r['square']}", *relative_change(r, own, metric_name("fd", r["features"]))
        lines.setdefault((r["features"], style, r["seed"], r["step"]), []).append(point)
    features = sorted({feature for feature, *_ in lines})
    labels = set()
    for (feature, style, *_), points in sorted(lines.items()):
        squares, changed, halves = zip(*points, strict=True)
        ax.errorbar(squares, changed, halves, marker="s", markersize=4, capsize=3, linewidth=1, alpha=0.8,
                    color=f"C{features.index(feature)}", linestyle=style,
                    label=None if feature in labels else feature)
        labels.add(feature)
    ax.axhline(0, color="#000000", linewidth=1)
    ax.set(xlabel="pixels averaged, in samples and training images", ylabel="Min-SNR's change of the distance (%)",
           title="is the difference in the fine detail?")
    ax.legend()


def measured(log: Callable[[Run, int], object]) -> Callable[[Arms], bool]:
    """Whether every run has it, at the step of arms."""
    return lambda arms: all(log(run, arms.step) for pair in arms.pairs for run in pair)


PANELS: dict[Callable, Callable[[Arms], object]] = {  # and when it can be drawn
    panel_profile: lambda arms: True, panel_swaps: swaps,
    panel_frontier: measured(lambda run, step: any(r["step"] == step for r in run.results("frontier"))),
    panel_slope: measured(lambda run, step: profile(run, step, "eps_mean_slope_ema")),
    panel_averaged: lambda arms: averaged(arms.root), panel_forest: lambda arms: True}


def description(arms: Arms) -> str:
    return (f"Step {arms.step:,}, {EXPS[1]} (Min-SNR, gamma 5) against {EXPS[0]} (vanilla), seed"
            f"{'s' * (len(arms.pairs) > 1)} {', '.join(str(base.seed) for base, _ in arms.pairs)}.")


def answer(arms: Arms) -> Figure:
    """Two panels in a row; the last one is as wide as both if their number is odd."""
    panels = [panel for panel, can_be_drawn in PANELS.items() if can_be_drawn(arms)]
    rows = math.ceil(len(panels) / 2)
    fig = Figure((10.4, 3.7 * rows))
    grid = fig.add_gridspec(rows, 2)
    for i, panel in enumerate(panels):
        wide = i + 1 == len(panels) and i % 2 == 0
        ax = fig.add_subplot(grid[i // 2, :] if wide else grid[i // 2, i % 2])
        panel(ax, arms)
        ax.set_title(f"({'abcdef'[i]}) {ax.get_title()}")
    caption = (f"{description(arms)} (d) dashed: other steps; dotted: Min-SNR's samples made as saturated as "
               "vanilla's. Bars: 95 % intervals, of a seed for its samples, of a mean over seeds. Grey: ±7 %, the "
               "limits registered for 50,000 steps.")
    fig.supxlabel(fill(caption, 160), x=0.01, ha="left", fontsize=8)
    return fig


# ---- the table ----

def rows(arms: Arms) -> list[list[str]]:
    """What was measured, its mean over seeds in both arms, the change, its direction, and how it was measured."""
    pairs, step, found = arms.pairs, arms.step, []

    def add(name: str, value: Callable[[Run], float], how: str) -> None:
        one, two = (np.array([value(run) for run in arm]) for arm in zip(*pairs, strict=True))
        add_ratios(name, list(two / one), how, f"{one.mean():.4g}", f"{two.mean():.4g}")

    def add_ratios(name: str, ratios: list[float], how: str, vanilla: str = "", arm: str = "") -> None:
        found.append([name, vanilla, arm, percent(ratios), direction(ratios), how])

    line = distance(pairs[0][0], arms)
    for name, metric in (("Fréchet distance", "fd"), ("KID", "kid")):
        key = metric_name(metric, line["features"])
        context = f"test images {line[f'{key}_floor_test']:.4g}, noise {line[f'{key}_ceiling']:.4g}"
        add(f"{name} of samples (lower is better)", lambda run, key=key: distance(run, arms)[key],
            f"{line['sampler'].upper()} {line['nfe']}, n = {line['n']:,}, {line['features']}, EMA weights; {context}")
    for name, (key, statistic) in STEADINESS.items():
        add(name, lambda run, key=key, statistic=statistic: statistic(training(run, key, step / 5, step)),
            f"{len(training(pairs[0][0], key, step / 5, step))} log lines after step {step // 5:,}")
    for t in sorted(profile(pairs[0][0], step).keys() & set(AT)):
        add(f"Held-out eps-MSE at t = {t}", lambda run, t=t: profile(run, step)[t], "EMA weights")
    probes = {traces(run, step).get("num_probes") for pair in pairs for run in pair}
    for of, key in (("the unweighted loss", "hutch_trace_unweighted_mean"), ("the arm's own loss", "hutch_trace_mean")):
        if len(probes) == 1 and None not in probes:
            add(f"Hessian trace of {of}", lambda run, key=key: traces(run, step)[f"curvature/{key}"],
                f"{min(probes)} probes, raw weights")
    for name, seeds in swaps(arms).items():
        add_ratios(f"Fréchet distance of {name}", list(seeds.values()), f"seed{'s' * (len(seeds) > 1)} "
                   + ", ".join(map(str, seeds)))
    for key, name in zip(SPREAD, ("Spread of mean colours", "Texture"), strict=True):
        if all(key in distance(run, arms) for pair in pairs for run in pair):
            add(name, lambda run, key=key: distance(run, arms)[key],
                f"levels of 255, training images {line[f'{key}_train']:.1f}")
    return found


def section(text: str, header: list[str], found: list[list[str]]) -> str:
    """A table below its text; "" if it has no row."""
    return f"{fill(text, 106, break_on_hyphens=False)}\n\n{table(header, found)}\n" if found else ""


def colours(root: Path) -> str:
    """A table of what colour.py has logged in RUNS/colour; "" if there is nothing."""
    found, text = [], ""
    for r in [r for path in sorted((root / "colour").glob("*.jsonl")) for r in read_jsonl(path)]:
        keys = [*(metric_name(metric, r["features"]) for metric in ("fd", "kid")), *SPREAD]
        found.append([f"{r['exp']}, seed {r['seed']}, {r['sampler'].upper()} {r['nfe']}", r["mean_colour"],
                      *(f"{r[key]:.4g}" for key in keys)])
        data = f"in training images {r[f'{SPREAD[0]}_train']:.1f} and {r[f'{SPREAD[1]}_train']:.1f}"
        text = (f"Step {r['step']:,}, n = {r['n']:,}, {r['features']}; corrected: at t > {r['above']} the channel "
                f"means of eps_hat are the best linear ones. Spread and texture in levels of 255; {data}.")
    header = ["samples", "mean colour", "Fréchet distance", "KID", "spread of mean colours", "texture"]
    return section(text, header, found)


def compared(base: Run, arm: Run, d: dict) -> list[str]:
    """CELLS of one of changes(), both runs at one step. Intervals: 95 %, of the samples."""
    fd, kid = (metric_name(metric, d["features"]) for metric in ("fd", "kid"))
    own, scale = d[f"{fd}_baseline"], 100 / d[f"{kid}_baseline"]
    point = {key: d[key] for key in ("step", "sampler", "nfe", "n")}
    spreads = [r[SPREAD[0]] for run in (base, arm) for r in run.results(d["kind"])
               if point.items() <= r.items() and SPREAD[0] in r]
    return [f"{own:.1f}", f"{own * (1 + d[fd] / 100):.1f}", f"{d[fd]:+.1f} ± {1.96 * d[f'{fd}_stderr']:.1f} %",
            f"{scale * d[kid]:+.1f} ± {1.96 * scale * d[f'{kid}_stderr']:.1f} %",
            ", ".join(f"{spread:.1f}" for spread in spreads)]


CELLS = ["vanilla", "Min-SNR", "change", "KID", "colour spread"]


def course(arms: Arms) -> str:
    """A table of the distances of seeds that have gone past the step of all pairs; "" if none has."""
    found, how, times = [], "", sorted(profile(arms.pairs[0][0], arms.step).keys() & {0, 130, 999})
    for base, arm in arms.pairs:
        points = [d for kind in ("milestone", "final") for d in changes(base, arm, kind)
                  if d["sampler"] == base.config.eval.sampler and d["step"] == d["step_a"]]
        for d in points if max((d["step"] for d in points), default=0) > arms.step else []:
            one, two = (profile(run, d["step"]) for run in (base, arm))
            hybrids = swapped(base, d["step"], arms.root)
            found.append([str(base.seed), f"{d['step']:,}", f"{d['n']:,}", *compared(base, arm, d),
                          *(f"{100 * (two[t] / one[t] - 1):+.1f} %" for t in times),
                          *(percent([hybrids[name]]) if name in hybrids else "" for name in (ABOVE, BELOW))])
            how = f"{d['sampler'].upper()} {d['nfe']}, {d['features']}"
    header = ["seed", "step", "n", *CELLS, *(f"eps-MSE, t = {t}" for t in times), ABOVE, BELOW]
    return section(
        f"Seeds past step {arms.step:,}: Fréchet distance of n samples of both arms ({how}), the changes of distance "
        "and KID with the 95 % intervals of the samples, the spread of mean colours in both arms, and the changes of "
        "the held-out eps-MSE and of the distance with Min-SNR's network on a part of the timesteps only (at the "
        "swap's own n, so not to be compared between rows).", header, found)


def others(arms: Arms) -> str:
    """A table of the other comparisons of a weight, below the answer's own pair of that seed; "" if none has ended.

    RUNS/unclipped may hold baselines that were trained with another train.grad_clip.
    """
    found, folders = [], {"": arms.root, ", vanilla not clipped": arms.root / "unclipped"}
    for comparison in load_tables("comparisons").values():
        if comparison["factor"] != ["loss.weighting"] or comparison["runs"] == EXPS:
            continue
        arm = {run.seed: run for run in find_runs(arms.root, comparison["runs"][1])}
        for note, folder in folders.items():
            for base in find_runs(folder, comparison["runs"][0]) if folder.is_dir() else []:
                if base.seed in arm and base.config.loss.weighting == "constant":
                    found += [(comparison["title"] + note, base, arm[base.seed], d)
                              for d in changes(base, arm[base.seed], "final") if d["step"] == d["step_a"]]
    beside, lines = {(base.seed, d["step"]) for _, base, _, d in found}, []
    own = [("Min-SNR against vanilla", *pair, d) for pair in arms.pairs for d in changes(*pair, "milestone")
           if (pair[0].seed, d["step"]) in beside]
    for title, one, two, d in own + found:
        slopes = [profile(run, d["step"], "eps_mean_slope_ema") for run in (one, two)]
        last = max(slopes[0], default=None)
        lines.append([title, str(one.seed), f"{d['step']:,}", f"{d['sampler'].upper()} {d['nfe']}", f"{d['n']:,}",
                      *compared(one, two, d), ", ".join(f"{slope[last]:.2f}" for slope in slopes if last in slope)])
    header = ["comparison", "seed", "step", "sampler", "n", *CELLS, "slope of the mean colour, highest t"]
    return section(
        f"Other comparisons of Min-SNR with vanilla, a row per seed and sampler; first, {B} against {A} at the same "
        "seeds and step. Fréchet distance, its change and that of KID with the 95 % intervals of the samples; other "
        "seeds can differ by more. Last columns: vanilla, Min-SNR.", header, found and lines)


def relative(r: dict, own: dict, key: str) -> str:
    return "{:+.1f} ± {:.1f} %".format(*relative_change(r, own, key))


def confirming(ratios: dict[tuple, dict[int, float]]) -> dict[tuple, tuple[str, str]]:
    """{(step, ...): (seeds, mean change with its 95 % t-interval)} of {(step, ...): {seed: arm / baseline}}."""
    later = {key: {seed: ratio for seed, ratio in sorted(by_seed.items()) if (seed, key[0]) not in EXPLORED}
             for key, by_seed in ratios.items()}
    return {key: (", ".join(map(str, by_seed)), percent([*by_seed.values()]))
            for key, by_seed in later.items() if len(by_seed) >= CONFIRMING}


def blurs(root: Path) -> str:
    """A table of what blur.py has logged in RUNS/blur; "" if there is nothing."""
    found, ratios, how = [], {}, ""
    for own, r in averaged(root):
        fd, kid = (metric_name(metric, r["features"]) for metric in ("fd", "kid"))
        equal, square = r.get("equal_saturation", False), f"{r['square']} x {r['square']}"
        colour = [f"{x['saturation']:.0f}" for x in (own, r) if "saturation" in x]
        found.append([str(r["seed"]), f"{r['step']:,}", r["features"] + ", equal saturation" * equal, square,
                      f"{r['n']:,}", f"{own[fd]:.4g}", f"{r[fd]:.4g}", relative(r, own, fd), relative(r, own, kid),
                      ", ".join(colour)])
        how = f"{r['sampler'].upper()} {r['nfe']}"
        if not equal:
            ratios.setdefault((r["step"], r["features"], square), {})[r["seed"]] = r[fd] / own[fd]
    found += [[seeds, f"{step:,}", features, square, "", "", "", mean, "", ""]
              for (step, features, square), (seeds, mean) in confirming(ratios).items()]
    header = ["seed", "step", "features", "averaged over pixels", "n", "vanilla", "Min-SNR", "change", "KID",
              "saturation"]
    return section(
        f"Fréchet distance ({how}) when samples and training images are averaged over squares of pixels, so that all "
        "lack the same detail. 95 % intervals of the samples; in a row of several seeds, of their mean. Saturation "
        "(not in older logs): largest minus smallest channel of a pixel, on average, vanilla and Min-SNR, before the "
        "averaging; equal: Min-SNR's samples were made as saturated as vanilla's first.", header, found)


def calls(arms: Arms) -> str:
    """A table of the swaps at several NFE that are logged in RUNS/swap/E1_*_E2_*_nfe*.jsonl; "" if there are none."""
    found, how = [], ""
    for lines in complete(arms.root / "swap", f"{A}_*_{B}_*_nfe*.jsonl"):
        own, by_networks = lines[0], {(r["noisy"], r["clean"]): r for r in lines}
        T, fd = arms.pairs[0][0].config.diffusion.num_timesteps, metric_name("fd", own["features"])
        clean = sum(t < own["at"] for t in spaced_timesteps(T, own["nfe"]).tolist())
        found.append((own["seed"], own["step"], own["nfe"], clean, own["n"], f"{own[fd]:.1f}",
                      *(relative(by_networks[networks], own, fd) for networks in mixed(A, B))))
        how = f"{own['sampler'].upper()}, {own['features']}; 95 % intervals of the samples"
    header = ["seed", "step", "NFE", "of them below t = 130", "n", "vanilla", *SWAPS]
    return section(f"Changes of the Fréchet distance with the number of network calls ({how}).", header,
                   [[str(seed), f"{step:,}", *map(str, rest)] for seed, step, *rest in sorted(found)])


def gradients(root: Path) -> str:
    """A table of what gradient.py has logged in RUNS/gradient; "" if there is nothing."""
    found, ratios, wide = [], {}, float(student.ppf(0.975, GROUPS - 1))
    for own, loss, network, arm in complete(root / "gradient", f"{A}_*_{B}_*.jsonl"):
        scales = [f"{r['noise_scale']:.1f} ± {wide * r['noise_scale_stderr']:.1f}" for r in (own, arm)]
        changed = [f"{100 * (r['noise_scale_ratio'] - 1):+.0f} ± {100 * wide * r['noise_scale_ratio_stderr']:.0f} %"
                   for r in (arm, loss, network)]
        shares = [f"{100 * r['square_share']:.0f} %" for r in (own, arm)]
        found.append((own["seed"], own["step"], own["n"], *scales, *changed, *shares))
        ratios.setdefault((own["step"],), {})[own["seed"]] = arm["noise_scale_ratio"]
    rows = [[str(seed), f"{step:,}", f"{n:,}", *rest] for seed, step, n, *rest in sorted(found)]
    rows += [[seeds, f"{step:,}", *[""] * 3, mean, *[""] * 4] for (step,), (seeds, mean) in confirming(ratios).items()]
    header = ["seed", "step", "n", "vanilla", "Min-SNR", "change", "only the loss changed", "only the network changed",
              "vanilla: from below t = 130", "Min-SNR: from below t = 130"]
    return section(
        "Noise scale of the gradient g of the own loss, tr cov(g) / |E g|^2: the batch size at which noise and signal "
        "are equal. Last columns: how much of E |g|^2 the cleanest timesteps contribute. All networks see the same n "
        "examples. 95 % intervals are over examples only, and other checkpoints can differ by more; in a row of "
        "several seeds, of their mean.", header, rows)


def rounding(root: Path) -> str:
    """A table of the runs that were repeated with other rounding: RUNS/again/PATH repeats RUNS/PATH; "" if none was."""
    found, ranges = [], ((0, 100), (100, 500), (500, 1000), (1000, 10_000))
    for path in sorted((root / "again").glob("**/seed*")):
        runs = Run(root / path.relative_to(root / "again")), Run(path)
        first, again = ({r["step"]: r["train/eps_mse_mean"] for r in run.log("loss")} for run in runs)
        off = {step: again[step] / first[step] - 1 for step in first.keys() & again.keys()}
        parts = [[off[step] for step in off if a < step <= b] for a, b in ranges]
        clip, devices = runs[0].config.train.grad_clip, [read_json(run.path / "env.json")["device"] for run in runs]
        found.append([f"{runs[0].exp}{f', clipped at {clip:g}' * (clip != default('train.grad_clip'))}",
                      str(runs[0].seed), "; ".join(devices),
                      *(f"{np.sqrt(np.mean(np.square(part))):.0e}" if part else "" for part in parts)])
    header = ["run", "seed", "CPUs of both trainings", *(f"steps {a + 1:,} to {b:,}" for a, b in ranges)]
    return section("How rounding grows: runs that were trained twice and differ by rounding only. Root mean square of "
                   "the relative difference of the training eps-MSE (means of 100 steps).", header, found)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=Path, default=HERE / "results" / "runs", help="folder with RUNS/EXP/seedSEED")
    parser.add_argument("--out", type=Path, help="folder to write to; docs/experiments/results by default")
    args = parser.parse_args(argv)
    arms = find(args.runs)
    out = args.out or HERE / "results"
    print(*save(answer(arms), out, "answer"))
    means = section(
        f"{description(arms)} vanilla, Min-SNR: means over seeds. change: the ratio of both at each seed, then the "
        "geometric mean over seeds with its 95 % t-interval. The intervals are not corrected for being many.",
        ["measure", "vanilla", "Min-SNR", "change", "Min-SNR is", "measured with"], rows(arms))
    tables = (means, course(arms), gradients(args.runs), calls(arms), blurs(args.runs), colours(args.runs),
              others(arms), rounding(args.runs))
    text = "\n".join(f"**Table {i}.** {table}" for i, table in enumerate(filter(None, tables), start=1))
    replace_file(out / "answer.md", text.encode())
    if args.out is None:
        page = HERE / "summary.md"
        before, begins, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        _, ends, after = rest.partition(MARKS[1])
        if not (begins and ends):
            raise UserError(f"{page}: needs the lines {MARKS[0]} and {MARKS[1]}")
        replace_file(page, f"{before}{begins}\n\n{text}\n{ends}{after}".encode())
    print(text)
    return 0


if __name__ == "__main__":
    run_script(main)
