"""Loss weights per timestep, as pure functions of the SNR.

Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy".
"""

import torch
from torch import Tensor


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """w = min(snr, gamma) / snr, the Min-SNR-gamma weight for eps-prediction (Hang et al. 2023, section 3.4).

    Written as min(1, gamma / snr), which is the same and also right at snr = 0 and at gamma = infinity (w = 1).
    In (0, 1], rising with t and with gamma. Raises ValueError unless gamma > 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}: must be above 0")
    return (gamma / snr).clamp(max=1)


def loss_weights(snr: Tensor, kind: str, gamma: float | None = None) -> Tensor:
    """The weight of each timestep, float64 (T,), from the schedule's snr (T,).

    kind: "constant" (1 everywhere; gamma is not used), "minsnr" (see min_snr), or "minsnr_norm" (minsnr divided by
    its mean over the *schedule*, so that the mean over all t is 1. The mean over a batch would be a biased and noisy
    divisor: with 4 samples, weights of up to 3.9 in place of 1.095).

    Raises ValueError for another kind, or where Min-SNR has no gamma above 0.
    """
    snr = snr.double()
    if kind == "constant":
        return torch.ones_like(snr)
    if kind not in ("minsnr", "minsnr_norm"):
        raise ValueError(f"weighting {kind!r}: must be 'constant', 'minsnr' or 'minsnr_norm'")
    if gamma is None:
        raise ValueError(f"weighting {kind!r} needs a gamma")
    w = min_snr(snr, gamma)
    return w / w.mean() if kind == "minsnr_norm" else w
