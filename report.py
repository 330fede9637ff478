"""What a comparison of two arms shows, as Markdown and as one HTML page; and the generated parts of hand-written pages.

    python report.py min_snr_10k                   a comparison of experiments.toml, from runs/
    python report.py E5 E6 --runs DIR              any two experiments: baseline, then arm
    python report.py --pages                       bring docs/experiments/E*.md up to date with experiments.toml,
                                                   the README's table of results with docs/experiments/results

An arm is compared with its baseline seed by seed. What differs between their configs besides the declared factor ends
the comparison, unless --force is given. Verdicts follow the criteria that were registered before the runs.
"""

import argparse
import base64
import html
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from checkpoint import replace_file
from config import PATHS, flatten, list_experiments, load_config, load_tables
from evaluate import Run, RunError, build, find_runs, metric_names, paired_differences, read_json, run_script

DISTANCE_CRITERION, TRACE_CRITERION = 0.07, 0.10  # pre-registered: the least relative change that counts
NOISE = 2.0                                       # standard errors that a difference must exceed
# Keys that may differ: they say where files lie, and when and what is measured, which changes no training.
HARMLESS = (*PATHS, "eval.every", "eval.final_samplers", "train.checkpoint_every", "curvature.every", "grid.every",
            "grid.n", "grid.sampler", "grid.nfe")
KINDS = ("distance_and_loss_vs_steps", "curvature_vs_steps", "curvature_vs_distance", "per_t", "grad_norm", "frontier",
         "grids")                                 # of figures in a report, where they can be drawn
ROOT = Path(__file__).parent
PAGES = ROOT / "docs" / "experiments"
KEPT = PAGES / "results"                          # logs, grids and influences of the study's runs, without checkpoints


# ---- numbers with errors ----

@dataclass(frozen=True)
class Measured:
    """A number and its standard error (None where it has none)."""
    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        if self.stderr is None or not math.isfinite(self.stderr) or self.stderr == 0:
            return f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.stderr)))  # two digits of the error
        return f"{self.value:z,.{digits}f} ± {self.stderr:,.{digits}f}"  # z: no minus before what rounds to zero


def mean_of(values) -> Measured:
    """Mean and standard error of independent values."""
    values = np.asarray(values, dtype=float)
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Measured(float(values.mean()), stderr)


def ratio_of(two, one, stderr: Callable = lambda values: mean_of(values).stderr) -> Measured:
    """mean(two) / mean(one) - 1 of paired values, with the error of both means (delta method)."""
    one, two = np.asarray(one, dtype=float), np.asarray(two, dtype=float)
    ratio = two.mean() / one.mean()
    return Measured(float(ratio - 1), stderr((two - ratio * one) / abs(one.mean())))


def stderr_by_neighbours(values) -> float:
    """Standard error of the mean of a systematic sample, from the differences of neighbours (Wolter 2007, ch. 8, v2).

    For values that drift over their index, as probes do whose t lies in a stratum each: the spread of all of them
    counts that drift as noise, though the mean does not vary by it.
    """
    values = np.asarray(values, dtype=float)
    return float(math.sqrt(np.square(np.diff(values)).sum() / (2 * (len(values) - 1) * len(values))))


def pooled(parts: list[Measured]) -> Measured:
    """Mean over seeds. Error: of the seeds' spread, std / sqrt(k), but no less than their own errors leave."""
    k, values = len(parts), [part.value for part in parts]
    own = [part.stderr for part in parts if part.stderr is not None]
    errors = [math.hypot(*own) / k] if len(own) == k else []
    if k > 1:
        errors.append(mean_of(values).stderr)
    return Measured(float(np.mean(values)), max(errors, default=None))


def over_seeds(parts: list[Measured]) -> str:
    """One arm's figure: of one seed with its own error, of several as mean and standard deviation."""
    if len(parts) == 1:
        return str(parts[0])
    values = [part.value for part in parts]
    return str(Measured(float(np.mean(values)), float(np.std(values, ddof=1))))


def verdict(change: Measured | None, criterion: float) -> str:
    """ "better", "worse", "neutral" or "missing", for a relative change of something that is better when lower.

    Neutral is what lies within the noise (NOISE standard errors) and what lies beyond it but below the criterion. A
    change without an error has no verdict.
    """
    if change is None or change.stderr is None or not (math.isfinite(change.value) and math.isfinite(change.stderr)):
        return "missing"
    if abs(change.value) <= NOISE * change.stderr or abs(change.value) < criterion:
        return "neutral"
    return "better" if change.value < 0 else "worse"


def percent(change: Measured) -> str:
    return str(Measured(100 * change.value, None if change.stderr is None else 100 * change.stderr)) + " %"


# ---- what is compared ----

def differing(a: Run, b: Run) -> dict[str, tuple]:
    """Config keys in which two runs differ, with both values; not what names them."""
    one, two = flatten(a.config), flatten(b.config)
    unused = {"loss.gamma"} if "constant" in (a.config.loss.weighting, b.config.loss.weighting) else set()
    return {key: (one[key], two[key]) for key in one
            if one[key] != two[key] and key not in {"exp", "title", "question", *unused}}


def check_comparable(a: Run, b: Run, factor: list[str], force: bool) -> list[str]:
    """Notes on what differs beside the factor. Raises RunError where that may explain a difference by itself."""
    differs = differing(a, b)
    wrong = [f"{key} ({differs[key][0]}, {differs[key][1]})" for key in differs if key not in (*factor, *HARMLESS)]
    if wrong and not force:
        raise RunError(f"{a.path} and {b.path} differ in more than {', '.join(factor)}: {'; '.join(wrong)}; compare "
                       "others, declare it by --factor, or --force")
    if not any(key in differs for key in factor) and not force:
        raise RunError(f"{a.path} and {b.path} do not differ in {', '.join(factor)}; declare what differs by --factor")
    notes = [f"Forced: they also differ in {text}." for text in wrong]
    envs = [read_json(run.path / "env.json") if (run.path / "env.json").exists() else {} for run in (a, b)]
    for key in ("git_commit", "torch", "device", "threads"):
        if envs[0].get(key) != envs[1].get(key):
            notes.append(f"Seed {a.seed}: {key} is {envs[0].get(key)} for {a.exp} and {envs[1].get(key)} for {b.exp}.")
    notes += [f"{run.exp}, seed {run.seed}, is not finished: no verdict." for run in (a, b) if not run.finished]
    return notes


def check_seeds(pairs: list[tuple[Run, Run]]) -> None:
    """Raise RunError unless the seeds of an arm were run with one config."""
    for arm in zip(*pairs, strict=True):
        for run in arm[1:]:
            wrong = [key for key in differing(arm[0], run) if key not in ("seed", *HARMLESS)]
            if wrong:
                raise RunError(f"{arm[0].path} and {run.path} differ in {', '.join(wrong)}: seeds of one arm must not")


def pairs_of(root: Path, exps: list[str]) -> tuple[list[tuple[Run, Run]], list[str]]:
    """(baseline, arm) for each seed that both were run with, and notes on seeds of one alone. Raises RunError."""
    runs = [{run.seed: run for run in find_runs(root, exp)} for exp in exps]
    for exp, found in zip(exps, runs, strict=True):
        if not found:
            raise RunError(f"no run of {exp} in {root}; python train.py --exp {exp}")
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        raise RunError(f"{exps[0]} has seeds {sorted(runs[0])}, {exps[1]} {sorted(runs[1])}: none that both have")
    notes = [f"Left out, as the other arm has no such run: {exp}, seed {seed}."
             for exp, found in zip(exps, runs, strict=True) for seed in sorted(found) if seed not in seeds]
    return [(runs[0][seed], runs[1][seed]) for seed in seeds], notes


# ---- sections of a report: a heading, text, and tables of strings ----

@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[str | Table]


def config_section(pairs: list[tuple[Run, Run]], notes: list[str]) -> Section:
    a, b = pairs[0]
    rows = [[f"`{key}`", json.dumps(one), json.dumps(two)] for key, (one, two) in differing(a, b).items()]
    seeds = ", ".join(str(run.seed) for run, _ in pairs)
    return Section("What differs", [Table(["key", a.exp, b.exp], rows), f"Everything else is equal. Seeds: {seeds}.",
                                    *notes])


def compute_section(pairs: list[tuple[Run, Run]]) -> Section:
    """Steps, images, parameters and seconds of both arms."""
    columns = []
    for runs in zip(*pairs, strict=True):
        config = runs[0].config
        parameters = sum(p.numel() for p in build(config, "cpu")[0].parameters())
        reached = [run.log("loss")[-1]["step"] for run in runs]
        seconds = [sum(r.get("seconds/train", 0) for r in run.log("timing")) for run in runs]
        columns.append([f"{min(reached):,} of {config.train.total_steps:,}",
                        f"{min(reached) * config.train.batch_size:,}", f"{parameters:,}",
                        over_seeds([Measured(s) for s in seconds])])
    names = ["steps logged", "images seen", "parameters", "seconds of training"]
    rows = [[name, *values] for name, *values in zip(names, *columns, strict=True)]
    return Section("Compute", [Table(["", pairs[0][0].exp, pairs[0][1].exp], rows)])


def distance_rows(pairs: list[tuple[Run, Run]]) -> dict[tuple, list[tuple[dict, dict, dict]]]:
    """(kind, step, sampler, nfe, n, features) -> per seed that has it: both lines, and their paired difference."""
    rows = {}
    for a, b in pairs:
        try:
            differences = paired_differences(a.path, b.path)
        except RunError as error:
            if "no distance in common" in str(error):
                continue
            raise
        for d in differences:
            alike = {key: d[key] for key in ("kind", "sampler", "nfe", "n", "features")}
            lines = [next(r for r in run.log("results") if (alike | {"step": step}).items() <= r.items())
                     for run, step in ((a, d["step_a"]), (b, d["step"]))]
            point = (d["kind"], d["step"], d["sampler"], d["nfe"], d["n"], d["features"])
            rows.setdefault(point, []).append((*lines, d | {"seed": a.seed}))
    return rows


@dataclass(frozen=True)
class Change:
    """A relative change on which the verdict is passed. registered: whether it is measured as was registered."""
    measure: str
    change: Measured
    criterion: float
    registered: str


def distance_section(pairs: list[tuple[Run, Run]]) -> tuple[Section, list[Change]]:
    """All distances with their paired differences; and the changes of the final ones."""
    rows, changes, contexts, table = distance_rows(pairs), [], {}, []
    a, b = (run.exp for run in pairs[0])
    if not rows:
        return Section("Distance", ["Not measured in both arms."]), []
    order = ("milestone", "final", "frontier")
    for point, seeds in sorted(rows.items(), key=lambda row: (order.index(row[0][0]), row[0])):
        kind, step, sampler, nfe, n, features = point
        fd, kid = metric_names(features)
        floor, test, ceiling, kid_test, kid_ceiling = (
            math.nan if seeds[0][0][key] is None else seeds[0][0][key]
            for key in ("floor", "floor_test", "ceiling", "kid_floor_test", "kid_ceiling"))
        contexts[n, features] = (f"at n = {n:,} {fd} has floor {floor:.4g} (test images {test:.4g}) and ceiling "
                                 f"{ceiling:.4g}, {kid} {kid_test:.2g} and {kid_ceiling:.4g}")
        for key in (fd, kid):
            one, two, difference = ([Measured(s[i][key], s[i][f"{key}_stderr"]) for s in seeds] for i in range(3))
            change = pooled([Measured(d.value / abs(base.value), d.stderr / abs(base.value))
                             for d, base in zip(difference, one, strict=True)])
            table.append([kind, f"{step:,}", f"{sampler.upper()} {nfe}", f"{n:,}",
                          ", ".join(str(d["seed"]) for _, _, d in seeds), key, over_seeds(one), over_seeds(two),
                          str(pooled(difference)), percent(change)])
            if kind == "final":
                registered = "yes" if (key, nfe, n) == ("val/fid", 50, 10_000) else "no: FID, NFE 50, n = 10,000"
                changes.append(Change(f"{key}, {sampler.upper()} {nfe}, n = {n:,}", change, DISTANCE_CRITERION,
                                      registered))
    context = (f"Lower is better; {b} minus {a}, with the error of their paired samples, relative to {a}. Reference: "
               f"{seeds[0][0]['reference']}. Context: {'; '.join(contexts.values())} (floor: training images, for KID "
               "test images; ceiling: uniform noise). Only figures of one n compare.")
    fd = metric_names(pairs[0][0].config.eval.features)[0]
    best = [(run, min((r for r in run.results("milestone") if fd in r), key=lambda r: r[fd], default=None))
            for pair in pairs for run in pair]
    minima = [f"{run.exp}, seed {run.seed}: {r[fd]:.4g} at step {r['step']:,}" for run, r in best if r]
    return Section("Distance", [
        Table(["kind", "step", "sampler", "n", "seeds", "metric", a, b, "difference", "relative"], table), context,
        *([f"Best milestone ({fd}, not the final figure): {'; '.join(minima)}."] if minima else [])]), changes


WINDOWS = ("first fifth", 0.0, 0.2), ("last fifth", 0.8, 1.0)
TRACES = ("hutch_trace", "of the arm's own loss"), ("hutch_trace_unweighted", "of the unweighted loss")


def in_window(pair: tuple[Run, Run], log: str, key: str, start: float, end: float) -> list[list]:
    """What each run of a pair has logged as `key` in a part of its training, at the steps that both have.

    Where the runs differ in length, the part is of each one's own, and their steps are not the same.
    """
    totals = [run.config.train.total_steps for run in pair]
    found = [{r["step"]: r[key] for r in run.log(log)
              if start * total < r["step"] <= end * total and r[key] is not None}
             for run, total in zip(pair, totals, strict=True)]
    if totals[0] == totals[1]:
        common = found[0].keys() & found[1].keys()
        found = [{step: values[step] for step in values if step in common} for values in found]
    return [list(values.values()) for values in found]


def trace_section(pairs: list[tuple[Run, Run]]) -> tuple[Section, list[Change]]:
    """Both traces in windows of training; and the changes in the last window.

    Probe j is the same at every step and in both arms, so the error is that over probes of the paired, time-averaged
    difference: more steps do not shrink it. The registered error is the spread of the probes; beside it stands the one
    of neighbours, since probe j of P draws its t from strata j, P + j, ... of [0, T).
    """
    a, b = (run.exp for run in pairs[0])
    pairs = [pair for pair in pairs if all(run.has("curvature") for run in pair)]
    table, changes = [], []
    for name, start, end in WINDOWS if pairs else ():
        for key, text in TRACES:
            parts = []
            for pair in pairs:
                records = in_window(pair, "curvature", f"curvature/{key}_samples", start, end)
                if all(records):
                    one, two = (np.mean(samples, axis=0) for samples in records)  # (num_probes,)
                    parts.append([mean_of(one), mean_of(two), mean_of(two - one), ratio_of(two, one),
                                  ratio_of(two, one, stderr_by_neighbours),
                                  f"{(two < one).sum()} of {len(one)}", len(records[1])])
            if parts:
                one, two, difference, change, narrow, lower, records = map(list, zip(*parts, strict=True))
                table.append([name, text, str(records[0]), over_seeds(one), over_seeds(two), str(pooled(difference)),
                              percent(pooled(change)), percent(pooled(narrow)), "; ".join(lower)])
                if name == "last fifth":
                    asked, made = ((c.curvature.every, c.curvature.num_probes)
                                   for c in (load_config(b), pairs[0][1].config))
                    wanted = f"every {asked[0]} steps, {asked[1]} probes" if asked[0] else "none was registered"
                    registered = "yes" if asked == made else f"no: {wanted}"
                    changes.append(Change(f"trace {text}", pooled(change), TRACE_CRITERION, registered))
    if not table:
        return Section("Hessian trace", ["Not measured in both arms at a common step."]), []
    text = ("Errors are over probes, which are the same at every step and in both arms. Each probe has its own strata "
            "of t, so their spread, the registered error, holds the trend over t too and is too wide; the column in "
            "brackets has the error of neighbouring probes, and was added after the first runs. A weight below 1 alone "
            "lowers the trace of an arm's own loss: whether the loss is flatter is told by the unweighted one. Seeds: "
            f"{', '.join(str(run.seed) for run, _ in pairs)}.")
    return Section("Hessian trace", [
        Table(["steps", "trace", "records", a, b, "difference", "relative", "(by neighbours)",
               f"probes in which {b} is lower"], table), text]), changes


def training_section(pairs: list[tuple[Run, Run]]) -> Section:
    """Unweighted training error and gradient norm in windows of training."""
    a, b = (run.exp for run in pairs[0])
    table, paired = [], True
    for name, start, end in WINDOWS:
        for key in ("train/eps_mse_mean", "train/grad_global_L2"):
            parts = []
            for pair in pairs:
                values = in_window(pair, "loss", key, start, end)
                if all(values):
                    one, two = (np.array(each) for each in values)
                    if pair[0].config.train.total_steps == pair[1].config.train.total_steps:
                        difference = mean_of(two - one)
                    else:  # other batches: nothing to pair
                        paired, means = False, (mean_of(one), mean_of(two))
                        difference = Measured(means[1].value - means[0].value,
                                              math.hypot(*(mean.stderr or math.nan for mean in means)))
                    parts.append([mean_of(one), mean_of(two), difference, one.max(), two.max()])
            if parts:
                one, two, difference = ([part[i] for part in parts] for i in range(3))
                highest = f"{max(p[3] for p in parts):.3g}, {max(p[4] for p in parts):.3g}"
                table.append([name, f"`{key}`", over_seeds(one), over_seeds(two), str(pooled(difference)), highest])
    note = "Differences are paired, since both arms see the same batches." if paired else (
        "The two runs differ in length, so their windows hold other batches and nothing is paired.")
    return Section("Training", [
        Table(["steps", "metric", a, b, "difference", "highest"], table),
        f"Means over log lines. {note} Gradient norms are those of each arm's own loss, before clipping."])


def profile_section(pairs: list[tuple[Run, Run]]) -> Section:
    """The unweighted held-out error at each t of the profile: at the last step that both arms of a seed have, or, where
    they differ in length, at each one's own last."""
    a, b = (run.exp for run in pairs[0])
    lines = []
    for pair in pairs:
        by_step = [{r["step"]: r for r in run.log("per_t")} if run.has("per_t") else {} for run in pair]
        if by_step[0] and by_step[1]:
            same_length = pair[0].config.train.total_steps == pair[1].config.train.total_steps
            last = [max(by_step[0].keys() & by_step[1].keys(), default=None)] * 2 if same_length else map(max, by_step)
            lines.append([log.get(step) for log, step in zip(by_step, last, strict=True)])
    if not lines or not all(map(all, lines)) or any(r["t"] != lines[0][0]["t"] for pair in lines for r in pair):
        return Section("Error at each timestep", ["Not measured in both arms at a common step, or not at the same t."])
    rows = []
    for i, t in enumerate(lines[0][0]["t"]):
        one, two = ([Measured(pair[k]["eps_mse_ema"][i]) for pair in lines] for k in (0, 1))
        changes = [[Measured(100 * (y[key][i] / x[key][i] - 1)) for x, y in lines]
                   for key in ("eps_mse_ema", "eps_mse_raw")]
        rows.append([str(t), over_seeds(one), over_seeds(two),
                     *(f"{c[0].value:z.1f} %" if len(c) == 1 else f"{over_seeds(c)} %" for c in changes)])
    steps = " and ".join(dict.fromkeys(f"{r['step']:,}" for r in lines[0]))
    return Section("Error at each timestep", [
        Table(["t", a, b, f"{b} to {a}", "raw weights"], rows),
        f"Unweighted eps-MSE of the EMA weights at step {steps} on {lines[0][0]['n']} held-out images with fixed "
        "eps: the same for both arms, so that their ratio is steadier than either. It has no error of its own."])


def verdict_section(pairs: list[tuple[Run, Run]], distances: list[Change], traces: list[Change]) -> Section:
    """A row per measure; and the trace's registered criterion, which only both traces together can meet."""
    finished = all(run.finished for pair in pairs for run in pair)

    def passed(change: Change) -> str:
        return verdict(change.change, change.criterion) if finished else "missing"

    rows = [[f"**{passed(c)}**", c.measure, percent(c.change), f">= {c.criterion:.0%} lower", c.registered]
            for c in (*distances, *traces)]
    if not distances:
        rows.append(["**missing**", "final distance", "", f">= {DISTANCE_CRITERION:.0%} lower", ""])
    both = {passed(c) for c in traces} or {"missing"}
    alike = "missing" if "missing" in both else both.pop() if len(both) == 1 else "neutral"
    rows.append([f"**{alike}**", "curvature: both traces alike", "", f">= {TRACE_CRITERION:.0%} lower",
                 traces[0].registered if traces else ""])
    seeds = [str(run.seed) for run, _ in pairs]
    text = [f"Neutral: within {NOISE:g} standard errors, or beyond but below the criterion. The last column says "
            "whether a measure is the one that was registered before the runs. ± is one standard error; of an arm over "
            "several seeds, their standard deviation.",
            f"This holds for seed{'s'[:len(seeds) - 1]} {', '.join(seeds)}" + (
                ", and says nothing of others." if len(seeds) == 1 else ".")]
    if pairs[0][0].config.eval.features == "lite0":
        text.append("The distance is one of Lite0 features. It is not FID, for which the 7 % was registered.")
    return Section("Verdict", [Table(["verdict", "measure", "change", "better means", "as registered"], rows), *text])


def seeds_section(pairs: list[tuple[Run, Run]]) -> Section:
    """The changes on which the verdict is passed, of each seed alone and with its own error."""
    alone = [{c.measure: percent(c.change) for section in (distance_section, trace_section) for c in section([pair])[1]}
             for pair in pairs]
    rows = [[measure, *(changes.get(measure, "") for changes in alone)] for measure in dict.fromkeys(
        measure for changes in alone for measure in changes)]
    return Section("Seed by seed", [Table(["relative change", *(str(run.seed) for run, _ in pairs)], rows),
                                    "Errors are those of samples or probes at that seed, not of another one."])


def compare(pairs: list[tuple[Run, Run]], factor: list[str], force: bool, notes: Sequence[str] = ()) -> list[Section]:
    """All sections, the verdict first. Raises RunError where the two arms may not be compared."""
    check_seeds(pairs)
    notes = [*notes, *(note for a, b in pairs for note in check_comparable(a, b, factor, force))]
    distance, distance_changes = distance_section(pairs)
    trace, trace_changes = trace_section(pairs)
    seeds = [seeds_section(pairs)] if len(pairs) > 1 else []
    return [verdict_section(pairs, distance_changes, trace_changes), *seeds, config_section(pairs, notes),
            compute_section(pairs), distance, trace, profile_section(pairs), training_section(pairs)]


# ---- Markdown and HTML ----

def table_to_markdown(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def to_markdown(title: str, sections: list[Section], figures: dict[str, Path]) -> str:
    blocks = [f"# {title}"]
    for section in sections:
        blocks += [f"## {section.title}", *(table_to_markdown(p) if isinstance(p, Table) else p for p in section.parts)]
    blocks += [f"![{kind}]({path.name})" for kind, path in figures.items()]
    return "\n\n".join(blocks) + "\n"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem; margin: 0 auto;
       padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
.few td, .few th { white-space: normal; } figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
.better { color: #00664b; } .worse { color: #a33c00; } code { font-size: .95em; }
"""


def to_html(title: str, sections: list[Section], figures: dict[str, Path]) -> str:
    """One page that needs no other file and no network."""
    def inline(text):
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
        return re.sub(r"\*\*(\w+)\*\*", r'<strong class="\1">\1</strong>', text)

    def table(t):
        rows = "".join(f"<tr>{''.join(f'<td>{inline(cell)}</td>' for cell in row)}</tr>\n" for row in t.rows)
        head = "".join(f"<th>{inline(cell)}</th>" for cell in t.header)
        few = ' class="few"' if len(t.header) < 6 else ""  # may break its lines on a phone; longer ones scroll
        return f'<div class="wide"><table{few}><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'

    body = [f"<h1>{inline(title)}</h1>"]
    for section in sections:
        body += [f"<h2>{inline(section.title)}</h2>",
                 *(table(p) if isinstance(p, Table) else f"<p>{inline(p)}</p>" for p in section.parts)]
    body += ["<h2>Figures</h2>"] if figures else []
    for kind, path in figures.items():
        data = base64.b64encode(path.with_suffix(".svg").read_bytes()).decode()
        body.append(f'<figure><img alt="{kind.replace("_", " ")}" src="data:image/svg+xml;base64,{data}"></figure>')
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n")


def draw_figures(exps: list[str], root: Path, out: Path) -> dict[str, Path]:
    """Have plots.py draw every kind that these runs allow, into out; kind -> png. What it leaves out it says."""
    kinds = [arg for kind in KINDS for arg in ("--kind", kind)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "plots.py", *kinds, "--exps", *exps, "--runs", root, "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, 2):
            raise RunError(f"plots.py failed: {done.stderr.strip().splitlines()[-1]}")
        print(done.stderr, end="", file=sys.stderr)
        figures = {}
        for kind in KINDS:
            for suffix in (".png", ".svg"):
                drawn = Path(folder) / f"{kind}_{'_'.join(exps)}{suffix}"
                if drawn.exists():
                    replace_file(out / drawn.name, drawn.read_bytes())
                    figures[kind] = out / drawn.with_suffix(".png").name
    return figures


# ---- the pages of docs/experiments ----

MARKS = "<!-- generated: python report.py --pages -->", "<!-- end -->"


def generated_block(exp: str) -> str:
    """What a page repeats of experiments.toml: the question, what this experiment changes, and its command."""
    config, base = load_config(exp), flatten(load_config(list_experiments()[0]))
    rows = [f"| `{key}` | {json.dumps(base[key])} | {json.dumps(value)} |" for key, value in flatten(config).items()
            if value != base[key] and key not in ("exp", "title", "question")]
    first = list_experiments()[0]
    changes = "\n".join([f"| key | {first} | {exp} |", "|---|---|---|", *rows]) if rows else (
        "All keys are as in `[defaults]` of [experiments.toml](../../experiments.toml).")
    return "\n\n".join([MARKS[0], f"**Question.** {config.question}", changes, f"    python train.py --exp {exp}",
                        MARKS[1]])


def fill(text: str, before_pattern: str, content: str, where: str) -> str:
    """The text with its one generated block, and what stands before it from a regex, made new. Raises RunError."""
    pattern = re.compile(rf"{before_pattern}{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    if not pattern.search(text) or text.count(MARKS[0]) != 1:
        raise RunError(f"{where}: needs the lines {MARKS[0]} and {MARKS[1]} exactly once"
                       + ", below a title" * bool(before_pattern))
    return pattern.sub(lambda _: content, text)  # of a function, since content may hold backslashes


def update_page(text: str, exp: str) -> str:
    """The page with its title and generated block as experiments.toml has them now. Raises RunError."""
    block = f"# {exp}: {load_config(exp).title}\n\n{generated_block(exp)}"
    return fill(text, r"\A# [^\n]*\n+", block, f"docs/experiments/{exp}.md")


def results_table(root: Path) -> Table:
    """Every final distance of the finished runs below root, and then floor and ceiling at each n and features."""
    rows, context = [], {}
    for exp in list_experiments():
        found = {}
        for run in find_runs(root, exp) if exp != "smoke" else []:
            for r in run.results("final") if run.finished else []:
                found.setdefault((r["features"], r["sampler"], r["nfe"], r["n"]), []).append((run, r))
        for (features, sampler, nfe, n), lines in found.items():
            config, keys = lines[0][0].config, metric_names(features)
            loss = config.loss.weighting + (f", {config.loss.gamma:g}" if config.loss.weighting != "constant" else "")
            values = [over_seeds([Measured(r[key], r[f"{key}_stderr"]) for _, r in lines]) for key in keys]
            rows.append([f"[{exp}](docs/experiments/{exp}.md)", loss,
                         f"{config.model.base_channels}, {config.train.total_steps:,}",
                         ", ".join(str(run.seed) for run, _ in lines), features, f"{sampler.upper()} {nfe}", f"{n:,}",
                         *values])
            context[features, n] = lines[0][1]
    for (features, n), r in sorted(context.items()):
        for name, text in (("floor", "floor: training images"), ("floor_test", "floor: test images"),
                           ("ceiling", "ceiling: uniform noise")):
            values = ["" if r.get(key) is None else format(r[key], spec)
                      for key, spec in ((name, ".4g"), (f"kid_{name}", ".4f"))]
            rows.append([text, "", "", "", features, "", f"{n:,}", *values])
    return Table(["", "weighting, gamma", "base, steps", "seeds", "features", "sampler, NFE", "n", "Fréchet distance",
                  "KID"], rows)


def update_readme(text: str, root: Path = KEPT) -> str:
    """The README with its table of results as the runs below root have them. Raises RunError."""
    return fill(text, "", "\n\n".join([MARKS[0], table_to_markdown(results_table(root)), MARKS[1]]), "README.md")


def update_pages() -> None:
    """Rewrite what changed of README.md, and of docs/experiments/EXP.md for every experiment but smoke."""
    pages = {PAGES / f"{exp}.md": partial(update_page, exp=exp) for exp in list_experiments() if exp != "smoke"}
    for path, update in ({ROOT / "README.md": update_readme} | pages).items():
        if not path.exists():
            raise RunError(f"{path}: missing; write it (hypothesis, metrics, success criteria) before the run")
        text = path.read_text(encoding="utf-8")
        if update(text) != text:
            replace_file(path, update(text).encode())
            print(path)


# ---- the command ----

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # an error is one line
    parser.add_argument("names", nargs="*", metavar="NAME", help="a comparison, or two experiments: baseline and arm")
    parser.add_argument("--pages", action="store_true", help="update README.md and docs/experiments/E*.md; no names")
    parser.add_argument("--runs", type=Path, help="folder of runs, RUNS/EXP/seedSEED; runs by default")
    parser.add_argument("--out", type=Path, help="folder to write to; RUNS/reports/NAME by default")
    parser.add_argument("--factor", action="append", default=[], metavar="KEY",
                        help="the config key in which the two differ; loss.weighting and loss.gamma by default")
    parser.add_argument("--force", action="store_true", help="compare even what differs in more than the factor")
    args = parser.parse_args(argv)
    if args.pages == bool(args.names) or len(args.names) > 2:
        parser.error("give a comparison, or two experiments, or --pages")
    if args.pages and (args.factor or args.force or args.out or args.runs):
        parser.error("--pages takes no other option")
    args.runs = args.runs or Path("runs")
    return args


def resolve(args: argparse.Namespace) -> tuple[str, str, list[str], list[str]]:
    """(name, title, [baseline, arm], factor) of the comparison that was asked for. Raises RunError."""
    tables = load_tables("comparisons")
    if len(args.names) == 1:
        if args.names[0] not in tables:
            raise RunError(f"unknown comparison {args.names[0]!r}; there are {', '.join(tables)}; or give two ids")
        found = args.names[0]
    else:
        for exp in args.names:
            if exp not in list_experiments():
                raise RunError(f"unknown experiment {exp!r}; there are {', '.join(list_experiments())}")
        found = next((name for name, table in tables.items() if table["runs"] == args.names), None)
    if found is None:
        return "_".join(args.names), " against ".join(reversed(args.names)), args.names, (
            args.factor or ["loss.weighting", "loss.gamma"])
    table = tables[found]
    return found, f"{table['title']} ({', '.join(table['runs'])})", table["runs"], args.factor or table["factor"]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.pages:
        update_pages()
        return 0
    name, title, exps, factor = resolve(args)
    pairs, notes = pairs_of(args.runs, exps)
    try:
        sections = compare(pairs, factor, args.force, notes)
    except KeyError as error:
        raise RunError(f"a log of {' or '.join(exps)} lacks {error}: of another version of this code") from error
    out = args.out or args.runs / "reports" / name
    out.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(exps, args.runs, out)
    render: dict[str, Callable] = {".md": to_markdown, ".html": to_html}
    for suffix, to_text in render.items():
        replace_file(out / f"{name}{suffix}", to_text(title, sections, figures).encode())
    print(to_markdown(title, sections, {}))
    print(*(out / f"{name}{suffix}" for suffix in render))
    return 0


if __name__ == "__main__":
    run_script(main)
