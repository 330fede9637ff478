"""Beta schedules, the forward process, what a network predicts and its loss, and the DDPM and DDIM samplers.

Notation as in Ho et al. 2020 (DDPM) and Song et al. 2021 (DDIM), with t counted from 0 to T - 1 as in the code of
both: x_0 is an image in [-1, 1], x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps, and
snr = alphas_cumprod / (1 - alphas_cumprod). Schedules live in float64 and are cast where they meet an image.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,) int64) -> what it predicts (B, ...)


def linear_betas(T: int = 1000) -> Tensor:
    """float64 (T,), from 1e-4 to 0.02 whatever T (Ho et al. 2020, section 4)."""
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def cosine_betas(T: int = 1000) -> Tensor:
    """float64 (T,), clipped at 0.999 (Nichol & Dhariwal 2021, eq. 17, s = 0.008)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def linear_zero_snr_betas(T: int = 1000) -> Tensor:
    """float64 (T,), the last 1: linear_betas, sqrt(alphas_cumprod) shifted to end at 0 (Lin et al. 2024, alg. 1)."""
    root = torch.cumprod(1 - linear_betas(T), dim=0).sqrt()
    root = root[0] * (root - root[-1]) / (root[0] - root[-1]).clamp(min=1e-300)  # at T = 1 all are 0
    return 1 - (root / torch.cat([root.new_ones(1), root[:-1]])) ** 2


BETAS = {"linear": linear_betas, "cosine": cosine_betas, "linear_zero_snr": linear_zero_snr_betas}
PREDICTIONS = ("eps", "x0", "v")


class Diffusion:
    """The one owner of the schedule and of what the network predicts.

    Attributes: T, and betas, alphas_cumprod, snr, each float64 (T,); prediction, one of PREDICTIONS; and eps_per_mse
    (T,), the eps-MSE of a network divided by the MSE of its own target. betas (T,): in (0, 1), the last may be 1 (snr
    = 0) for x0 and v; float32 ones are upcast. Raises ValueError for other betas or predictions. Not checked: that x_0
    is in [-1, 1]; that the network predicts what `prediction` says; on a GPU, the range of t, since that would wait.
    """

    def __init__(self, betas: Tensor, prediction: str = "eps"):
        end = None if prediction == "eps" else -1  # at snr = 0, eps says nothing about x_0
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all() or (betas[:end] == 1).any():
            raise ValueError("betas: must be a vector of values in (0, 1); the last may be 1 for prediction x0 or v")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r}: must be one of {', '.join(PREDICTIONS)}")
        self.T, self.prediction, self.betas = len(betas), prediction, betas.double()
        self.alphas_cumprod = ac = torch.cumprod(1 - self.betas, dim=0)
        self.snr = ac / (1 - ac)
        self.eps_per_mse = {"eps": torch.ones_like(ac), "x0": self.snr, "v": ac}[prediction]

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, prediction: str = "eps") -> "Diffusion":
        """From a scheduler's alphas_cumprod (T,). If they are float32, snr is wrong by up to 5e-4 of it near t = 0."""
        ac = alphas_cumprod.double()
        return cls(1 - ac / torch.cat([ac.new_ones(1), ac[:-1]]), prediction)

    def _signal_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod[t]) and sqrt(1 - alphas_cumprod[t]), each (B, 1, ..., 1) in the type of `like`."""
        ac = self.alphas_cumprod[t].reshape(-1, *[1] * (like.ndim - 1))
        return ac.sqrt().to(like.dtype), (1 - ac).sqrt().to(like.dtype)

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), shape of x_0 (Ho et al. 2020, eq. 4). t (B,) int64 in [0, T), eps like x_0.

        Raises ValueError for other shapes or another t.
        """
        if eps.shape != x_0.shape or t.shape != x_0.shape[:1] or t.dtype != torch.int64:
            raise ValueError(f"x_0 {tuple(x_0.shape)}, t {tuple(t.shape)} {t.dtype}, eps {tuple(eps.shape)}: expected "
                             "(B, ...), (B,) int64 and the shape of x_0")
        if t.device.type == "cpu" and not ((t >= 0) & (t < self.T)).all():
            raise ValueError(f"t: must be from 0 to {self.T - 1}")
        signal, noise = self._signal_noise(t, x_0)
        return signal * x_0 + noise * eps

    def target(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network is to predict, shape of x_0. v: Salimans & Ho 2022, section 4."""
        if self.prediction == "v":
            signal, noise = self._signal_noise(t, x_0)
            return signal * eps - noise * x_0
        return eps if self.prediction == "eps" else x_0

    def predict_x0(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0_hat, shape of x_t, from the network's output, whatever it predicts."""
        if self.prediction == "x0":
            return output
        signal, noise = self._signal_noise(t, x_t)
        return (x_t - noise * output) / signal if self.prediction == "eps" else signal * x_t - noise * output

    def predict_eps(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """eps_hat, shape of x_t, from the network's output, whatever it predicts."""
        if self.prediction == "eps":
            return output
        signal, noise = self._signal_noise(t, x_t)
        return (x_t - signal * self.predict_x0(x_t, t, output)) / noise

    def mse(self, model: Model, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """|target - model(x_t, t)|^2 averaged over pixels, unweighted: (B,), type of x_0 (Ho et al. 2020, eq. 14)."""
        output = model(self.q_sample(x_0, t, eps), t)
        error = self.target(x_0, t, eps) - output
        return error.square().flatten(1).mean(dim=1)

    def eps_mse(self, model: Model, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The same error in eps, (B,): |eps - eps_hat|^2 = snr |x_0 - x_0_hat|^2 = alphas_cumprod |v - v_hat|^2."""
        return self.mse(model, x_0, t, eps) * self.eps_per_mse[t].to(x_0.dtype)


def spaced_timesteps(T: int, nfe: int) -> Tensor:
    """int64 (nfe,): the timesteps a sampler visits, evenly spaced and descending from T - 1 to 0.

    With nfe = 1 it is T - 1 alone. Raises ValueError unless 1 <= nfe <= T.
    """
    if not 1 <= nfe <= T:
        raise ValueError(f"nfe={nfe}: must be from 1 to T={T}")
    return torch.linspace(T - 1, 0, nfe, dtype=torch.float64).round().long()


@torch.no_grad()
def _reverse_process(model: Model, diffusion: Diffusion, x_T: Tensor, nfe: int, clip_x0: bool, step) -> Tensor:
    """Walk x_T down the sub-sequence of timesteps; `step(x_t, x_0_hat, ac_t, ac_s)` goes from t to the next s < t.

    Every coefficient comes from consecutive alphas_cumprod *of the sub-sequence*. With the betas of adjacent steps,
    50 of 1000 steps would remove a twentieth of the noise, and even a perfect denoiser would return near-noise.
    """
    ts = spaced_timesteps(diffusion.T, nfe).tolist()
    alphas_cumprod = [float(diffusion.alphas_cumprod[t]) for t in ts] + [1.0]  # s = -1 is the clean image
    x_t = x_T
    for t, ac_t, ac_s in zip(ts, alphas_cumprod[:-1], alphas_cumprod[1:], strict=True):
        t = torch.full((len(x_t),), t, dtype=torch.int64, device=x_t.device)
        x_0_hat = diffusion.predict_x0(x_t, t, model(x_t, t))
        if clip_x0:
            x_0_hat = x_0_hat.clamp(-1, 1)
        x_t = step(x_t, x_0_hat, ac_t, ac_s)
    return x_t


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Normal noise drawn where the generator lives: a CPU generator gives one sequence on every device."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def ddpm_sample(model: Model, diffusion: Diffusion, x_T: Tensor, nfe: int,
                generator: torch.Generator | None = None, clip_x0: bool = True) -> Tensor:
    """Algorithm 2 of Ho et al. 2020 on a respaced chain of nfe steps; returns x_0, shape of x_T.

    Variance: the posterior's, "fixed small". Noise comes from `generator`, or torch's global one if None.
    Raises ValueError unless 1 <= nfe <= T.
    """
    def step(x_t, x_0_hat, ac_t, ac_s):
        alpha = ac_t / ac_s
        beta = 1 - alpha  # of the step from s to t, however far apart they are
        mean = (math.sqrt(ac_s) * beta * x_0_hat + math.sqrt(alpha) * (1 - ac_s) * x_t) / (1 - ac_t)  # eq. 7
        if ac_s == 1:
            return mean
        return mean + math.sqrt((1 - ac_s) / (1 - ac_t) * beta) * _randn_like(x_t, generator)

    return _reverse_process(model, diffusion, x_T, nfe, clip_x0, step)


def ddim_sample(model: Model, diffusion: Diffusion, x_T: Tensor, nfe: int, eta: float = 0.0,
                generator: torch.Generator | None = None, clip_x0: bool = True) -> Tensor:
    """Song et al. 2021, eq. 12; returns x_0, shape of x_T. eta = 0 is deterministic, eta = 1 equals ddpm_sample.

    With clip_x0, eps is recomputed from the clipped x_0_hat, so that x_0_hat and eps still explain x_t together.
    Raises ValueError unless 1 <= nfe <= T and 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: must be from 0 (deterministic) to 1 (DDPM)")

    def step(x_t, x_0_hat, ac_t, ac_s):
        eps_hat = (x_t - math.sqrt(ac_t) * x_0_hat) / math.sqrt(1 - ac_t)
        sigma = eta * math.sqrt((1 - ac_s) / (1 - ac_t) * (1 - ac_t / ac_s))  # eq. 16
        # at eta = 1, rounding can leave 1 - ac_s - sigma^2 a little below 0
        x_s = math.sqrt(ac_s) * x_0_hat + math.sqrt(max(0.0, 1 - ac_s - sigma**2)) * eps_hat
        return x_s + sigma * _randn_like(x_t, generator) if sigma > 0 else x_s

    return _reverse_process(model, diffusion, x_T, nfe, clip_x0, step)


SAMPLERS = {"ddpm": ddpm_sample, "ddim": ddim_sample}
