import json

import pytest
import torch

import evaluate
from data import make_shapes
from diffusion import Diffusion, linear_betas
from evaluate import RunError, check_device, eval_mode, per_t_profile, sample_images
from model import UNet
from rng import seed_global

D = Diffusion(linear_betas())


@pytest.fixture
def net():
    """A small network whose output depends on x_t and t, with dropout on."""
    seed_global(0, "init")
    net = UNet(8, (1, 2), 1, (), 0.5)
    torch.nn.init.normal_(net.conv_out.weight, std=0.02)
    return net.train()


def test_samples_depend_on_seed_and_chunk_only(net, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    for sampler in ("ddpm", "ddim"):
        few, many = (sample_images(net, D, n, sampler, 3, seed=1) for n in (4, 10))
        assert many.shape == (10, 3, 32, 32) and many.dtype == torch.uint8
        assert torch.equal(few, many[:4]) and not torch.equal(many[:4], many[4:8])
        assert not torch.equal(few, sample_images(net, D, 4, sampler, 3, seed=2))
    assert net.training


def test_samplers_start_from_the_same_noise_and_eta_is_used(net):
    ddpm, ddim = (sample_images(net, D, 2, sampler, 1, seed=1) for sampler in ("ddpm", "ddim"))
    assert torch.equal(ddpm, ddim)  # one step from x_T to x_0 has no noise of its own
    assert not torch.equal(*(sample_images(net, D, 2, "ddim", 5, seed=1, eta=eta) for eta in (0, 1)))
    with pytest.raises(ValueError, match="sampler 'euler'"):
        sample_images(net, D, 2, "euler", 5, seed=1)


def test_profile_of_a_network_that_says_zero():
    """Then the error is the mean square of eps, 1 at every t."""
    ts, mse = per_t_profile(UNet(8, (1,), 1, ()), D, make_shapes(8))
    assert len(ts) == 21 and ts[:3] == [0, 50, 100] and ts[-1] == 999
    assert mse == pytest.approx([1.0] * 21, abs=0.05) and len(set(mse)) == 21  # another eps at each t


def test_profile_is_a_fixed_measuring_stick(net, monkeypatch):
    images = make_shapes(6)
    first = per_t_profile(net, D, images)
    torch.manual_seed(9)  # dropout is off, and nothing depends on the global generator
    assert per_t_profile(net, D, images) == first and net.training
    monkeypatch.setattr(evaluate, "CHUNK", 4)  # nor on how the images are batched, beyond rounding
    assert per_t_profile(net, D, images)[1] == pytest.approx(first[1], rel=1e-5)


def test_eval_mode_restores_each_modules_own_mode(net):
    net.middle.eval()
    modes = [m.training for m in net.modules()]
    with pytest.raises(RuntimeError), eval_mode(net):
        assert not any(m.training for m in net.modules())
        raise RuntimeError
    assert [m.training for m in net.modules()] == modes


def test_the_command_measures_a_finished_run(run_train, capsys):
    run_dir = run_train("E1")
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run_dir / "per_t.jsonl").read_text().splitlines()[-1])


def test_errors(tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        evaluate.main([str(tmp_path / "nowhere")])
    for name in ("cuda:77", "gpu"):
        with pytest.raises(RunError, match=f"--device {name}"):
            check_device(name)
