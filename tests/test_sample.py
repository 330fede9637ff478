from pathlib import Path

import numpy
import pytest
import torch
from conftest import TINY, set_flags
from PIL import Image

import interop
import sample
import train
from evaluate import sample_images
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


def test_samples_of_a_milestone_go_into_the_run(run_dir, capsys):
    sample.main([str(run_dir), "--step", "6", "--n", "2", "--nfe", "2", "--npz", "--device", "cpu"])
    npz = Path(capsys.readouterr().out.split()[1])
    expected = sample_images(load_run(run_dir, "cpu", 6).ema, load_run(run_dir, "cpu").diffusion, 2, "ddim", 2, 1077)
    assert npz.parent == run_dir / "samples"
    assert (numpy.load(npz)["arr_0"] == expected.permute(0, 2, 3, 1).numpy()).all()


@pytest.mark.parametrize("flags, step, which", [
    ([], None, "ema"), (["--raw"], None, "model"), (["--step=6"], 6, "ema")])
def test_the_network_asked_for_goes_to_diffusers(run_dir, tmp_path, capsys, flags, step, which):
    assert sample.main([str(run_dir), "--device", "cpu", "--export-diffusers", str(tmp_path / "new"), *flags]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "new")]
    run, (network, diffusion) = load_run(run_dir, "cpu", step), interop.read(tmp_path / "new")
    pairs = {name: list(zip(network.parameters(), getattr(run, name).parameters(), strict=True))
             for name in ("model", "ema")}
    assert [name for name, pair in pairs.items() if all(torch.equal(p, q) for p, q in pair)] == [which]
    assert torch.equal(diffusion.betas, run.diffusion.betas)


@pytest.mark.parametrize("flag", ["--n=3", "--nfe=3", "--sampler=ddpm", "--npz", "--seed=1", "--eta=0", "--out=x"])
def test_an_export_draws_no_samples(run_dir, tmp_path, flag):
    with pytest.raises(SystemExit):
        sample.main([str(run_dir), "--export-diffusers", str(tmp_path / "new"), flag])
    assert not (tmp_path / "new").exists()
