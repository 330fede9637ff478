"""The peers as their users would call them, given this project's sizes and weights.

Each function imports its own peer, so that a benchmark runs where only its peer is installed.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import interop
from config import Config

# ---- diffusers ----

def diffusers_unet(config: Config) -> nn.Module:
    """UNet2DModel of the same architecture: with the weights of interop.to_diffusers, the same function as our UNet."""
    from diffusers import UNet2DModel
    settings = interop.unet_config(**dataclasses.asdict(config.model))
    return UNet2DModel(**{name: value for name, value in settings.items() if name != "_class_name"})


class DiffusersTraining:
    """A training step as diffusers' examples write it: DDPMScheduler, Adam, clip_grad_norm_, EMAModel."""

    def __init__(self, config: Config, images: Tensor, w: Tensor, bf16: bool = False):
        """images: uint8 (N, 3, 32, 32). w: float32 (T,), the loss weights. bf16: autocast, as accelerate does it."""
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel
        self.config, self.images, self.w, self.bf16 = config, images, w, bf16
        self.model = diffusers_unet(config).train()
        self.scheduler = DDPMScheduler(config.diffusion.num_timesteps, beta_start=1e-4, beta_end=0.02,
                                       beta_schedule="linear")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.train.lr)
        self.ema = EMAModel(self.model.parameters(), decay=config.ema.decay)

    def __call__(self) -> None:
        indices = torch.randint(len(self.images), (self.config.train.batch_size,))
        clean = self.images[indices].float() / 127.5 - 1
        noise = torch.randn(clean.shape)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (len(clean),))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            predicted = self.model(self.scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        loss = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (self.w[timesteps] * loss).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())


@torch.no_grad()
def diffusers_ddim(model: nn.Module, x_T: Tensor, nfe: int, bf16: bool = False) -> Tensor:
    """uint8 samples from x_T by the loop of diffusers' DDIMPipeline, set to the timesteps and the clipping of ours.

    Its scheduler steps from t to t - T // nfe where ours goes to the next timestep of the rounded grid, so that some
    coefficients are those of a neighbouring t; the work is the same.
    """
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True,
                              timestep_spacing="linspace")
    scheduler.set_timesteps(nfe)
    image = x_T
    for t in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = model(image, t).sample.float()
        image = scheduler.step(predicted, t, image, eta=0.0, use_clipped_model_output=True).prev_sample
    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


# ---- Inception and distance ----

def inceptions(weights: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each peer's network with these weights: uint8 (B, 3, H, W) -> features (B, 2048).

    They share layers and weights. What goes before differs: torch-fidelity resizes as TensorFlow 1 did, torchmetrics
    with anti-aliasing, and both map 0..255 to -1..127/128 where pytorch-fid and ours map it to -1..1.
    """
    from pytorch_fid import inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    inception.load_state_dict_from_url = lambda *_, **__: weights  # it takes no path, and would download
    pytorch_fid = inception.InceptionV3().eval()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights, file.name)
        torch_fidelity = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file.name)
        torchmetrics = NoTrainInceptionV3("inception", ["2048"], feature_extractor_weights_path=file.name)
    networks = {"pytorch-fid": lambda x: pytorch_fid(x / 255)[0][:, :, 0, 0],
                "torch-fidelity": lambda x: torch_fidelity(x)[0],
                "torchmetrics": torchmetrics}
    return {name: torch.no_grad()(network) for name, network in networks.items()}


def distances() -> dict[str, Callable[..., float]]:
    """Each peer's Frechet distance of (mu1, sigma1, mu2, sigma2), float64 arrays."""
    from pytorch_fid import fid_score
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    # pytorch-fid 0.3.0 asks sqrtm for an argument that SciPy has removed since
    fid_score.linalg.sqrtm = lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), 0.0)

    def torch_fidelity(mu1, sigma1, mu2, sigma2):
        one, two = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
        return fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]

    return {"pytorch-fid": lambda *moments: float(fid_score.calculate_frechet_distance(*moments)),
            "torch-fidelity": torch_fidelity,
            "torchmetrics": lambda *moments: _compute_fid(*map(torch.from_numpy, moments)).item()}


# ---- PyHessian ----

def pyhessian_probe(model: nn.Module, x_t: Tensor, t: Tensor, eps: Tensor) -> Callable[[], list[float]]:
    """A function that draws one probe of the trace of the unweighted loss.

    The graph of the gradient is made here, once, as PyHessian does for a single batch; so its time is not counted.
    """
    import pyhessian

    class AtFixedT(nn.Module):  # PyHessian calls model(inputs)
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x_t):
            return self.model(x_t, t)

    peer = pyhessian.hessian(AtFixedT(), nn.MSELoss(), data=(x_t, eps), cuda=False)
    return lambda: peer.trace(maxIter=1, tol=0)
