"""What a comparison of two arms over seeds shows, as Markdown and as one HTML page.

    python report.py min_snr                       a comparison of experiments.toml, from runs/
    python report.py E5 E6 --runs DIR              any two experiments: baseline, then arm

Runs of one seed are paired, and the seeds are the sample: y = ln(arm / baseline) of each seed gives a mean with a
t-interval. Only the two registered measures get a verdict: the final Frechet distance (DDPM, NFE 50), and the trace of
the unweighted loss's Hessian at the last step.
"""

import argparse
import base64
import html
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import plots
from checkpoint import replace_file
from config import PATHS, flatten, list_experiments, load_tables
from errors import UserError, nearest, one_line, run_script
from fid import METRICS, metric_name
from runs import Run, build, find_runs, paired_differences, read_json

# Relative changes that count, as bounds of ln(arm / baseline); lower is better for both.
DISTANCE_BAND, TRACE_BAND = (math.log(0.93), math.log(1.07)), (math.log(0.90), -math.log(0.90))
# Keys that say where files lie, and when and how much is measured: they change no training.
HARMLESS = (*PATHS, "train.checkpoint_every", "log.every", "grid.every", "grid.n", "grid.sampler", "grid.nfe",
            "eval.every", "eval.final_samplers", "eval.profile_t", "eval.profile_images", "eval.n_samples",
            "curvature.every")
KINDS = ("distance_and_loss_vs_steps", "curvature_vs_steps", "curvature_vs_distance", "per_t", "grad_norm", "frontier",
         "grids")  # of figures in a report, if they can be drawn


# ---- numbers, intervals, verdicts ----

@dataclass(frozen=True)
class Measured:
    """A number and its sampling error (None if it has none)."""
    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        if not self.stderr:
            return f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.stderr)))  # two digits of the error
        return f"{self.value:z,.{digits}f} ± {self.stderr:,.{digits}f}"


def over_seeds(parts: list[Measured]) -> Measured:
    """One arm over seeds: mean and standard deviation, which is never less than the parts' sampling error."""
    values = [part.value for part in parts]
    errors = [math.sqrt(np.mean([part.stderr**2 for part in parts]))] if all(part.stderr for part in parts) else []
    spread = [float(np.std(values, ddof=1))] if len(parts) > 1 else []
    return Measured(float(np.mean(values)), max(errors + spread, default=None))


@dataclass(frozen=True)
class Interval:
    """Mean of the log ratios of k seeds, its standard error, and the p-value of a mean of 0 (two-sided t test)."""
    k: int
    mean: float
    stderr: float
    p: float

    def at(self, level: float) -> tuple[float, float]:
        """The t-interval that holds the mean with this confidence; infinite for one seed."""
        from scipy.stats import t
        half = t.ppf((1 + level) / 2, self.k - 1) * self.stderr if self.k > 1 else math.inf
        return self.mean - half, self.mean + half


def interval(log_ratios: list[float]) -> Interval:
    from scipy.stats import t
    k, mean = len(log_ratios), float(np.mean(log_ratios))
    if k < 2:
        return Interval(k, mean, math.inf, 1.0)
    stderr = float(np.std(log_ratios, ddof=1)) / math.sqrt(k)
    p = 2 * t.sf(abs(mean) / stderr, k - 1) if stderr else float(mean == 0)
    return Interval(k, mean, stderr, float(p))


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for being read together (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        largest = adjusted[i] = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def verdict(change: Interval, band: tuple[float, float], p: float) -> str:
    """better, worse, neutral or undecided. p: adjusted by Holm. band: the log ratios between which a change is small.

    Better or worse: the 95 % interval excludes 0, p < 0.05 and the mean is outside the band. Neutral: the 90 % interval
    is inside the band. Else undecided, with the sign if the 95 % interval excludes 0.
    """
    if change.k < 2:
        return "undecided (one seed)"
    low, high = change.at(0.95)
    excludes_0 = low > 0 or high < 0
    if excludes_0 and p < 0.05 and not band[0] <= change.mean <= band[1]:
        return "better" if change.mean < 0 else "worse"
    if band[0] < change.at(0.90)[0] and change.at(0.90)[1] < band[1]:
        return "neutral"
    return "undecided" + (", lower" if high < 0 else ", higher" if low > 0 else "")


def percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %" if log_ratio < 700 else "∞"


# ---- what is compared ----

def differing(a: Run, b: Run) -> dict[str, tuple]:
    """Config keys in which two runs differ, with both values; not what names them."""
    one, two = flatten(a.config), flatten(b.config)
    return {key: (x, two[key]) for key, x in one.items() if x != two[key] and key not in ("exp", "title", "question")}


def check_comparable(pairs: list[tuple[Run, Run]], factor: list[str], force: bool) -> list[str]:
    """Notes on what differs beside the factor. Raises UserError if that may explain a difference by itself."""
    notes = []
    for arm in zip(*pairs, strict=True):
        for run in arm[1:]:
            wrong = [key for key in differing(arm[0], run) if key not in ("seed", *HARMLESS)]
            if wrong:
                raise UserError(f"{arm[0].path} and {run.path} differ in {', '.join(wrong)}: seeds of one arm must not")
    for a, b in pairs:
        wrong = [f"{key} {values}" for key, values in differing(a, b).items() if key not in (*factor, *HARMLESS)]
        if (wrong or not any(key in differing(a, b) for key in factor)) and not force:
            raise UserError(f"{a.path} and {b.path} must differ in {', '.join(factor)} only, but differ in "
                            f"{'; '.join(wrong) or 'nothing'}; declare what differs by --factor, or --force")
        notes += [f"Forced: they also differ in {text}." for text in wrong]
        envs = [read_json(run.path / "env.json") if (run.path / "env.json").exists() else {} for run in (a, b)]
        notes += [f"Seed {a.seed}: {key} is {envs[0].get(key)} for {a.exp}, {envs[1].get(key)} for {b.exp}."
                  for key in ("git_commit", "torch", "device", "threads") if envs[0].get(key) != envs[1].get(key)]
    return notes


def pairs_of(root: Path, exps: list[str]) -> tuple[list[tuple[Run, Run]], list[str]]:
    """(baseline, arm) of each seed that both were run with, and notes on seeds of one alone. Raises UserError."""
    runs = [{run.seed: run for run in find_runs(root, exp)} for exp in exps]
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        raise UserError(f"{root}: {exps[0]} has seeds {sorted(runs[0])}, {exps[1]} {sorted(runs[1])}: none in common; "
                        f"python train.py --exp {exps[0] if not runs[0] else exps[1]} --seed SEED")
    notes = [f"Left out, because only {exp} has it: seed {seed}."
             for exp, found in zip(exps, runs, strict=True) for seed in sorted(found) if seed not in seeds]
    return [(runs[0][seed], runs[1][seed]) for seed in seeds], notes


# ---- measures: a name, and for each seed the values of both arms ----

@dataclass(frozen=True)
class Measure:
    name: str
    seeds: list[int]
    one: list[Measured]
    two: list[Measured]
    errors: list[float | None]  # of each seed's log ratio, paired; None if unknown

    @property
    def log_ratios(self) -> list[float]:
        return [math.log(b.value / a.value) if a.value > 0 and b.value > 0 else math.nan
                for a, b in zip(self.one, self.two, strict=True)]

    def row(self) -> list[str]:
        change = interval(self.log_ratios)
        low, high = change.at(0.95)
        alone = [f"{seed}: {percent(y)}" + (f" ± {100 * error:.2g}" if error else "")
                 for seed, y, error in zip(self.seeds, self.log_ratios, self.errors, strict=True)]
        between = f"{percent(low)} to {percent(high)}" if change.k > 1 else "one seed"
        return [self.name, str(over_seeds(self.one)), str(over_seeds(self.two)), percent(change.mean), between,
                "; ".join(alone)]


def distances(pairs: list[tuple[Run, Run]]) -> dict[tuple, Measure]:
    """(kind, metric, sampler, nfe, n, features, step) -> the distances that both arms have, by seed."""
    found = {}
    for a, b in pairs:
        for d in paired_differences(a.path, b.path):
            key = [d[name] for name in ("kind", "sampler", "nfe", "n", "features")]
            lines = [next(r for r in run.log("results") if r["step"] == step and all(
                r.get(name) == d[name] for name in ("kind", "sampler", "nfe", "n", "features")))
                for run, step in ((a, d["step_a"]), (b, d["step"]))]
            for metric in METRICS:
                name = metric_name(metric, d["features"])
                one, two = (Measured(r[name], r[f"{name}_stderr"]) for r in lines)
                point = (key[0], metric, *key[1:], d["step"])
                found.setdefault(point, []).append((a.seed, one, two, d[f"{name}_stderr"] / abs(one.value), lines[0]))
    measures = {}
    for (kind, metric, sampler, nfe, n, features, step), parts in found.items():
        seeds, one, two, errors, lines = map(list, zip(*parts, strict=True))
        name = metric_name(metric, features)
        context = [f"{text} {lines[0][f'{name}_{key}']:.4g}" for key, text in (
            ("floor", "training images"), ("floor_test", "test images"), ("ceiling", "noise"))
            if lines[0][f"{name}_{key}"] is not None]
        measures[kind, metric, sampler, nfe, n, features, step] = Measure(
            f"{kind}, step {step:,}: {name}, {sampler.upper()} {nfe}, n = {n:,} ({', '.join(context)})",
            seeds, one, two, errors)
    return measures


def measure(name: str, pairs: list[tuple[Run, Run]], value: Callable[[Run], Measured | None]) -> list[Measure]:
    """The measure `value` of both runs of each pair that has it; [] if no pair has."""
    parts = [(a.seed, value(a), value(b), None) for a, b in pairs]
    parts = [part for part in parts if part[1] is not None and part[2] is not None]
    return [Measure(name, *map(list, zip(*parts, strict=True)))] if parts else []


def last_fifth(log: str, key: str) -> Callable[[Run], Measured | None]:
    """The mean of a log's key over the last fifth of training."""
    def value(run: Run) -> Measured | None:
        values = [r[key] for r in run.log(log) if r["step"] > 0.8 * run.config.train.total_steps]
        return Measured(float(np.mean(values))) if values else None
    return value


def last_trace(name: str) -> Callable[[Run], Measured | None]:
    """The Hessian trace at the last step, with its error over probes."""
    def value(run: Run) -> Measured | None:
        lines = [r for r in run.log("curvature") if r["step"] == run.config.train.total_steps]
        return Measured(*(lines[-1][f"curvature/{name}_{key}"] for key in ("mean", "stderr"))) if lines else None
    return value


def error_at(t: int) -> Callable[[Run], Measured | None]:
    """The held-out eps-MSE of the EMA weights at one timestep, at the last step."""
    def value(run: Run) -> Measured | None:
        profile = next((r for r in run.log("per_t") if r["step"] == run.config.train.total_steps), None)
        return Measured(profile["eps_mse_ema"][profile["t"].index(t)]) if profile and t in profile["t"] else None
    return value


# ---- the report: a list of headings, paragraphs and tables (lists of rows, the first of which is the header) ----

def compare(pairs: list[tuple[Run, Run]], factor: list[str], force: bool, notes: list[str]) -> list[str | list]:
    """The blocks of the report, the verdict first. Raises UserError if the two arms may not be compared."""
    notes, (a, b) = notes + check_comparable(pairs, factor, force), pairs[0]
    found = distances(pairs)
    final = [key for key in found if key[:4] == ("final", "fd", "ddpm", 50)]
    registered = [(found[max(final, key=lambda key: key[4])], DISTANCE_BAND)] if final else []
    traces = [measure(f"Hessian trace of {text}, last step", pairs, last_trace(name)) for name, text in (
        ("hutch_trace_unweighted", "the unweighted loss"), ("hutch_trace", "the arm's own loss"))]
    registered += [(m, TRACE_BAND) for m in traces[0]]
    unfinished = [f"{run.exp} of seed {run.seed}" for pair in pairs for run in pair if not run.finished]

    changes = [interval(m.log_ratios) for m, _ in registered]
    adjusted = holm([change.p for change in changes] + [1.0] * (2 - len(changes)))
    rows = [["verdict", "measure", "seeds", "change", "95 % interval", "p (Holm)", "the gain hoped for"]]
    for (m, band), change, p in zip(registered, changes, adjusted, strict=False):
        low, high = change.at(0.95)
        rows.append([f"**{'none: not finished' if unfinished else verdict(change, band, p)}**", m.name, str(change.k),
                     percent(change.mean), f"{percent(low)} to {percent(high)}" if change.k > 1 else "", f"{p:.3g}",
                     f"{percent(band[0])}: {'refuted' if low > band[0] else 'not refuted'}"])
    asks = "Neither registered measure was taken in both arms: final Frechet distance (DDPM, NFE 50), last trace."
    text = [f"A change is that of {b.exp} relative to {a.exp}, seed by seed; lower is better. Better or worse: the "
            "95 % t-interval over seeds excludes 0, also after Holm's correction for two measures, and the change is "
            "beyond 7 % (distance) or 10 % (trace). Neutral: the 90 % interval is within these bounds."]
    if final and "n = 10,000 " not in registered[0][0].name:
        text.append("The registered distance has n = 10,000; this one does not.")
    if a.config.eval.features != "inception":
        text.append(f"The distance is one of {a.config.eval.features} features. It is not FID.")
    text += [f"Not finished: {', '.join(unfinished)}."] if unfinished else []

    header = ["measure", a.exp, b.exp, "change", "95 % interval", "seed by seed (± paired sampling error)"]
    training = [m for key, name in (("train/eps_mse_mean", "unweighted training eps-MSE"),
                                    ("train/grad_global_L2", "gradient norm of the arm's own loss, before clipping"))
                for m in measure(f"{name}, mean of the last fifth", pairs, last_fifth("loss", key))]
    training += [m for name, of in (("hutch_trace_unweighted", "the unweighted loss"), ("hutch_trace", "its own loss"))
                 for m in measure(f"Hessian trace of {of}, mean of the last fifth", pairs,
                                  last_fifth("curvature", f"curvature/{name}_mean"))]
    times = sorted({t for run in (a, b) for r in run.log("per_t") for t in r["t"]})
    profile = [m for t in times for m in measure(f"t = {t}", pairs, error_at(t))]
    cost = measure("seconds of training", pairs, lambda run: Measured(
        sum(r.get("seconds/train", 0) for r in run.log("timing"))) if run.log("timing") else None)
    parameters = [f"{sum(p.numel() for p in build(run.config, 'cpu')[0].parameters()):,}" for run in (a, b)]
    images = [f"{run.config.train.total_steps * run.config.train.batch_size:,}" for run in (a, b)]
    differs = [[f"`{key}`", json.dumps(x), json.dumps(y)] for key, (x, y) in differing(a, b).items()]
    order = {"final": 0, "milestone": 1, "frontier": 2}
    sections = {
        "## Distances to the training images": [found[k] for k in sorted(found, key=lambda k: (order[k[0]], k[1:]))],
        "## Curvature and training": [*traces[0], *traces[1], *training],
        "## Held-out eps-MSE by timestep (EMA weights, last step)": profile, "## Time": cost}
    blocks = ["## Verdict", rows if registered else asks, *text, "## What differs", [["key", a.exp, b.exp], *differs,
              ["parameters", *parameters], ["images seen", *images]], *notes]
    for title, measures in sections.items():
        blocks += [title, [header, *(m.row() for m in measures)] if measures else "Not measured in both arms."]
    return blocks


def plain(text: str) -> str:
    """Text from files, made unable to start a heading, a table cell or a tag."""
    return html.escape(one_line(text), quote=False).replace("|", "\\|").lstrip("#")


def to_markdown(title: str, blocks: list[str | list], figures: dict[str, Path]) -> str:
    def block(b: str | list) -> str:
        if isinstance(b, str):
            return f"## {plain(b[3:])}" if b.startswith("## ") else plain(b)
        rows = [b[0], ["---"] * len(b[0]), *b[1:]]
        return "\n".join("| " + " | ".join(map(plain, row)) + " |" for row in rows)

    parts = [f"# {plain(title)}", *map(block, blocks), *(f"![{kind}]({path.name})" for kind, path in figures.items())]
    return "\n\n".join(parts) + "\n"


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; } img { max-width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }"""


def to_html(title: str, blocks: list[str | list], figures: dict[str, Path]) -> str:
    """One page that needs no other file and no network."""
    def inline(text: str) -> str:
        return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html.escape(one_line(text)))

    def block(b: str | list) -> str:
        if isinstance(b, str):
            return f"<h2>{inline(b[3:])}</h2>" if b.startswith("## ") else f"<p>{inline(b)}</p>"
        rows = ["<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in b]
        return f'<div class="wide"><table>{chr(10).join(rows)}</table></div>'

    images = [f'<img alt="{kind}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
              for kind, path in figures.items()]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{inline(title)}</title><style>{STYLE}</style><h1>{inline(title)}</h1>\n"
            + "\n".join([*map(block, blocks), *images]) + "</html>\n")


# ---- the command ----

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)  # an error is one line
    parser.add_argument("names", nargs="+", metavar="NAME", help="a comparison, or two experiments: baseline and arm")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs, RUNS/EXP/seedSEED")
    parser.add_argument("--out", type=Path, help="folder to write to; RUNS/reports/NAME by default")
    parser.add_argument("--factor", action="append", default=[], metavar="KEY",
                        help="the config key in which the two differ; loss.weighting and loss.gamma by default")
    parser.add_argument("--force", action="store_true", help="compare even what differs in more than the factor")
    args = parser.parse_args(argv)
    tables = load_tables("comparisons")
    if len(args.names) == 1:
        name = args.names[0]
        if name not in tables:
            raise UserError(f"unknown comparison {name!r}{nearest(name, tables)}")
        exps, factor, title = tables[name]["runs"], tables[name]["factor"], tables[name]["title"]
    else:
        exps, factor, name = args.names, ["loss.weighting", "loss.gamma"], "_".join(args.names)
        title = " against ".join(reversed(exps))
        for exp in exps:
            if len(exps) != 2 or exp not in list_experiments():
                raise UserError(f"{' '.join(exps)}: give two experiments of {', '.join(list_experiments())}")
    pairs, notes = pairs_of(args.runs, exps)
    try:
        blocks = compare(pairs, args.factor or factor, args.force, notes)
    except KeyError as error:
        raise UserError(f"a log of {' or '.join(exps)} lacks {error}: written by another version?") from error
    out, figures = args.out or args.runs / "reports" / name, {}
    out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        try:
            figures[kind] = plots.save(plots.draw(kind, exps, args.runs), out, f"{kind}_{'_'.join(exps)}")[0]
        except UserError as error:
            print(f"{kind}: left out: {error}")
    for suffix, render in ((".md", to_markdown), (".html", to_html)):
        replace_file(out / f"{name}{suffix}", render(f"{title} ({', '.join(exps)})", blocks, figures).encode())
        print(out / f"{name}{suffix}")
    print(to_markdown(title, blocks, {}))
    return 0


if __name__ == "__main__":
    run_script(main)
