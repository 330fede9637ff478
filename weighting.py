"""Loss weights per timestep, as pure functions of the SNR.

Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy".
"""

from collections.abc import Callable

import torch
from torch import Tensor


def min_snr(snr: Tensor, gamma: float | None) -> Tensor:
    """w = min(snr, gamma) / snr, the Min-SNR-gamma weight for eps-prediction (Hang et al. 2023, section 3.4).

    Written as min(1, gamma / snr), which is the same and also right at snr = 0 and at gamma = infinity (w = 1).
    In (0, 1], rising with t and with gamma. Raises ValueError unless gamma > 0.
    """
    if gamma is None or not gamma > 0:
        raise ValueError(f"gamma={gamma}: must be above 0")
    return (gamma / snr).clamp(max=1)


def constant(snr: Tensor, gamma: float | None) -> Tensor:
    """w = 1: the unweighted loss of Ho et al. 2020, eq. 14."""
    return torch.ones_like(snr)


def minsnr_norm(snr: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR divided by its mean over the schedule, so that the mean over all t is 1.

    The mean over a batch would be a biased and noisy divisor: with 4 samples, weights of up to 3.9 instead of 1.095.
    """
    w = min_snr(snr, gamma)
    return w / w.mean()


WEIGHTINGS: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    "constant": constant, "minsnr": min_snr, "minsnr_norm": minsnr_norm}


def loss_weights(snr: Tensor, kind: str, gamma: float | None = None) -> Tensor:
    """The weight of each timestep on the eps-MSE: float64 (T,), from the snr of the whole schedule (T,).

    kind: a key of WEIGHTINGS. Raises ValueError for another kind, or if Min-SNR has no gamma above 0.
    """
    if kind not in WEIGHTINGS:
        raise ValueError(f"weighting {kind!r}: must be one of {', '.join(WEIGHTINGS)}")
    return WEIGHTINGS[kind](snr.double(), gamma)
