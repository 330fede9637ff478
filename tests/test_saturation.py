"""docs/experiments/saturation.py: both arms' grids, as they are and equally saturated."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, tiny_network

import blur
import saturation
from data import grid_png, make_shapes
from errors import UserError


def test_a_grid_is_read_as_it_was_written(tmp_path):
    images = make_shapes(6)  # in two rows of three
    (tmp_path / "grid.png").write_bytes(grid_png(images))
    assert torch.equal(saturation.read_grid(tmp_path / "grid.png"), images)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saturation, "VGG16", tiny_network)
    images = make_shapes(36) // 2 + 64  # what is doubled is not clamped
    for exp, samples in (("E1", images), ("E2", blur.saturated(images, 0.5))):
        run = tmp_path / exp / "seed5"
        (run / "grids").mkdir(parents=True)
        shutil.copy(ROOT / f"docs/experiments/results/runs/{exp}/seed1077/config.json", run)
        (run / "grids" / "step_000010_ddpm50.png").write_bytes(grid_png(samples))
    assert saturation.main(["--step", "10", "--runs", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["step"], line["n"]) == (10, 36)
    assert line["saturation"][1] == pytest.approx(line["saturation"][0] / 2, rel=0.02)
    assert abs(line["change_equal"]) < 0.1 * abs(line["change"])
    with pytest.raises(UserError, match="step 20"):
        saturation.main(["--step", "20", "--runs", str(tmp_path)])
