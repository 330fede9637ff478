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
from fid import FeatureError
from report import Measured, over_seeds, pooled, ratio_of, verdict

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
    assert over_seeds([Measured(1.0, 9.0)]) == "1.0 ± 9.0"
    assert over_seeds([Measured(1.0, 9.0), Measured(2.0, 9.0), Measured(3.0, 9.0)]) == "2.0 ± 1.0"  # mean +- std


def test_the_error_of_a_ratio_counts_that_of_its_baseline():
    """Against the spread of the ratio over many repetitions; the paired error alone would be far off."""
    rng = np.random.default_rng(0)
    one = rng.normal(10, 3, size=(4000, 16))
    two = 0.8 * one + rng.normal(0, 1, size=one.shape)
    ratios = [ratio_of(b, a) for a, b in zip(one, two, strict=True)]
    values = np.array([r.value for r in ratios])
    assert values.mean() == pytest.approx(-0.2, abs=2e-3)
    assert np.mean([r.stderr for r in ratios]) == pytest.approx(values.std(), rel=0.08)
    assert ratio_of([0.8, 1.6], [1.0, 2.0]).stderr == pytest.approx(0, abs=1e-12)


def test_the_error_of_neighbours_does_not_count_a_drift():
    """Against the spread of the mean over many repetitions, of independent values and of values in strata."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2, size=(4000, 16))
    for values, wide in ((noise, 1), (noise + np.linspace(0, 20, 16), 3)):
        spread = values.mean(axis=1).std()
        by_neighbours = np.sqrt(np.mean([report.stderr_by_neighbours(v)**2 for v in values]))
        assert by_neighbours == pytest.approx(spread, rel=0.15)
        assert np.mean([report.mean_of(v).stderr for v in values]) / spread == pytest.approx(wide, rel=0.15)


@pytest.mark.parametrize("value, stderr, text", [
    (941.234, 3.21, "941.2 ± 3.2"), (0.0123456, 0.00021, "0.01235 ± 0.00021"), (12345.6, 250.0, "12,346 ± 250"),
    (-0.01, 1.4, "0.0 ± 1.4"),
    (5.0, None, "5"), (1.0, 0.0, "1"), (12345.6, None, "12,346")])
def test_numbers_show_two_digits_of_their_error(value, stderr, text):
    assert str(Measured(value, stderr)) == text


@pytest.mark.parametrize("value, stderr, expected", [
    (-0.10, 0.02, "better"), (0.10, 0.02, "worse"), (-0.07, 0.01, "better"), (0.07, 0.01, "worse"),
    (-0.069, 0.001, "neutral"), (0.069, 0.001, "neutral"),      # real, but below the criterion
    (-0.30, 0.15, "neutral"), (0.30, 0.2, "neutral"),           # large, but within the noise
    (-0.301, 0.15, "better"), (0.0, 0.0, "neutral"), (-0.5, None, "missing"), (float("nan"), 0.1, "missing"),
    (-0.5, float("nan"), "missing")])
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
    pairs, notes = report.pairs_of(root, ["E5", "E6"])
    found = report.compare(pairs, list(factor), force, notes)
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
    """All probes scaled alike: their ratio is sure, though their own spread is large."""
    base = {r["step"]: r for r in map(json.loads, (runs / "E5/seed1077/curvature.jsonl").read_text().splitlines())}

    def change(r):
        late = r["step"] > 48
        for key in ("hutch_trace", "hutch_trace_unweighted"):
            samples = base[r["step"]][f"curvature/{key}_samples"]
            r[f"curvature/{key}_samples"] = [x * factor if late else 9 * x for x in samples]
        return r

    edit(runs, "E6", "curvature.jsonl", change)
    found = verdicts(runs)
    assert found["trace of the arm's own loss"] == found["trace of the unweighted loss"] == expected
    assert found["curvature: both traces alike"] == expected
    row = next(r for r in sections(runs)["Hessian trace"].parts[0].rows if r[0] == "last fifth")
    assert row[2] == "3" and float(row[6].split()[0]) == pytest.approx(100 * factor - 100)


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
    for name in ("loss", "results", "curvature", "per_t", "timing"):
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
    assert "at step 40 and 60 on" in found["Error at each timestep"].parts[1]


def test_profiles_are_compared_at_the_last_step_of_both(runs):
    base = {r["step"]: r for r in map(json.loads, (runs / "E5/seed1077/per_t.jsonl").read_text().splitlines())}
    last = max(base)

    def change(r):
        factor = 1.5 if r["step"] == last else 9
        return r | {"eps_mse_ema": [x * factor for x in base[r["step"]]["eps_mse_ema"]],
                    "eps_mse_raw": [x / 2 for x in base[r["step"]]["eps_mse_raw"]]}

    edit(runs, "E6", "per_t.jsonl", change)
    section = sections(runs)["Error at each timestep"]
    rows = section.parts[0].rows
    assert [row[0] for row in rows] == [str(t) for t in base[last]["t"]] and f"at step {last}" in section.parts[1]
    assert {(row[3], row[4]) for row in rows} == {("50.0 %", "-50.0 %")}
    assert rows[0][1] == f"{base[last]['eps_mse_ema'][0]:.4g}"
    edit(runs, "E6", "per_t.jsonl", lambda r: r | {"t": [t + 1 for t in r["t"]]})
    assert "Not measured" in sections(runs)["Error at each timestep"].parts[0]
    (runs / "E6/seed1077/per_t.jsonl").write_text("")
    assert "Not measured" in sections(runs)["Error at each timestep"].parts[0]


def test_what_was_not_measured_is_missing(runs):
    for exp in ("E5", "E6"):
        (runs / exp / "seed1077" / "curvature.jsonl").unlink()
        edit(runs, exp, "results.jsonl", lambda r: {k: v for k, v in r.items() if k != "sampler"})
    assert verdicts(runs) == {"final distance": "missing", "curvature: both traces alike": "missing"}
    assert sections(runs)["Distance"].parts == ["Not measured in both arms."]
    assert sections(runs)["Hessian trace"].parts == ["Not measured in both arms at a common step."]


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


def test_seeds_of_one_arm_must_have_one_config(tmp_path):
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    for exp in ("E5", "E6"):
        path = tmp_path / exp / "seed1078" / "config.json"
        path.write_text(path.read_text().replace("0.0001", "0.5"))
    with pytest.raises(RunError, match=r"E5/seed1077 and .*E5/seed1078 differ in train.lr: seeds of one arm must not"):
        sections(tmp_path)


def test_a_log_of_another_interval_is_not_paired(runs):
    """train/eps_mse_mean is a mean over log.every steps: at one step, two intervals hold different batches."""
    edit(runs, "E6", "config.json", lambda c: c | {"log": {"every": 10}})
    with pytest.raises(RunError, match="log.every"):
        sections(runs)


def test_an_unfinished_arm_has_no_verdict(runs):
    edit(runs, "E6", "timing.jsonl", lambda r: r | {"step": r["step"] - 8})
    assert set(verdicts(runs).values()) == {"missing"}
    assert "E6, seed 1077, is not finished: no verdict." in sections(runs)["What differs"].parts


def test_a_seed_that_lacks_something_does_not_take_it_from_the_others(tmp_path):
    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    (tmp_path / "E6" / "seed1078" / "curvature.jsonl").write_text("")
    assert verdicts(tmp_path)["curvature: both traces alike"] == "neutral"
    assert sections(tmp_path)["Hessian trace"].parts[1].endswith("Seeds: 1077.")
    shutil.rmtree(tmp_path / "E6" / "seed1078")
    assert "Left out, as the other arm has no such run: E5, seed 1078." in sections(tmp_path)["What differs"].parts


def test_the_verdict_says_what_it_is_not(runs):
    """Not FID, not of the registered n and NFE, and of one seed."""
    found = sections(runs)["Verdict"].parts
    text = " ".join(part for part in found if isinstance(part, str))
    assert "It is not FID" in text and "This holds for seed 1077, and says nothing of others." in text
    assert [row[4] for row in found[0].rows] == ["no: FID, NFE 50, n = 10,000"] * 2 + [
        "no: every 100 steps, 16 probes"] * 3
    for exp in ("E5", "E6"):
        edit(runs, exp, "config.json", lambda c: c | {"eval": c["eval"] | {"features": "inception"},
                                                      "curvature": {"every": 100, "num_probes": 16}})
        edit(runs, exp, "results.jsonl", lambda r: {k.replace("fd_lite0", "fid").replace("_lite0", ""): v for k, v in (
            r | {"features": "inception"} | ({"nfe": 50, "n": 10_000} if r["kind"] == "final" else {})).items()})
        folder = runs / exp / "seed1077" / "influence"
        for path in [*folder.iterdir()]:
            with np.load(path) as arrays:
                arrays = {k.replace("fd_lite0", "fid").replace("_lite0", ""): v for k, v in arrays.items()}
            path.unlink()
            if "n30" in path.name:
                arrays = {k: np.resize(v, 10_000) for k, v in arrays.items()}
                np.savez(folder / "step_000060_ddpm50_inception_n10000.npz", **arrays)
            else:
                np.savez(folder / path.name.replace("lite0", "inception"), **arrays)
    found = sections(runs)["Verdict"].parts
    assert "not FID" not in " ".join(part for part in found if isinstance(part, str))
    assert [row[4] for row in found[0].rows] == ["yes", "no: FID, NFE 50, n = 10,000"] + ["yes"] * 3
    edit(runs, "E6", "config.json", lambda c: c | {"exp": "E3"})  # an arm of which no trace was asked for
    assert [row[4] for row in sections(runs)["Verdict"].parts[0].rows][2:] == ["no: none was registered"] * 3


def test_a_frontier_of_other_features_than_the_configs(runs):
    for exp in ("E5", "E6"):
        edit(runs, exp, "config.json", lambda c: c | {"eval": c["eval"] | {"features": "none"}})
        edit(runs, exp, "results.jsonl", lambda r: r if r["kind"] == "frontier" else {
            k: v for k, v in r.items() if k != "sampler"})
    rows = sections(runs)["Distance"].parts[0].rows
    assert len(rows) == 8 and {row[0] for row in rows} == {"frontier"}
    assert verdicts(runs)["final distance"] == "missing"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None])
def test_a_damaged_influence_file_is_named(runs, content):
    path = runs / "E6" / "seed1077" / "influence" / "step_000060_ddpm2_lite0_n30.npz"
    if content is None:
        np.savez(path, other=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises((RunError, FeatureError), match=r"E6/seed1077/influence/step_000060_ddpm2_lite0_n30\.npz"):
        sections(runs)


def test_another_environment_is_noted(runs):
    edit(runs, "E6", "env.json", lambda env: env | {"torch": "3.0"})
    assert any("torch is" in note and "3.0 for E6" in note for note in sections(runs)["What differs"].parts[1:])


def test_missing_runs_and_seeds_are_named(runs):
    with pytest.raises(RunError, match="no run of E1 in"):
        report.pairs_of(runs, ["E1", "E6"])
    (runs / "E6" / "seed1077").rename(runs / "E6" / "seed5")
    edit_config = json.loads((runs / "E6" / "seed5" / "config.json").read_text()) | {"seed": 5}
    (runs / "E6" / "seed5" / "config.json").write_text(json.dumps(edit_config))
    with pytest.raises(RunError, match="no such folder of runs"):
        report.pairs_of(runs / "typo", ["E5", "E6"])
    with pytest.raises(RunError, match=r"E5 has seeds \[1077\], E6 \[5\]: none that both have"):
        report.pairs_of(runs, ["E5", "E6"])


def test_the_numbers_of_a_comparison_of_two_seeds():
    found = sections(RECORDED)
    results = {(exp, seed): [json.loads(line) for line in
                             (RECORDED / exp / f"seed{seed}" / "results.jsonl").read_text().splitlines()]
               for exp in ("E5", "E6") for seed in (1077, 1078)}
    finals = {key: next(r for r in lines if r["kind"] == "final")["val/fd_lite0"] for key, lines in results.items()}
    row = next(r for r in found["Distance"].parts[0].rows if r[0] == "final" and r[5] == "val/fd_lite0")
    assert row[4] == "1077, 1078"
    e5 = [finals["E5", seed] for seed in (1077, 1078)]
    assert row[6] == f"{np.mean(e5):.0f} ± {np.std(e5, ddof=1):.0f}"
    difference = np.mean([finals["E6", s] - finals["E5", s] for s in (1077, 1078)])
    assert row[8].startswith(f"{difference:.2f} ± ")
    compute = {row[0]: row[1:] for row in found["Compute"].parts[0].rows}
    assert compute["images seen"] == ["240", "240"] and compute["parameters"] == ["6,571", "6,571"]
    assert compute["steps logged"] == ["60 of 60"] * 2
    training = found["Training"].parts[0].rows
    assert [r[:2] for r in training] == [[w, f"`{m}`"] for w in ("first fifth", "last fifth")
                                         for m in ("train/eps_mse_mean", "train/grad_global_L2")]
    kinds = [r[0] for r in found["Distance"].parts[0].rows]
    assert kinds == ["milestone"] * 6 + ["final"] * 2 + ["frontier"] * 8
    assert ("at n = 20 val/fd_lite0 has floor 197.4 (test images 193.4) and ceiling 824.4, val/kid_lite0 -0.024 and "
            "1.497; at n = 30 val/fd_lite0 has floor 159 (") in found["Distance"].parts[1]


def test_each_seed_alone(runs):
    alone, together = sections(runs), sections(RECORDED)
    assert "Seed by seed" not in alone
    table = together["Seed by seed"].parts[0]
    assert table.header[1:] == ["1077", "1078"] and all(a != b for _, a, b in table.rows)
    assert [[measure, change] for measure, change, _ in table.rows] == [
        row[1:3] for row in alone["Verdict"].parts[0].rows[:-1]]


def test_a_distance_says_which_seeds_have_it(tmp_path):
    shutil.copytree(RECORDED, tmp_path / "runs")
    path = tmp_path / "runs" / "E6" / "seed1078" / "results.jsonl"
    path.write_text("".join(text for text in path.open() if json.loads(text)["kind"] != "milestone"))
    rows = sections(tmp_path / "runs")["Distance"].parts[0].rows
    assert {(r[0], r[4]) for r in rows} == {("milestone", "1077"), ("final", "1077, 1078"), ("frontier", "1077, 1078")}


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
    assert parsed.open == [] and len(parsed.sources) == 7 and parsed.strong == [
        "neutral", "neutral", "better", "neutral", "neutral"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in parsed.sources)  # no file, no network
    assert 'name="viewport"' in page
    cells = [cell for section in sections(RECORDED).values() for part in section.parts if isinstance(part, report.Table)
             for row in part.rows for cell in row]
    assert parsed.cells == len(cells) and all(f"| {cell} |" in markdown for cell in cells)


def test_what_the_command_refuses(tmp_path, monkeypatch):
    (tmp_path / "lacking").mkdir()
    shutil.copytree(RECORDED, tmp_path / "lacking", dirs_exist_ok=True)
    path = tmp_path / "lacking" / "E6" / "seed1077" / "curvature.jsonl"
    path.write_text(path.read_text().replace("hutch_trace_samples", "samples"))
    with pytest.raises(RunError, match="lacks 'curvature/hutch_trace_samples': of another version"):
        report.main(["E5", "E6", "--runs", str(tmp_path / "lacking"), "--out", str(tmp_path / "out")])
    for names, message in [(["min_snr_11k"], "unknown comparison 'min_snr_11k'"), (["E5", "E66"], "unknown experiment"),
                           (["min_snr"], "no run of E1")]:
        with pytest.raises(RunError, match=message):
            report.main([*names, "--runs", str(RECORDED), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- pages ----

def test_every_comparison_differs_in_its_factor_alone():
    from config import load_tables
    for table in load_tables("comparisons").values():
        a, b = (report.flatten(load_config(exp)) for exp in table["runs"])
        differs = {k for k in a if a[k] != b[k]} - {"exp", "title", "question", *report.HARMLESS}
        assert differs == set(table["factor"])


def test_pages_are_up_to_date_with_experiments_toml():
    for exp in list_experiments():
        if exp != "smoke":
            text = (ROOT / "docs" / "experiments" / f"{exp}.md").read_text(encoding="utf-8")
            assert report.update_page(text, exp) == text, f"{exp}.md is out of date: python report.py --pages"


def test_the_table_of_results():
    table = report.results_table(RECORDED)
    rows = {row[0]: row[1:] for row in table.rows}
    finals = [json.loads(line) for seed in (1077, 1078)
              for line in (RECORDED / f"E5/seed{seed}/results.jsonl").read_text().splitlines()]
    one, two = (r["val/fd_lite0"] for r in finals if r["kind"] == "final")
    assert rows["[E5](docs/experiments/E5.md)"][:6] == ["constant", "4, 60", "1077, 1078", "lite0", "DDPM 2", "30"]
    mean, std = map(float, rows["[E5](docs/experiments/E5.md)"][6].split(" ± "))
    assert mean == pytest.approx((one + two) / 2, abs=1) and std == pytest.approx(abs(one - two) / 2**0.5, rel=0.1)
    assert rows["[E6](docs/experiments/E6.md)"][0] == "minsnr, 5"
    floor, ceiling = (float(rows[text][6]) for text in ("floor: training images", "ceiling: uniform noise"))
    assert floor < mean < ceiling and rows["floor: training images"][7] == ""


def test_an_unfinished_run_is_no_result(runs):
    edit(runs, "E6", "timing.jsonl", lambda r: r | {"step": min(r["step"], 58)})
    assert [row[0].split("]")[0] for row in report.results_table(runs).rows if row[1]] == ["[E5"]


def test_the_readme_has_the_results_that_the_logs_give():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.update_readme(text) == text, "README.md is out of date: python report.py --pages"
    assert report.update_readme(text, RECORDED) != text
    with pytest.raises(RunError, match=r"README.md: needs the lines <!-- generated"):
        report.update_readme("# no block\n")


def test_the_reports_are_those_that_the_logs_give():
    """Of the comparisons kept under docs/experiments/results/reports, but for the figures."""
    kept = sorted((report.KEPT / "reports").glob("*/*.md"))
    assert len(kept) >= 1
    for path in kept:
        name, title, exps, factor = report.resolve(report.parse_args(path.stem.split("_") if path.stem[0] == "E"
                                                                     else [path.stem]))
        pairs, notes = report.pairs_of(report.KEPT, exps)
        text = report.to_markdown(title, report.compare(pairs, factor, False, notes), {})
        command = f"python report.py {name} --runs docs/experiments/results"
        assert path.read_text(encoding="utf-8").startswith(text.rstrip()), f"{path} is out of date: {command}"


def test_a_page_keeps_what_is_written_by_hand():
    text = f"# old title\n\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\n\n## Hypothesis\n\nBy \\hand.\n"
    page = report.update_page(text, "E6")
    assert page.startswith("# E6: Min-SNR with curvature probe, 10k steps\n")
    assert page.endswith(f"{report.MARKS[1]}\n\n## Hypothesis\n\nBy \\hand.\n") and "old" not in page
    assert "**Question.**" in page and '| `loss.weighting` | "constant" | "minsnr" |' in page
    assert "    python train.py --exp E6\n" in page and report.update_page(page, "E6") == page
    for broken in ("# E6\n", page.replace("# E6", "E6", 1), page + "\n" + page):
        with pytest.raises(RunError, match="needs the lines"):
            report.update_page(broken, "E6")
