"""The UNet of DDPM (Ho et al. 2020, appendix B): from x_t and t to eps (or x_0, or v).

Shapes are (B, C, H, W) throughout. Two things the study depends on:

* GroupNorm has min(32, base_channels // 4) groups, so 4 channels share a group at base 32. With 32 groups on 32
  channels it would be InstanceNorm, which erases each channel's mean right before the output convolution: such a
  network cannot predict the mean of eps, and sampling amplifies that error 157 times at t = 999.
* Attention is written out as softmax(q k^T) v. Curvature needs second derivatives, which fused attention kernels do
  not have; taylor.py has a rule for each operation used here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (B,) -> (B, dim), Vaswani et al. 2017, with frequencies falling from 1 to 1/10000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t[:, None].float() * freqs[None, :]  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, dim)


def init_(layer: nn.Module) -> nn.Module:
    """Ho et al.'s initialisation: uniform with variance 1 / fan_avg, biases zero."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def zero_(layer: nn.Module) -> nn.Module:
    """Zero weight and bias, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    return init_(nn.Conv2d(in_channels, out_channels, 3, stride, padding))


def conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return init_(nn.Conv2d(in_channels, out_channels, 1))


def silu(x: Tensor) -> Tensor:
    """SiLU of a norm's output: in place if no gradient needs it, since sampling on a CPU waits for memory."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv; add the time embedding; GroupNorm, SiLU, dropout, conv (zero at the start)."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.emb = init_(nn.Linear(emb_dim, out_channels))
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(conv3x3(out_channels, out_channels))
        self.skip = conv1x1(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h += self.emb(emb)[:, :, None, None]  # emb has passed SiLU once, in UNet.forward
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        h += self.skip(x)  # in place, twice: no backward pass needs the output of a convolution
        return h


class Attention(nn.Module):
    """Single-head self-attention over the H * W positions, as a residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = conv1x1(channels, 3 * channels)
        # one matrix for three projections, each initialised with its own fan
        for weight in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(weight)
        self.proj = zero_(conv1x1(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # (B, H, W, 3C): no copy if x is channels_last
        q, k, v = qkv.reshape(B, H * W, 3, C).unbind(2)  # each (B, HW, C)
        weights = torch.softmax((q * C**-0.5) @ k.transpose(1, 2), dim=-1)  # (B, HW, HW), rows sum to 1
        out = weights @ v  # (B, HW, C)
        return x + self.proj(out.reshape(B, H, W, C).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """Halve H and W. Padding only below and to the right is what TensorFlow's SAME means at stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """output = UNet(x_t, t). At base_channels 128 this is the published CIFAR-10 network (35.7 M parameters).

    Raises ValueError if base_channels cannot be split into min(32, base_channels // 4) groups.
    """

    image_size, image_channels = 32, 3

    def __init__(self, base_channels=32, channel_mults=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,),
                 dropout=0.1):
        super().__init__()
        groups = min(32, base_channels // 4)
        if base_channels < 4 or base_channels % 2 or base_channels % groups:
            raise ValueError(f"base_channels={base_channels}: must be even, at least 4 and divisible by "
                             "min(32, base_channels // 4), its number of GroupNorm groups")
        emb_dim = 4 * base_channels
        self.base_channels = base_channels
        self.time_mlp = nn.Sequential(init_(nn.Linear(base_channels, emb_dim)), nn.SiLU(),
                                      init_(nn.Linear(emb_dim, emb_dim)))
        self.conv_in = conv3x3(self.image_channels, base_channels)

        def level(in_channels, out_channels, resolution):
            block = nn.ModuleList([ResBlock(in_channels, out_channels, emb_dim, groups, dropout)])
            if resolution in attn_resolutions:
                block.append(Attention(out_channels, groups))
            return block

        # Every block and every Downsample on the way down leaves one skip; the way up consumes them in reverse.
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, resolution, skips = base_channels, self.image_size, [base_channels]
        for i, mult in enumerate(channel_mults):
            for _ in range(num_res_blocks):
                self.down.append(level(channels, base_channels * mult, resolution))
                channels = base_channels * mult
                skips.append(channels)
            if i < len(channel_mults) - 1:
                self.down.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
                resolution //= 2

        self.middle = nn.ModuleList([ResBlock(channels, channels, emb_dim, groups, dropout),
                                     Attention(channels, groups),
                                     ResBlock(channels, channels, emb_dim, groups, dropout)])

        for i, mult in reversed(list(enumerate(channel_mults))):
            for _ in range(num_res_blocks + 1):
                self.up.append(level(channels + skips.pop(), base_channels * mult, resolution))
                channels = base_channels * mult
            if i > 0:
                self.up[-1].append(Upsample(channels))
                resolution *= 2

        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = zero_(conv3x3(channels, self.image_channels))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (B, 3, 32, 32), t (B,) int64 in [0, T) -> the prediction (B, 3, 32, 32)."""
        emb = timestep_embedding(t, self.base_channels).to(x_t.dtype)
        emb = F.silu(self.time_mlp(emb))  # (B, 4 * base_channels)
        h = self.conv_in(x_t)
        skips = [h]
        for block in self.down:
            h = run(block, h, emb)
            skips.append(h)
        h = run(self.middle, h, emb)
        for block in self.up:
            h = run(block, torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(silu(self.norm_out(h)))


def run(block: nn.ModuleList, h: Tensor, emb: Tensor) -> Tensor:
    """Apply the layers of one block; only a ResBlock reads the time embedding."""
    for layer in block:
        h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
    return h
