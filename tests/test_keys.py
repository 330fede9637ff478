"""Every key of the config does what it is for: with another value, what it is for changes."""

from functools import cache

import pytest
import torch
from conftest import same, set_flags, tiny_network

import train
from checkpoint import load_checkpoint, load_file
from config import SETTABLE
from data import make_shapes

# A run of every part: 6 steps, milestones at 3 and 6.
BASE = ["data.name=shapes", "model.base_channels=4", "model.channel_mults=[1,1]", "model.num_res_blocks=1",
        "model.attn_resolutions=[16]", "model.dropout=0.2", "diffusion.num_timesteps=10", "loss.weighting=minsnr",
        "train.total_steps=6", "train.checkpoint_every=2", "log.every=3", "grid.every=3", "grid.n=2", "grid.nfe=2",
        "eval.every=3", "eval.profile_images=3", "eval.features=inception", "eval.nfe=2", "eval.n_samples=4",
        "eval.final_n_samples=6", "curvature.every=3", "curvature.num_probes=2"]

# key -> (another value, what must change with it)
CASES = {
    "seed": ("5", "model"), "data.name": ("cifar10", "model"), "data.root": ("elsewhere", "model"),
    "model.base_channels": ("8", "model"), "model.channel_mults": ("[2,2]", "model"),
    "model.num_res_blocks": ("2", "model"), "model.attn_resolutions": ("[32]", "model"),
    "model.dropout": ("0.4", "model"), "diffusion.beta_schedule": ("cosine", "model"),
    "diffusion.num_timesteps": ("9", "model"), "diffusion.prediction": ("v", "model"),
    "loss.weighting": ("constant", "model"), "loss.gamma": ("1", "model"),
    "train.total_steps": ("5", "model"), "train.batch_size": ("3", "model"), "train.lr": ("1e-3", "model"),
    "train.grad_clip": ("1e-3", "model"), "train.amp": ("false", "model"), "eval.amp": ("true", "results.jsonl"),
    "train.checkpoint_every": ("5", "previous"), "ema.decay": ("0.1", "ema"), "log.every": ("2", "loss.jsonl"),
    "grid.every": ("2", "grids"), "grid.n": ("3", "grids"), "grid.sampler": ("ddpm", "grids"),
    "grid.nfe": ("3", "grids"),
    "eval.every": ("2", "results.jsonl"), "eval.profile_t": ("dense", "per_t.jsonl"),
    "eval.profile_images": ("2", "per_t.jsonl"), "eval.features": ("none", "results.jsonl"),
    "eval.inception_weights": ("other", "results.jsonl"), "eval.stats_root": ("other_stats", "stats"),
    "eval.nfe": ("3", "results.jsonl"), "eval.sampler": ("ddim", "results.jsonl"),
    "eval.n_samples": ("5", "results.jsonl"), "eval.final_samplers": ('["ddim"]', "results.jsonl"),
    "eval.final_n_samples": ("5", "results.jsonl"), "curvature.every": ("2", "curvature.jsonl"),
    "curvature.num_probes": ("3", "curvature.jsonl"),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """outcome("loss.gamma=1") -> everything that such a run leaves behind, by name. One run per set of overrides."""
    def images(name, root, split=True):
        return (make_shapes(80, "train" if split else "test") + len(name) + len(root)).clamp(max=255)

    def network(name, weights, device):
        net = tiny_network()
        net.weight += len(weights)
        net.weights_hash = weights
        return net

    @cache
    def run(*overrides, bf16=False):
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(train, "load_images", images)
            patch.setattr(train, "feature_network", network)
            patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
            assert train.main(["--exp", "E2", "--device", "cpu", *set_flags(*BASE, *overrides)]) == 0
        (run_dir,) = (folder / "runs" / "E2").iterdir()
        state = load_checkpoint(run_dir / "checkpoints")
        left = {key: state[key] for key in ("model", "ema")}
        left["previous"] = load_file(run_dir / "checkpoints" / "previous.pt")["step"]
        left |= {path.name: path.read_bytes() for path in run_dir.glob("*.jsonl") if path.name != "timing.jsonl"}
        left["grids"] = {path.name: path.read_bytes() for path in (run_dir / "grids").iterdir()}
        left["stats"] = sorted(str(path.relative_to(folder)) for path in folder.glob("*stats/*"))
        return left

    return run


@pytest.mark.filterwarnings("ignore:.*the covariance is singular")
@pytest.mark.parametrize("key", SETTABLE)
def test_a_key_changes_what_it_is_for(outcome, key):
    value, what = CASES[key]
    bf16 = key in ("train.amp", "eval.amp")  # which acts on hardware that has bf16
    also = ["diffusion.num_timesteps=50"] * (key == "eval.profile_t")  # of 10 timesteps both grids have all
    base, other = outcome(*also, bf16=bf16), outcome(*also, f"{key}={value}", bf16=bf16)
    assert not same(base[what], other[what])
    if what != "model":  # nothing that is measured reaches training
        assert same(base["model"], other["model"])
    if key == "eval.amp":  # the per-t profile and the curvature stay fp32, and the samples say what they are
        assert base["curvature.jsonl"] == other["curvature.jsonl"] and base["per_t.jsonl"] == other["per_t.jsonl"]
        assert b'"precision": "bf16"' in other["results.jsonl"] and b'"precision": "fp32"' in base["results.jsonl"]
        assert base["grids"] != other["grids"]


@pytest.mark.filterwarnings("ignore:.*the covariance is singular")
def test_without_bf16_all_is_fp32(outcome):
    assert same(outcome("eval.amp=true", bf16=False), outcome("train.amp=false", bf16=True))
