import pytest
import torch

from diffusion import Diffusion, cosine_betas, linear_betas
from weighting import WEIGHTINGS, loss_weights, min_snr

SNR = Diffusion(linear_betas()).snr


@pytest.mark.parametrize("betas, gamma, first, mean, w0, w50, w100", [
    (linear_betas(), 1, 259, 0.817311, 1.000e-4, 0.0310, 0.1171),
    (linear_betas(), 3, 165, 0.888422, 3.000e-4, 0.0929, 0.3514),
    (linear_betas(), 5, 130, 0.913073, 5.001e-4, 0.1549, 0.5857),
    (cosine_betas(), 1, 496, 0.642114, None, None, None),
    (cosine_betas(), 3, 328, 0.775809, None, None, None),
    (cosine_betas(), 5, 261, 0.824022, None, None, None),
])
def test_closed_form_table(betas, gamma, first, mean, w0, w50, w100):
    w = loss_weights(Diffusion(betas).snr, "minsnr", gamma)
    assert w.dtype == torch.float64 and w.shape == (1000,)
    assert (w >= 1).nonzero()[0].item() == first
    assert w.mean().item() == pytest.approx(mean, abs=1e-6)
    if w0 is not None:
        assert w[[0, 50, 100]].tolist() == [pytest.approx(w0, abs=1e-6), pytest.approx(w50, abs=1e-4),
                                            pytest.approx(w100, abs=1e-4)]


@pytest.mark.parametrize("gamma, expected", [(5, [0.5, 1, 1, 1]), (2, [0.2, 0.4, 1, 1]), (20, [1, 1, 1, 1]),
                                             (0.5, [0.05, 0.1, 0.25, 1])])
def test_definition_at_hand_made_snrs(gamma, expected):
    snr = torch.tensor([10.0, 5.0, 2.0, 0.0], dtype=torch.float64)
    assert min_snr(snr, gamma).tolist() == loss_weights(snr, "minsnr", gamma).tolist() == pytest.approx(expected)
    mean = sum(expected) / 4
    assert loss_weights(snr, "minsnr_norm", gamma).tolist() == pytest.approx([w / mean for w in expected])
    assert loss_weights(snr.float(), "minsnr", gamma).dtype == torch.float64


def test_constant_is_the_limit_of_a_large_gamma():
    constant = loss_weights(SNR, "constant")
    assert torch.equal(constant, torch.ones(1000, dtype=torch.float64))
    for kind in ("minsnr", "minsnr_norm"):
        assert torch.equal(loss_weights(SNR, kind, float("inf")), constant)
        assert torch.equal(loss_weights(SNR, kind, 1e4), constant)  # the largest snr is 9999


@pytest.mark.parametrize("kind, gamma, match", [
    ("min_snr", 5, "'min_snr'.*" + ".*".join(WEIGHTINGS)), ("minsnr", None, "gamma"), ("minsnr_norm", None, "gamma"),
    ("minsnr", 0, "gamma=0"), ("minsnr_norm", -1, "gamma=-1"), ("minsnr", float("nan"), "gamma=nan"),
])
def test_errors(kind, gamma, match):
    with pytest.raises(ValueError, match=match):
        loss_weights(SNR, kind, gamma)
