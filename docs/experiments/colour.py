"""Are a run's saturated samples due to the mean colour of eps_hat? It is set right above a timestep, and samples drawn.

    python docs/experiments/colour.py runs/E1/seed1077 --step 10000 > colour.jsonl

At high t the channel means of eps_hat should follow those of x_t. Here they are replaced, at t > ABOVE, by the best
linear estimate from x_t's channel means (evaluate.best_mean_slope). Prints a line for each sampler, as it is and
corrected, from the same noise: distances, and the samples' spread of mean colours and texture beside the data's.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from config import default
from data import load_images, to_model_range
from diffusion import SAMPLERS, Diffusion
from distances import Distances, extract_shared
from errors import UserError, argument_parser, run_script
from evaluate import best_mean_slope, sample_images
from fid import feature_network
from parallel import precision
from runs import load_run


class Corrected(nn.Module):
    """A network that predicts eps, with the channel means of eps_hat replaced at t > above by the best linear ones."""

    def __init__(self, model: nn.Module, diffusion: Diffusion, images: Tensor, above: int):
        """images: uint8 (N, 3, H, W), whose channel means give the linear estimate its mean and variance."""
        super().__init__()
        self.model, self.above = model, above
        self.image_channels, self.image_size = model.image_channels, model.image_size
        self.slope = torch.tensor(best_mean_slope(diffusion, images, list(range(diffusion.T))))  # (T,)
        self.signal = diffusion.alphas_cumprod.cpu().sqrt()                                      # (T,)
        self.mean = to_model_range(images).mean(dim=(0, 2, 3))[:, None, None]                    # (3, 1, 1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """As in sampling, all t of a batch must be equal."""
        eps_hat, now = self.model(x_t, t), int(t[0])
        if now <= self.above:
            return eps_hat
        x_bar, eps_bar = (a.mean(dim=(2, 3), keepdim=True) for a in (x_t, eps_hat))
        best = self.slope[now].item() * (x_bar - self.signal[now].item() * self.mean.to(x_t.device))
        return eps_hat - eps_bar + best.to(eps_hat.dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--above", type=int, default=500, help="the last timestep that is left as it is")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--step", type=int, help="a milestone; the last checkpoint by default")
    parser.add_argument("--data-root", default=default("data.root"), help="folder of CIFAR-10; default %(default)s")
    parser.add_argument("--stats-root", default=default("eval.stats_root"), help="folder of reference statistics")
    args = parser.parse_args(argv)
    config, step, _, ema, diffusion = load_run(args.run_dir, "cpu", args.step)
    if diffusion.prediction != "eps" or config.eval.features == "none" or args.n < 2:
        raise UserError(f"{args.run_dir}: needs eps-prediction, eval.features and --n of 2 or more")
    train, test = (load_images(config.data.name, args.data_root, split) for split in (True, False))
    network = feature_network(config.eval.features, default("eval.inception_weights"), "cpu")
    distances, nfe = Distances(network, config.data.name, train, test, args.stats_root), config.eval.nfe
    used = precision(config.eval.amp, torch.device("cpu"))
    models = {"as it is": ema, "corrected": Corrected(ema, diffusion, test, args.above)}
    for sampler in SAMPLERS:
        for name, model in models.items():
            samples = sample_images(model, diffusion, args.n, sampler, nfe, config.seed, used, f"{sampler}, {name}")
            record, _ = distances.measure(samples, extract_shared(network, samples))
            line = {"exp": config.exp, "seed": config.seed, "step": step, "mean_colour": name, "above": args.above,
                    "sampler": sampler, "nfe": nfe, "precision": used, **record}
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
