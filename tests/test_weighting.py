import pytest
import torch

from diffusion import Diffusion, cosine_betas, linear_betas
from weighting import loss_weights, min_snr

SNR = Diffusion(linear_betas()).snr


@pytest.mark.parametrize("gamma, first, mean, w0, w50, w100", [
    (1, 259, 0.817311, 1.000e-4, 0.0310, 0.1171),
    (3, 165, 0.888422, 3.000e-4, 0.0929, 0.3514),
    (5, 130, 0.913073, 5.001e-4, 0.1549, 0.5857),
])
def test_closed_form_table_linear(gamma, first, mean, w0, w50, w100):
    w = loss_weights(SNR, "minsnr", gamma)
    assert w.dtype == torch.float64 and w.shape == (1000,)
    assert (w >= 1).nonzero()[0].item() == first
    assert w.mean().item() == pytest.approx(mean, abs=1e-6)
    assert w[0].item() == pytest.approx(w0, abs=1e-6)
    assert w[50].item() == pytest.approx(w50, abs=1e-4)
    assert w[100].item() == pytest.approx(w100, abs=1e-4)


@pytest.mark.parametrize("gamma, first, mean", [(1, 496, 0.642114), (3, 328, 0.775809), (5, 261, 0.824022)])
def test_closed_form_table_cosine(gamma, first, mean):
    w = loss_weights(Diffusion(cosine_betas()).snr, "minsnr", gamma)
    assert (w >= 1).nonzero()[0].item() == first
    assert w.mean().item() == pytest.approx(mean, abs=1e-6)


def test_definition_at_hand_made_snrs():
    snr = torch.tensor([10.0, 5.0, 2.0, 0.0], dtype=torch.float64)
    assert min_snr(snr, 5).tolist() == [0.5, 1.0, 1.0, 1.0]


def test_rises_with_t_and_with_gamma():
    weights = torch.stack([loss_weights(SNR, "minsnr", gamma) for gamma in (0.5, 1, 3, 5, 20)])
    assert (weights.diff(dim=1) >= 0).all() and (weights.diff(dim=0) >= 0).all()
    assert (weights > 0).all() and (weights <= 1).all()


@pytest.mark.parametrize("gamma", [0.1, 1, 3, 5, 100])
@pytest.mark.parametrize("betas", [linear_betas(), cosine_betas(), linear_betas(50)])
def test_normalised_mean_is_one_and_shape_is_kept(gamma, betas):
    snr = Diffusion(betas).snr
    w, raw = loss_weights(snr, "minsnr_norm", gamma), loss_weights(snr, "minsnr", gamma)
    assert abs(w.mean().item() - 1) < 1e-12
    torch.testing.assert_close(w / raw, (1 / raw.mean()).expand_as(raw), rtol=1e-12, atol=0)


def test_normalising_multiplies_by_1_0952():
    ratio = loss_weights(SNR, "minsnr_norm", 5) / loss_weights(SNR, "minsnr", 5)
    assert ratio[0].item() == pytest.approx(1.0952, abs=5e-5)


def test_gamma_to_infinity_is_constant():
    constant = loss_weights(SNR, "constant")
    assert torch.equal(constant, torch.ones(1000, dtype=torch.float64))
    for kind in ("minsnr", "minsnr_norm"):
        assert torch.equal(loss_weights(SNR, kind, float("inf")), constant)
        assert torch.equal(loss_weights(SNR, kind, 1e4), constant)  # the largest snr is 9999


@pytest.mark.parametrize("kind, gamma, match", [
    ("min_snr", 5, "must be"), ("minsnr", None, "needs a gamma"), ("minsnr", 0, "above 0"),
    ("minsnr_norm", -1, "above 0"), ("minsnr", float("nan"), "above 0"),
])
def test_errors(kind, gamma, match):
    with pytest.raises(ValueError, match=match):
        loss_weights(SNR, kind, gamma)
