"""Does VGG16 see less in Min-SNR's samples because their colours are less saturated? From the grids of both arms.

    python docs/experiments/saturation.py --step 10000 > saturation.jsonl

Reads grids/step_STEP_ddpm50.png of all seeds that have it in E1 and E2. Prints a line for each: the saturation of both
arms, and the change of the activations (VGG16's features, summed; samples averaged over squares of 4 pixels) from
vanilla's to Min-SNR's, in percent, with half of its 95 % interval (paired over the samples). `change_equal`: the same
with Min-SNR's samples made as saturated as vanilla's.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from blur import VGG16, blurred, saturated, saturation
from check import EXPS
from errors import UserError, argument_parser, run_script
from fid import extract
from report import Z
from runs import find_runs, paired_stderr


def read_grid(path: Path, size: int = 32) -> Tensor:
    """The images, uint8 (N, 3, size, size), of a full grid that data.grid_png has written."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))[1::2, 1::2]).permute(2, 0, 1)  # half the size
    tiles = pixels[:, 1:, 1:].unfold(1, size, size + 1).unfold(2, size, size + 1)  # (3, rows, columns, size, size)
    return tiles.flatten(1, 2).transpose(0, 1).contiguous()


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--step", type=int, default=10_000)
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "results" / "runs")
    args = parser.parse_args(argv)
    arms = [{run.seed: path for run in find_runs(args.runs, exp)
             if (path := run.path / "grids" / f"step_{args.step:06d}_ddpm50.png").exists()} for exp in EXPS]
    seeds = sorted(arms[0].keys() & arms[1].keys())
    if not seeds:
        raise UserError(f"{args.runs}: no seed has a grid of step {args.step} in both {' and '.join(EXPS)}")
    network = VGG16()

    def activation(images: Tensor) -> Tensor:  # (N,)
        return extract(network, blurred(images, 4)).double().sum(dim=1)

    for seed in seeds:
        one, two = (read_grid(arm[seed]) for arm in arms)
        line = {"seed": seed, "step": args.step, "n": len(one), "saturation": [saturation(one), saturation(two)]}
        own, equal = activation(one), saturated(two, saturation(one) / saturation(two))
        for name, images in (("change", two), ("change_equal", equal)):
            relative = 100 * activation(images) / own.mean()
            half = Z * paired_stderr(relative.numpy(), (100 * own / own.mean()).numpy())
            line |= {name: relative.mean().item() - 100, f"{name}_half": half}
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
