"""Why the notes' FID never moved: strided DDPM with adjacent-step coefficients, run on denoisers that are exact.

    python docs/experiments/why_204.py        # writes why_204.png and why_204.svg, prints the table of why_204.md

No network and no training: with an exact denoiser, whatever is wrong with the output is the sampler's doing.
"""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from data import make_shapes, to_model_range, to_uint8
from diffusion import Diffusion, Model, ddim_sample, ddpm_sample, linear_betas, spaced_timesteps
from rng import generator

MEAN, STD = 0.3, 0.5  # every pixel of x_0 is N(0.3, 0.5^2)
NFES = (10, 20, 50, 100, 200, 500, 1000)
NOTES_NFE = 50
N_PIXELS = 40_000
N_IMAGES = 256
GRAIN = 0.05  # std of the pixel noise that belongs to x_0 in the pictures; why not 0: see the page
HERE = Path(__file__).parent


# ---- a denoiser that makes no error ----

def exact_denoiser(diffusion: Diffusion, means: Tensor, std: float) -> Model:
    """E[eps | x_t] where x_0 is one of `means` (N, ...), each equally likely, plus N(0, std^2) in every pixel.

    Given which one, x_t is Gaussian around sqrt(ac) times it, with variance ac std^2 + 1 - ac; so the posterior over
    `means` is a softmax, and eps_hat is affine in x_t and in the average of `means` under it.
    """
    flat = means.flatten(1)  # (N, CHW)

    def model(x_t, t):
        ac = diffusion.alphas_cumprod[t][:, None]  # (B, 1)
        x, var = x_t.flatten(1), ac * std**2 + 1 - ac
        # of -|x - sqrt(ac) mean|^2 / (2 var), without |x|^2: it is the same for all, and a softmax does not see it
        logits = (ac.sqrt() * x @ flat.T - ac * flat.square().sum(1) / 2) / var  # (B, N)
        return ((1 - ac).sqrt() * (x - ac.sqrt() * (logits.softmax(1) @ flat)) / var).reshape(x_t.shape)
    return model


# ---- the notes' sampler, in the notation of diffusion.py ----

def ac_at(diffusion: Diffusion, t: int) -> float:
    """alphas_cumprod[t]; t = -1 is the clean image."""
    return diffusion.alphas_cumprod[t].item() if t >= 0 else 1.0


@torch.no_grad()
def adjacent_step_ddpm(model: Model, diffusion: Diffusion, x_T: Tensor, nfe: int,
                       generator: torch.Generator | None = None) -> Tensor:
    """WRONG ON PURPOSE: the notes' sampler, kept here to be measured. ddpm_sample in diffusion.py is the right one.

    It visits nfe of T timesteps and takes each step with the coefficients of t -> t - 1; at the next step it tells the
    model that x_t is at the next visited timestep, where it has not got to. Like the notes, it does not clip x_0_hat.
    """
    x_t = x_T
    for t in spaced_timesteps(diffusion.T, nfe).tolist():
        s = t - 1  # <- the error: has to be the next visited timestep
        ac_t, ac_s, beta = ac_at(diffusion, t), ac_at(diffusion, s), diffusion.betas[t].item()
        t = torch.full((len(x_t),), t)
        x_0_hat = diffusion.predict_x0(x_t, t, model(x_t, t))
        x_t = (math.sqrt(ac_s) * beta * x_0_hat + math.sqrt(1 - beta) * (1 - ac_s) * x_t) / (1 - ac_t)  # eq. 7
        if ac_s < 1:
            z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype)
            x_t = x_t + math.sqrt((1 - ac_s) / (1 - ac_t) * beta) * z
    return x_t


# ---- the same three samplers as numbers: x_s = on_x x_t - on_eps eps_hat + sigma z ----

def ddpm_coefficients(ac_t: float, ac_s: float, beta: float) -> tuple[float, float, float]:
    """on_x, on_eps, sigma of one DDPM step (Ho et al. 2020, eq. 11, with the variance of eq. 7)."""
    return (1 / math.sqrt(1 - beta), beta / math.sqrt((1 - beta) * (1 - ac_t)),
            math.sqrt((1 - ac_s) / (1 - ac_t) * beta))


def adjacent_step(diffusion: Diffusion, t: int, s: int) -> tuple[float, float, float]:
    """The notes' error: s goes unused."""
    return ddpm_coefficients(ac_at(diffusion, t), ac_at(diffusion, t - 1), diffusion.betas[t].item())


def respaced_step(diffusion: Diffusion, t: int, s: int) -> tuple[float, float, float]:
    ac_t, ac_s = ac_at(diffusion, t), ac_at(diffusion, s)
    return ddpm_coefficients(ac_t, ac_s, 1 - ac_t / ac_s)


def ddim_step(diffusion: Diffusion, t: int, s: int) -> tuple[float, float, float]:
    """Song et al. 2021, eq. 12 with sigma = 0."""
    ac_t, ac_s = ac_at(diffusion, t), ac_at(diffusion, s)
    return math.sqrt(ac_s / ac_t), math.sqrt(ac_s / ac_t * (1 - ac_t)) - math.sqrt(1 - ac_s), 0.0


ADJACENT, RESPACED, DDIM = "adjacent-step DDPM", "respaced DDPM", "DDIM"
STEPS = {ADJACENT: adjacent_step, RESPACED: respaced_step, DDIM: ddim_step}
SHOWN = [(ADJACENT, 0), (ADJACENT, NOTES_NFE), (RESPACED, NOTES_NFE), (DDIM, NOTES_NFE), (ADJACENT, 1000)]  # pictures


def chain(name: str, diffusion: Diffusion, nfe: int) -> Iterator[tuple[int, float, float, float]]:
    """t, on_x, on_eps and sigma of every step, in the order of sampling."""
    ts = spaced_timesteps(diffusion.T, nfe).tolist()
    for t, s in zip(ts, [*ts[1:], -1], strict=True):
        yield t, *STEPS[name](diffusion, t, s)


def exact_moments(name: str, diffusion: Diffusion, nfe: int) -> tuple[float, float]:
    """Mean and std of the output with the exact Gaussian denoiser.

    eps_hat = slope (x_t - sqrt(ac) MEAN), so a step is affine in x_t, and mean and variance follow without sampling.
    """
    mean, var = 0.0, 1.0  # of x_T
    for t, on_x, on_eps, sigma in chain(name, diffusion, nfe):
        ac = ac_at(diffusion, t)
        slope = math.sqrt(1 - ac) / (ac * STD**2 + 1 - ac)
        mean = on_x * mean - on_eps * slope * (mean - math.sqrt(ac) * MEAN)
        var = (on_x - on_eps * slope) ** 2 * var + sigma**2
    return mean, math.sqrt(var)


def noise_and_pull(name: str, diffusion: Diffusion, nfe: int) -> tuple[float, float]:
    """What a sampler fixes before any network is asked.

    Unrolled, the output is Z - sum_t c_t eps_hat(x_t, t): Z holds x_T and all the z, the c_t are numbers.
    Returns the RMS of Z and the sum of the c_t.
    """
    var, pull = 1.0, 0.0
    for _, on_x, on_eps, sigma in chain(name, diffusion, nfe):
        var, pull = on_x**2 * var + sigma**2, on_x * pull + on_eps
    return math.sqrt(var), pull


def needed_rms(diffusion: Diffusion) -> float:
    """The RMS that eps_hat must reach at some step if adjacent steps are to end at the data's RMS.

    By the triangle inequality RMS(x_0) >= RMS(Z) - (sum of c_t) (the largest RMS of eps_hat).
    """
    noise, pull = noise_and_pull(ADJACENT, diffusion, NOTES_NFE)
    return (noise - math.hypot(MEAN, STD)) / pull


def frechet(mean: float, std: float) -> float:
    """Squared Frechet (2-Wasserstein) distance from N(mean, std^2) to N(MEAN, STD^2): FID's formula in 1-D."""
    return (mean - MEAN) ** 2 + (std - STD) ** 2


# ---- what the page shows ----

def samplers() -> dict[str, Callable]:
    """name -> sample(model, diffusion, x_T, nfe, generator), none of them clipping x_0_hat."""
    return {
        ADJACENT: adjacent_step_ddpm,
        RESPACED: lambda model, diffusion, x_T, nfe, rng: ddpm_sample(model, diffusion, x_T, nfe, rng, clip_x0=False),
        DDIM: lambda model, diffusion, x_T, nfe, rng: ddim_sample(model, diffusion, x_T, nfe, clip_x0=False),
    }


def sampled_moments(name: str, diffusion: Diffusion, nfe: int, n: int = N_PIXELS) -> tuple[float, float]:
    """Mean and std of n pixels sampled with the exact Gaussian denoiser."""
    x_T = torch.randn(1, n, generator=generator(0, "why_204/x_T", nfe), dtype=torch.float64)  # one image of n pixels
    model = exact_denoiser(diffusion, torch.full_like(x_T, MEAN), STD)
    x_0 = samplers()[name](model, diffusion, x_T, nfe, generator(0, "why_204/z", nfe))
    return x_0.mean().item(), x_0.std().item()


def sample_images(name: str, diffusion: Diffusion, nfe: int, images: Tensor, n: int = 6) -> Tensor:
    """(n, 3, 32, 32) sampled with the exact denoiser of `images`; nfe = 0 is x_T itself, the same for every sampler."""
    x_T = torch.randn(n, *images.shape[1:], generator=generator(0, "why_204/image/x_T"), dtype=torch.float64)
    if nfe == 0:
        return x_T
    model = exact_denoiser(diffusion, images, GRAIN)
    return samplers()[name](model, diffusion, x_T, nfe, generator(0, "why_204/image/z"))


def distance_to_images(x: Tensor, images: Tensor) -> float:
    """RMS per pixel from each of x to the nearest of `images`, averaged over x."""
    return (torch.cdist(x.flatten(1), images.flatten(1)).min(1).values / math.sqrt(x[0].numel())).mean().item()


def shapes_images() -> Tensor:
    """float64 (N_IMAGES, 3, 32, 32) in [-1, 1]."""
    return to_model_range(make_shapes(N_IMAGES)).double()


def table(diffusion: Diffusion) -> str:
    """The Markdown table of the page, all of it from closed forms: the same digits on every machine."""
    heads = " | ".join(f"{name}: mean, std, d²" for name in STEPS)
    lines = [f"| NFE | noise removed by adjacent steps | {heads} |", "|---:|---:|" + "---|" * len(STEPS)]
    for nfe in NFES:
        removed = (diffusion.betas[spaced_timesteps(diffusion.T, nfe)].sum() / diffusion.betas.sum()).item()
        cells = []
        for name in STEPS:
            mean, std = exact_moments(name, diffusion, nfe)
            cells.append(f"{mean:.3f}, {std:.3f}, {frechet(mean, std):#.2g}")
        lines.append(f"| {nfe} | {removed:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Okabe & Ito's colours; markers and dashes tell the samplers apart without colour too.
STYLES = {
    ADJACENT: {"color": "#D55E00", "linestyle": "-", "marker": "X", "markersize": 8},
    RESPACED: {"color": "#0072B2", "linestyle": "--", "marker": "o", "markersize": 9, "markerfacecolor": "none"},
    DDIM: {"color": "#009E73", "linestyle": ":", "marker": "^", "markersize": 5},
}


def draw_curves(axes, diffusion: Diffusion) -> None:
    """Mean, std and Frechet distance against NFE: closed forms as lines, samples as markers."""
    def columns(moments):
        return zip(*((mean, std, frechet(mean, std)) for mean, std in moments), strict=True)

    fine = sorted({round(10 ** (1 + 2 * i / 40)) for i in range(41)})  # 10 to 1000
    for name, style in STYLES.items():
        exact = columns(exact_moments(name, diffusion, nfe) for nfe in fine)
        sampled = columns(sampled_moments(name, diffusion, nfe) for nfe in NFES)
        for ax, line, points in zip(axes, exact, sampled, strict=True):
            ax.plot(fine, line, color=style["color"], linestyle=style["linestyle"], linewidth=1.8)
            ax.plot(NFES, points, **style | {"linestyle": "none"}, markeredgewidth=1.2)
            ax.plot([], [], **style, linewidth=1.8, label=name)  # line and marker together, for the legend
    panels = [  # quantity, its value for data and for pure noise, with the side of the line where the label is free
        ("mean of x_0", (MEAN, "above"), (0.0, "below"), (-0.03, 0.34)),
        ("std of x_0", (STD, "above"), (1.0, "above"), (0.28, 1.06)),
        ("Fréchet distance d² to the data", (0.0, "below"), (frechet(0, 1), "above"), (-0.03, 0.38))]
    for ax, (ylabel, data, noise, ylim) in zip(axes, panels, strict=True):
        ax.set(xscale="log", xlabel=f"NFE (of T = {diffusion.T} timesteps)", ylabel=ylabel, ylim=ylim)
        ax.set_xticks(NFES, [str(nfe) for nfe in NFES])
        ax.minorticks_off()
        for text, x, (y, side) in (("data", "left", data), ("pure noise", "right", noise)):
            ax.axhline(y, color="0.35", linewidth=0.9, linestyle=(0, (6, 3)), zorder=0)
            ax.annotate(text, (0.02 if x == "left" else 0.98, y), (0, 7 if side == "above" else -5), fontsize=9,
                        xycoords=("axes fraction", "data"), textcoords="offset points", color="0.25", ha=x,
                        va="bottom" if side == "above" else "top")
        ax.axvline(NOTES_NFE, color="0.85", linewidth=6, zorder=-1, label="the notes' NFE")


def draw_images(axes, diffusion: Diffusion) -> None:
    """One block of samples per axis, two rows of three; the same x_T in each."""
    images = shapes_images()
    for ax, (name, nfe) in zip(axes, SHOWN, strict=True):
        x = to_uint8(sample_images(name, diffusion, nfe, images))
        x = torch.nn.functional.pad(x, (1, 1, 1, 1), value=255)
        x = x.unflatten(0, (2, 3)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (2 (H+2), 3 (W+2), 3)
        ax.imshow(x.numpy(), interpolation="nearest")
        ax.set_title(f"{name}\nNFE {nfe}" if nfe else "pure noise\nx_T of all the others", fontsize=10,
                     color=STYLES[name]["color"] if nfe else "0.25")
        ax.axis("off")


def draw(diffusion: Diffusion, folder: Path) -> None:
    import matplotlib  # here, so that the tests of the numbers need not pay for it
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # a fixed salt and no date: the same SVG from every run
    settings = {"svg.hashsalt": "why_204", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings):
        figure = plt.figure(figsize=(12, 6.2), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.7, 1))
        curves = top.subplots(1, 3)
        draw_curves(curves, diffusion)
        top.legend(*curves[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        draw_images(bottom.subplots(1, 5), diffusion)
        figure.savefig(folder / "why_204.png", dpi=130)
        figure.savefig(folder / "why_204.svg", metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    diffusion = Diffusion(linear_betas())
    print(table(diffusion))
    print(f"\npure noise: mean 0, std 1, d² {frechet(0, 1):.2g}")
    for name in (ADJACENT, RESPACED):
        noise, pull = noise_and_pull(name, diffusion, NOTES_NFE)
        print(f"{name}, NFE {NOTES_NFE}: RMS of Z {noise:.3f}, sum of c_t {pull:.3f}")
    print(f"for the data's RMS, adjacent steps need an eps_hat of RMS {needed_rms(diffusion):.2f} or more")
    images = shapes_images()
    for name, nfe in SHOWN:
        away = distance_to_images(sample_images(name, diffusion, nfe, images), images)
        print(f"{f'{name}, NFE {nfe}' if nfe else 'pure noise'}: RMS per pixel to the nearest image {away:.2f}")
    draw(diffusion, HERE)


if __name__ == "__main__":
    main()
