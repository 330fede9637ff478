"""Is the difference between two arms in the fine detail? Their distances after all images have lost it.

    python docs/experiments/blur.py runs/E1/seed1077 runs/E2/seed1077 --step 10000 > blur.jsonl

Samples of both runs, from the same noise, and the training images are averaged over squares of 1, 2 and 4 pixels, and
enlarged again. Prints a line for each feature network, square and run: distances, and their paired differences from the
first run. The reference is the first 10,000 training images. Floors are of averaged images too; the ceiling is of noise
as it is. With `--features lite0 vgg16 pixels` there are also lines for a second network and for none, in case the
difference is Lite0's own; `pixels` compares means and covariances of pixels that are averaged over squares of 4.
With `--equal-saturation` the second run's samples are first made as saturated as the first's (nearly: channels are
clamped to 0 to 255). `saturation` in a line is that of the samples after this, and before the averaging.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import default
from data import load_images
from distances import Distances, extract_shared
from errors import UserError, argument_parser, run_script
from evaluate import sample_images
from fid import FEATURES, feature_network
from parallel import precision
from runs import load_run
from swap import differences
from vgg16 import VGG16

SQUARES = (1, 2, 4)  # pixels
REFERENCE = 10_000   # training images


class Pixels(nn.Module):
    """uint8 (B, 3, 32, 32) -> float32 (B, 192): pixels in [-1, 1], averaged over 4 x 4. The features of no network."""

    name, dim, weights_hash = "pixels", 192, None
    squares = 4,  # at the others its features would be almost the same

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(127.5), requires_grad=False)  # tells extract() the device

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.float() / self.scale - 1, 4).flatten(1)


OWN = {network.name: network for network in (VGG16, Pixels)}  # beside those of fid.py


def blurred(images: Tensor, square: int) -> Tensor:
    """uint8 (N, 3, H, W) without the detail inside of squares: averages, then bilinear interpolation."""
    return torch.cat([F.interpolate(F.avg_pool2d(part.float(), square), scale_factor=square, mode="bilinear")
                      .round().to(torch.uint8) for part in images.split(1000)])


def saturation(images: Tensor) -> float:
    """Of uint8 images (N, 3, H, W): the largest minus the smallest channel of a pixel, on average; 0 to 255."""
    return (images.amax(dim=1) - images.amin(dim=1)).double().mean().item()


def saturated(images: Tensor, factor: float) -> Tensor:
    """uint8 (N, 3, H, W) with each pixel's distance from its grey, the mean of its channels, times factor."""
    grey = images.float().mean(dim=1, keepdim=True)
    return (grey + factor * (images - grey)).round().clamp(0, 255).to(torch.uint8)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dirs", type=Path, nargs=2, metavar="RUN_DIR")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--features", nargs="+", choices=[*FEATURES, *OWN], help="default: those of the run")
    parser.add_argument("--equal-saturation", action="store_true",
                        help="make the second run's samples as saturated as the first's")
    parser.add_argument("--step", type=int, help="a milestone; the last checkpoint by default")
    parser.add_argument("--data-root", default=default("data.root"), help="folder of CIFAR-10; default %(default)s")
    parser.add_argument("--stats-root", type=Path, default=Path(default("eval.stats_root")),
                        help="folder of reference statistics")
    args = parser.parse_args(argv)
    runs = [load_run(run_dir, "cpu", args.step) for run_dir in args.run_dirs]
    (config, step, *_), (other, other_step, *_) = runs
    if (config.seed, config.data.name, step) != (other.seed, other.data.name, other_step):
        raise UserError(f"{args.run_dirs[0]} and {args.run_dirs[1]} differ in seed, data or step")
    if config.exp == other.exp:
        raise UserError(f"{args.run_dirs[0]} and {args.run_dirs[1]}: both of {config.exp}; give two experiments")
    features = args.features or [config.eval.features]
    if features == ["none"] or args.n < 2:
        raise UserError(f"{args.run_dirs[0]}: needs --features, and --n of 2 or more")
    train, test = (load_images(config.data.name, args.data_root, split) for split in (True, False))
    networks = [OWN[name]() if name in OWN else feature_network(name, default("eval.inception_weights"))
                for name in features]
    ev, used = config.eval, precision(config.eval.amp, torch.device("cpu"))
    samples = {run.config.exp: sample_images(run.ema, run.diffusion, args.n, ev.sampler, ev.nfe, config.seed, used,
                                             run.config.exp) for run in runs}
    if args.equal_saturation:
        one, two = (saturation(images) for images in samples.values())
        samples[other.exp] = saturated(samples[other.exp], one / two)
    for network, square in [(each, square) for each in networks for square in getattr(each, "squares", SQUARES)]:
        distances, own = Distances(network, config.data.name, blurred(train[:REFERENCE], square),
                                   blurred(test, square), args.stats_root / f"square{square}"), None
        for exp, images in samples.items():
            measured = blurred(images, square)
            record, estimates = distances.measure(measured, extract_shared(network, measured))
            own = own or estimates
            line = {"exp": exp, "seed": config.seed, "step": step, "square": square, "sampler": ev.sampler,
                    "nfe": ev.nfe, "precision": used, "saturation": saturation(images),
                    "equal_saturation": args.equal_saturation, **record, **differences(estimates, own)}
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
