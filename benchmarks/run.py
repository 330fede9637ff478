"""Time this project beside its peers: interleaved (A B A B ...) in one process, medians, same threads, same sizes.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/run.py                                  all, about 10 minutes on 2 cores
    python benchmarks/run.py --only training --only sampling
    python benchmarks/run.py --quick --out /tmp/quick         tiny sizes: whether it runs, not how fast
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import interop
from benchmarks import peers
from config import Config, load_config
from data import make_shapes
from parallel import precision
from rng import generator
from runs import weights_of

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
PRECISIONS = ["fp32"] + ["bf16"] * (precision(True, CPU) == "bf16")
PACKAGES = ("torch", "numpy", "scipy", "diffusers", "pytorch-fid", "torch-fidelity", "torchmetrics", "pyhessian")
KERNELS = {f"aten::{name}" for name in ("mkldnn_convolution", "convolution_backward", "mm", "addmm", "bmm")}
Times = dict[str, list[float]]


# ---- measuring ----

def interleaved(work: dict[str, Callable[[], object]], rounds: int, warm_up: bool = True) -> Times:
    """Seconds of each work in each of the rounds, after a round that only warms up."""
    times = {name: [] for name in work}
    for i in range(rounds + warm_up):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def flops_of(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in run().

    Attention is counted in its plain form: the counter knows no fused kernel of the CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def kernel_share(run: Callable[[], object]) -> float:
    """Share of the time of run() that goes into convolutions and matrix products, by torch's profiler.

    Our network and the peer's leave these to the same libraries, so what remains is all that code can gain.
    """
    run()  # warms up
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    seconds = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(s for key, s in seconds.items() if key in KERNELS) / sum(seconds.values())


@torch.no_grad()
def kernel_rates() -> dict[str, float]:
    """FLOP/s of the fastest kernel in each precision: the best of products and 3x3 convolutions of several sizes."""
    best = {}
    for name in PRECISIONS:
        dtype, work = {"fp32": torch.float32, "bf16": torch.bfloat16}[name], []
        for n in (1024, 2048):
            a, b = torch.randn(2, n, n).to(dtype).unbind()
            work.append((partial(torch.matmul, a, b), 2 * n**3))
        for B, C, H in ((4, 128, 32), (20, 128, 16), (20, 256, 16)):
            x = torch.randn(B, C, H, H).to(dtype, memory_format=torch.channels_last)
            conv = torch.nn.Conv2d(C, C, 3, padding=1).to(dtype, memory_format=torch.channels_last)
            work.append((partial(conv, x), 2 * B * H * H * C * 9 * C))
        for run, flops in work:
            seconds = min(interleaved({"run": run}, 8)["run"])
            best[name] = max(best.get(name, 0.0), flops / seconds)
    return best


def row(benchmark: str, work: str, peer: str, ours: list[float], theirs: list[float], unit: str = "s",
        **more) -> dict:
    """A line of the table from values per round, less being better. gain: median over rounds of theirs / ours.

    more: precision ("fp32" if absent), flops (of one run of ours), kernels (see kernel_share), step_s (seconds of a
    training step), images (per run, for images/s), base, batch.
    """
    gains = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    return {"benchmark": benchmark, "work": work, "peer": peer, "unit": unit, "ours": statistics.median(ours),
            "theirs": statistics.median(theirs), "gain": statistics.median(gains), "gain_range": [gains[0], gains[-1]],
            "rounds": len(gains), **more}


def experiment(base: int, batch: int, *overrides: str) -> Config:
    return load_config("E6", overrides=["data.name=shapes", f"model.base_channels={base}",
                                        f"train.batch_size={batch}", *overrides])


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """Move every weight a little: a new network predicts exactly 0, whatever its input."""
    rng = generator(0, "benchmark_weights")
    for p in model.parameters():
        p += 0.05 * torch.randn(p.shape, generator=rng)


# ---- against diffusers ----

@cache
def equal_networks(base: int) -> dict:
    """Parameters, FLOPs of a training step per image and outputs of both networks at the same weights.

    Raises RuntimeError where they differ: then their times could not be compared.
    """
    from model import UNet
    ours, theirs = UNet(base), peers.diffusers_unet(experiment(base, 2))
    shake(ours)
    theirs.load_state_dict(interop.to_diffusers(ours))
    rng = generator(0, "benchmark_input")
    x_t, t = torch.randn(2, 3, 32, 32, generator=rng), torch.tensor([3, 700])
    count = {"parameters": [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)],
             "flops_per_image": [flops_of(lambda run=run: run().square().mean().backward()) // 2
                                 for run in (lambda: ours(x_t, t), lambda: theirs(x_t, t).sample)]}
    ours.eval(), theirs.eval()
    with torch.no_grad():
        a, b = ours(x_t, t), theirs(x_t, t).sample
    difference = (a - b).abs().max().item()
    if len(set(count["parameters"])) + len(set(count["flops_per_image"])) > 2 or difference > 1e-4:
        raise RuntimeError(f"base {base}: not the same network as diffusers': {count}, outputs differ by {difference}")
    return {"base": base, **count, "output_std": a.std().item(), "max_output_difference": difference}


def training_pair(base: int, batch: int, precision: str) -> dict[str, Callable[[], object]]:
    """One training step, ours and diffusers', of the same network on the same images."""
    import train
    config = experiment(base, batch, f"train.amp={'true' if precision == 'bf16' else 'false'}")
    images = make_shapes(512)
    state, diffusion = train.new_state(config, CPU)
    w = weights_of(config, diffusion).float()
    shake(state.model)
    peer = peers.DiffusersTraining(config, images, w, precision == "bf16")
    peer.model.load_state_dict(interop.to_diffusers(state.model))
    return {"ours": lambda: train.train_step(config, state, diffusion, w, images), "diffusers": peer}


def training(quick: bool) -> list[dict]:
    rows = []
    for base in (8,) if quick else (32, 64):
        flops = equal_networks(base)["flops_per_image"][0]
        for batch, rounds in ((2, 1),) if quick else ((4, 40 if base == 32 else 25), (64, 4)):
            pairs = {(side, p): run for p in PRECISIONS for side, run in training_pair(base, batch, p).items()}
            times = interleaved(pairs, rounds)
            fp32 = statistics.median(times["diffusers", "fp32"])
            rows += [row("training", f"training step, base {base}, batch {batch}", "diffusers", times["ours", p],
                         times["diffusers", p], precision=p, flops=flops * batch, base=base, batch=batch,
                         kernels=kernel_share(pairs["ours", p]),
                         of_fp32_peer=statistics.median(times["ours", p]) / fp32) for p in PRECISIONS]
    return rows


def sampling(quick: bool) -> list[dict]:
    """At the batch that is best for both, and once as many images as make a chunk of ours in one batch of the peer."""
    from evaluate import CPU_BATCH, sample_images
    from runs import build
    rows = []
    for base, n, nfe, rounds in ((8, 2, 2, 1),) if quick else (
            (32, CPU_BATCH, 50, 4), (64, CPU_BATCH, 50, 2), (32, 100, 10, 2), (64, 100, 10, 2)):
        config = experiment(base, 4)
        model, diffusion = build(config, CPU)
        shake(model.eval())
        peer = peers.diffusers_unet(config).eval()
        peer.load_state_dict(interop.to_diffusers(model))
        x_T = torch.randn(n, 3, 32, 32, generator=generator(0, "x_T"))
        pairs = {}
        for p in PRECISIONS:
            sample_images(model, diffusion, n, "ddim", 1, 0, p)  # warms up in a fiftieth of a round
            peers.diffusers_ddim(peer, x_T, 1, p == "bf16")
            pairs["ours", p] = partial(sample_images, model, diffusion, n, "ddim", nfe, 0, p)
            pairs["diffusers", p] = partial(peers.diffusers_ddim, peer, x_T, nfe, p == "bf16")
        times = interleaved(pairs, rounds, warm_up=False)
        with torch.no_grad():
            flops = n * flops_of(lambda model=model, x=x_T[:1]: model(x, torch.zeros(1, dtype=torch.int64)))
        rows += [row("sampling", f"DDIM, NFE {nfe}, base {base}, {n} images", "diffusers", times["ours", p],
                     times["diffusers", p], "images/s", precision=p, flops=flops * nfe, images=n, base=base,
                     kernels=kernel_share(partial(sample_images, model, diffusion, n, "ddim", 2, 0, p)))
                 for p in PRECISIONS]
    return rows


# ---- Inception and distance ----

def moments(n: int, d: int, seed: int) -> tuple:
    """Mean and covariance of n correlated samples whose spectrum falls by e^10 over d dimensions, as features' do."""
    import numpy as np
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(0).standard_normal((d, d)))[0] * np.exp(-10 * np.arange(d) / d)[:, None]
    x = rng.standard_normal((n, d)) @ mix + 0.01 * seed
    return x.mean(axis=0), np.cov(x, rowvar=False)


def inception(quick: bool) -> list[dict]:
    from fid import InceptionV3
    network = InceptionV3()  # random weights take as long as the published ones, which are a download
    theirs = peers.inceptions(network.state_dict())
    B, rounds = (2, 1) if quick else (16, 3)
    x = torch.randint(256, (B, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "benchmark_images"))
    features = network(x)
    difference = ((theirs["pytorch-fid"](x) - features).norm() / features.norm()).item()
    times = interleaved({name: partial(f, x) for name, f in {"ours": network, **theirs}.items()}, rounds)
    flops = flops_of(partial(network, x))
    return [row("inception", f"Inception features, {B} images of 32x32", peer, times["ours"], times[peer],
                flops=flops, **({"relative_difference": difference} if peer == "pytorch-fid" else {}))
            for peer in theirs]


def distance(quick: bool) -> list[dict]:
    from fid import frechet_distance
    d = 64 if quick else 2048
    reference, theirs, rows = moments(5000, d, 1), peers.distances(), []
    # below n = d covariances are singular; there the two that take eigenvalues do what they do above
    for n, names, rounds in ((5000, list(theirs), 1 if quick else 2), (d // 2, ["pytorch-fid"], 1)):
        sample, values = moments(n, d, 2), {}

        def measure(name, f, sample=sample, values=values):
            values[name] = f(*sample, *reference)

        work = {"ours": partial(frechet_distance, method="eigh"), **{name: theirs[name] for name in names}}
        times = interleaved({name: partial(measure, name, f) for name, f in work.items()}, rounds, warm_up=False)
        rows += [row("distance", f"Frechet distance, d = {d}, n = {n}", peer, times["ours"], times[peer],
                     n=n, values=[values["ours"], values[peer]]) for peer in names]
    return rows


# ---- curvature ----

def curvature(quick: bool) -> list[dict]:
    """One probe, and the 16 probes of a line of curvature.jsonl, which gives the weighted and the unweighted trace."""
    import train
    from curvature import hutchinson_trace, rademacher
    from evaluate import curvature_record
    from taylor import quadratic_forms
    warnings.filterwarnings("ignore", message="Using backward")
    rows, images = [], make_shapes(512)
    for base in (8,) if quick else (32, 64):
        config = experiment(base, 4, f"curvature.num_probes={2 if quick else 16}")
        state, diffusion = train.new_state(config, CPU)
        shake(state.model)
        w = weights_of(config, diffusion).float()
        probed = copy.deepcopy(state.model).eval()
        params, rng = list(probed.parameters()), generator(0, "benchmark_probe")
        x_0, eps = torch.randn(2, 4, 3, 32, 32, generator=rng).unbind()
        t = torch.tensor([100, 350, 600, 850])
        losses = partial(diffusion.eps_mse, probed, x_0, t, eps)
        taylor = partial(quadratic_forms, losses, params, rademacher(params, rng))
        times = interleaved({
            "step": lambda c=config, s=state, d=diffusion, w=w: train.train_step(c, s, d, w, images),
            "taylor": taylor,
            "double": lambda f=losses, p=params: hutchinson_trace(lambda _: f().mean(), p, 1, generator(0, "v")),
            "pyhessian": peers.pyhessian_probe(copy.deepcopy(probed), diffusion.q_sample(x_0, t, eps), t, eps),
            "record": partial(curvature_record, config, 0, probed, diffusion, images)}, 1 if quick else 3)
        more = {"step_s": statistics.median(times["step"]), "base": base}
        flops, P = flops_of(taylor), config.curvature.num_probes
        for name, ours, theirs, extra in (
                ("one probe, every example (Taylor mode)", "taylor", times["pyhessian"], {"flops": flops}),
                ("one probe, one loss (double backward)", "double", times["pyhessian"], {}),
                (f"{P} probes, both traces", "record", [2 * P * s for s in times["pyhessian"]], {"flops": P * flops})):
            rows.append(row("curvature", f"{name}, base {base}", "PyHessian", times[ours], theirs, **extra, **more))
    return rows


# ---- in processes of their own ----

def startup(quick: bool) -> list[dict]:
    """Seconds beyond `import torch`: our `train.py --list`, and importing what diffusers' training step needs."""
    commands = {"torch": ["-c", "import torch"], "ours": ["train.py", "--list"],
                "diffusers": ["-c", "import torch; from diffusers import DDPMScheduler, UNet2DModel; "
                                    "from diffusers.training_utils import EMAModel"]}
    times = interleaved({name: partial(subprocess.run, [sys.executable, *command], cwd=ROOT, check=True,
                                       capture_output=True) for name, command in commands.items()},
                        1 if quick else 7)
    ours, theirs = ([max(a - b, 1e-3) for a, b in zip(times[name], times["torch"], strict=True)]
                    for name in ("ours", "diffusers"))
    return [row("startup", "train.py --list beyond import torch; diffusers: imports only", "diffusers", ours, theirs,
                import_torch_s=statistics.median(times["torch"]))]


def status_mib(field: str) -> float:
    """VmHWM (peak) or VmRSS of this process. Not getrusage: its ru_maxrss starts from the parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def memory_of(side: str, base: int) -> None:
    """Train for a few steps and print MiB: after the imports, and at the peak."""
    import torch._dynamo  # every optimiser imports it at its first step

    import train
    if side == "diffusers":
        import diffusers.training_utils
        _ = diffusers.UNet2DModel, diffusers.DDPMScheduler
    before, config = status_mib("VmRSS"), experiment(base, 4)
    images = make_shapes(64)
    if side == "ours":
        state, diffusion = train.new_state(config, CPU)
        w = weights_of(config, diffusion).float()
        step = partial(train.train_step, config, state, diffusion, w, images)
    else:
        step = peers.DiffusersTraining(config, images, torch.ones(config.diffusion.num_timesteps))
    for _ in range(5):
        step()
    print(json.dumps([before, status_mib("VmHWM")]))


def memory(quick: bool) -> list[dict]:
    base, rounds = (8, 1) if quick else (64, 3)
    peaks = {side: [] for side in ("ours", "diffusers")}
    for _ in range(rounds):
        for side, values in peaks.items():
            done = subprocess.run([sys.executable, __file__, "--memory-of", side, str(base), "--threads",
                                   str(torch.get_num_threads())], check=True, capture_output=True, text=True)
            values.append(json.loads(done.stdout.splitlines()[-1]))
    work = f"training, base {base}, batch 4"
    return [row("memory", f"peak of a process, {work}", "diffusers", [p for _, p in peaks["ours"]],
                [p for _, p in peaks["diffusers"]], "MiB", base=base),
            row("memory", f"peak above its imports, {work}", "diffusers", [p - b for b, p in peaks["ours"]],
                [p - b for b, p in peaks["diffusers"]], "MiB", base=base)]


BENCHMARKS = {f.__name__: f for f in (training, sampling, inception, distance, curvature, startup, memory)}


# ---- goals and the table ----

def finish(rows: list[dict], rates: dict[str, float]) -> None:
    """Add to each row its FLOP floor in seconds and our time over it, steps, and rates where the unit is a rate."""
    for r in rows:
        if "flops" in r:
            r["floor_s"] = r["flops"] / rates[r.get("precision", "fp32")]
            r["over_floor"] = r["ours"] / r["floor_s"]
        if "step_s" in r:
            r["steps"] = [r[side] / r["step_s"] for side in ("ours", "theirs")]
        if r["unit"] == "images/s":
            r["ours"], r["theirs"] = r["images"] / r["ours"], r["images"] / r["theirs"]


def goals(rows: list[dict]) -> list[dict]:
    """Each goal that these rows can answer, with its value and whether it is met.

    best: what the value would be if all but convolutions and matrix products took us no time, where that was measured.
    """
    found = []

    def goal(text: str, value: float, met: bool, best: float | None = None) -> None:
        found.append({"goal": text, "value": value, "met": met, "best": best})

    for r in rows:
        kind, base, p = r["benchmark"], f"base {r.get('base')}", r.get("precision", "fp32")
        if kind == "training" and r["batch"] == 4:
            part = 1 / r["gain"]
            goal(f"training step, {base}, batch 4, {p}: at most 0.80 of diffusers' time", part, part <= 0.80,
                 part * r["kernels"])
            if r["base"] == 64 and p == "bf16":
                goal(f"training step, {base}, batch 4, bf16: at most 0.60 of diffusers' time in fp32",
                     r["of_fp32_peer"], r["of_fp32_peer"] <= 0.60, r["of_fp32_peer"] * r["kernels"])
        elif kind == "sampling":
            goal(f"{r['work']}, {p}: at least 1.3 times diffusers' images/s", r["gain"], r["gain"] >= 1.3,
                 r["gain"] / r["kernels"])
        elif kind == "distance" and r["peer"] == "pytorch-fid":
            goal(f"distance, n = {r['n']}: at least 10 times as fast as pytorch-fid", r["gain"], r["gain"] >= 10)
        elif kind == "curvature" and "both traces" in r["work"]:
            goal(f"16 probes, both traces, {base}: at most 30 training steps", r["steps"][0], r["steps"][0] <= 30)
        elif kind == "memory":
            what = r["work"].split(",")[0]
            goal(f"memory of training, {base}, batch 4, {what}: below diffusers'", 1 / r["gain"], r["gain"] > 1)
    return found


def machine() -> dict:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    from threadpoolctl import threadpool_info
    blas = [f"{i['internal_api']} {i['version']} ({i.get('architecture')})" for i in threadpool_info()
            if i["user_api"] == "blas"]
    return {"cpu": models[0] if models else platform.machine(), "threads": torch.get_num_threads(), "blas": blas,
            "instructions": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
            "versions": versions}


def markdown(result: dict) -> str:
    m = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    lines = ["# Beside the peers", "",
             f"{m['cpu']}, {m['threads']} threads, {m['instructions']}, Python {m['python']}; {versions}. "
             f"numpy's BLAS: {', '.join(m['blas'])}. Fastest kernel: "
             f"{', '.join(f'{p} {rate:.0f} GFLOP/s' for p, rate in m['gflops'].items())}.", ""]
    if result["quick"]:
        lines += ["`--quick`: tiny sizes, of which no time means anything.", ""]
    lines += ["Medians of interleaved rounds in one process. gain: how many times better ours is, median (range) "
              "over the rounds. / floor: our time over that of its FLOPs at the rate of the fastest kernel, a matrix "
              "product or a 3x3 convolution, measured in the same run. steps: in training steps at batch 4. Peers are "
              "called as their examples do, so diffusers' step has torch's default Adam, ours the fused one.", ""]
    header = [f"{p}: ours, peer's | gain | / floor" for p in m["gflops"]]
    lines += [f"| work | peer | {' | '.join(header)} | rounds | steps: ours, peer's |",
              "|---" * (4 + 3 * len(header)) + "|"]
    for work, peer in dict.fromkeys((r["work"], r["peer"]) for r in result["rows"]):
        same, cells = [r for r in result["rows"] if (r["work"], r["peer"]) == (work, peer)], []
        for p in m["gflops"]:
            for r in [r for r in same if r.get("precision", "fp32") == p] or [None]:
                cells += ["", "", ""] if r is None else [
                    f"{r['ours']:.3g}, {r['theirs']:.3g} {r['unit']}",
                    f"{r['gain']:.2f} ({r['gain_range'][0]:.2f} to {r['gain_range'][1]:.2f})",
                    f"{r['over_floor']:.2f}" if "over_floor" in r else ""]
        steps = "{:.1f}, {:.1f}".format(*same[0]["steps"]) if "steps" in same[0] else ""
        lines.append(f"| {work} | {peer} | {' | '.join(cells)} | {same[0]['rounds']} | {steps} |")
    if result["equal_networks"]:
        lines += ["", "The network timed is diffusers' UNet2DModel too:", "",
                  "| base | parameters: ours, theirs | FLOPs per image and step: ours, theirs | outputs differ by |",
                  "|---|---|---|---|"]
        lines += ["| {base} | {0:,}, {1:,} | {2:,}, {3:,} | {max_output_difference:.1e} (their sd: {output_std:.2g}) |"
                  .format(*c["parameters"], *c["flops_per_image"], **c) for c in result["equal_networks"]]
    if result["goals"]:
        lines += ["", "At best: what we would reach if everything but convolutions and matrix products took no time. "
                  "These run in the same libraries on both sides; their share is torch's profiler's.", "",
                  "| goal | measured | | at best |", "|---|---|---|---|"]
        lines += [f"| {g['goal']} | {g['value']:.2f} | {'met' if g['met'] else '**not met**'} | "
                  f"{'' if g['best'] is None else format(g['best'], '.2f')} |" for g in result["goals"]]
    return "\n".join(lines) + "\n"


def run(names: list[str], quick: bool) -> dict:
    """Run the benchmarks named; the content of results.json."""
    rates, rows, networks = kernel_rates(), [], []
    if {"training", "sampling"} & set(names):
        networks = [equal_networks(base) for base in ((8,) if quick else (32, 64))]
    for name in names:
        start = time.perf_counter()
        new = BENCHMARKS[name](quick)
        rates = {p: max(rate, rates[p]) for p, rate in kernel_rates().items()}  # other work only ever lowers them
        rows += new
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    finish(rows, rates)
    gflops = {p: rate / 1e9 for p, rate in rates.items()}
    return {"machine": {**machine(), "gflops": gflops}, "quick": quick, "equal_networks": networks,
            "rows": rows, "goals": [] if quick else goals(rows)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="this benchmark; repeatable")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of results.json and results.md")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", nargs=2, metavar=("SIDE", "BASE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        memory_of(args.memory_of[0], int(args.memory_of[1]))
        return 0
    if forced := {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"} & os.environ.keys():
        print(f"run.py: unset {', '.join(sorted(forced))}: numpy's BLAS is to choose its own kernel", file=sys.stderr)
        return 2
    try:
        result = run(args.only or list(BENCHMARKS), args.quick)
    except ImportError as error:
        print(f"run.py: {error}; pip install -r benchmarks/requirements.txt", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "results.md").write_text(markdown(result))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
