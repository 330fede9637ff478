"""What a comparison of two arms over seeds shows, as Markdown with figures.

    python report.py min_snr                  a comparison of experiments.toml, from runs/
    python report.py E5 E6 --runs DIR         any two experiments: the baseline, then the arm
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

import plots
from checkpoint import replace_file
from config import OWN, PATHS, flatten, load_tables
from errors import UserError, argument_parser, nearest, one_line, run_script
from fid import METRICS, metric_name
from runs import Run, build, find_runs, paired_differences, read_json

DISTANCE, TRACE = (0.93, 1.07), (0.90, 1 / 0.90)  # registered limits of arm / baseline; lower is better
Z, LAST = 1.96, 1 - 1e-9                          # standard errors of 95 %; a part of a run: all but its last step
HARMLESS = (*PATHS, "train.checkpoint_every", "log.", "grid.", "eval.", "curvature.")  # keys that change no training


class Measured(NamedTuple):
    """A number and half of its 95 % interval (None if unknown). Its format may be "+", for a sign."""
    value: float
    half: float | None = None

    def __format__(self, sign: str) -> str:
        if not self.half or not 1e-9 * abs(self.value) < self.half < math.inf:
            return f"{self.value:{sign},.0f}" if abs(self.value) >= 1000 else f"{self.value:{sign}.4g}"
        digits = max(0, 1 - math.floor(math.log10(self.half)))  # two digits of half
        return f"{self.value:{sign}z,.{digits}f} ± {self.half:,.{digits}f}"  # z: no minus before what rounds to 0


class Point(NamedTuple):
    """A measure at one seed, in both arms."""
    seed: int
    baseline: Measured
    arm: Measured
    difference: Measured  # arm - baseline

    @property
    def percent(self) -> Measured:  # of the baseline
        return Measured(*(x and 100 * x / abs(self.baseline.value) for x in self.difference))


def over_seeds(parts: list[Measured]) -> Measured:
    """Mean and 95 % t-interval over seeds, never narrower than sampling errors allow; of one seed, its own interval."""
    k, values = len(parts), [part.value for part in parts]
    own = math.hypot(*(part.half or 0 for part in parts)) / k
    spread = student.ppf(0.975, k - 1) * np.std(values, ddof=1) / math.sqrt(k) if k > 1 else 0
    return Measured(float(np.mean(values)), float(max(own, spread)) or None)


class Decision(NamedTuple):
    """On y = ln(arm / baseline): mean over seeds, 95 % t-interval, p of a two-sided t test of mean 0, verdict."""
    mean: float
    interval: tuple[float, float]
    p: float
    word: str


def decide(log_ratios: list[float], limits: tuple[float, float]) -> Decision:
    """The verdict on y of each seed, before Holm's correction. limits: of arm / baseline.

    better, worse: the 95 % interval excludes 0, the mean is beyond a limit. neutral: the 90 % interval is inside both.
    """
    k, mean, (low, high) = len(log_ratios), float(np.mean(log_ratios or [math.nan])), map(math.log, limits)
    if k < 2 or math.isnan(mean):
        few = {0: "not measured", 1: "undecided (one seed)"}
        return Decision(mean, (math.nan, math.nan), 1.0, few.get(k, "undecided"))
    stderr = float(np.std(log_ratios, ddof=1)) / math.sqrt(k)
    half90, half95 = (float(q) * stderr for q in student.ppf((0.95, 0.975), k - 1))
    word = "undecided, lower" if mean + half95 < 0 else "undecided, higher" if mean - half95 > 0 else "undecided"
    if word != "undecided" and not low <= mean <= high:
        word = "better" if mean < 0 else "worse"
    elif low < mean - half90 and mean + half90 < high:
        word = "neutral"
    p = 2 * float(student.sf(abs(mean) / stderr, k - 1)) if stderr else float(mean == 0)
    return Decision(mean, (mean - half95, mean + half95), p, word)


def holm(pair: list[Decision]) -> list[Decision]:
    """Two decisions with p adjusted for there being two (Holm 1979); better and worse need it below 0.05."""
    least, weaker = 2 * min(d.p for d in pair), {"better": "undecided, lower", "worse": "undecided, higher"}
    pair = [d._replace(p=min(1.0, max(least, d.p))) for d in pair]
    return [d._replace(word=weaker.get(d.word, d.word)) if d.p >= 0.05 else d for d in pair]


def differing(a: Run, b: Run, allowed: tuple[str, ...] = ()) -> dict[str, tuple]:
    """{key: both values} of the config keys in which two runs differ, but for those that begin as one of `allowed`."""
    one, two = flatten(a.config), flatten(b.config)
    return {key: (one[key], two[key]) for key in one
            if one[key] != two[key] and not key.startswith(allowed) and key not in ("exp", *OWN)}


def paired(root: Path, exps: list[str], factor: list[str], force: bool) -> tuple[list[tuple[Run, Run]], list[str]]:
    """(baseline, arm) of each seed in both, and notes. UserError if more differs than the factor and HARMLESS keys."""
    one, two = ({run.seed: run for run in find_runs(root, exp)} for exp in exps)
    if not one.keys() & two.keys():
        raise UserError(f"{root}: {exps[0]} has the seeds {sorted(one)}, {exps[1]} {sorted(two)}: train one in both")
    notes = [f"Seed {seed} is left out: only one arm has it." for seed in sorted(one.keys() ^ two.keys())]
    pairs = [(one[seed], two[seed]) for seed in sorted(one.keys() & two.keys())]
    for first, run in ((first, run) for pair in pairs for first, run in zip(pairs[0], pair, strict=True)):
        if wrong := differing(first, run, ("seed", *HARMLESS)):
            raise UserError(f"{first.path} and {run.path} differ in {', '.join(wrong)}: seeds of one arm must not")
    a, b = pairs[0]
    wrong = "; ".join(f"{key} {values}" for key, values in differing(a, b, (*factor, *HARMLESS)).items())
    if (wrong or differing(a, b).keys().isdisjoint(factor)) and not force:
        raise UserError(f"{a.path} and {b.path} must differ in {', '.join(factor)} alone, but differ in "
                        f"{wrong or 'none of it'}; declare what differs by --factor, or give --force")
    notes += [f"Forced: the arms also differ in {wrong}."] if wrong else []
    for a, b in pairs:
        of_a, of_b = (read_json(run.path / "env.json") if (run.path / "env.json").exists() else {} for run in (a, b))
        notes += [f"Seed {a.seed}: {key} is {of_a.get(key)} in {a.exp} and {of_b.get(key)} in {b.exp}."
                  for key in ("git_commit", "torch", "device", "threads", "train_precision")
                  if of_a.get(key) != of_b.get(key)]
        notes += [f"Seed {a.seed}: {run.exp} is not finished." for run in (a, b) if not run.finished]
    return pairs, notes


def distances(pairs: list[tuple[Run, Run]]) -> dict[str, tuple[list[Point], dict]]:
    """All distances; with each the baseline's line of the results, and `metric`."""
    found, same = {}, ("sampler", "nfe", "n", "features", "reference", "precision")
    for a, b in pairs:
        for d in paired_differences(a.path, b.path):
            lines = [next(r for r in run.results(d["kind"]) if r["step"] == step and all(r[k] == d[k] for k in same))
                     for run, step in ((a, d["step_a"]), (b, d["step"]))]
            for metric in filter(d.__contains__, (metric_name(metric, d["features"]) for metric in METRICS)):
                parts = [Measured(r[metric], Z * r[f"{metric}_stderr"]) for r in (*lines, d)]
                bf16 = ", bf16" * (d["precision"] == "bf16")
                name = (f"{d['kind']}, step {d['step']:,}, {d['sampler'].upper()} {d['nfe']}, n = {d['n']:,}{bf16}: "
                        f"{metric}")
                found.setdefault(name, ([], lines[0] | {"metric": metric}))[0].append(Point(a.seed, *parts))
    return found


def points(pairs: list[tuple[Run, Run]], value: Callable[[Run], float]) -> list[Point]:
    """A point per seed, if the value is a number in both arms (nan: not measured)."""
    both = ((a.seed, value(a), value(b)) for a, b in pairs)
    return [Point(seed, Measured(x), Measured(y), Measured(y - x)) for seed, x, y in both if not math.isnan(x + y)]


def mean(log: str, key: str, after: float, t: int | None = None) -> Callable[[Run], float]:
    """The mean of what a run has logged as `key` (of a profile: at t) after a part of training."""
    def value(run: Run) -> float:
        lines = [r for r in run.log(log) if r["step"] > after * run.config.train.total_steps]
        values = [r[key] if t is None else r[key][r["t"].index(t)] for r in lines if t is None or t in r["t"]]
        return float(np.mean(values)) if values else math.nan
    return value


def at_end(run: Run) -> dict[int, dict]:
    """{number of probes: line} of the Hessian traces at the last step, from the run and from evaluate.py --probes."""
    return {r["num_probes"]: r for log in ("curvature", "traces") for r in run.log(log)
            if r["step"] == run.config.train.total_steps}


def last_traces(pairs: list[tuple[Run, Run]], key: str) -> tuple[str, list[Point]]:
    """The traces at the last step with the most probes that the most seeds have in both arms, and their name."""
    seeds = Counter(probes for a, b in pairs for probes in at_end(a).keys() & at_end(b).keys())
    probes = max(seeds, key=lambda probes: (seeds[probes], probes), default=0)
    return f"last step, {probes} probes", points(
        pairs, lambda run: at_end(run)[probes][key] if probes in at_end(run) else math.nan)


def safe(text: str) -> str:
    """Text as one line that can start no heading, no cell and no HTML tag."""
    return one_line(text).replace("|", "&#124;").replace("<", "&lt;")


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(safe, row))} |" for row in [header, ["---"] * len(header), *rows])


def verdict(pairs: list[tuple[Run, Run]], found: dict[str, tuple[list[Point], dict]]) -> list[str]:
    """Paragraphs: the verdict on both registered measures, a note if they are measured in another way, and the rule."""
    (a, b), fd, rows = pairs[0], metric_name("fd", pairs[0][0].config.eval.features), []
    name = max((name for name, (_, r) in found.items() if (r["kind"], r["sampler"], r["nfe"], r["metric"]) == (
        "final", "ddpm", 50, fd)), key=lambda name: found[name][1]["n"], default=f"final, DDPM 50: {fd}")
    distance, line = found.get(name, ([], {}))
    when, trace = last_traces(pairs, "curvature/hutch_trace_unweighted_mean")
    measures = (name, distance, DISTANCE), (f"Hessian trace of the unweighted loss, {when}", trace, TRACE)
    withheld = ("no verdict: not finished" if not all(run.finished for pair in pairs for run in pair) else
                "no verdict: same loss.weighting" if "loss.weighting" not in differing(a, b) else "")
    decisions = holm([decide([float(np.log(p.arm.value / p.baseline.value)) for p in seeds], limits)
                      for _, seeds, limits in measures])
    for (name, seeds, limits), d in zip(measures, decisions, strict=True):
        change, low, high = (f"{100 * math.expm1(y):+.1f} %" for y in (d.mean, *d.interval))
        gain = "" if withheld else "refuted" if d.interval[0] > math.log(limits[0]) else "not refuted"
        rows.append([f"**{withheld or d.word}**", name, f"{len(seeds)}", *(
            [change, f"{low} to {high}", f"{d.p:.2g}", gain] if len(seeds) > 1 else [""] * 4)])
    note = [safe(f"The distance is {fd} at n = {line['n']:,}. The registered measure is val/fd_lite0 at n = 10,000.")
            ] if line and (fd, line["n"]) != ("val/fd_lite0", 10_000) else []
    if len(pairs) < 4:
        note.append("A verdict on fewer than four seeds is provisional: four is what was registered.")
    return [table(["verdict", "measure", "seeds", "change", "95 % interval", "p", "gain hoped for"], rows), *note, (
        "Lower is better. The change is the mean over seeds of ln(arm / baseline), in percent. p is corrected for two "
        "measures (Holm). Better or worse: the 95 % t-interval excludes 0, p is below 0.05, and the change is beyond "
        "-7 % or +7 % (distance), -10 % or +11 % (trace). Neutral: the 90 % interval is inside these limits. The gain "
        "hoped for, -7 % or -10 %, is refuted if the 95 % interval is above it.")]


def compare(pairs: list[tuple[Run, Run]], notes: list[str]) -> str:
    """All sections as Markdown, the verdict first."""
    (a, b), found = pairs[0], distances(pairs)

    def shown(measures, first="measure"):
        cells = [[name, f"{len(of)}", *(f"{over_seeds([p[i] for p in of])}" for i in (1, 2, 3)),
                  f"{over_seeds([p.percent for p in of]):+} %"] for name, of in measures.items() if of]
        return table([first, "seeds", a.exp, b.exp, "difference", "change"], cells) if cells else "Not in both arms."

    traces = {f"Hessian trace of the {of} loss, {when}": of_seeds
              for of, key in (("unweighted", "hutch_trace_unweighted_mean"), ("arm's own", "hutch_trace_mean"))
              for when, of_seeds in (("last fifth", points(pairs, mean("curvature", f"curvature/{key}", 0.8))),
                                     last_traces(pairs, f"curvature/{key}"))}
    training = {key: points(pairs, mean("loss", f"train/{key}", 0.8)) for key in ("eps_mse_mean", "grad_global_L2")}
    errors = {f"{t}, {weights}": points(pairs, mean("per_t", f"eps_mse_{weights}", LAST, t))
              for weights in ("ema", "raw") for t in sorted({t for r in a.log("per_t") for t in r["t"]})}
    cost = {"images seen": points(pairs, lambda run: run.config.train.total_steps * run.config.train.batch_size),
            "parameters": points(pairs, lambda run: sum(p.numel() for p in build(run.config, "cpu")[0].parameters())),
            "seconds of training": points(pairs,
                                          lambda run: sum(r["seconds/train"] for r in run.log("timing")) or math.nan)}
    context = {f"{m} at n = {r['n']:,}: " + ", ".join(f"{r[m + end]:.4g} for {what}" for end, what in (
        ("_floor", "training images"), ("_floor_test", "test images"), ("_ceiling", "uniform noise"))
        if r.get(m + end) is not None) + "." for _, r in found.values() for m in [r["metric"]]}
    finals = {name: seeds for name, (seeds, r) in found.items() if r["kind"] == "final"} | traces
    alone = [[name, *("".join(f"{p.percent:+} %" for p in of if p.seed == run.seed) for run, _ in pairs)]
             for name, of in finals.items() if of]
    sections = {
        "Verdict": verdict(pairs, found),
        "Seed by seed": [table(["change", *(f"{run.seed}" for run, _ in pairs)], alone)],
        "What differs": [table(["key", a.exp, b.exp], [[key, *map(str, both)]
                                                       for key, both in differing(a, b).items()]), *map(safe, notes)],
        "Compute": [shown(cost)],
        "Distances": [shown({name: seeds for name, (seeds, _) in found.items()}), *map(safe, sorted(context)),
                      "± is half the width of a 95 % interval: over seeds (t), or over the samples of one seed."],
        "Hessian traces": [shown(traces), "A weight below 1 makes the trace of the arm's own loss smaller by itself."],
        "Training, last fifth": [shown(training), "The gradient norm is that of the arm's own loss, before clipping."],
        "Held-out eps-MSE at each t, last step": [shown(errors, "t, weights")]}
    return "\n\n".join(f"## {title}\n\n" + "\n\n".join(blocks) for title, blocks in sections.items())


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a comparison, or two experiments: baseline and arm")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder with RUNS/EXP/seedSEED; default runs")
    parser.add_argument("--out", type=Path, help="folder to write to; default RUNS/reports/NAME")
    parser.add_argument("--factor", action="append", metavar="KEY", help="key that may differ; default loss.weighting")
    parser.add_argument("--force", action="store_true", help="compare even what differs in more than the factor")
    args = parser.parse_args(argv)
    tables, name = load_tables("comparisons"), "_".join(args.names)
    if name not in tables and len(args.names) != 2:
        raise UserError(f"{' '.join(args.names)}: not two experiments, and no comparison{nearest(name, tables)}")
    found = tables.get(name) or {"title": name, "runs": args.names, "factor": ["loss.weighting", "loss.gamma"]}
    pairs, notes = paired(args.runs, found["runs"], args.factor or found["factor"], args.force)
    try:
        text = f"# {safe(found['title'])}: {' against '.join(found['runs'][::-1])}\n\n{compare(pairs, notes)}\n"
    except KeyError as error:
        raise UserError(f"a log of {' or '.join(found['runs'])} lacks {error}: written by another version?") from None
    out = args.out or args.runs / "reports" / name
    for kind in ("distance_and_loss_vs_steps", "curvature_vs_steps", "per_t", "grad_norm", "frontier", "grids"):
        try:
            text += f"\n![{kind}]({plots.save(plots.draw(kind, found['runs'], args.runs), out, kind)[0].name})\n"
        except UserError as error:
            print(f"{kind} is left out: {error}")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / f"{name}.md", text.encode())
    print(text, out / f"{name}.md", sep="\n")
    return 0


if __name__ == "__main__":
    run_script(main)
