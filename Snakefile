"""The whole study as one workflow, for Snakemake 9 (pip install -r workflow-requirements.txt).

    snakemake --cores 2 --config data_root=DIR     run what is missing, a core and a thread each
    snakemake -n                                   list what is missing

config: runs=DIR, where the runs are (default runs); data_root=DIR, which holds cifar-10-batches-py (default data).
Snakemake deletes the outputs of a job that fails. So a run directory or a log that grows is never an output: its rule
declares a small marker, which is written when all the work is done.
"""
import shlex
import sys
from os.path import exists

sys.path.insert(0, str(workflow.basedir))
from config import load_config, load_tables

CODE = f"{shlex.quote(sys.executable)} {shlex.quote(str(workflow.basedir))}"  # {CODE}/train.py runs it
RUNS, DATA = config.get("runs", "runs"), config.get("data_root", "data")
ROOTS = f"--data-root {shlex.quote(DATA)} --stats-root {shlex.quote(RUNS)}/stats"
STUDY = [(exp, str(seed)) for table in load_tables("study").values() for seed in table["seeds"]
         for exp in table["runs"]]  # in the order in which they start
EXPS = {exp for exp, _ in STUDY}
COMPARISONS = {name: c["runs"] for name, c in load_tables("comparisons").items() if EXPS.issuperset(c["runs"])}
FIGURES = [name for name, figure in load_tables("figures").items() if EXPS.issuperset(figure.get("runs", []))]

PAIR = A, B = COMPARISONS["min_snr"]  # the primary runs: E1 and E2
SEEDS = [seed for exp, seed in STUDY if exp == A]
BASE = load_config(A, profile="study")
FIRST, LAST, N = BASE.eval.every, BASE.train.total_steps, BASE.eval.n_samples
SWAPS = {FIRST: N // 2, LAST: N}  # as registered: at 10k steps n = 1,000, at 50k 2,000
STATISTICS = f"{RUNS}/stats/{BASE.data.name}_{BASE.eval.features}_train.npz"
RUN = RUNS + "/{exp}/seed{seed}"


def evidence(exps):
    """The markers of all runs of these experiments."""
    return [f"{RUN.format(exp=exp, seed=seed)}/{marker}" for exp, seed in STUDY if exp in exps
            for marker in ("done.json", "measured")[:1 + (exp in PAIR)]]


wildcard_constraints: seed=r"\d+", s=r"\d+", u=r"\d+"

rule all:
    input: f"{RUNS}/pages"

rule statistics:
    output: STATISTICS
    shell: "{CODE}/evaluate.py --stats {BASE.data.name} --features {BASE.eval.features} --n {N} {ROOTS}"

rule train:  # resumes an unfinished run
    input: lambda w: [] if exists(f"{RUN.format(**w)}/done.json") else STATISTICS  # a finished run stays without them
    output: f"{RUN}/done.json"
    priority: lambda w: len(STUDY) - STUDY.index((w.exp, w.seed))
    shell: "{CODE}/train.py --exp {wildcards.exp} --profile study --seed {wildcards.seed} --resume"
           " --data-root {DATA:q} --out {RUNS:q} --set eval.stats_root={RUNS:q}/stats"

rule measure:  # leaves out what the run's results.jsonl and traces.jsonl have already
    input: f"{RUN}/done.json"
    output: touch(f"{RUN}/measured")
    params: run=RUN
    shell: "{CODE}/evaluate.py {params.run:q} {ROOTS} --frontier 10,20,50,100,250 --n {N}; "
           "for step in {FIRST} {LAST}; do {CODE}/evaluate.py {params.run:q} --data-root {DATA:q}"
           " --curvature --probes 256 --step $step; done"

rule swap:  # above t = 130 one network, below it the other: both arms of a seed; as a control two seeds of the baseline
    input: RUNS + "/{a}/seed{s}/done.json", RUNS + "/{b}/seed{u}/done.json"
    output: RUNS + "/swap/{a}_{s}_{b}_{u}_step{step}.jsonl"
    params: runs=[RUNS + "/{a}/seed{s}", RUNS + "/{b}/seed{u}"], n=lambda w: SWAPS[int(w.step)]
    shell: "{CODE}/docs/experiments/swap.py {params.runs:q} --step {wildcards.step} --n {params.n} {ROOTS} > {output:q}"

rule longer:  # the other control: the baseline after as many steps as both networks of the first swap together
    input: RUNS + f"/{A}/seed{{seed}}/done.json"
    output: RUNS + f"/swap/{A}_{{seed}}_step{2 * FIRST}.jsonl"
    params: run=RUNS + f"/{A}/seed{{seed}}", n=SWAPS[FIRST], step=2 * FIRST
    shell: "{CODE}/evaluate.py {params.run:q} --distance --step {params.step} --n {params.n} {ROOTS} > {output:q}"

rule report:
    input: lambda w: evidence(COMPARISONS[w.name])
    output: RUNS + "/reports/{name}/{name}.md"
    shell: "{CODE}/report.py {wildcards.name} --runs {RUNS:q}"

rule figures:
    input: evidence(EXPS)
    output: expand(RUNS + "/figures/{name}.png", name=FIGURES)
    shell: "{CODE}/plots.py {FIGURES} --runs {RUNS:q}"

rule pages:
    input:
        rules.figures.output, expand(RUNS + "/reports/{name}/{name}.md", name=COMPARISONS),
        expand(f"{RUNS}/swap/{A}_{{seed}}_{B}_{{seed}}_step{{step}}.jsonl", seed=SEEDS, step=SWAPS),
        [f"{RUNS}/swap/{A}_{s}_{A}_{u}_step{step}.jsonl" for s, u in zip(SEEDS, SEEDS[1:]) for step in SWAPS],
        expand(rules.longer.output, seed=SEEDS)
    output: touch(f"{RUNS}/pages")
    shell: "{CODE}/docs/experiments/pages.py && "
           "{CODE}/docs/experiments/answer.py --runs {RUNS:q} --out {RUNS:q}/reports"
