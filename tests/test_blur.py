"""docs/experiments/blur.py: distances after all images have lost their detail."""

import json

import pytest
import torch
from conftest import tiny_network

import blur
from data import make_shapes
from errors import UserError


def test_detail_inside_of_a_square_is_lost_and_the_rest_stays():
    images = make_shapes(8)
    assert torch.equal(blur.blurred(images, 1), images)
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 200  # single pixels of 0 and 200
    assert (blur.blurred(board.to(torch.uint8).expand(2, 3, 32, 32), 2) == 100).all()
    halves = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    halves[..., 16:] = 200  # an edge between two squares is softened within one pixel on both sides
    assert blur.blurred(halves, 2)[0, 0, 5].unique().tolist() == [0, 50, 150, 200]


def test_saturation_is_made_equal_and_greys_stay():
    images = torch.tensor([[100, 100, 100], [90, 120, 150]], dtype=torch.uint8)[..., None, None].expand(2, 3, 4, 4)
    assert blur.saturation(images) == 30  # 0 and 60
    more = blur.saturated(images, 1.5)
    assert torch.equal(more[0], images[0]) and more[1, :, 0, 0].tolist() == [75, 120, 165]
    assert blur.saturated(images, 9)[1, :, 0, 0].tolist() == [0, 120, 255]


def test_pixels_as_features():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[0, 1, :4, 4:8] = 255                     # the second square of the first row of the second channel
    image[0, 2, 28:, 28:30] = 255                  # half of the last square
    features = blur.Pixels()(image)
    expected = torch.full((1, 192), -1.0)
    expected[0, 64 + 1], expected[0, -1] = 1, 0
    assert features.shape == (1, blur.Pixels.dim) and torch.equal(features, expected)


@pytest.mark.filterwarnings("ignore:.*the covariance is singular")  # 20 samples, 192 pixels
def test_command(run_train, tmp_path, monkeypatch, capsys):
    for module in ("train.feature_network", "evaluate.feature_network"):
        monkeypatch.setattr(module, tiny_network)
    monkeypatch.setattr(blur, "feature_network", tiny_network)
    stats = ["eval.features=inception", "eval.n_samples=20", "eval.final_n_samples=20",
             f"eval.stats_root='{tmp_path}/s'"]
    runs = [str(run_train(exp, *stats)) for exp in ("E5", "E6")]
    capsys.readouterr()
    assert blur.main([*runs, "--n", "20", "--step", "6", "--stats-root", str(tmp_path / "b")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["square"], r["exp"], r["step"]) for r in lines] == [
        (square, exp, 6) for square in (1, 2, 4) for exp in ("E5", "E6")]
    for baseline, arm in zip(lines[::2], lines[1::2], strict=True):
        assert baseline["val/fid_difference"] == 0 < arm["val/fid_difference_stderr"]
        assert arm["val/fid_difference"] == arm["val/fid"] - baseline["val/fid"]
    rms, data = ([r[key] for r in lines[::2]] for key in ("samples/neighbour_rms", "samples/neighbour_rms_train"))
    assert rms[0] > rms[1] > rms[2] and data[0] > data[1] > data[2]

    def second():
        network = tiny_network()
        network.name = "vgg16"
        return network

    monkeypatch.setitem(blur.OWN, "vgg16", second)
    more = ["--features", "inception", "vgg16", "pixels"]
    assert blur.main([*runs, *more, "--n", "20", "--step", "6", "--stats-root", str(tmp_path / "b")]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert again[:6] == lines and [r["features"] for r in again[6:]] == ["vgg16"] * 6 + ["pixels"] * 2
    assert [(r["exp"], r["square"]) for r in again[12:]] == [("E5", 4), ("E6", 4)]
    for one, other in zip(again[:6], again[6:12], strict=True):  # the same samples, and here the same features
        assert other["val/fd_vgg16"] == one["val/fid"] and other["square"] == one["square"]
    monkeypatch.setattr(blur, "sample_images", lambda *args: blur.saturated(make_shapes(20), 0.5 + (args[-1] == "E5")))
    for option in [], ["--equal-saturation"]:
        assert blur.main([*runs, *option, "--n", "20", "--step", "6", "--stats-root", str(tmp_path / "b")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["equal_saturation"] for r in lines] == [False] * 6 + [True] * 6
    own, arm, own_again, equal = (r["saturation"] for r in (*lines[:2], *lines[6:8]))
    assert arm < 0.6 * own and own_again == own and equal == pytest.approx(own, rel=0.05)  # some channels are clamped
    assert lines[7]["val/fid_difference"] != lines[1]["val/fid_difference"]
    with pytest.raises(UserError, match="--n"):
        blur.main([*runs, "--n", "1"])
    with pytest.raises(UserError, match="both of E5"):
        blur.main([runs[0], runs[0]])
    with pytest.raises(UserError, match="seed"):
        blur.main([runs[0], str(run_train("E6", *stats, seed=5))])
