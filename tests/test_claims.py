"""docs/experiments: its numbers are those that the code gives now, its commands exist, its pages have one form."""

import contextlib
import io
import math
import re
import shlex
import tomllib
from functools import cache
from itertools import groupby, product

import numpy as np
import pytest
from conftest import ROOT

import report
from checkpoint import read_jsonl
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


@cache
def kept(exp):
    return Run(KEPT / exp / "seed1077")


def logged(exp, log, key, after=0, until=math.inf):
    """What a kept run has logged as `key` at steps after < step <= until."""
    return np.array([r[key] for r in kept(exp).log(log) if after < r["step"] <= until])


OWN, UNWEIGHTED = "curvature/hutch_trace_mean", "curvature/hutch_trace_unweighted_mean"
NORM = "train/grad_global_L2"


def percent(change):
    return f"{100 * abs(change):.0f} %"


def norms_by_snr(exp):
    """Gradient norms after step 100 of batches with a mean SNR above 100, and of the others."""
    norm, rare = logged(exp, "loss", NORM, 100), logged(exp, "loss", "snr/mean", 100) > 100
    return norm[rare], norm[~rare]


def cleanest_probe(exp, key):
    """Trace of the probe with the highest mean SNR, and the median of all, averaged over the last fifth of the run."""
    samples = logged(exp, "curvature", key.replace("_mean", "_samples"), 0.8 * kept(exp).config.train.total_steps)
    probes = samples.mean(axis=0)
    return probes[np.argmax(logged(exp, "curvature", "curvature/snr_mean_samples")[0])], np.median(probes)


def unweighted_and_own(exp):
    """ "2,573 (716) and 467 (525)": both traces of the probe with the highest mean SNR, with the median of all."""
    return " and ".join("{:,.0f} ({:,.0f})".format(*cleanest_probe(exp, key)) for key in (UNWEIGHTED, OWN))


def profile_change(arm, baseline, key="ema"):
    """Relative change of the held-out eps-MSE at the end, at each of the profile's timesteps."""
    return np.divide(*(kept(exp).log("per_t")[-1][f"eps_mse_{key}"] for exp in (arm, baseline))) - 1


def measured_of_min_snr():
    """{claim or page: the numbers that it must state}, from the logs of E5 and E6."""
    def fall(key, log="loss"):
        first, last = logged("E5", log, key, 0, 2000).mean(), logged("E5", log, key, 8000).mean()
        return first, last, percent(1 - last / first)

    def spread(exp, key, after):
        return logged(exp, "loss", key, after).std() / logged(exp, "loss", key, after).mean()

    base, own, unweighted = (logged(exp, "curvature", key, 8000).mean()
                             for exp, key in (("E5", OWN), ("E6", OWN), ("E6", UNWEIGHTED)))
    lower = (logged("E6", "curvature", OWN) < logged("E5", "curvature", OWN)).sum()
    higher = (logged("E6", "curvature", UNWEIGHTED) > logged("E5", "curvature", UNWEIGHTED)).sum()
    factors = f"{own / unweighted:.2f} x {unweighted / base:.2f} = {own / base:.2f}"
    bins = {(exp, after): logged(exp, "curvature", "curvature/hutch_trace_t_bins", after, after + 2000).mean(axis=0)
            for exp in ("E5", "E6") for after in (0, 8000)}
    share = {key: value[0] / value.sum() for key, value in bins.items()}
    ema, raw = (profile_change("E6", "E5", key) for key in ("ema", "raw"))
    loss, mean_loss, norm, trace = fall("train/loss"), fall("train/loss_mean"), fall(NORM), fall(OWN, "curvature")
    errors = [logged(exp, "loss", "train/eps_mse_mean", 8000).mean() for exp in ("E5", "E6")]
    steady = [f"{spread('E6', NORM, 2000):.2f}", f"{spread('E5', NORM, 2000):.2f}",
              *(f"{logged(exp, 'loss', NORM, 2000).max():.2f}" for exp in ("E5", "E6"))]
    shape = [[logged(exp, "curvature", key)[i] for i in (0, 9, -1)] for exp, key in (("E5", OWN), ("E6", UNWEIGHTED))]
    r = kept("E5").results("milestone")[-1]
    return {
        "C07": [f"{lower} of 50 records", percent(1 - own / base), percent(1 - own / unweighted),
                percent(unweighted / base - 1), factors],
        "C08": [f"{higher} of 50 records"],
        "C13": [f"{spread(exp, key, 8000):.2f}" for exp in ("E5", "E6") for key in ("train/loss", "train/eps_mse")],
        "C14": [percent(ema[0]), percent(ema[-1])],
        "C15": [*(f"{(logged(exp, 'loss', NORM) > 1).sum()} of 100" for exp in ("E5", "E6")),
                *(f"{logged(exp, 'loss', NORM, 100).max():.2f}" for exp in ("E5", "E6"))],
        "C16": [f"the {len(norms_by_snr('E5')[0])} batches",
                *(f"{norms.mean():.2f}" for exp in ("E5", "E6") for norms in norms_by_snr(exp)),
                *(f"{trace:,.0f}" for trace in cleanest_probe("E5", OWN)),
                unweighted_and_own("E6").replace("(", "(median ", 1)],
        "C17": [f"{logged('E5', 'loss', 'train/loss')[0]:.3f} at step 100",
                f"{logged('E5', 'loss', 'train/loss')[-1]:.4f} at 10k", f"{loss[0]:.3f}", f"{loss[1]:.4f}", loss[2],
                f"{mean_loss[0]:.3f}", f"{mean_loss[1]:.3f}"],
        "C18": [f"{norm[0]:.3f}", f"{norm[1]:.3f}", norm[2]],
        "C19": [f"{shape[0][0]:,.0f} at step 200", f"{shape[0][2]:.0f} at 10k", trace[2]],
        "C30": [*(f"{value:,.0f}" for values in shape for value in values),
                f"by {percent(1 - shape[0][1] / shape[0][0])[:-2]} and {percent(1 - shape[1][1] / shape[1][0])}"],
        "C31": steady,
        "E5.md": [trace[2], *(f"{share['E5', after]:.2f}" for after in (0, 8000)), f"{share['E6', 0]:.2f}"],
        "E6.md": [f"{lower} of", factors, f"{bins['E6', 8000][0] / 8 - bins['E5', 8000][0] / 8:.0f}",
                  *(percent(ema[i]) for i in (0, 1, -1)), percent(raw[0]), percent(raw[-1]),
                  *(f"{error:.4f}" for error in errors)],
        "summary.md": [*steady, *(percent(x[i]) for x in (ema, raw) for i in (0, -1)), factors,
                       f"by {percent(errors[1] / errors[0] - 1)}",
                       "{:.2f} to {:.2f}".format(*(kept(e).log("per_t")[-1]["eps_mse_ema"][0] for e in ("E5", "E6"))),
                       percent((r["ceiling"] - r["val/fd_lite0"]) / (r["ceiling"] - r["floor"])),
                       f"{lower} of 50 records"],
    }


def measured_of_normalised():
    """The same of E4 beside E6."""
    mean = loss_weights(Diffusion(linear_betas()).snr, "minsnr", 5).mean().item()
    ratio = logged("E4", "loss", NORM) / logged("E6", "loss", NORM)
    first, last = (f"{np.median(part):.3f}" for part in (ratio[:25], ratio[-25:]))
    apart = [f"{100 * abs(profile_change('E4', 'E6', key)).max():.1f} %" for key in ("ema", "raw")]
    alike = f"{np.corrcoef(*(logged(exp, 'loss', 'train/eps_mse') for exp in ('E4', 'E6')))[0, 1]:.5f}"
    late = [np.divide(*(logged(exp, "loss", key, 8000).mean() for exp in ("E4", "E6")))
            for key in ("train/eps_mse_mean", "train/loss_mean")]
    return {
        "C05": [*apart, alike],
        "C06": [first, last, f"from {ratio[:25].min():.2f} to {ratio[:25].max():.2f}"],
        "E4.md": [*apart, alike, *(f"{x:.3f}" for x in late), f"{np.median(ratio):.3f}", first, last,
                  f"{(logged('E4', 'loss', NORM) > 1).sum()} of 100",
                  f"{(logged('E6', 'loss', NORM) > mean).sum()} of 100"],
        "summary.md": [*apart, alike, first, last,
                       f"{np.corrcoef(*(logged(exp, 'loss', 'train/eps_mse') for exp in ('E5', 'E6')))[0, 1]:.3f}",
                       "{:.2f} to {:.2f} by quarter".format(*np.sort([*map(np.median, np.split(ratio, 4))])[[0, -1]])],
    }


def measured_of_gamma():
    """The same of E8a, E8b and E8c."""
    arms = "E8a", "E8b", "E8c"
    own, loss, error = ({exp: logged(exp, log, key, 4000).mean() for exp in arms} for log, key in (
        ("curvature", OWN), ("loss", "train/loss_mean"), ("loss", "train/eps_mse_mean")))
    one, three = profile_change("E8a", "E8c"), profile_change("E8b", "E8c")
    raw_one, raw_three = (profile_change(exp, "E8c", "raw") for exp in ("E8a", "E8b"))
    between, raw_between = (f"{((np.minimum(0, a) <= b) & (b <= np.maximum(0, a))).sum()} of 21"
                            for a, b in ((one, three), (raw_one, raw_three)))
    return {
        "C04": [f"{weight * (1 + change[1]):.3f}" for weight, change in ((1 / 5, raw_one), (3 / 5, raw_three))],
        "C09": [f"{own['E8c'] / own['E8a']:.3f} times"],
        "C12": [*(f"{x['E8a'] / x['E8c']:.3f} times" for x in (loss, error)),
                "{:.3f} and {:.3f} times".format(*(x["E8b"] / x["E8c"] for x in (loss, error)))],
        "C14": [*(percent(one[i]) for i in (0, 1, -2)), between],
        "C15": ["{}, {} and {} of 500".format(*((logged(exp, "loss", NORM) > 1).sum() for exp in arms)),
                "{:.2f}, {:.2f} and {:.2f}".format(*(logged(exp, "loss", NORM, 100).max() for exp in arms))],
        "C16": [f"{len(norms_by_snr('E8a')[0])} batches",
                *(f"{norms.mean():.2f}" for exp in arms for norms in norms_by_snr(exp)),
                *(unweighted_and_own(exp) for exp in ("E8a", "E8c"))],
        "E8a.md": ["{} higher at t = 0, {} at t = 50, {} at t = 100".format(*map(percent, one[:3])),
                   *(f"{norms_by_snr(exp)[0].mean():.3f}" for exp in ("E8a", "E8c"))],
        "E8b.md": [between, raw_between,
                   "{} higher at t = 0, {} at t = 50, {} lower at t = 949".format(*map(percent, three[[0, 1, -2]])),
                   "where E8a is {}, {} and {} away".format(*map(percent, one[[0, 1, -2]])),
                   *(f"{error[exp]:.4f}" for exp in arms)],
        "E8c.md": [f"{norms.mean():.3f}" for norms in norms_by_snr("E8c")],
        "summary.md": [between],
    }


@cache
def swap_lines():
    return read_jsonl(KEPT / "swap.jsonl")


def measured_of_swap():
    """The same of swap.py's samples: their grain, and the timesteps below its cut."""
    first = swap_lines()[:4]
    below = [int((spaced_timesteps(1000, nfe) < first[0]["at"]).sum()) for nfe in (50, 10, 100)]
    return {
        "summary.md": ["{} of 50, {} of 10 and {} of 100".format(*below), ", ".join(f"{r['grain']:.1f}" for r in first),
                       f"{first[0]['grain_train']:.1f} levels"],
    }


def states(text, number):
    """Whether the number stands in the text, not as a part of a longer one."""
    return re.search(rf"(?<![\d.]){re.escape(number)}(?!\d|\.\d)", text)


@pytest.mark.parametrize("name, numbers", closed_forms().items())
def test_the_page_states_the_numbers_that_the_code_gives(name, numbers):
    here = item(claims()[name], "Here")
    assert [number for number in numbers if not states(here, number)] == []


@pytest.mark.parametrize("measured", [measured_of_min_snr, measured_of_normalised, measured_of_gamma,
                                      measured_of_swap])
def test_the_pages_state_the_numbers_that_the_logs_give(measured):
    for name, numbers in measured().items():
        text = item(claims()[name], "Here") if name in claims() else " ".join((DOCS / name).read_text().split())
        assert [number for number in numbers if not states(text, number)] == [], name


ERROR = r"-?\d+(?:,\d{3})*(?:\.\d+)? ± \d+(?:,\d{3})*(?:\.\d+)?(?: %)?"  # a number with its error


def swapped():
    """What a table may have of swap.jsonl: of each way to draw the timesteps, and each metric, the values of the first
    arm's own samples or the relative differences from them, a column per sampler and seed."""
    def cell(r, own, name):
        if r is own:
            return str(report.Measured(r[name], r[f"{name}_stderr"]))
        return report.percent(report.Measured(*(r[f"{name}_difference{part}"] / own[name] for part in ("", "_stderr"))))

    parts = [list(part) for _, part in groupby(swap_lines(), key=lambda r: (r["seed"], r["sampler"]))]
    assert [(r["noisy"], r["clean"]) for r in parts[0]] == [*product(("E5", "E6"), repeat=2)]
    return [[cell(r, part[0], name) for part, r in zip(parts, way, strict=True)]
            for way in zip(*parts, strict=True) for name in report.metric_names(way[0]["features"])]


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda path: path.name)
def test_every_number_with_its_error_stands_in_a_report(page):
    """ "514.4 ± 3.0" anywhere by hand is what report.py or swap.py give of the kept runs; those of a row are of one."""
    texts = [path.read_text() for path in KEPT.glob("reports/*/*.md")]
    rows = [re.findall(ERROR, line) for text in [*texts, report.table_to_markdown(report.results_table(KEPT))]
            for line in text.splitlines() if line.startswith("|")] + swapped()
    assert len(rows) > 30
    printed = {number for row in rows for number in row}
    text = page.read_text()
    assert [number for number in re.findall(ERROR, " ".join(text.split())) if number not in printed] == []
    for line in text.splitlines():
        numbers = re.findall(ERROR, line) if line.startswith("| ") and "notes" not in line else []
        if len(numbers) > 2:  # both arms and their difference: in the order of some row
            assert any(all(n in rest for n in numbers) for rest in map(iter, rows)), line


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
    text = "".join((DOCS / name).read_text() for name in ("claims.md", "summary.md", "README.md"))
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
