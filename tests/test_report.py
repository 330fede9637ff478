"""Verdicts on constructed results, comparisons of the recorded runs in tests/runs, and the experiments' pages."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT

import report
from config import list_experiments, load_config
from evaluate import RunError
from report import Measured, pooled, relative, verdict

RECORDED = ROOT / "tests" / "runs"


# ---- numbers ----

def test_the_error_of_seeds_is_their_spread_or_their_own():
    assert pooled([Measured(3.0, 0.5)]) == Measured(3.0, 0.5)
    assert pooled([Measured(3.0)]) == Measured(3.0, None)
    spread = pooled([Measured(1.0, 0.01), Measured(2.0, 0.01), Measured(3.0, 0.01)])
    assert spread.value == 2 and spread.stderr == pytest.approx(1 / 3**0.5)
    own = pooled([Measured(2.0, 3.0), Measured(2.0, 4.0)])  # two seeds may agree by chance
    assert own == Measured(2.0, 2.5)
    assert pooled([Measured(1.0), Measured(3.0)]).stderr == pytest.approx(1.0)
    assert relative(Measured(-20.0, 5.0), 200.0) == Measured(-0.1, 0.025)
    assert relative(Measured(-20.0, 5.0), -200.0) == Measured(-0.1, 0.025)


@pytest.mark.parametrize("value, stderr, text", [
    (941.234, 3.21, "941.2 ± 3.2"), (0.0123456, 0.00021, "0.01235 ± 0.00021"), (12345.6, 250.0, "12,346 ± 250"),
    (5.0, None, "5"), (1.0, 0.0, "1")])
def test_numbers_show_two_digits_of_their_error(value, stderr, text):
    assert str(Measured(value, stderr)) == text


@pytest.mark.parametrize("value, stderr, expected", [
    (-0.10, 0.02, "better"), (0.10, 0.02, "worse"), (-0.07, 0.01, "better"), (0.07, 0.01, "worse"),
    (-0.069, 0.001, "neutral"), (0.069, 0.001, "neutral"),      # real, but below the criterion
    (-0.30, 0.15, "neutral"), (0.30, 0.2, "neutral"),           # large, but within the noise
    (-0.301, 0.15, "better"), (0.0, 0.0, "neutral"), (-0.5, None, "missing"), (float("nan"), 0.1, "missing")])
def test_verdict(value, stderr, expected):
    assert verdict(Measured(value, stderr), 0.07) == expected


def test_the_criteria_are_the_registered_ones():
    assert (report.DISTANCE_CRITERION, report.TRACE_CRITERION, report.NOISE) == (0.07, 0.10, 2.0)
    assert verdict(None, 0.07) == "missing"


# ---- comparisons ----

@pytest.fixture
def runs(tmp_path):
    """The recorded runs of seed 1077, as files that a test may change."""
    for exp in ("E5", "E6"):
        shutil.copytree(RECORDED / exp / "seed1077", tmp_path / exp / "seed1077")
    return tmp_path


def edit(root, exp, name, change):
    path = root / exp / "seed1077" / name
    if name.endswith(".jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(change(r)) + "\n" for r in records))
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


def sections(root, force=False, factor=("loss.weighting",)):
    found = report.compare(report.pairs_of(root, ["E5", "E6"]), list(factor), force)
    return {section.title: section for section in found}


def verdicts(root):
    return {row[1]: row[0].strip("*") for row in sections(root)["Verdict"].parts[0].rows}


def scaled(factor):
    def change(r):
        if r["kind"] == "final":
            r |= {key: factor * r[key] for key in ("val/fd_lite0", "val/kid_lite0")}
        return r
    return change


@pytest.mark.parametrize("factor, expected", [(0.9, "better"), (1.1, "worse"), (0.95, "neutral"), (1.0, "neutral")])
def test_distance_verdicts(runs, factor, expected):
    edit(runs, "E6", "results.jsonl", scaled(factor))
    assert verdicts(runs)["val/fd_lite0, DDPM 2, n = 30"] == verdicts(runs)["val/kid_lite0, DDPM 2, n = 30"] == expected


@pytest.mark.parametrize("factor, expected", [(0.8, "better"), (1.2, "worse"), (0.95, "neutral")])
def test_trace_verdicts_come_from_the_last_fifth_and_from_paired_probes(runs, factor, expected):
    """All probes scaled alike: the paired error is small, though the probes' own spread is large."""
    base = {r["step"]: r for r in map(json.loads, (runs / "E5/seed1077/curvature.jsonl").read_text().splitlines())}

    def change(r):
        late = r["step"] > 48
        for key in ("hutch_trace", "hutch_trace_unweighted"):
            samples = base[r["step"]][f"curvature/{key}_samples"]
            r[f"curvature/{key}_samples"] = [x * factor if late else 9 * x for x in samples]
        return r

    edit(runs, "E6", "curvature.jsonl", change)
    found = verdicts(runs)
    mean = np.mean([base[s]["curvature/hutch_trace_samples"] for s in (52, 56, 60)], axis=0)
    error = abs(factor - 1) * mean.std(ddof=1) / 2 / mean.mean()
    assert 2 * error < abs(factor - 1)  # else this test would show nothing
    assert found["trace of the arm's own loss"] == found["trace of the unweighted loss"] == expected
    assert found["curvature: both traces alike"] == expected
    row = next(r for r in sections(runs)["Hessian trace"].parts[0].rows if r[0] == "last fifth")
    assert row[2] == "3" and row[6] == report.percent(Measured(factor - 1, error))


def test_a_smaller_weight_alone_is_not_flatter(runs):
    base = {r["step"]: r for r in map(json.loads, (runs / "E5/seed1077/curvature.jsonl").read_text().splitlines())}

    def change(r):
        samples = base[r["step"]]["curvature/hutch_trace_samples"]
        return r | {"curvature/hutch_trace_samples": [x / 2 for x in samples],
                    "curvature/hutch_trace_unweighted_samples": samples}

    edit(runs, "E6", "curvature.jsonl", change)
    found = verdicts(runs)
    assert (found["trace of the arm's own loss"], found["trace of the unweighted loss"],
            found["curvature: both traces alike"]) == ("better", "neutral", "neutral")


def test_runs_of_different_length_are_compared_at_their_own_ends(runs):
    """Step 60 of 60 against step 40 of 40: finals with finals, last fifth with last fifth, nothing paired by batch."""
    edit(runs, "E5", "config.json", lambda c: c | {"train": c["train"] | {"total_steps": 40}})
    for name in ("loss", "results", "curvature", "per_t"):
        path = runs / "E5" / "seed1077" / f"{name}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [r | {"step": 40} if r.get("kind") == "final" else r for r in records
                if r["step"] <= 40 or r.get("kind") == "final"]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
    influence = runs / "E5" / "seed1077" / "influence"
    (influence / "step_000060_ddpm2_lite0_n30.npz").rename(influence / "step_000040_ddpm2_lite0_n30.npz")
    found = sections(runs, factor=["loss.weighting", "train.total_steps"])
    kinds = [(r[0], r[1]) for r in found["Distance"].parts[0].rows]
    assert kinds == [("milestone", "20")] * 2 + [("milestone", "40")] * 2 + [("final", "60")] * 2
    logged = {exp: [json.loads(line) for line in (runs / exp / "seed1077" / "curvature.jsonl").read_text().splitlines()]
              for exp in ("E5", "E6")}
    means = {exp: np.mean([r["curvature/hutch_trace_mean"] for r in logged[exp] if after < r["step"] <= end])
             for exp, after, end in (("E5", 32, 40), ("E6", 48, 60))}
    row = next(r for r in found["Hessian trace"].parts[0].rows if r[:2] == ["last fifth", "of the arm's own loss"])
    assert row[5].startswith(f"{means['E6'] - means['E5']:.1f}") and row[2] == "3"
    assert "nothing is paired" in found["Training"].parts[1]


def test_what_was_not_measured_is_missing(runs):
    for exp in ("E5", "E6"):
        (runs / exp / "seed1077" / "curvature.jsonl").unlink()
        edit(runs, exp, "results.jsonl", lambda r: {k: v for k, v in r.items() if k != "sampler"})
    assert verdicts(runs) == {"final distance": "missing", "curvature: both traces alike": "missing"}
    assert sections(runs)["Distance"].parts == sections(runs)["Hessian trace"].parts == ["Not measured in both arms."]


def test_a_difference_beside_the_factor_ends_the_comparison_unless_forced(runs):
    edit(runs, "E6", "config.json", lambda c: c | {"train": c["train"] | {"lr": 2e-4}})
    with pytest.raises(RunError, match=r"differ in more than loss.weighting: train.lr \(0.0001, 0.0002\)"):
        sections(runs)
    notes = sections(runs, force=True)["What differs"].parts
    assert "Forced: they also differ in train.lr (0.0001, 0.0002)." in notes
    assert sections(runs, factor=["loss.weighting", "train.lr"])
    with pytest.raises(RunError, match="do not differ in model.dropout"):
        edit(runs, "E6", "config.json", lambda c: json.loads((runs / "E5/seed1077/config.json").read_text()))
        sections(runs, factor=["model.dropout"])


def test_what_is_measured_and_where_files_lie_may_differ(runs):
    edit(runs, "E6", "config.json", lambda c: c | {"data": c["data"] | {"root": "elsewhere"},
                                                   "eval": c["eval"] | {"final_samplers": ["ddpm", "ddim"]}})
    assert [row[0] for row in sections(runs)["What differs"].parts[0].rows] == [
        "`data.root`", "`loss.weighting`", "`eval.final_samplers`"]


def test_another_environment_is_noted(runs):
    edit(runs, "E6", "env.json", lambda env: env | {"torch": "3.0"})
    assert any("torch is" in note and "3.0 for E6" in note for note in sections(runs)["What differs"].parts[1:])


def test_missing_runs_and_seeds_are_named(runs):
    with pytest.raises(RunError, match="no run of E1 in"):
        report.pairs_of(runs, ["E1", "E6"])
    (runs / "E6" / "seed1077").rename(runs / "E6" / "seed5")
    edit_config = json.loads((runs / "E6" / "seed5" / "config.json").read_text()) | {"seed": 5}
    (runs / "E6" / "seed5" / "config.json").write_text(json.dumps(edit_config))
    with pytest.raises(RunError, match=r"E5 has seeds \[1077\], E6 \[5\]: none that both have"):
        report.pairs_of(runs, ["E5", "E6"])


def test_the_numbers_of_a_comparison_of_two_seeds():
    found = sections(RECORDED)
    results = {(exp, seed): [json.loads(line) for line in
                             (RECORDED / exp / f"seed{seed}" / "results.jsonl").read_text().splitlines()]
               for exp in ("E5", "E6") for seed in (1077, 1078)}
    finals = {key: next(r for r in lines if r["kind"] == "final")["val/fd_lite0"] for key, lines in results.items()}
    row = next(r for r in found["Distance"].parts[0].rows if r[0] == "final" and r[4] == "val/fd_lite0")
    assert row[5].startswith(f"{(finals['E5', 1077] + finals['E5', 1078]) / 2:.1f} ± ")
    difference = np.mean([finals["E6", s] - finals["E5", s] for s in (1077, 1078)])
    assert row[7].startswith(f"{difference:.2f} ± ")
    compute = {row[0]: row[1:] for row in found["Compute"].parts[0].rows}
    assert compute["images seen"] == ["240", "240"] and compute["parameters"] == ["6,571", "6,571"]
    assert compute["steps logged"] == ["60 of 60"] * 2
    training = found["Training"].parts[0].rows
    assert [r[:2] for r in training] == [[w, f"`{m}`"] for w in ("first fifth", "last fifth")
                                         for m in ("train/eps_mse_mean", "train/grad_global_L2")]
    kinds = [r[0] for r in found["Distance"].parts[0].rows]
    assert kinds == ["milestone"] * 6 + ["final"] * 2 + ["frontier"] * 8
    assert "at n = 20 floor 197.4, ceiling 824.4; at n = 30 floor 159" in found["Distance"].parts[1]


class Page(HTMLParser):
    """What a page refers to, and whether its tags are closed."""
    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.cells, self.strong = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[key] for key in ("src", "href") if key in attrs]
        self.cells += tag == "td"
        self.strong += [attrs.get("class")] if tag == "strong" else []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_command(tmp_path, capsys):
    assert report.main(["E5", "E6", "--runs", str(RECORDED), "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Min-SNR against vanilla, 10k steps, with curvature (E5, E6)\n\n## Verdict\n")
    markdown = (tmp_path / "a" / "min_snr_10k.md").read_text()
    page = (tmp_path / "a" / "min_snr_10k.html").read_text()
    images = re.findall(r"!\[\w+\]\((\S+)\)", markdown)
    assert len(images) == 7 and all((tmp_path / "a" / name).exists() for name in images)
    parsed = Page(page)
    assert parsed.open == [] and len(parsed.sources) == 7 and parsed.strong == ["neutral"] * 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in parsed.sources)  # no file, no network
    assert 'name="viewport"' in page
    cells = [cell for section in sections(RECORDED).values() for part in section.parts if isinstance(part, report.Table)
             for row in part.rows for cell in row]
    assert parsed.cells == len(cells) and all(f"| {cell} |" in markdown for cell in cells)


def test_what_the_command_refuses(tmp_path, monkeypatch):
    for names, message in [(["min_snr_11k"], "unknown comparison 'min_snr_11k'"), (["E5", "E66"], "unknown experiment"),
                           (["min_snr"], "no run of E1")]:
        with pytest.raises(RunError, match=message):
            report.main([*names, "--runs", str(RECORDED), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- pages ----

def test_every_comparison_differs_in_its_factor_alone():
    from config import load_tables
    for table in load_tables("comparisons", {"title": str, "runs": list, "factor": list}).values():
        a, b = (report.flatten(load_config(exp)) for exp in table["runs"])
        differs = {k for k in a if a[k] != b[k]} - {"exp", "title", "question", *report.HARMLESS}
        assert differs == set(table["factor"])


def test_pages_are_up_to_date_with_experiments_toml():
    for exp in list_experiments():
        if exp != "smoke":
            text = (ROOT / "docs" / "experiments" / f"{exp}.md").read_text(encoding="utf-8")
            assert report.update_page(text, exp) == text, f"{exp}.md is out of date: python report.py --pages"


def test_a_page_keeps_what_is_written_by_hand():
    text = f"# old title\n\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\n\n## Hypothesis\n\nBy \\hand.\n"
    page = report.update_page(text, "E6")
    assert page.startswith("# E6: Min-SNR with curvature probe, 10k steps\n")
    assert page.endswith(f"{report.MARKS[1]}\n\n## Hypothesis\n\nBy \\hand.\n") and "old" not in page
    assert "**Question.**" in page and '| `loss.weighting` | "constant" | "minsnr" |' in page
    assert "    python train.py --exp E6\n" in page and report.update_page(page, "E6") == page
    with pytest.raises(RunError, match="must begin with a title"):
        report.update_page("# E6\n", "E6")
