"""The registered rule on closed forms, and reports of run directories that hold known numbers."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import SMALLEST
from scipy import stats

import report
from config import flatten, load_config, load_tables
from errors import UserError
from report import DISTANCE, TRACE, Decision, Measured, decide, holm, over_seeds
from runs import Run

T95 = {2: 12.7062, 3: 4.30265, 4: 3.18245, 6: 2.57058}  # t table: 97.5 % quantile for k seeds
T90 = {2: 6.31375, 3: 2.91999, 4: 2.35336, 6: 2.01505}


# ---- the rule ----

def spread(mean, half, k=3, quantile=T95):
    """k values with this mean, and a t-interval of mean +- half at the level of the quantile."""
    x = np.arange(k) - (k - 1) / 2
    return list(mean + x / x.std(ddof=1) * half * math.sqrt(k) / quantile[k])


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_interval_and_p_are_those_of_students_t(k):
    y = [0.05, 0.01, 0.11, -0.02, 0.07, 0.03][:k]
    d, sd = decide(y, DISTANCE), np.std(y, ddof=1)
    assert d.mean == pytest.approx(sum(y) / k)
    assert d.interval == pytest.approx((d.mean - T95[k] * sd / k**0.5, d.mean + T95[k] * sd / k**0.5), rel=1e-4)
    assert d.p == pytest.approx(stats.ttest_1samp(y, 0).pvalue)


B, W = math.log(0.93), math.log(1.07)


@pytest.mark.parametrize("y, word", [
    (spread(-0.10, 0.09), "better"), (spread(0.10, 0.09), "worse"),
    (spread(-0.10, 0.11), "undecided"), (spread(0.10, 0.11), "undecided"),          # the interval holds 0
    (spread(B - 1e-6, 0.01), "better"), (spread(B + 1e-6, 0.01), "undecided, lower"),  # the mean at its limit
    (spread(W + 1e-6, 0.01), "worse"), (spread(W - 1e-6, 0.01), "undecided, higher"),
    (spread(0.0, W - 1e-6, quantile=T90), "neutral"), (spread(0.0, W + 1e-4, quantile=T90), "undecided"),
    (spread(0.03, W - 0.0301, quantile=T90), "neutral"), (spread(0.03, W - 0.0299, quantile=T90), "undecided"),
    (spread(-0.03, -0.0301 - B, quantile=T90), "neutral"), (spread(-0.03, -0.0299 - B, quantile=T90), "undecided"),
    (spread(0.04, 0.01), "neutral"),                                  # surely higher, and surely by less than 7 %
    (spread(0.06, 0.05), "undecided, higher"), (spread(-0.06, 0.05), "undecided, lower"),
    ([0.0, 0.0, 0.0], "neutral"), ([-0.5], "undecided (one seed)"), ([], "not measured"),
    ([-0.5, math.nan, -0.5], "undecided")])
def test_words(y, word):
    assert decide(y, DISTANCE).word == word


def test_the_limits_are_the_registered_ones():
    assert DISTANCE == (0.93, 1.07) and pytest.approx((0.90, 1 / 0.90)) == TRACE
    y = spread(math.log(1.09), 0.001)
    assert (decide(y, DISTANCE).word, decide(y, TRACE).word) == ("worse", "neutral")


@pytest.mark.parametrize("p, adjusted", [
    ((0.01, 0.04), (0.02, 0.04)), ((0.04, 0.01), (0.04, 0.02)), ((0.03, 0.04), (0.06, 0.06)),
    ((0.024, 0.9), (0.048, 0.9)), ((0.026, 1.0), (0.052, 1.0)), ((0.7, 0.8), (1.0, 1.0))])
def test_holm(p, adjusted):
    pair = holm([Decision(-1, (-2, -0.5), p[0], "better"), Decision(1, (0.5, 2), p[1], "worse")])
    assert [d.p for d in pair] == pytest.approx(adjusted)
    assert [d.word for d in pair] == [word if each < 0.05 else f"undecided, {sign}" for word, sign, each in zip(
        ("better", "worse"), ("lower", "higher"), adjusted, strict=True)]


def test_over_seeds():
    assert over_seeds([Measured(3.0, 0.5)]) == Measured(3.0, 0.5) and over_seeds([Measured(3.0)]) == Measured(3.0, None)
    seeds = over_seeds([Measured(x, 0.01) for x in (1.0, 2.0, 3.0)])
    assert seeds.value == 2 and seeds.half == pytest.approx(T95[3] / 3**0.5, rel=1e-4)
    assert over_seeds([Measured(2.0, 3.0), Measured(2.0, 4.0)]) == Measured(2.0, 2.5)  # seeds that agree by chance
    assert over_seeds([Measured(2.0, 3.0), Measured(2.0, None)]) == Measured(2.0, 1.5)


@pytest.mark.parametrize("value, half, sign, text", [
    (941.234, 3.21, "", "941.2 ± 3.2"), (0.01234, 0.0002, "", "0.01234 ± 0.00020"), (12345.6, 250, "", "12,346 ± 250"),
    (-0.01, 1.4, "", "0.0 ± 1.4"), (4, 0.9, "+", "+4.00 ± 0.90"), (5, None, "", "5"), (12345.6, None, "", "12,346"),
    (1.5, math.inf, "", "1.5"), (0.2, 1e-17, "", "0.2")])
def test_numbers_show_two_digits_of_their_interval(value, half, sign, text):
    assert format(Measured(value, half), sign) == text


# ---- run directories with known numbers ----

STEPS, N = 100, 40


def make_run(root, exp, seed, fd=100.0, trace=200.0, sets=(), features="lite0", n=N, env=None, done=True):
    """A finished run: final DDPM and DDIM distances of `fd` and 2 `fd`, KID of `fd` / 100, last traces, eps-MSE."""
    config = dataclasses.replace(load_config(exp, overrides=[
        *SMALLEST, f"seed={seed}", f"train.total_steps={STEPS}", f"eval.features={features}", *sets]))
    path = root / exp / f"seed{seed}"
    (path / "influence").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (path / "env.json").write_text(json.dumps({"git_commit": "abc", "torch": "2", "device": "cpu", "threads": 1} | (
        env or {})))
    fid, kid = ("val/fid", "val/kid") if features == "inception" else (f"val/fd_{features}", f"val/kid_{features}")
    pulls = np.random.default_rng(seed).normal(size=n)
    results, total = [], config.train.total_steps
    for kind, sampler, value in (("milestone", "ddpm", 3 * fd), ("final", "ddpm", fd), ("final", "ddim", 2 * fd)):
        count, step = (n // 2, total // 2) if kind == "milestone" else (n, total)
        results.append({"step": step, "kind": kind, "sampler": sampler, "nfe": 50, "n": count, "features": features,
                        "reference": "shapes train", "precision": "fp32", fid: value, f"{fid}_stderr": 1.5,
                        f"{fid}_floor": 7.5, f"{fid}_floor_test": 8.25, f"{fid}_ceiling": 912.0, kid: value / 100,
                        f"{kid}_stderr": 0.01,
                        f"{kid}_floor": None, f"{kid}_floor_test": 0.003, f"{kid}_ceiling": 1.625})
        np.savez(path / "influence" / f"step_{step:06d}_{sampler}50_{features}_n{count}.npz",
                 **{fid: value / 50 * pulls[:count], kid: value / 5000 * pulls[:count]})
    steps = [total * i // 10 for i in range(1, 11)]
    logs = {"results": results,
            "loss": [{"step": s, "train/eps_mse_mean": 0.2 if s > 0.8 * total else 9.0,
                      "train/grad_global_L2": fd / 100 if s > 0.8 * total else 9.0} for s in steps],
            "curvature": [{"step": s, "num_probes": 2, "batch_size": 4,
                           "curvature/hutch_trace_mean": trace / 2 + (s < total),
                           "curvature/hutch_trace_stderr": 1.0, "curvature/hutch_trace_unweighted_stderr": 1.0,
                           "curvature/hutch_trace_unweighted_mean": trace * (
                               1 if s == total else 9 if s <= 0.8 * total else 3)} for s in steps],
            "per_t": [{"step": s, "n": 8, "t": [0, 500], "eps_mse_ema": [fd / 10 * (1 if s == total else 7), 0.5],
                       "eps_mse_raw": [0.25, fd / 50]} for s in (total // 2, total)],
            "timing": [{"step": s, "seconds/train": 1.5, "seconds/measure": 9.0} for s in steps]}
    for name, lines in logs.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (path / "done.json").write_text("{}")
    return path


def make_arms(root, ratios, traces=None, **more):
    """E5 and E6 at a seed for each ratio E6 / E5 of the distance (and of the trace)."""
    for i, (ratio, of_trace) in enumerate(zip(ratios, traces or [1.0] * len(ratios), strict=True)):
        make_run(root, "E5", 1077 + i, **more)
        make_run(root, "E6", 1077 + i, 100 * ratio, 200 * of_trace, **more)
    return root


def edit(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def read(root, factor=("loss.weighting",), force=False, exps=("E5", "E6")):
    return report.compare(*report.paired(root, list(exps), list(factor), force))


def section(text, title):
    (found,) = [part for part in re.split(r"^## ", text, flags=re.M) if part.startswith(title)]
    return found


def rows(text, title):
    """The cells of a section's first table, by their first cell; the header under ''."""
    lines = [line for line in section(text, title).split("\n\n")[1].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {"": cells[0]} | {row[0]: row[1:] for row in cells[2:]}


def verdicts(text):
    """[(word, other cells)] of the distance and of the trace."""
    return [(row[0].strip("*"), row[1:]) for row in (
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section(text, "Verdict").splitlines() if line.startswith("| **"))]


def numbers(text):
    return [float(x.replace(",", "")) for x in re.findall(r"[-+]?\d[\d,]*(?:\.\d+)?", text)]


def test_the_verdict_of_three_seeds(tmp_path):
    ratios, traces = [0.80, 0.82, 0.81], [1.04, 1.05, 1.06]
    (word, cells), (word_of_trace, cells_of_trace) = verdicts(text := read(make_arms(tmp_path, ratios, traces)))
    y = np.log(ratios)
    low, high = (100 * math.expm1(y.mean() + sign * T95[3] * y.std(ddof=1) / 3**0.5) for sign in (-1, 1))
    p = stats.ttest_1samp(y, 0).pvalue, stats.ttest_1samp(np.log(traces), 0).pvalue
    assert word == "better" and cells[1] == "3"
    assert numbers(cells[2]) == [pytest.approx(100 * math.expm1(y.mean()), abs=0.06)]
    assert numbers(cells[3]) == [pytest.approx(low, abs=0.06), pytest.approx(high, abs=0.06)]
    assert [float(c[4]) for c in (cells, cells_of_trace)] == [
        pytest.approx(2 * min(p), rel=0.05), pytest.approx(max(2 * min(p), *p), rel=0.05)]
    assert (word_of_trace, cells[5], cells_of_trace[5]) == ("neutral", "not refuted", "refuted")
    assert text.startswith("## Verdict\n") and "val/fd_lite0" in cells[0] and f"n = {N}" in cells[0]


def test_holm_reaches_the_verdict(tmp_path):
    """p = 0.034 for either measure: better by itself, not as one of two."""
    y = spread(-0.3, 0.24)
    assert decide(y, DISTANCE).word == "better" and 0.025 < decide(y, DISTANCE).p < 0.05
    found = verdicts(read(make_arms(tmp_path, np.exp(y).tolist(), np.exp(y).tolist())))
    assert [word for word, _ in found] == ["undecided, lower"] * 2


def test_a_gain_is_refuted_by_the_interval_not_by_the_mean(tmp_path):
    for half, gain in ((0.05, "not refuted"), (0.035, "refuted")):  # mean -3 %, limit -7 %
        y = spread(-0.03, half)
        assert verdicts(read(make_arms(tmp_path / gain, np.exp(y).tolist())))[0][1][5] == gain


def test_runs_of_different_length_are_compared_at_their_own_ends(tmp_path):
    make_run(tmp_path, "E5", 1077, sets=["train.total_steps=50"])
    make_run(tmp_path, "E6", 1077, 125, 150)
    text = read(tmp_path, ["loss.weighting", "train.total_steps"])
    assert rows(text, "Distances")[f"final, step 100, DDPM 50, n = {N}: val/fd_lite0"][4].startswith("+25.00 ± ")
    assert rows(text, "Hessian traces")["Hessian trace of the unweighted loss, last step, 2 probes"][4] == "-25 %"


def test_only_the_registered_measures_get_a_word(tmp_path):
    """DDIM, KID, milestones and the own loss's trace all halve; what is registered does not change."""
    make_arms(tmp_path, [1.0, 1.0, 1.0])
    for seed in (1077, 1078, 1079):
        folder = tmp_path / "E6" / f"seed{seed}"
        edit(folder / "results.jsonl", lambda r: r | {"val/kid_lite0": r["val/kid_lite0"] / 2} | (
            {} if (r["kind"], r["sampler"]) == ("final", "ddpm") else {"val/fd_lite0": r["val/fd_lite0"] / 2}))
        edit(folder / "curvature.jsonl", lambda r: r | {"curvature/hutch_trace_mean": 1.0} | (
            {} if r["step"] == STEPS else {"curvature/hutch_trace_unweighted_mean": 1.0}))
    text = read(tmp_path)
    assert [word for word, _ in verdicts(text)] == ["neutral", "neutral"]
    assert not re.search("better|worse|neutral|undecided", text.split("\n## ", 2)[2])


def test_what_is_not_the_registered_distance_is_said(tmp_path):
    for name, features, n, said in (("a", "inception", 10_000, True), ("b", "lite0", 40, True),
                                    ("c", "lite0", 10_000, False)):
        text = section(read(make_arms(tmp_path / name, [1.0], features=features, n=n)), "Verdict")
        before, found, after = text.partition("The registered measure")
        assert bool(found) == said
        assert not said or (f"n = {n:,}" in before and "val/fd_lite0" in after)


def test_the_largest_n_is_the_registered_distance(tmp_path):
    make_arms(tmp_path, [0.5, 0.5])
    for exp in ("E5", "E6"):
        for seed in (1077, 1078):
            path = tmp_path / exp / f"seed{seed}"
            lines = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
            small = lines[1] | {"n": 20, "val/fd_lite0": 100.0}
            (path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*lines, small]))
            np.savez(path / "influence" / "step_000100_ddpm50_lite0_n20.npz", **{
                "val/fd_lite0": np.arange(20.0), "val/kid_lite0": np.arange(20.0)})
    _, cells = verdicts(read(tmp_path))[0]
    assert f"n = {N}" in cells[0] and cells[2] == "-50.0 %"


@pytest.mark.parametrize("change, name", [({"sampler": "ddim", "nfe": 20}, "ddim20"), ({"nfe": 20}, "ddpm20")])
def test_without_the_registered_distance_nothing_takes_its_place(tmp_path, change, name):
    make_arms(tmp_path, [0.5, 0.6])
    for path in tmp_path.glob("*/*/results.jsonl"):
        edit(path, lambda r: r | change if r["sampler"] == "ddpm" else r)
        for old in path.parent.glob("influence/*ddpm50*"):
            old.rename(old.with_name(old.name.replace("ddpm50", name)))
    (word, cells), _ = verdicts(read(tmp_path))
    assert word == "not measured" and cells[1:] == ["0", "", "", "", ""]


def test_an_unfinished_run_ends_the_verdict(tmp_path):
    make_arms(tmp_path, [0.8, 0.81])
    (tmp_path / "E6" / "seed1078" / "done.json").unlink()
    text = read(tmp_path)
    assert all(word.startswith("no verdict") and cells[-1] == "" for word, cells in verdicts(text))
    assert "Seed 1078: E6 is not finished." in text


def test_arms_of_one_weighting_get_no_verdict(tmp_path):
    for seed in (1077, 1078):
        make_run(tmp_path, "E8c", seed)
        make_run(tmp_path, "E8a", seed, 50)
    text = read(tmp_path, ["loss.gamma"], exps=("E8c", "E8a"))
    assert [word for word, _ in verdicts(text)] == ["no verdict: same loss.weighting"] * 2
    assert "better" not in section(text, "Seed by seed")


# ---- the other sections ----

def test_distances_are_relative_to_the_baseline(tmp_path):
    """125 against 100 is 25 % more; relative to the arm it would be 20 %. The error is that of paired samples."""
    text = read(make_arms(tmp_path, [1.25]))
    name = f"final, step 100, DDPM 50, n = {N}: val/fd_lite0"
    found = rows(text, "Distances")
    assert found[""] == ["measure", "seeds", "E5", "E6", "difference", "change"]
    pulls = np.random.default_rng(1077).normal(size=N).astype(np.float32)
    half = 1.96 * (0.5 * pulls).std(ddof=1) / N**0.5
    seeds, one, two, difference, change = found[name]
    assert (seeds, one, two) == ("1", "100.0 ± 2.9", "125.0 ± 2.9")
    assert numbers(difference) == [25, pytest.approx(half, abs=0.006)] and numbers(change) == numbers(difference)
    assert change.startswith("+25.00 ± ") and [*found][1:] == [
        f"{point}: {metric}" for point in (f"milestone, step 50, DDPM 50, n = {N // 2}", name[:-14],
                                           f"final, step 100, DDIM 50, n = {N}")
        for metric in ("val/fd_lite0", "val/kid_lite0")]


def test_distances_have_their_context(tmp_path):
    lines = section(read(make_arms(tmp_path, [1.0])), "Distances").splitlines()
    (fd,) = [line for line in lines if line.startswith(f"val/fd_lite0 at n = {N}:")]
    (kid,) = [line for line in lines if line.startswith(f"val/kid_lite0 at n = {N}:")]
    assert numbers(fd.split(":")[1]) == [7.5, 8.25, 912] and numbers(kid.split(":")[1]) == [0.003, 1.625]


def test_numbers_over_seeds_are_t_intervals(tmp_path):
    text = read(make_arms(tmp_path, [1.1, 1.2, 1.6]))
    *_, change = rows(text, "Distances")[f"final, step 100, DDIM 50, n = {N}: val/fd_lite0"]
    assert numbers(change) == [pytest.approx(30), pytest.approx(T95[3] * np.std([10, 20, 60], ddof=1) / 3**0.5, abs=1)]
    alone = rows(text, "Seed by seed")
    assert alone[""] == ["change", "1077", "1078", "1079"]
    assert [numbers(cell)[0] for cell in alone[f"final, step 100, DDPM 50, n = {N}: val/fd_lite0"]] == [10, 20, 60]


def test_traces_training_and_profile(tmp_path):
    text = read(make_arms(tmp_path, [1.5], [0.75]))
    traces = {name: [numbers(cell) for cell in row[1:]] for name, row in rows(text, "Hessian traces").items() if name}
    assert traces == {
        "Hessian trace of the unweighted loss, last fifth": [[400], [300], [-100], [-25]],
        "Hessian trace of the unweighted loss, last step, 2 probes": [[200], [150], [-50], [-25]],
        "Hessian trace of the arm's own loss, last fifth": [[100.5], [75.5], [-25], [pytest.approx(-24.88)]],
        "Hessian trace of the arm's own loss, last step, 2 probes": [[100], [75], [-25], [-25]]}
    assert {name: cells for name, cells in rows(text, "Training").items() if name} == {
        "eps_mse_mean": ["1", "0.2", "0.2", "0", "+0 %"], "grad_global_L2": ["1", "1", "1.5", "0.5", "+50 %"]}
    profile = rows(text, "Held-out eps-MSE")
    assert profile["0, ema"] == ["1", "10", "15", "5", "+50 %"] and profile["500, ema"][4] == "+0 %"
    assert profile["0, raw"][4] == "+0 %" and profile["500, raw"][1:] == ["2", "3", "1", "+50 %"]


def test_the_registered_trace_has_the_most_probes_that_all_seeds_have(tmp_path):
    make_arms(tmp_path, [1.0, 1.0, 1.0], [0.75, 0.75, 0.75])

    def with_many_probes(exp, seed, step, trace):
        line = {"step": step, "num_probes": 256, "curvature/hutch_trace_mean": trace / 2,
                "curvature/hutch_trace_unweighted_mean": trace}
        with open(tmp_path / exp / f"seed{seed}" / "traces.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    for seed in (1077, 1078):
        for exp, trace in (("E5", 100.0), ("E6", 120.0)):
            with_many_probes(exp, seed, STEPS, trace)
            with_many_probes(exp, seed, STEPS // 2, 5.0)  # not the last step
    with_many_probes("E5", 1079, STEPS, 100.0)  # in one arm only
    name, seeds, change, *_ = verdicts(read(tmp_path))[1][1]
    assert name.endswith("last step, 2 probes") and (seeds, change) == ("3", "-25.0 %")
    with_many_probes("E6", 1079, STEPS, 120.0)
    name, seeds, change, *_ = verdicts(text := read(tmp_path))[1][1]
    assert name.endswith("last step, 256 probes") and (seeds, change) == ("3", "+20.0 %")
    assert rows(text, "Hessian traces")["Hessian trace of the arm's own loss, last step, 256 probes"][1] == "50"


def test_distances_in_two_precisions_are_two_measures(tmp_path):
    make_arms(tmp_path, [0.9, 0.9])
    for path in tmp_path.glob("E?/seed*"):
        lines = [r | {"precision": precision} for r in Run(path).log("results") for precision in ("fp32", "bf16")]
        (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file in (path / "influence").iterdir():
            shutil.copy(file, file.with_name(f"{file.stem}_bf16.npz"))
    found = rows(read(tmp_path), "Distances")
    assert found.pop("")[1] == "seeds" and {cells[0] for cells in found.values()} == {"2"}
    assert sum("bf16" in name for name in found) == len(found) / 2 == 6


def test_compute(tmp_path):
    found = rows(read(make_arms(tmp_path, [1.0, 1.0])), "Compute")
    assert found["images seen"][1] == found["images seen"][2] == "400" and found["seconds of training"][1] == "15"
    assert found["parameters"][1] == found["parameters"][2] == "6,571"


def test_a_seed_that_lacks_a_log_does_not_take_it_from_the_others(tmp_path):
    make_arms(tmp_path, [0.8, 0.8])
    (tmp_path / "E6" / "seed1078" / "curvature.jsonl").write_text("")
    (tmp_path / "E5" / "seed1078" / "timing.jsonl").unlink()
    text = read(tmp_path)
    assert verdicts(text)[0][1][1] == "2" and verdicts(text)[1] == ("undecided (one seed)", [
        "Hessian trace of the unweighted loss, last step, 2 probes", "1", "", "", "", ""])
    assert rows(text, "Compute")["seconds of training"][0] == "1"


def test_runs_that_differ_in_more_are_refused_unless_forced(tmp_path):
    make_run(tmp_path, "E5", 1077)
    make_run(tmp_path, "E6", 1077, sets=["train.lr=2e-4"])
    with pytest.raises(UserError, match=r"E5.seed1077.*E6.seed1077.*train\.lr.*0\.0001.*0\.0002"):
        read(tmp_path)
    assert "train.lr (0.0001, 0.0002)" in section(read(tmp_path, force=True), "What differs")
    assert rows(read(tmp_path, ["loss.weighting", "train.lr"]), "What differs")["train.lr"] == ["0.0001", "0.0002"]
    with pytest.raises(UserError, match=r"model\.dropout"):
        read(tmp_path, ["model.dropout"])


def test_what_is_measured_may_differ(tmp_path):
    make_run(tmp_path, "E5", 1077)
    make_run(tmp_path, "E6", 1077, sets=["log.every=7", "eval.every=50", "curvature.num_probes=3", "data.root=there"])
    assert {*rows(read(tmp_path), "What differs")} == {
        "", "loss.weighting", "log.every", "eval.every", "curvature.num_probes", "data.root"}


def test_seeds_of_one_arm_have_one_config(tmp_path):
    for exp in ("E5", "E6"):
        make_run(tmp_path, exp, 1077)
        make_run(tmp_path, exp, 1078, sets=["train.lr=0.5"])
    with pytest.raises(UserError, match=r"E5.seed1077.*E5.seed1078.*train\.lr"):
        read(tmp_path, force=True)


def test_notes(tmp_path):
    make_run(tmp_path, "E5", 1077)
    make_run(tmp_path, "E5", 1078)
    make_run(tmp_path, "E6", 1077, env={"torch": "3.1", "threads": 4})
    text = section(read(tmp_path), "What differs")
    assert "Seed 1077: torch is 2 in E5 and 3.1 in E6." in text and "threads is 1 in E5 and 4 in E6" in text
    assert "git_commit" not in text and "Seed 1078 is left out" in text


def test_files_cannot_forge_the_report(tmp_path):
    make_run(tmp_path, "E5", 1077)
    path = make_run(tmp_path, "E6", 1077, env={"device": "x\n## Verdict\n| **better** | <script>"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"title": "E6 |\n# <b>"}))
    edit(path.parents[1] / "E5/seed1077/results.jsonl", lambda r: r | {"reference": "<i>"})
    text = read(tmp_path)
    assert "<" not in text and [line for line in text.splitlines() if line.startswith("#")] == [
        f"## {title}" for title in ("Verdict", "Seed by seed", "What differs", "Compute", "Distances", "Hessian traces",
                                    "Training, last fifth", "Held-out eps-MSE at each t, last step")]
    tables = re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


# ---- the command ----

def test_the_command(tmp_path, capsys):
    make_arms(tmp_path / "runs", [0.8, 0.81])
    assert report.main(["min_snr_10k", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    text, out = (tmp_path / "out" / "min_snr_10k.md").read_text(), capsys.readouterr().out
    assert text in out and text.startswith(f"# {load_tables('comparisons')['min_snr_10k']['title']}: E6 against E5\n")
    drawn = re.findall(r"!\[(\w+)\]\((\S+)\)", text)
    assert {kind for kind, _ in drawn} == {"distance_and_loss_vs_steps", "curvature_vs_steps", "per_t", "grad_norm"}
    assert all((tmp_path / "out" / name).exists() for _, name in drawn)
    assert "frontier is left out" in out and "grids is left out" in out


def test_what_the_command_refuses(tmp_path):
    make_arms(tmp_path, [0.8])
    (tmp_path / "E6/seed1077/loss.jsonl").write_text('{"step": 100}\n')
    for names, fact in ((["min_snr_11k"], "min_snr_10k"), (["E5", "E6", "E1"], "E5 E6 E1"), (["E5", "E66"], "E66"),
                        (["E1", "E2"], "E1"), (["E5", "E6"], "train/eps_mse_mean")):
        with pytest.raises(UserError, match=fact):
            report.main([*names, "--runs", str(tmp_path)])
    assert not (tmp_path / "reports").exists()


def test_every_comparison_differs_in_its_factor_alone():
    for table in load_tables("comparisons").values():
        a, b = (flatten(load_config(exp)) for exp in table["runs"])
        differs = {key for key in a if a[key] != b[key]} - {"exp", "title", "question"}
        assert {key for key in differs if not key.startswith(report.HARMLESS)} == set(table["factor"])
