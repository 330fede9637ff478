"""How noisy are the gradients of two runs? The noise scale does not change if the loss is multiplied by a constant.

    python docs/experiments/gradient.py runs/E1/seed1077 runs/E2/seed1077 --step 10000 > gradient.jsonl

For each network (raw weights, dropout on) and each run's loss: gradients g of N single training examples, with the same
images, t, eps and dropout masks for all. Prints a line for each network and loss:
norm: |E g|, the norm of the mean gradient.
noise_scale: tr cov(g) / |E g|^2, the batch size at which the noise of the mean gradient equals its signal (McCandlish
et al. 2018, eq. 2.9).
square_share: the part of E |g|^2 from examples with t < AT.
cosine: of the mean gradients of examples with t < AT and with t >= AT; null if one of them is lost in noise.
Each has its standard error (jackknife over 10 groups of examples), and so have the ratios of the first three to the
first line. Errors are of the examples only; another checkpoint or seed can differ by more. At base 32 and N = 4,000 it
takes nine minutes on one thread and 1 GB.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import default
from data import load_images, to_model_range
from diffusion import Diffusion
from errors import UserError, argument_parser, run_script
from rng import generator, seed_global
from runs import load_run, weights_of

GROUPS = 10


def sums(model: nn.Module, diffusion: Diffusion, images: Tensor, weights: list[Tensor], at: int,
         n: int) -> tuple[Tensor, Tensor]:
    """For each of the weights (T,), about gradients of n examples in GROUPS groups and two parts, t < at and t >= at:

    inner products of the sums of the gradients, (weights, GROUPS, 2, GROUPS, 2), and sums of their squared norms,
    (weights, GROUPS, 2). float64. images: uint8 (N, 3, H, W).
    """
    params = list(model.parameters())
    total = torch.zeros(len(weights), GROUPS, 2, sum(p.numel() for p in params))
    squares = torch.zeros(len(weights), GROUPS, 2, dtype=torch.float64)
    for i in tqdm(range(n), "gradients", disable=None):
        rng = generator(0, "gradient", i)
        x_0 = to_model_range(images[torch.randint(len(images), (1,), generator=rng)])
        t = torch.randint(diffusion.T, (1,), generator=rng)
        seed_global(0, "gradient_dropout", i)
        mse = diffusion.mse(model, x_0, t, torch.randn(x_0.shape, generator=rng))
        g = torch.cat([part.flatten() for part in torch.autograd.grad(mse.sum(), params)])
        part, norm = int(t >= at), g.double().square().sum()
        for k, w in enumerate(weights):
            total[k, i % GROUPS, part] += w[t].float() * g
            squares[k, i % GROUPS, part] += w[t].item()**2 * norm
    flat = total.flatten(1, 2).double()
    return (flat @ flat.mT).view(len(weights), GROUPS, 2, GROUPS, 2), squares


def summary(inner: Tensor, squares: Tensor, n: int) -> Tensor:
    """norm, noise_scale, square_share and cosine, (4,), of n examples, without bias from n in the products.

    inner: (2, 2), inner products of the sums of both parts; squares: (2,), their sums of squared norms. What would be
    the root of a negative product is not finite.
    """
    products = (inner - squares.diag()) / (n * (n - 1))  # of the parts of E g: over pairs of different examples
    signal, noise = products.sum(), (squares.sum() - inner.sum() / n) / (n - 1)
    cosine = products[0, 1] / (products[0, 0].sqrt() * products[1, 1].sqrt())
    return torch.stack([signal.sqrt(), noise / signal, squares[0] / squares.sum(), cosine])


def without_each(inner: Tensor, squares: Tensor, n: int) -> Tensor:
    """The summary without one of the groups each, (GROUPS, 4). inner: (GROUPS, 2, GROUPS, 2), squares: (GROUPS, 2)."""
    kept = [[j for j in range(GROUPS) if j != k] for k in range(GROUPS)]
    return torch.stack([summary(inner[rest][:, :, rest].sum(dim=(0, 2)), squares[rest].sum(dim=0), n - n // GROUPS)
                        for rest in kept])


def jackknife(values: Tensor) -> Tensor:
    """Standard errors (4,) from the values (GROUPS, 4) without one of the groups each."""
    return ((GROUPS - 1) * values.var(dim=0, correction=0)).sqrt()


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dirs", type=Path, nargs=2, metavar="RUN_DIR")
    parser.add_argument("--n", type=int, default=4000, help="examples, a multiple of 10; default %(default)s")
    parser.add_argument("--at", type=int, default=130, help="clean is t < AT; 130: w = 1 from there on, at gamma 5")
    parser.add_argument("--step", type=int, help="a milestone; the last checkpoint by default")
    parser.add_argument("--data-root", default=default("data.root"), help="folder of CIFAR-10; default %(default)s")
    args = parser.parse_args(argv)
    runs, n = [load_run(run_dir, "cpu", args.step) for run_dir in args.run_dirs], args.n
    config, step, _, _, diffusion = runs[0]
    same = [(run.config.seed, run.config.data.name, run.config.model, run.config.diffusion, run.step) for run in runs]
    if same[0] != same[1]:
        raise UserError(f"{args.run_dirs[0]} and {args.run_dirs[1]} differ in seed, data, model, diffusion or step")
    if n < 2 * GROUPS or n % GROUPS:
        raise UserError(f"--n {n}: must be a multiple of {GROUPS}, from {2 * GROUPS} on")
    if not 0 < args.at < diffusion.T:
        raise UserError(f"--at {args.at}: must be from 1 to T - 1 = {diffusion.T - 1}")
    images = load_images(config.data.name, args.data_root)
    weights, first = [weights_of(run.config, run.diffusion) for run in runs], None
    for network in runs:
        both = sums(network.model.train(), diffusion, images, weights, args.at, n)
        for loss, inner, squares in zip(runs, *both, strict=True):
            value = summary(inner.sum(dim=(0, 2)), squares.sum(dim=0), n)
            without = without_each(inner, squares, n)
            if not (value[:3].isfinite().all() and without[:, :3].isfinite().all()):
                raise UserError(f"--n {n}: too few examples to tell the mean gradient from noise")
            first = first or (value, without)
            line = {"network": network.config.exp, "loss": loss.config.exp, "seed": config.seed, "step": step,
                    "n": n, "at": args.at}
            for end, x, error in (("", value, jackknife(without)),
                                  ("_ratio", value / first[0], jackknife(without / first[1]))):
                for j, name in enumerate(("norm", "noise_scale", "square_share")):
                    line |= {f"{name}{end}": x[j].item(), f"{name}{end}_stderr": error[j].item()}
            line |= {"cosine": value[3].item(), "cosine_stderr": jackknife(without)[3].item()}
            line = {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in line.items()}
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
