"""docs/experiments/saturation.py: both arms' grids, as they are and equally saturated."""

import json
import shutil

import pytest
import torch
from conftest import ROOT

import blur
import saturation
from data import grid_png, make_shapes
from errors import UserError


def test_a_grid_is_read_as_it_was_written(tmp_path):
    images = make_shapes(6)  # in two rows of three
    (tmp_path / "grid.png").write_bytes(grid_png(images))
    assert torch.equal(saturation.read_grid(tmp_path / "grid.png"), images)


class Range(torch.nn.Module):
    """The saturation as the only feature; keeps the images that it has seen."""

    def __init__(self):
        super().__init__()
        self.seen, self.weight = [], torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        self.seen.append(x)
        return (x.amax(dim=1) - x.amin(dim=1)).float().mean(dim=(1, 2))[:, None]


def test_command(tmp_path, monkeypatch, capsys):
    network = Range()
    monkeypatch.setattr(saturation, "VGG16", lambda: network)
    images = make_shapes(36) // 2 + 64  # what is doubled is not clamped
    for exp, samples in (("E1", images), ("E2", blur.saturated(images, 0.5))):
        run = tmp_path / exp / "seed5"
        (run / "grids").mkdir(parents=True)
        shutil.copy(ROOT / f"docs/experiments/results/runs/{exp}/seed1077/config.json", run)
        (run / "grids" / "step_000010_ddpm50.png").write_bytes(grid_png(samples))
    assert saturation.main(["--step", "10", "--runs", str(tmp_path)]) == 0
    assert torch.equal(network.seen[0], blur.blurred(images, 4))
    line = json.loads(capsys.readouterr().out)
    assert (line["step"], line["n"]) == (10, 36)
    assert line["saturation"][1] == pytest.approx(line["saturation"][0] / 2, rel=0.02)
    assert line["change"] == pytest.approx(-50, abs=2) and abs(line["change_equal"]) < 2
    assert 0 < line["change_equal_half"] < line["change_half"]
    with pytest.raises(UserError, match="step 20"):
        saturation.main(["--step", "20", "--runs", str(tmp_path)])
