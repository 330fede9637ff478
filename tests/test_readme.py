"""The README's commands, as they stand there, in a copy of the checkout with a profile that makes runs small."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = """
[profiles.tiny]
data.name = "shapes"
model = {base_channels = 4, channel_mults = [1, 1, 1], num_res_blocks = 1, attn_resolutions = []}
train = {total_steps = 4, checkpoint_every = 2}
log.every = 1
grid = {every = 4, n = 4, nfe = 2}
eval = {every = 2, profile_images = 2, features = "lite0", nfe = 2, n_samples = 4, final_n_samples = 4}
curvature = {every = 2, num_probes = 2}
"""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(block):
    """Its command lines without comments, those joined by && apart."""
    return [part.strip() for line in block.splitlines() for part in line.split("#")[0].split("&&") if part.strip()]


@pytest.mark.long
def test_every_command_of_the_readme(tmp_path):
    """Left out: the install, pytest and the smoke run, which CI runs; snakemake, which test_workflow.py runs."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, checkout)
    (own,), toml = blocks("toml"), (ROOT / "experiments.toml").read_text(encoding="utf-8")
    (checkout / "experiments.toml").write_text(toml + TINY + own, encoding="utf-8")
    (checkout / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(checkout / "images" / f"{i}.png")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

    def run(command):
        command = command.replace("DIR", "data").replace("FOLDER_OR_NPZ", "images")
        python, script, *args = shlex.split(command)
        args += ["--profile", "tiny"] * (script == "train.py" and "--exp" in args)
        args += ["--features", "lite0"] * (script == "fid.py")
        args = ["8" if old in ("64", "1000") else old for old in args]  # samples
        args = ["1,2" if old == "10,20,50" else old for old in args]    # NFE; the tiny run's T is 1,000
        args = ["2" if old == "50" else old for old in args]
        if script == "train.py" and "--exp" in args and args[2:] == ["--data-root", "data", "--profile", "tiny"]:
            args.append("--overwrite")  # the README has two ways to start this run
        done = subprocess.run([sys.executable, script, *args], cwd=checkout, env=env, capture_output=True, text=True)
        assert python == "python" and done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout

    bash = [command for block in blocks("bash") for command in commands(block)
            if not command.startswith((".venv", "python3 -m venv", "snakemake"))]
    assert len(bash) == 17
    for exp in ("E5", "E6"):  # which the reports compare
        run(f"python train.py --exp {exp}")
    for command in bash:
        run(command)
    assert (checkout / "elsewhere" / "E8c" / "seed1" / "done.json").exists()
    assert (checkout / "runs" / "figures" / "per_t_E6_mine.png").exists()
    assert (checkout / "runs" / "reports" / "E6_mine" / "E6_mine.md").exists()


def test_the_code_of_the_readme_trains():
    """The lines on the weighting, with the names that they take for granted."""
    from diffusion import Diffusion, linear_betas
    from weighting import loss_weights
    scale = torch.ones((), requires_grad=True)
    names = {"Diffusion": Diffusion, "linear_betas": linear_betas, "loss_weights": loss_weights,
             "model": lambda x_t, t: scale * x_t, "x_0": torch.ones(2, 3, 8, 8), "t": torch.tensor([0, 999]),
             "eps": torch.full((2, 3, 8, 8), 2.0)}
    (code,) = blocks("python")
    exec(code, names)
    w, d = names["w"], names["diffusion"]
    errors = [(2 - (d.alphas_cumprod[t].sqrt() + 2 * (1 - d.alphas_cumprod[t]).sqrt())).item() ** 2 for t in (0, 999)]
    assert w[0] == pytest.approx(5 / 9999, rel=1e-3)
    assert names["loss"].item() == pytest.approx((errors[0] * 5 / 9999 + errors[1]) / 2, rel=1e-3)
    names["loss"].backward()
    assert scale.grad.isfinite()
