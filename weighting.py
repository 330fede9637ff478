"""Loss weights per timestep, as pure functions of the SNR, for networks that predict eps, x_0 or v.

A weighting is one loss in x_0, lambda(snr) |x_0 - x_0_hat|^2, whatever the network predicts. It weighs the eps-MSE by
lambda / snr, the v-MSE by lambda / (snr + 1): |x_0 - x_0_hat|^2 = |eps - eps_hat|^2 / snr = |v - v_hat|^2 / (snr + 1).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The MSE of what is predicted, divided by the MSE of x_0.
SCALES = {"eps": lambda snr: snr, "v": lambda snr: snr + 1, "x0": torch.ones_like}


def constant(snr: Tensor, scale: Tensor, gamma: float | None) -> Tensor:
    """w = 1 on whatever is predicted: for eps, Ho et al. 2020, eq. 14. So lambda = scale depends on the prediction."""
    return torch.ones_like(snr)


def minsnr(snr: Tensor, scale: Tensor, gamma: float) -> Tensor:
    """lambda = min(snr, gamma): Hang et al. 2023, section 3.4."""
    return torch.minimum(snr / scale, gamma / scale)


def minsnr_norm(snr: Tensor, scale: Tensor, gamma: float) -> Tensor:
    """minsnr divided by its mean over the schedule, so that the mean over all t is 1.

    The mean over a batch would be a biased and noisy divisor: with 4 samples, weights of up to 3.99 instead of 1.095.
    Raises ValueError if snr rises anywhere: then it is not that of a schedule. (A batch sorted by t is not noticed.)
    """
    if (snr.diff() > 0).any():
        raise ValueError("snr: minsnr_norm needs that of the whole schedule; index its result by the t of a batch")
    w = minsnr(snr, scale, gamma)
    return w / w.mean()


def soft_minsnr(snr: Tensor, scale: Tensor, gamma: float) -> Tensor:
    """lambda = snr gamma / (snr + gamma): minsnr without its corner (k-diffusion, layers.py, soft-min-snr).

    On eps that is sigma^2 / (sigma^2 + sigma_data^2), with sigma^2 = 1 / snr and sigma_data^2 = 1 / gamma.
    """
    return 1 / (1 / snr + 1 / gamma) / scale


def p2(snr: Tensor, scale: Tensor, gamma: float | None) -> Tensor:
    """lambda = snr / (1 + snr), 1 / (1 + snr) on eps: P2, 1 / (k + snr)^gamma with k = gamma = 1 (Choi et al. 2022)."""
    return snr / (1 + snr) / scale


def debiased(snr: Tensor, scale: Tensor, gamma: float | None) -> Tensor:
    """lambda = sqrt(snr), 1 / sqrt(snr) on eps: Yu et al. 2024, "Unmasking Bias in Diffusion Model Training"."""
    return snr.sqrt() / scale


class Weighting(NamedTuple):
    """One kind of weight. function(snr, scale, gamma) -> lambda / scale, all (T,); scale is of SCALES."""
    function: Callable[[Tensor, Tensor, float | None], Tensor]
    reads_gamma: bool = False


WEIGHTINGS = {
    "constant": Weighting(constant), "minsnr": Weighting(minsnr, reads_gamma=True),
    "minsnr_norm": Weighting(minsnr_norm, reads_gamma=True), "soft_minsnr": Weighting(soft_minsnr, reads_gamma=True),
    "p2": Weighting(p2), "debiased": Weighting(debiased)}


def loss_weights(snr: Tensor, kind: str, gamma: float | None = None, prediction: str = "eps") -> Tensor:
    """The weight of each timestep on the MSE of what is predicted: float64 (T,), from the whole schedule's snr (T,).

    kind: a key of WEIGHTINGS. prediction: "eps", "x0" or "v". gamma may be infinity; kinds that have none ignore it.
    Raises ValueError for another kind or prediction, an snr that is negative or not finite, and a kind that reads gamma
    without a gamma above 0. At snr = 0 a weight on eps is its limit, and 1e50 for debiased, whose limit is infinite.
    """
    for name, value, names in (("weighting", kind, WEIGHTINGS), ("prediction", prediction, SCALES)):
        if value not in names:
            raise ValueError(f"{name} {value!r}: must be one of {', '.join(names)}")
    snr = snr.double()
    if not ((snr >= 0) & (snr < math.inf)).all():
        raise ValueError("snr: must be at least 0 and finite")
    function, reads_gamma = WEIGHTINGS[kind]
    if reads_gamma and (gamma is None or not gamma > 0):
        raise ValueError(f"gamma={gamma}: {kind} needs one above 0")
    if prediction == "eps":
        snr = snr.clamp(min=1e-100)  # lambda / snr would be 0 / 0
    return function(snr, SCALES[prediction](snr), gamma)


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(snr, gamma) / snr, the Min-SNR weight on the eps-MSE, as float64. Raises ValueError like loss_weights."""
    return loss_weights(snr, "minsnr", gamma)
