"""The peers as their users would call them, given this project's sizes and weights.

Each function imports its own peer, so that a benchmark runs where only its peer is installed.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import Config
from model import Attention, Downsample, ResBlock, UNet

# ---- diffusers ----

def diffusers_unet(config: Config) -> nn.Module:
    """UNet2DModel of the same architecture: with weights_for_diffusers it is the same function as our UNet.

    Its defaults differ: GroupNorm of 32 groups, eps 1e-5; heads of 8 channels; padding on all sides before a stride;
    cosine before sine, and frequencies that stop short of 1/10000. All are options; nothing is subclassed.
    """
    from diffusers import UNet2DModel
    m = config.model
    attends = [UNet.image_size >> i in m.attn_resolutions for i in range(len(m.channel_mults))]
    return UNet2DModel(
        sample_size=UNet.image_size, in_channels=UNet.image_channels, out_channels=UNet.image_channels,
        block_out_channels=tuple(m.base_channels * mult for mult in m.channel_mults),
        layers_per_block=m.num_res_blocks, dropout=m.dropout,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=min(32, m.base_channels // 4), norm_eps=1e-6,
        attention_head_dim=None,  # one head of all channels
        downsample_padding=0,     # means: pad right and below
        flip_sin_to_cos=False, freq_shift=1)


def _layer_names(layer: nn.Module, block: str, j: int) -> dict[str, nn.Module]:
    """diffusers' name of each convolution, linear layer and norm of one of our layers (Attention aside)."""
    if isinstance(layer, ResBlock):
        names = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "emb", "norm2": "norm2", "conv2": "conv2",
                 "conv_shortcut": "skip"}
        return {f"{block}.resnets.{j}.{theirs}": getattr(layer, ours) for theirs, ours in names.items()
                if not isinstance(getattr(layer, ours), nn.Identity)}
    return {f"{block}.{'down' if isinstance(layer, Downsample) else 'up'}samplers.0.conv": layer.conv}


def weights_for_diffusers(model: UNet) -> dict[str, Tensor]:
    """The state dict of our UNet under diffusers' names."""
    state = {}

    def put(name: str, weight: Tensor, bias: Tensor) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = weight.detach().clone(), bias.detach().clone()

    def put_layer(layer: nn.Module, block: str, j: int) -> None:
        if isinstance(layer, Attention):  # its 1x1 convolutions are linear layers there, q, k and v apart
            put(f"{block}.attentions.{j}.group_norm", layer.norm.weight, layer.norm.bias)
            weights, biases = layer.qkv.weight[:, :, 0, 0].chunk(3), layer.qkv.bias.chunk(3)
            for name, weight, bias in zip("qkv", weights, biases, strict=True):
                put(f"{block}.attentions.{j}.to_{name}", weight, bias)
            put(f"{block}.attentions.{j}.to_out.0", layer.proj.weight[:, :, 0, 0], layer.proj.bias)
        else:
            for name, inner in _layer_names(layer, block, j).items():
                put(name, inner.weight, inner.bias)

    for name, layer in {"time_embedding.linear_1": model.time_mlp[0], "time_embedding.linear_2": model.time_mlp[2],
                        "conv_in": model.conv_in, "conv_norm_out": model.norm_out, "conv_out": model.conv_out}.items():
        put(name, layer.weight, layer.bias)
    for j, layer in enumerate(model.middle):  # ResBlock, Attention, ResBlock: numbered by kind
        put_layer(layer, "mid_block", j // 2)
    for side, blocks in (("down_blocks", model.down), ("up_blocks", model.up)):
        level = j = 0
        for block in blocks:
            for layer in block:
                put_layer(layer, f"{side}.{level}", j)
            # a level ends with its Downsample, alone in a block, or with its Upsample, the last layer of a block
            ends = not isinstance(block[-1], ResBlock | Attention)
            level, j = (level + 1, 0) if ends else (level, j + 1)
    return state


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
