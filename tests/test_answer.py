"""The answer's figure and table, from run directories that hold known numbers."""

import json

import numpy as np
import pytest
from test_report import STEPS, edit, make_run

import answer
from errors import UserError
from runs import Run, influence_path

STEP = STEPS // 2  # the milestone of make_run


@pytest.fixture
def runs(tmp_path):
    """Min-SNR's distance is 10 and 21 % higher at two seeds; seed 1079 has one arm only."""
    for seed, ratio in ((1077, 1.10), (1078, 1.21)):
        make_run(tmp_path, "E1", seed)
        make_run(tmp_path, "E2", seed, fd=100 * ratio)
        write_training(tmp_path, "E1", seed, (0.1, 0.3))
        write_training(tmp_path, "E2", seed, (0.15, 0.25))
    make_run(tmp_path, "E1", 1079)
    return tmp_path


def add_swap(runs, seed, names, differences, step=STEP):
    folder = runs / "swap"
    folder.mkdir(exist_ok=True)
    lines = [{"step": step, "noisy": noisy, "clean": clean, "n": 1000, "val/fd_lite0": 200.0 + difference,
              "val/fd_lite0_difference": difference}
             for (noisy, clean), difference in zip([(a, b) for a in names for b in names], differences, strict=True)]
    file = "_".join(name.replace("/", "_") if "/" in name else f"{name}_{seed}" for name in names)
    (folder / f"{file}_step{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def table(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)}


def write_training(runs, exp, seed, norms):
    """Log lines at these gradient norms up to STEP, after two of the first fifth that are to be left out."""
    steps = [1, STEP // 5, *range(STEP // 5 + 1, STEP), STEP, STEP + 1]
    lines = [{"step": s, "train/grad_global_L2": norms[i % 2] if STEP // 5 < s <= STEP else 900.0,
              "train/eps_mse_mean": 0.2 + 0.1 * (i % 2), "train/loss_mean": 0.1 + 0.05 * (i % 2)}
             for i, s in enumerate(steps)]
    (runs / exp / f"seed{seed}" / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_numbers_of_the_table(runs, tmp_path, capsys):
    add_swap(runs, 1077, ["E1", "E2"], [0, 20, -10, 4])
    add_swap(runs, 1078, ["E1", "E2"], [0, 20, -10, 4])
    add_swap(runs, 1077, ["E1/1077", "E1/1078"], [0, -6, -8, 50])
    (runs / "swap" / f"E1_1077_step{2 * STEP}.jsonl").write_text(
        json.dumps({"step": 2 * STEP, "n": 1000, "val/fd_lite0": 150.0}) + "\n")
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    assert f"Step {STEP:,}" in text and "1077, 1078." in text and (tmp_path / "out" / "answer.png").exists()
    found = table(text)
    # the mean of ln 1.10 and ln 1.21 is 1.5 ln 1.10; half a 95 % interval of two seeds is 12.706 / 2 of their distance
    high, low = (100 * (1.1 ** (1.5 + sign * 12.7062 / 2) - 1) for sign in (1, -1))
    name = "Fréchet distance of samples (lower is better)"
    assert found[name][:4] == ["300", "346.5", f"+15.4 % ({low:+.1f} to {high:+.1f})", "not told apart"]
    assert found["Held-out eps-MSE at t = 500"][2] == "+0.0 % (+0.0 to +0.0)"
    assert found["Held-out eps-MSE at t = 0"][2].startswith("+15.4 %")
    assert found["Gradient norm of the own loss, mean"][:4] == ["0.2", "0.2", "+0.0 % (+0.0 to +0.0)", "not told apart"]
    assert found["Gradient norm of the own loss, largest"][:3] == ["0.3", "0.25", "-16.7 % (-16.7 to -16.7)"]
    assert found["Gradient norm of the own loss, sd / mean"][2:4] == ["-50.0 % (-50.0 to -50.0)", "lower"]
    assert f"after step {STEP // 5}" in found["Training eps-MSE, sd / mean"][4]
    assert found["Fréchet distance of Min-SNR above t = 130"][2:4] == ["-5.0 % (-5.0 to -5.0)", "lower"]
    assert found["Fréchet distance of Min-SNR below t = 130"][2:4] == ["+10.0 % (+10.0 to +10.0)", "higher"]
    assert found["Fréchet distance of Min-SNR at all t"][2].startswith("+2.0 %")
    for part, difference in (("at all t", "+25.0 %"), ("above t = 130", "-4.0 %"), ("below t = 130", "-3.0 %")):
        assert found[f"Fréchet distance of another vanilla seed {part}"][2] == difference
    assert found["Fréchet distance of vanilla, twice the steps"][2] == "-25.0 %"


def test_the_figure_shows_the_numbers(runs):
    add_swap(runs, 1077, ["E1", "E2"], [0, 20, -10, 4])
    for path in (path for path in runs.glob("E?/seed*") if path.name != "seed1079"):
        slope = 0.25 if path.parent.name == "E1" else 0.75
        edit(path / "per_t.jsonl", lambda r, slope=slope: r | {"eps_mean_slope_ema": [0.0, slope],
                                                               "eps_mean_slope_best": [0.0, 1.0]})
        (early,) = Run(path).results("milestone")
        points = [early | {"kind": "frontier", "step": step, "nfe": nfe} for step, nfe in (
            (STEP, 10), (STEP, 20), (STEPS, 50))]  # the last one is not of the step of all else
        with open(path / "results.jsonl", "a") as file:
            file.writelines(json.dumps(point) + "\n" for point in points)
        for point in points:
            np.savez(influence_path(path, point), **np.load(influence_path(path, early)))
    axes = {ax.get_title()[4:]: ax for ax in answer.answer(answer.find(runs)).axes}
    lines = {title: [line.get_xydata().tolist() for line in ax.lines] for title, ax in axes.items()}

    def close(values):
        return pytest.approx(np.array(values))
    profile = lines["where the weight acts: a line per seed"]
    assert np.array(profile[:2]) == close([[[0, 1.10], [500, 1]], [[0, 1.21], [500, 1]]])
    forest = lines["distance of samples: left of 0, Min-SNR is closer"]  # each bar has two caps
    assert np.array([line[0] for line in forest[:9:3]]) == close([[10, 0], [21, 1], [100 * (1.1**1.5 - 1), 2]])
    swaps = lines["each network on a part of the timesteps"]
    assert [line[0][0] for line in swaps[:3]] == pytest.approx([2, -5, 10])
    labels = [label.get_text() for label in axes["each network on a part of the timesteps"].get_yticklabels()]
    assert labels == ["Min-SNR at all t", "Min-SNR above t = 130", "Min-SNR below t = 130"]
    calls = lines["over the number of calls"]  # of the first seed, the second, and a line at 0; there is no DDIM
    assert np.array(calls[:2]) == close([[[10, 10], [20, 10]], [[10, 21], [20, 21]]]) and len(calls) == 3
    slopes = lines["how much of the mean colour is seen"]
    assert [line[1][1] for line in slopes] == [0.25, 0.75, 0.25, 0.75, 1.0]


def test_what_is_not_measured_is_left_out(runs, tmp_path, capsys):
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    assert not any("t = 130" in name for name in table((tmp_path / "out" / "answer.md").read_text()))


def test_table_of_the_corrected_colours(runs, tmp_path, capsys):
    (runs / "colour").mkdir()
    r = {"step": 50, "exp": "E1", "seed": 1077, "n": 200, "features": "lite0", "above": 500, "sampler": "ddim",
         "nfe": 50, "val/kid_lite0": 0.5, "samples/channel_mean_sd_train": 34.8, "samples/neighbour_rms_train": 24.3}
    lines = [r | {"mean_colour": name, "val/fd_lite0": fd, "samples/channel_mean_sd": sd, "samples/neighbour_rms": 22}
             for name, fd, sd in (("as it is", 792.1, 66.6), ("corrected", 729.4, 23.8))]
    (runs / "colour" / "E1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    assert "| E1, seed 1077, DDIM 50 | corrected | 729.4 | 0.5 | 23.8 | 22 |" in text
    assert "| E1, seed 1077, DDIM 50 | as it is | 792.1 |" in text and "34.8 and 24.3" in text and "t > 500" in text


def test_table_of_the_swaps_at_several_numbers_of_calls(runs, tmp_path, capsys):
    add_swap(runs, 1077, ["E1", "E2"], [0, 20, -10, 4])
    folder, name = runs / "swap", f"E1_1077_E2_1077_step{STEP}"
    same = {"seed": 1077, "sampler": "ddpm", "features": "lite0", "at": 130, "val/fd_lite0_difference_stderr": 1.0}
    for nfe, factor in ((50, 1), (100, 2), (10, 3)):
        lines = [r | same | {"nfe": nfe, "val/fd_lite0_difference": factor * r["val/fd_lite0_difference"]}
                 for r in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())]
        (folder / f"{name}_nfe{nfe}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines[:4 - (nfe == 10)]))
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    lines = text[text.index("number of network calls (DDPM, lite0"):].splitlines()
    assert [line for line in lines if line.startswith("| 1077")] == [  # that of NFE 10 is still being written
        f"| 1077 | {STEP} | 50 | 7 | 1000 | 200.0 | +2.0 ± 1.0 % | -5.0 ± 1.0 % | +10.0 ± 1.0 % |",
        f"| 1077 | {STEP} | 100 | 13 | 1000 | 200.0 | +4.0 ± 1.0 % | -10.0 ± 1.0 % | +20.0 ± 1.0 % |"]


def test_table_of_the_blurred_samples(runs, tmp_path, capsys):
    (runs / "blur").mkdir()
    lines = [{"step": 50, "exp": exp, "seed": 1077, "square": square, "n": 1000, "features": "lite0", "sampler": "ddpm",
              "nfe": 50, "val/fd_lite0": 200 + change, "val/kid_lite0": 0.5 + change / 100,
              "val/fd_lite0_difference": change, "val/kid_lite0_difference": change / 100,
              "val/fd_lite0_difference_stderr": 1.0, "val/kid_lite0_difference_stderr": 0.005}
             for square, exp, change in ((1, "E1", 0), (1, "E2", 20), (2, "E1", 0), (2, "E2", -10), (4, "E1", 0))]
    (runs / "blur" / "E1_E2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = [{key.replace("lite0", "vgg16"): 2 * value if key.endswith("difference") else value
              for key, value in (line | {"features": "vgg16"}).items()} for line in lines[:2]]
    (runs / "blur" / "E1_E2_vgg16.jsonl").write_text("".join(json.dumps(line) + "\n" for line in other))
    equal = [line | {"equal_saturation": True, "saturation": 45.3} for line in lines[:2]]
    (runs / "blur" / "equal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in equal))
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    row = "| 1077 | 50 | lite0, equal saturation | 1 x 1 | 1,000 | 200 | 220 | +10.0 ± 1.0 % | +40.0 ± 2.0 % | 45, 45 |"
    assert row in text
    assert "| 1077 | 50 | lite0 | 1 x 1 | 1,000 | 200 | 220 | +10.0 ± 1.0 % | +40.0 ± 2.0 % |  |" in text
    assert "| 1077 | 50 | lite0 | 2 x 2 | 1,000 | 200 | 190 | -5.0 ± 1.0 % | -20.0 ± 2.0 % |  |" in text
    assert "4 x 4" not in text  # one arm is still being measured
    (ax,) = [ax for ax in answer.answer(answer.find(runs)).axes if "fine detail" in ax.get_title()]
    assert ax.lines[0].get_ydata().tolist() == [10, -5]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["lite0", "vgg16"]
    assert sorted(line.get_linestyle() for line in ax.lines if len(line.get_xdata()) and line.get_marker() == "s") == [
        "-", "-", ":"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1 x 1", "2 x 2"]

    def log(seed, step, ratio):
        new = [line | {"seed": seed, "step": step} for line in lines[:2]]
        new[1]["val/fd_lite0"] = 200 * ratio
        return "".join(json.dumps(line) + "\n" for line in new)

    (runs / "blur" / "three.jsonl").write_text(log(1077, 10_000, 1.21) + log(1078, 10_000, 1.21) + log(1080, 10_000, 1))
    (runs / "blur" / "three_equal.jsonl").write_text(  # enters no mean
        log(1077, 10_000, 9).replace('"n"', '"equal_saturation": true, "n"'))
    (runs / "blur" / "two.jsonl").write_text(log(1077, 50_000, 2) + log(1078, 50_000, 3))
    (runs / "blur" / "explored.jsonl").write_text(log(1082, 10_000, 5) + log(1081, 50_000, 5))
    rows = [row for row in answer.blurs(runs).splitlines() if row.startswith("| 10") and "," in row.split("|")[1]]
    # logarithms of the ratios: 0.191, 0.191, 0
    assert rows == ["| 1077, 1078, 1080 | 10,000 | lite0 | 1 x 1 |  |  |  | +13.6 % (-13.6 to +49.3) |  |  |"]


def test_table_of_the_noise_of_gradients(runs, tmp_path, capsys):
    (runs / "gradient").mkdir()
    lines = [{"network": network, "loss": loss, "seed": 1077, "step": 50, "n": 4000, "noise_scale": 40 * ratio,
              "noise_scale_stderr": 1.0, "noise_scale_ratio": ratio, "noise_scale_ratio_stderr": 0.05,
              "square_share": share} for network, loss, ratio, share in (
                  ("E1", "E1", 1, 0.4), ("E1", "E2", 0.75, 0.1), ("E2", "E1", 2, 0.6), ("E2", "E2", 0.5, 0.2))]
    (runs / "gradient" / "E1_1077_E2_1077_step50.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (runs / "gradient" / "E1_1077_E2_1077_step90.jsonl").write_text(json.dumps(lines[0]) + "\n")  # being measured
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    row = ("| 1077 | 50 | 4,000 | 40.0 ± 2.3 | 20.0 ± 2.3 | -50 ± 11 % | -25 ± 11 % | +100 ± 11 % | 40 % | 20 % |")
    assert text.endswith(row + "\n")
    for seed, ratio in ((1078, 0.5), (1079, 0.6)):
        later = [r | {"seed": seed} | ({"noise_scale_ratio": ratio} if r["loss"] == "E2" == r["network"] else {})
                 for r in lines]
        log = runs / "gradient" / f"E1_{seed}_E2_{seed}_step50.jsonl"
        log.write_text("".join(json.dumps(r) + "\n" for r in later))
    *_, last = answer.gradients(runs).splitlines()
    assert last == "| 1077, 1078, 1079 | 50 |  |  |  | -46.9 % (-59.1 to -31.0) |  |  |  |  |"


def test_table_of_runs_that_were_repeated(runs):
    assert answer.rounding(runs) == ""
    for exp, off in (("E1", 3e-3), ("E2", 4e-6)):
        for root, steps, factor in ((runs, range(100, 2001, 100), 1), (runs / "again", (100, 200, 500, 600), 1 + off)):
            make_run(root, exp, 1080)
            lines = [{"step": step, "train/eps_mse_mean": 0.2 * factor ** (step > 100)} for step in steps]
            log = root / exp / "seed1080" / "loss.jsonl"
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (runs / "again" / "E1" / "seed1080" / "env.json").write_text('{"device": "another CPU"}')
    assert answer.rounding(runs).splitlines()[-2:] == [
        "| E1 | 1080 | cpu; another CPU | 0e+00 | 3e-03 | 3e-03 |  |",
        "| E2 | 1080 | cpu; cpu | 0e+00 | 4e-06 | 4e-06 |  |"]


def test_course_of_a_seed_that_is_ahead(runs, tmp_path, capsys):
    for exp, fd in (("E1", 200.0), ("E2", 190.0)):
        log = runs / exp / "seed1078" / "results.jsonl"
        log.write_text(json.dumps(Run(log.parent).results("milestone")[0]) + "\n")
        path = runs / exp / "seed1077"
        (early,), step = Run(path).results("milestone"), STEP + 10
        early |= {"samples/channel_mean_sd": fd / 4}
        late = early | {"step": step, "val/fd_lite0": fd, "val/kid_lite0": fd / 100}
        profile = {"step": step, "n": 8, "t": [0, 500], "eps_mse_ema": [fd**2, 0.5]}
        final = late | {"kind": "final", "n": 2 * early["n"], "val/fd_lite0": fd + 10}
        (path / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in (early, late, final)))
        with open(path / "per_t.jsonl", "a") as file:
            file.write(json.dumps(profile) + "\n")
        pull = np.array([100.0, 200, 400, 600] * (early["n"] // 4)) * fd / 200  # paired differences: 5, 10, 20, 30
        for line, times in ((late, 1), (final, 2)):
            pulls = np.tile(pull, times)
            np.savez(influence_path(path, line), **{"val/fd_lite0": pulls, "val/kid_lite0": pulls})
    add_swap(runs, 1077, ["E1", "E2"], [0, 20, -10, 4], STEP + 10)
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    assert f"Step {STEP:,}, E2" in text and f"Seeds past step {STEP:,}: Fréchet distance of n samples" in text
    error = 1.96 * np.std([5, 10, 20, 30] * (early["n"] // 4), ddof=1) / early["n"]**0.5 / 2
    assert error > 1
    assert (f"| 1077 | {STEP + 10} | {early['n']} | 200.0 | 190.0 | -5.0 ± {error:.1f} % | "
            f"-5.0 ± {100 * error:.1f} % | 50.0, 47.5 | -9.8 % | -5.0 % | +10.0 % |") in text
    assert f"| 1077 | {STEP + 10} | {2 * early['n']} | 210.0 | 200.0 | -4.8 ±" in text
    assert f"| 1077 | {STEP} | {early['n']} | 300.0 | 330.0 | +10.0 ±" in text and "| 1078 |" not in text


def test_table_of_other_comparisons(runs, tmp_path, capsys):
    for exp, fd, slope in (("E10a", 100.0, 0.25), ("E10b", 80.0, 0.75)):
        path = make_run(runs, exp, 1078, fd=fd, sets=[f"train.total_steps={STEP}"])
        edit(path / "per_t.jsonl", lambda r, slope=slope: r | {"eps_mean_slope_ema": [0.0, slope]})
        edit(path / "results.jsonl", lambda r, fd=fd: r | {"samples/channel_mean_sd": fd / 4})
    make_run(runs / "unclipped", "E10a", 1078, fd=160.0, sets=[f"train.total_steps={STEP}"])
    edit(runs / "unclipped/E10a/seed1078/results.jsonl", lambda r: r | {"nfe": 10 if r["sampler"] == "ddim" else 50})
    for exp in ("E3", "E4", "E9a"):  # no constant weight; no second arm
        make_run(runs, exp, 1078)
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| Min-SNR")]
    own, *rest, control = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert control[0].endswith(", vanilla not clipped") and control[5:7] == ["160.0", "80.0"]
    assert own[:4] == ["Min-SNR against vanilla", "1078", str(STEP), "DDPM 50"]
    assert own[5:7] == ["300.0", "363.0"] and own[7].startswith("+21.0 ± ") and own[9:] == ["", ""]
    for line, sampler, distances in zip(rest, ("DDPM 50", "DDIM 50"), (["100.0", "80.0"], ["200.0", "160.0"]),
                                        strict=True):
        assert line[:4] == ["Min-SNR against vanilla with v-prediction", "1078", str(STEP), sampler]
        assert line[5:7] == distances and line[7].startswith("-20.0 ± ")
        assert line[8].startswith("-20.0 ± ") and line[9:] == ["25.0, 20.0", "0.25, 0.75"]


def test_a_final_distance_is_never_compared_with_a_milestone(runs, tmp_path, capsys):
    """At the last step one arm has its final line, and the other still samples for it."""
    for exp, fd in (("E1", 250.0), ("E2", 300.0)):
        for seed in (1077, 1078):
            path = runs / exp / f"seed{seed}"
            (early,), (final, _) = Run(path).results("milestone"), Run(path).results("final")
            late = early | {"step": STEPS, "val/fd_lite0": fd}
            lines = [early, late] + [final] * ((exp, seed) != ("E2", 1078))
            (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            pulls = np.ones(late["n"])
            np.savez(influence_path(path, late), **{"val/fd_lite0": pulls, "val/kid_lite0": pulls})
    assert answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "answer.md").read_text()
    assert f"Step {STEPS:,}" in text
    assert table(text)["Fréchet distance of samples (lower is better)"][:2] == ["250", "300"]


def test_the_step_is_a_milestone_of_every_seed(runs, tmp_path, capsys):
    for exp in ("E1", "E2"):
        path = runs / exp / "seed1078"
        (early,) = Run(path).results("milestone")
        (path / "results.jsonl").write_text("".join(json.dumps(early | {"step": step}) + "\n" for step in (30, 40)))
    with pytest.raises(UserError, match="in common"):
        answer.main(["--runs", str(runs), "--out", str(tmp_path / "out")])


def test_a_page_without_the_end_of_its_table_is_left_as_it_is(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answer, "HERE", tmp_path)
    page = tmp_path / "summary.md"
    page.write_text(f"above\n{answer.MARKS[0]}\nformer\n{answer.MARKS[1]}\nbelow\n")
    assert answer.main(["--runs", str(runs)]) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "former" not in text and "| measure |" in text
    page.write_text(broken := f"above\n{answer.MARKS[0]}\nbelow\n")
    with pytest.raises(UserError, match="summary.md"):
        answer.main(["--runs", str(runs)])
    assert page.read_text() == broken


def test_without_a_pair_there_is_no_answer(tmp_path):
    make_run(tmp_path, "E1", 1077)
    make_run(tmp_path, "E2", 1078)
    with pytest.raises(UserError, match="no seed"):
        answer.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")])
