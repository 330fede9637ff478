"""colour.py: the mean colour of eps_hat, set right above a timestep."""

import json

import pytest
import torch

import colour
from data import make_shapes, to_model_range
from diffusion import Diffusion, linear_betas
from rng import generator

D = Diffusion(linear_betas())


class Blind(torch.nn.Module):
    """eps_hat has the contrast of x_t, and always the same mean."""
    image_channels, image_size = 3, 32

    def forward(self, x_t, t):
        return x_t - x_t.mean(dim=(2, 3), keepdim=True) + 0.1


def test_mean_colour_is_right_above_the_timestep_and_as_it_was_below():
    images, blind = make_shapes(256) // 4 + 190, Blind()  # bright images, so that their mean counts
    corrected, x_0 = colour.Corrected(blind, D, images, above=500), to_model_range(images)
    eps = torch.randn(x_0.shape, generator=generator(0, "test"))
    for t in (501, 999, 500):
        ts = torch.full((256,), t)
        x_t = D.q_sample(x_0, ts, eps)
        output = corrected(x_t, ts)
        assert torch.allclose(output - output.mean(dim=(2, 3), keepdim=True), blind(x_t, ts) - 0.1, atol=1e-5)
        if t == 500:
            assert torch.equal(output, blind(x_t, ts))
        else:  # eps - eps_hat is uncorrelated with x_t, as of a linear least-squares fit, and 0 on average
            x, error = (a.mean(dim=(2, 3)) for a in (x_t, eps - output))
            assert error.mean().abs() < 0.003
            slope = ((x - x.mean(dim=0)) * error).sum() / (x - x.mean(dim=0)).square().sum()
            assert abs(slope) < 0.05


@pytest.mark.long
def test_command(run_train, tmp_path, capsys):
    stats = f"eval.stats_root='{tmp_path}/stats'"
    run = run_train("E5", "eval.features=lite0", "eval.n_samples=4", "eval.final_n_samples=4", stats)
    capsys.readouterr()
    assert colour.main([str(run), "--n", "4", "--stats-root", str(tmp_path / "stats")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["sampler"], r["mean_colour"]) for r in lines] == [
        ("ddpm", "as it is"), ("ddpm", "corrected"), ("ddim", "as it is"), ("ddim", "corrected")]
    assert lines[2]["samples/channel_mean_sd"] != lines[3]["samples/channel_mean_sd"]
