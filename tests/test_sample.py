from pathlib import Path

import numpy
import pytest
import torch
from conftest import TINY, set_flags
from PIL import Image

import sample
import train
from data import to_uint8
from errors import UserError
from evaluate import sample_images
from rng import generator
from runs import load_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train.main(["--exp", "E1", "--out", str(out), "--device", "cpu",
                *set_flags(*TINY, "train.lr=1e-2", "ema.decay=0.9")])
    return out / "E1" / "seed1077"


@pytest.fixture
def draw(run_dir, tmp_path, capsys):
    """Calls sample.py on the run; returns the paths that it prints."""
    def run(*flags):
        capsys.readouterr()
        assert sample.main([str(run_dir), "--out", str(tmp_path / "out"), "--device", "cpu", *flags]) == 0
        return capsys.readouterr().out.split()
    return run


def test_grid_and_npz(run_dir, draw):
    png, npz = draw("--sampler", "ddpm", "--nfe", "3", "--n", "5", "--npz")
    assert Image.open(png).size == (2 * (3 * 33 + 1), 2 * (2 * 33 + 1))
    images = numpy.load(npz)["arr_0"]
    assert images.shape == (5, 32, 32, 3) and images.dtype == numpy.uint8
    _, step, _, ema, diffusion = load_run(run_dir, "cpu")
    expected = sample_images(ema, diffusion, 5, "ddpm", 3, seed=1077)
    assert step == 12 and torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), expected)


def test_each_option_changes_the_samples(draw):
    variants = [[], ["--sampler=ddpm"], ["--nfe=5"], ["--seed=0"], ["--raw"], ["--eta=0.5"], ["--step=6"]]
    files = [draw("--n", "2", "--nfe", "4", "--npz", *flags)[1] for flags in variants]
    arrays = {numpy.load(file)["arr_0"].tobytes() for file in files}
    assert len(set(files)) == len(arrays) == len(variants)


def test_a_trajectory_leads_from_noise_to_the_usual_sample(run_dir, draw):
    """Rows: x_t and x_0_hat of each sample; columns: from x_T to x_0."""
    path, = draw("--trajectory", "--n", "2", "--nfe", "20")
    picture = numpy.array(Image.open(path))[::2, ::2]
    assert picture.shape == (4 * 33 + 1, 10 * 33 + 1, 3)
    cells = [[picture[r * 33 + 1:r * 33 + 33, c * 33 + 1:c * 33 + 33] for c in range(10)] for r in range(4)]
    _, _, _, ema, diffusion = load_run(run_dir, "cpu")
    x_0 = sample_images(ema, diffusion, 2, "ddim", 20, seed=1077).permute(0, 2, 3, 1).numpy()
    x_T = torch.randn(2, 3, 32, 32, generator=generator(1077, "x_T", 0))
    with torch.no_grad():
        t = torch.full((2,), diffusion.T - 1)
        x_0_hat = to_uint8(diffusion.predict_x0(x_T, t, ema(x_T, t))).permute(0, 2, 3, 1).numpy()
    for i in range(2):
        assert (cells[2 * i][0] == to_uint8(x_T[i]).permute(1, 2, 0).numpy()).all()
        assert (cells[2 * i][9] == x_0[i]).all() and (cells[2 * i + 1][9] == x_0[i]).all()
        assert abs(cells[2 * i + 1][0].astype(int) - x_0_hat[i]).max() <= 1
        assert (cells[2 * i + 1][8] == x_0[i]).all()  # the last call's x_0_hat is the sample
    columns = [numpy.stack([cells[0][c], cells[2][c]]).tobytes() for c in range(10)]
    assert len(set(columns)) == 10  # ten different moments


@pytest.mark.parametrize("flags, fact", [
    (["--nfe", "0"], "--nfe 0.*1000"), (["--nfe", "1001"], "--nfe 1001"), (["--n", "0"], "--n 0"),
    (["--eta", "2"], "--eta 2"), (["--sampler", "ddpm", "--eta", "0.5"], "--eta 0.5.*DDIM"),
    (["--trajectory", "--n", "17"], "--n 17.*16"), (["--seed", "-1"], "--seed -1"), (["--step", "7"], "step 7"),
])
def test_bad_flags_write_nothing(draw, tmp_path, flags, fact):
    with pytest.raises(UserError, match=fact):
        draw(*flags)
    assert not (tmp_path / "out").exists()


def test_samples_of_a_milestone_go_into_the_run(run_dir, capsys):
    sample.main([str(run_dir), "--step", "6", "--n", "2", "--nfe", "2", "--npz", "--device", "cpu"])
    npz = Path(capsys.readouterr().out.split()[1])
    expected = sample_images(load_run(run_dir, "cpu", 6).ema, load_run(run_dir, "cpu").diffusion, 2, "ddim", 2, 1077)
    assert npz.parent == run_dir / "samples"
    assert (numpy.load(npz)["arr_0"] == expected.permute(0, 2, 3, 1).numpy()).all()
