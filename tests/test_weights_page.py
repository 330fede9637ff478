"""The snippets of docs/weights.md, run as they stand: their loss is the one written out by hand, and they train."""

import copy
import re

import pytest
import torch
from conftest import ROOT

from diffusion import Diffusion, linear_betas
from model import UNet
from rng import generator

PLAIN, DIFFUSERS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "weights.md").read_text(), flags=re.DOTALL)
X_0 = torch.rand(6, 3, 32, 32, generator=generator(0, "page")) * 2 - 1


def min_snr_loss(network, ac, eps, t, prediction):
    """Of gamma 5 and X_0, from the formulas, in float32."""
    signal, noise, snr = ((x[t].float()[:, None, None, None]) for x in (ac**0.5, (1 - ac)**0.5, ac / (1 - ac)))
    target, scale = {"eps": (eps, snr), "x0": (X_0, 1), "v": (signal * eps - noise * X_0, snr + 1)}[prediction]
    w = torch.where(snr > 0, torch.clamp(snr, max=5) / scale, 1.0 if prediction == "eps" else 0.0)
    return (w * (network(signal * X_0 + noise * eps, t) - target) ** 2).mean().item()


def run(snippet, network, **names):
    """The snippet's variables after one batch, and the network as it was before."""
    before = copy.deepcopy(network)
    names |= {"torch": torch, "device": "cpu", "loader": [X_0], "optimizer": torch.optim.Adam(network.parameters())}
    torch.manual_seed(5)
    exec(snippet, names)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), network.parameters(), strict=True))
    return names, before


def test_the_plain_loop():
    model = UNet(8, (1,), 1, ())
    names, before = run(PLAIN, model, model=model)
    torch.manual_seed(5)
    t, eps = torch.randint(1000, (6,)), torch.randn_like(X_0)
    expected = min_snr_loss(before, Diffusion(linear_betas()).alphas_cumprod, eps, t, "v")
    assert names["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type, prediction", [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")])
def test_the_loop_with_a_scheduler_of_diffusers(prediction_type, prediction, zero_snr, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="diffusers: benchmarks/requirements.txt")
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)
    unet = diffusers.UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                                 down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    if prediction == "eps" and zero_snr:
        with pytest.raises(ValueError, match="betas"):
            run(DIFFUSERS, unet, scheduler=scheduler, unet=unet)
        return
    ts = torch.tensor([0, 40, 130, 500, 998, 999])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: ts)
    names, before = run(DIFFUSERS, unet, scheduler=scheduler, unet=unet)
    torch.manual_seed(5)
    eps = torch.randn_like(X_0)
    expected = min_snr_loss(lambda x, t: before(x, t).sample, scheduler.alphas_cumprod.double(), eps, ts, prediction)
    assert names["loss"].item() == pytest.approx(expected, rel=1e-3)  # its alphas_cumprod are float32
    if prediction == "v":
        torch.testing.assert_close(names["diffusion"].target(X_0, ts, eps), scheduler.get_velocity(X_0, eps, ts))
