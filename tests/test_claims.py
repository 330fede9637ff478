"""docs/experiments: its numbers are those that the code gives now, its commands exist, its pages have one form."""

import contextlib
import io
import re
import shlex
import tomllib
from functools import cache

import numpy as np
import pytest
from conftest import ROOT

import report
from diffusion import Diffusion, cosine_betas, linear_betas, spaced_timesteps
from evaluate import Run
from weighting import loss_weights

DOCS = ROOT / "docs" / "experiments"
KEPT = report.KEPT
TABLES = tomllib.loads((ROOT / "experiments.toml").read_text())
EXPERIMENTS = [name for name in TABLES["experiments"] if name != "smoke"]
VERDICTS = ("right", "wrong way round", "wrong", "trivially true", "confounded", "expected", "reproduced in kind",
            "not yet measured")


@cache
def claims():
    """{"C01": its section} of claims.md."""
    parts = re.split(r"^### (C\d\d)\. ", (DOCS / "claims.md").read_text(), flags=re.M)
    return {name: re.split(r"^## ", body, flags=re.M)[0] for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def item(section, name):
    """The text of "* **name.** ..." with its line breaks undone."""
    return " ".join(re.search(rf"^\* \*\*{name}\.\*\* (.*?)(?=^\* |^$)", section, flags=re.M | re.S)[1].split())


def commands(section):
    return [" ".join(block.split()) for block in re.findall(r"^```bash\n(.*?)^```", section, flags=re.M | re.S)]


def printed(section):
    """(python code, what the page says it prints) of each one-liner with an output block."""
    pairs = re.findall(r"^```bash\n(python -c .*?)^```\n```text\n(.*?)^```", section, flags=re.M | re.S)
    return [(shlex.split(command)[2], output) for command, output in pairs]


def closed_forms():
    """{claim: the numbers that its "Here" must state}, without the one-liners of the page."""
    linear, cosine = Diffusion(linear_betas()), Diffusion(cosine_betas())
    snr = linear.snr
    w1, w3, w5 = (loss_weights(snr, "minsnr", gamma) for gamma in (1, 3, 5))
    normalised = loss_weights(snr, "minsnr_norm", 5)
    mean1, mean3, mean5 = (w.mean().item() for w in (w1, w3, w5))
    first = [int((w >= 1).nonzero()[0]) for w in (w1, w3, w5)]
    strided = linear.betas[spaced_timesteps(1000, 50)].sum().item()
    clean = int((snr > 400).sum())
    chance = 1 - (1 - clean / 1000)**4
    assert (loss_weights(cosine.snr, "minsnr", 5) < 1).sum() == 261  # what E9b's page builds on
    return {
        "C01": [f"{first[0]}, {first[1]} and {first[2]}", *(f"{t / 1000:.3f}" for t in first)],
        "C02": [f"{mean5:.6f}", f"{1 / mean5:.4f}", f"{1 - mean5:.1%}".replace("%", " %")],
        "C03": [f"{100 * first[2] / 1000:.1f} %", f"{100 * (w5 < 0.5).double().mean():.1f} %",
                f"{100 * first[0] / 1000:.1f} %", f"{normalised.max():.4f}"],
        "C04": [f"{(w1 / w5)[:130].mean():.3f}", f"{(w3 / w5)[:130].mean():.3f}",
                *(f"{w[:200].mean():.3f}" for w in (w1, w3, w5))],
        "C05": [f"{(normalised / w5).mean():.4f}", f"{mean5:.3f}"],
        "C06": [f"{(normalised / w5).mean():.4f}"],
        "C07": [f"{100 * (1 - mean5):.1f} %", f"{100 * (1 - (1 - 0.152) / mean5):.1f} %", f"{w5[:125].mean():.3f}"],
        "C09": [f"{mean5 / mean1:.3f}", f"{mean3 / mean1:.3f}", f"{100 * (1.139 * mean1 / mean5 - 1):.1f} %",
                f"{100 * (1.100 * mean1 / mean3 - 1):.1f} %"],
        "C12": [f"{mean1 / mean5:.3f}"],
        "C13": [f"{w5[0]:.2e}", f"{w5[50]:.3f}"],
        "C16": [f"the {clean} timesteps", f"{100 * chance:.2f} %", f"{50 * chance:.1f}"],
        "C17": [f"{1 - 0.041 / 0.102:.2f}"],
        "C18": [f"{1 - 0.122 / 0.207:.2f}"],
        "C19": [f"{1 - 330 / 591:.2f}"],
        "C20": [f"{strided:.4f} of {linear.betas.sum():.2f}", f"{100 * strided / linear.betas.sum():.1f} %",
                *adjacent_step_moments(linear)],
        "C22": [f"{linear.alphas_cumprod[-1] ** -0.5:.1f}"],
        "C23": [f"{100 * (206.16 / 203.61 - 1):.1f} %", f"{100 * 0.999**2000:.1f} %"],
        "C24": [f"{100 * (1 - 203.9 / 204.47):.2f} %", f"{100 * (1 - 206.5 / 206.95):.2f} %"],
        "C25": [f"{100 * (1 - 203.80 / 206.48):.1f} %"],
    }


def adjacent_step_moments(diffusion, mean=0.3, std=0.5, nfe=50):
    """Where 50 strided steps with adjacent-step coefficients end under the exact denoiser of N(mean, std^2)."""
    m, v = 0.0, 1.0
    for t in spaced_timesteps(diffusion.T, nfe).tolist():
        ac, beta = diffusion.alphas_cumprod[t].item(), diffusion.betas[t].item()
        before = diffusion.alphas_cumprod[t - 1].item() if t else 1.0
        pull = beta / (ac * std**2 + 1 - ac)  # of x_t towards sqrt(ac) * mean, the eps_hat of the exact denoiser
        m = (m - pull * (m - ac**0.5 * mean)) / (1 - beta)**0.5
        v = v * (1 - pull)**2 / (1 - beta) + (1 - before) / (1 - ac) * beta
    return f"mean {m:.3f}", f"std {v**0.5:.3f}"


def last_fifth(exp, log, key):
    run = kept(exp)
    return np.array([r[key] for r in run.log(log) if r["step"] > 0.8 * run.config.train.total_steps])


@cache
def kept(exp):
    return Run(KEPT / exp / "seed1077")


def measured():
    """{claim: the numbers that its "Here" must state}, from the logs of the study's runs."""
    logs = {exp: kept(exp).log("loss") for exp in ("E5", "E6")}
    traces = {exp: kept(exp).log("curvature") for exp in ("E5", "E6")}
    own, unweighted = (f"curvature/hutch_trace{kind}_mean" for kind in ("", "_unweighted"))
    lower = sum(b[own] < a[own] for a, b in zip(traces["E5"], traces["E6"], strict=True))
    higher = sum(b[unweighted] > a[unweighted] for a, b in zip(traces["E5"], traces["E6"], strict=True))
    base, ours, plain = (last_fifth(exp, "curvature", key).mean()
                         for exp, key in (("E5", own), ("E6", own), ("E6", unweighted)))

    def norms(exp, chosen):
        return np.array([r["train/grad_global_L2"] for r in logs[exp] if chosen(r)])

    def window(exp, key, start, stop):
        return np.mean([r[key] for r in logs[exp] if start < r["step"] <= stop])

    def drop(key):
        return f"{100 * (1 - window('E5', key, 8000, 10_000) / window('E5', key, 0, 2000)):.0f} %"

    spread = {(exp, key): last_fifth(exp, "loss", key).std() / last_fifth(exp, "loss", key).mean()
              for exp in logs for key in ("train/loss", "train/eps_mse")}
    rare = {exp: [norms(exp, lambda r, above=above: r["step"] > 100 and (r["snr/mean"] > 100) == above)
                  for above in (True, False)] for exp in logs}
    first_trace = np.mean([r[own] for r in traces["E5"] if r["step"] <= 2000])
    return {
        "C07": [f"{lower} of {len(traces['E5'])} records", f"{100 * (1 - ours / base):.0f} %",
                f"{100 * (1 - ours / plain):.0f} %", f"{100 * (plain / base - 1):.0f} %",
                f"{ours / plain:.2f} x {plain / base:.2f} = {ours / base:.2f}"],
        "C08": [f"{higher} of {len(traces['E5'])} records"],
        "C13": [f"{value:.2f}" for value in spread.values()],
        "C15": [f"{(norms('E5', bool) > 1).sum()} of {len(logs['E5'])}", f"{(norms('E6', bool) > 1).sum()} of 100",
                *(f"{norms(exp, lambda r: r['step'] > 100).max():.2f}" for exp in logs)],
        "C16": [f"the {len(rare['E5'][0])} batches", *(f"{x.mean():.2f}" for pair in rare.values() for x in pair)],
        "C17": [f"{logs['E5'][0]['train/loss']:.3f} at step 100", f"{logs['E5'][-1]['train/loss']:.4f} at 10k",
                f"{window('E5', 'train/loss', 0, 2000):.3f}", f"{window('E5', 'train/loss', 8000, 10_000):.4f}",
                drop("train/loss"), f"{window('E5', 'train/loss_mean', 0, 2000):.3f}",
                f"{window('E5', 'train/loss_mean', 8000, 10_000):.3f}"],
        "C18": [f"{window('E5', 'train/grad_global_L2', 0, 2000):.3f}",
                f"{window('E5', 'train/grad_global_L2', 8000, 10_000):.3f}", drop("train/grad_global_L2")],
        "C19": [f"{traces['E5'][0][own]:,.0f} at step 200", f"{traces['E5'][-1][own]:.0f} at 10k",
                f"{100 * (1 - base / first_trace):.0f} %"],
    }


def states(text, number):
    """Whether the number stands in the text, not as a part of a longer one."""
    return re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)", text)


@pytest.mark.parametrize("name, numbers", [*closed_forms().items(), *measured().items()])
def test_the_page_states_the_numbers_that_the_code_and_the_logs_give(name, numbers):
    here = item(claims()[name], "Here")
    assert [number for number in numbers if not states(here, number)] == []


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda path: path.name)
def test_every_number_with_its_error_stands_in_a_report(page):
    """ "514.4 ± 3.0" anywhere by hand is what report.py has printed from the kept logs."""
    pattern = r"-?\d+(?:,\d{3})*(?:\.\d+)? ± \d+(?:,\d{3})*(?:\.\d+)?(?: %)?"
    reports = "".join(path.read_text() for path in KEPT.glob("reports/*/*.md"))
    printed = set(re.findall(pattern, reports + report.table_to_markdown(report.results_table(KEPT))))
    assert len(printed) > 30
    found = re.findall(pattern, " ".join(page.read_text().split()))
    assert [number for number in found if number not in printed] == []


def test_each_one_liner_prints_what_the_page_says():
    checked = 0
    for section in claims().values():
        for code, output in printed(section):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(code, {})
            assert out.getvalue() == output, code
            checked += 1
    assert checked >= 18
    # and a one-liner without its output block would go unchecked
    assert checked == sum(command.startswith("python -c") for s in claims().values() for command in commands(s))


def test_every_claim_is_whole_and_has_a_command_that_exists():
    assert list(claims()) == [f"C{i:02d}" for i in range(1, len(claims()) + 1)] and len(claims()) >= 28
    for name, section in claims().items():
        for part in ("Notes", "Here", "Verdict", "Evidence"):
            assert item(section, part), (name, part)
        assert item(section, "Verdict").startswith(VERDICTS), name
        assert commands(section), name
        if "not run yet" in item(section, "Evidence"):
            assert any("train.py --exp" in command for command in commands(section)), name


def test_commands_name_what_exists():
    text = (DOCS / "claims.md").read_text()
    exps = [*re.findall(r"train\.py --exp (\w+)", text), *re.findall(r"report\.py (E\w+ E\w+)", text),
            *re.findall(r"for exp in ([\w ]+);", text), *re.findall(r"--exps ([\w ]+)", text)]
    assert {exp for group in exps for exp in group.split()} <= set(EXPERIMENTS)
    assert set(re.findall(r"report\.py ([a-z]\w+)", text)) <= set(TABLES["comparisons"])
    assert set(re.findall(r"plots\.py ([a-z]\w+)", text)) <= set(TABLES["figures"])
    source = (ROOT / "plots.py").read_text()
    assert [kind for kind in re.findall(r"--kind (\w+)", text) if f"def {kind}(" not in source] == []
    for file, expression in re.findall(r'pytest (tests/\w+\.py) -k "?([\w ]+)"?', text):
        names = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), flags=re.M)
        for part in expression.split(" or "):
            assert any(part.strip() in test for test in names), (file, part)


def test_every_comparison_stands_in_the_index():
    for line in (DOCS / "README.md").read_text().splitlines():
        if row := re.match(r"\| \[(\w+)\]\S+ \| .*? \| (.*?) \| (baseline|variant) ", line):
            for name in re.findall(r"`(\w+)`", row[2]):
                runs, factor = TABLES["comparisons"][name]["runs"], TABLES["comparisons"][name]["factor"][0]
                assert row[1] == runs[row[3] == "variant"]
                assert row[3] == "baseline" or f"`{factor}`" in line


def test_the_index_repeats_id_and_verdict_of_each_section():
    text = (DOCS / "claims.md").read_text()
    rows = re.findall(r"^\| \[?(C\d\d)\S* \| (.*?) \| (.*?) \|$", text, flags=re.M)
    assert [name for name, _, _ in rows] == list(claims())
    for name, _, verdict in rows:
        assert verdict.startswith(VERDICTS) and item(claims()[name], "Verdict").startswith(verdict), name


@pytest.mark.parametrize("exp", EXPERIMENTS)
def test_every_experiment_has_its_page(exp):
    title = TABLES["experiments"][exp]["title"]
    page = (DOCS / f"{exp}.md").read_text()
    assert page.startswith(f"# {exp}: {title}\n\n<!-- generated: python report.py --pages -->\n")
    assert page.count("<!-- generated: python report.py --pages -->") == page.count("<!-- end -->") == 1
    assert re.findall(r"^## (.*)$", page.split("<!-- end -->")[1], flags=re.M) == [
        "Hypothesis", "Metrics", "Success criteria", "Results"]
    assert f"[{exp}]({exp}.md)" in (DOCS / "README.md").read_text()


def test_links_between_the_pages_lead_somewhere():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_weights_quoted_on_the_experiments_pages():
    """What E4, E6, E8 and E9 expect rests on these means."""
    def mean(gamma, betas, stop=1000):
        return loss_weights(Diffusion(betas).snr, "minsnr", gamma)[:stop].mean().item()

    linear, cosine = linear_betas(), cosine_betas()
    quoted = {"E6": [f"{100 * (1 - mean(5, linear)):.1f} %", f"{mean(5, linear, 125):.3f}"],
              "E8a": [f"{100 * (mean(1, linear) / mean(5, linear) - 1):.1f} %", f"{mean(1, linear):.3f}"],
              "E8b": [f"{100 * (mean(3, linear) / mean(5, linear) - 1):.1f} %", f"{mean(3, linear):.3f}"],
              "E9b": [f"{100 * (mean(5, cosine) - 1):.1f} %", f"{mean(5, cosine):.3f}", f"{mean(5, cosine, 125):.3f}"],
              "E4": [f"{1 / mean(5, linear):.4f}"],
              "E9a": [f"{Diffusion(cosine).alphas_cumprod[-1] ** -0.5:,.0f}",
                      f"t = {int((Diffusion(cosine).snr < 1).nonzero()[0])}"]}
    for exp, numbers in quoted.items():
        page = (DOCS / f"{exp}.md").read_text()
        assert [number for number in numbers if number not in page] == [], exp
