import json

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers: benchmarks/requirements.txt")

from benchmarks import peers, run
from model import UNet

COLUMNS = {"benchmark", "work", "peer", "unit", "ours", "theirs", "gain", "gain_range", "rounds"}


@pytest.fixture(autouse=True)
def blas_is_free(monkeypatch):
    """Without variables that the command refuses, whatever the shell has set."""
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("base", [8, *(pytest.param(base, marks=pytest.mark.long) for base in (32, 64))])
def test_diffusers_network_is_ours(base):
    same = run.equal_networks(base)  # raises where it is not
    ours, theirs = same["parameters"]
    assert ours == theirs == sum(p.numel() for p in UNet(base).parameters())
    ours, theirs = same["flops_per_image"]
    assert ours == theirs > 0
    assert same["max_output_difference"] < 1e-4 < 0.1 < same["output_std"]


def test_a_different_network_is_refused(monkeypatch):
    unet = peers.diffusers_unet

    def with_other_eps(config):
        network = unet(config)
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.eps = 0.1
        return network

    monkeypatch.setattr(peers, "diffusers_unet", with_other_eps)
    with pytest.raises(RuntimeError, match="not the same network"):
        run.equal_networks.__wrapped__(8)


def test_flops_are_those_of_the_formula():
    a, conv = torch.randn(8, 8), torch.nn.Conv2d(3, 5, 3, padding=1)
    assert run.flops_of(lambda: a @ a) == 2 * 8**3
    assert run.flops_of(lambda: conv(torch.randn(2, 3, 6, 6))) == 2 * (2 * 6 * 6) * 5 * (3 * 9)


def test_samples_are_those_of_diffusers_scheduler():
    """All but the rounding of the timesteps: at nfe = T there is none."""
    from diffusion import Diffusion, ddim_sample, linear_betas
    eps_hat = torch.randn(1, 3, 8, 8)

    class Peer(torch.nn.Module):
        def forward(self, x_t, t):
            return type("Output", (), {"sample": 0.3 * x_t + 0.1 * eps_hat})

    x_T = torch.randn(2, 3, 8, 8)
    ours = ddim_sample(lambda x_t, t: 0.3 * x_t + 0.1 * eps_hat, Diffusion(linear_betas()), x_T, 1000)
    ours = ((ours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    assert (ours.int() - peers.diffusers_ddim(Peer(), x_T, 1000).int()).abs().max() <= 1


def test_gain_is_the_median_over_rounds():
    row = run.row("training", "work", "peer", [1.0, 2.0, 4.0], [2.0, 2.0, 40.0])
    assert (row["ours"], row["theirs"], row["gain"], row["gain_range"]) == (2.0, 2.0, 2.0, [1.0, 10.0])


def test_goals_are_read_off_the_rows():
    step = run.row("training", "step", "diffusers", [1.0], [2.0], flops=10, base=64, batch=4,
                   kernels=0.5)
    samples = run.row("sampling", "samples", "diffusers", [4.0], [5.0], "images/s", flops=10, images=20, base=32,
                      kernels=0.5)
    probes = run.row("curvature", "16 probes, both traces", "PyHessian", [31.0], [60.0], step_s=1.0, base=32)
    rows = [step, samples, probes]
    run.finish(rows, {"fp32": 20.0})
    assert (samples["ours"], samples["theirs"]) == (5.0, 4.0) and step["over_floor"] == 2.0
    found = [(goal["value"], goal["met"], goal["best"]) for goal in run.goals(rows)]
    assert found == [(0.5, True, 0.25), (1.25, False, 2.5), (31.0, False, None)]


def test_the_share_of_kernels_is_that_of_products_and_convolutions():
    a, b = torch.randn(2, 512, 512).unbind()
    assert run.kernel_share(lambda: a @ b) > 0.9 and run.kernel_share(lambda: a.sin()) == 0


@pytest.mark.long
@pytest.mark.parametrize("precisions", [["fp32"], ["fp32", "bf16"]])
def test_a_quick_run_writes_its_table(tmp_path, capsys, monkeypatch, precisions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(run, "PRECISIONS", precisions)
    monkeypatch.setattr(run, "kernel_rates", lambda: dict.fromkeys(run.PRECISIONS, 1e11))
    assert run.main(["--quick", "--only", "training", "--only", "sampling", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["quick"] and result["machine"]["threads"] == 2 and result["machine"]["versions"]["diffusers"]
    assert [(row["benchmark"], row["precision"]) for row in result["rows"]] == [
        (name, p) for name in ("training", "sampling") for p in precisions]
    for row in result["rows"]:
        assert row.keys() >= COLUMNS and row["ours"] > 0 and row["floor_s"] > 0
        assert 0 < row["kernels"] < 1
    table = (tmp_path / "results.md").read_text()
    assert table == capsys.readouterr().out.removesuffix("\n")
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len([line for line in lines if "| diffusers |" in line]) == 2
    header, rule, *rows = lines[:4]
    assert {line.count("|") for line in (header, rule, *rows)} == {5 + 3 * len(precisions)}


def test_an_absent_peer_is_one_line(tmp_path, capsys, monkeypatch):
    def absent(quick):
        raise ImportError("No module named 'pyhessian'")

    monkeypatch.setitem(run.BENCHMARKS, "curvature", absent)
    monkeypatch.setattr(run, "kernel_rates", lambda: dict.fromkeys(run.PRECISIONS, 1e11))
    assert run.main(["--quick", "--only", "curvature", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "'pyhessian'" in error and "benchmarks/requirements.txt" in error
