"""Images: CIFAR-10 and the generated `shapes` set, each as one uint8 tensor; and the pixel conventions.

Images at rest are uint8 (N, 3, 32, 32) in RGB. The model sees float32 in [-1, 1].
"""

import io
import math
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from errors import UserError
from rng import generator

SHAPES_TRAIN, SHAPES_TEST = 2048, 1024
CHUNK = 512  # shapes that share one stream of random numbers


def to_model_range(x_uint8: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return x_uint8.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded and clamped; the inverse of to_model_range.

    Raises FloatingPointError for NaN and infinity, which a cast would turn into pixels.
    """
    if not x.isfinite().all():
        raise FloatingPointError("the network has returned values that are not finite: they make no image")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(x_uint8: Tensor) -> bytes:
    """uint8 (N, 3, H, W) as one PNG, about square, at twice the size."""
    n, _, h, w = x_uint8.shape
    cols = math.ceil(math.sqrt(n))
    grid = Image.new("RGB", (cols * (w + 1) + 1, math.ceil(n / cols) * (h + 1) + 1))
    for i, image in enumerate(x_uint8.permute(0, 2, 3, 1).cpu().numpy()):  # (H, W, 3)
        grid.paste(Image.fromarray(image), (i % cols * (w + 1) + 1, i // cols * (h + 1) + 1))
    png = io.BytesIO()
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(png, format="png")
    return png.getvalue()


def load_images(name: str, root: str | Path, train: bool = True) -> Tensor:
    """uint8 (N, 3, 32, 32). name: "cifar10" (50,000 train, 10,000 test images) or "shapes" (2,048 and 1,024).

    CIFAR-10 is read from root/cifar-10-batches-py, or else downloaded there. `shapes` is generated and reads no file.
    Raises UserError if CIFAR-10 is damaged or cannot be downloaded, and ValueError for another name.
    """
    if name == "shapes":
        return make_shapes(SHAPES_TRAIN if train else SHAPES_TEST, "train" if train else "test")
    if name != "cifar10":
        raise ValueError(f"data {name!r}: must be 'cifar10' or 'shapes'")
    from torchvision.datasets import CIFAR10, utils  # here, since it costs a second that `shapes` need not pay

    root, folder = Path(root), Path(root, CIFAR10.base_folder)
    advice = f"give --data-root DIR with DIR/{folder.name}, put {CIFAR10.filename} into {root}, or run --exp smoke"
    if folder.exists() or (root / CIFAR10.train_list[0][0]).exists():  # the latter: root is the folder of batches
        for file, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]:
            if not utils.check_integrity(str(folder / file), md5):
                raise UserError(f"cifar10: {folder / file} is missing, unreadable or has the wrong md5; {advice}")
    new = not root.exists()
    try:
        dataset = CIFAR10(root, train=train, download=not folder.exists())
    except (OSError, RuntimeError) as error:  # no network, no permission, full disk; a broken archive
        if new:
            shutil.rmtree(root, ignore_errors=True)
        raise UserError(f"cifar10: the download of {CIFAR10.url} to {root} failed ({error}); {advice}") from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) -> (N, 3, 32, 32)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> Tensor:
    """int64 (batch_size,): which of n images step `step` (from 0) trains on. A pure function of its arguments.

    The steps read shuffled epochs one after the other. An epoch holds every image once; a batch may straddle two.
    """
    parts, start, end = [], step * batch_size, (step + 1) * batch_size
    while start < end:
        epoch, offset = divmod(start, n)
        parts.append(_permutation(seed, epoch, n)[offset:offset + end - start])
        start += len(parts[-1])
    return torch.cat(parts)


def make_shapes(n: int, split: str = "train") -> Tensor:
    """n generated images, uint8 (n, 3, 32, 32): something to learn within a minute, with no file and no network.

    Each shows a disc, square, triangle, ring or cross, lit from the upper left, on a smooth two-coloured background.
    A split's images are always the same, and a longer set begins with the shorter one.
    """
    chunks = [_shapes_chunk(generator(0, f"shapes/{split}", i)) for i in range(max(1, math.ceil(n / CHUNK)))]
    return torch.cat(chunks)[:n]


def _shapes_chunk(rng: torch.Generator) -> Tensor:
    """uint8 (CHUNK, 3, 32, 32)."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(CHUNK, 1, 1, generator=rng)

    axis = (torch.arange(32) + 0.5) / 16 - 1  # pixel centres in [-1, 1]
    y, x = torch.meshgrid(axis, axis, indexing="ij")  # each (32, 32), y downwards

    # Background: two pale or dark colours of one draw, blended along a random direction.
    angle = uniform(0, 2 * math.pi)
    blend = (0.5 + 0.4 * (x * angle.cos() + y * angle.sin()))[:, None]  # (CHUNK, 1, 32, 32)
    sky, ground = (_hsv_to_rgb(uniform(0, 1), uniform(0.1, 0.45), uniform(0.25, 0.95)) for _ in range(2))
    background = torch.lerp(sky, ground, blend.clamp(0, 1))

    # Object: coordinates turned and centred, then the signed distance (negative inside) of each kind of shape.
    angle, size = uniform(0, 2 * math.pi), uniform(0.4, 0.7)
    dx, dy = x - uniform(-0.3, 0.3), y - uniform(-0.3, 0.3)
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    radius = torch.hypot(u, v)

    def box(half_u, half_v):
        return torch.maximum(u.abs() - half_u, v.abs() - half_v)

    distance = torch.stack([
        radius - size,                                                                       # disc
        box(0.8 * size, 0.8 * size),                                                         # square
        torch.maximum(v, 0.5 * (math.sqrt(3) * u.abs() - v)) - 0.6 * size,                   # triangle
        (radius - 0.75 * size).abs() - 0.27 * size,                                          # ring
        torch.minimum(box(size, 0.32 * size), box(0.32 * size, size)),                       # cross
    ])  # (5, CHUNK, 32, 32)
    kind = torch.randint(len(distance), (CHUNK,), generator=rng)
    coverage = (0.5 - 16 * distance[kind, torch.arange(CHUNK)]).clamp(0, 1)[:, None]  # one pixel is 1/16 wide

    light = (0.8 - 0.35 * (dx + dy) / (2 * size))[:, None].clamp(0.35, 1.25)
    colour = _hsv_to_rgb(uniform(0, 1), uniform(0.7, 1), uniform(0.75, 1))
    image = torch.lerp(background, (colour * light).clamp(0, 1), coverage)
    return to_uint8(2 * image - 1)


def _hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Each (N, 1, 1) in [0, 1] -> (N, 3, 1, 1) in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + 6 * h[:, None]) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
