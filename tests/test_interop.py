"""Networks of diffusers: by themselves here, and against diffusers itself in the tests marked long."""

import json

import pytest
import torch
from conftest import tiny_network

import evaluate
import interop
from config import load_config
from data import make_shapes
from diffusion import ddpm_sample
from distances import Distances
from errors import UserError
from evaluate import sample_images
from model import UNet
from rng import generator
from runs import build

SMALL = "model.base_channels=8"
# The config.json and scheduler_config.json of google/ddpm-cifar10-32.
OLD_UNET = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
OLD_SCHEDULER = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
                 "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000,
                 "trained_betas": None, "variance_type": "fixed_large"}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def network(*overrides):
    """Config, network with outputs of about the same size whatever its width, diffusion."""
    config = load_config("E1", overrides=overrides)
    torch.manual_seed(0)
    model, diffusion = build(config, "cpu")
    return config, shaken(model, config.model.base_channels), diffusion


@torch.no_grad()
def shaken(model, base):
    """model with every weight moved: a new one of ours predicts exactly 0."""
    rng = generator(0, "interop_weights")
    for p in model.parameters():
        p += 0.1 * base**-0.5 * torch.randn(p.shape, generator=rng)
    return model.eval()


def old_layout(folder, base):
    """A folder as the first versions of diffusers wrote them, and the network that it holds."""
    _, model, _ = network(f"model.base_channels={base}")
    state = interop.to_diffusers(model)
    for new, old in OLD_NAMES.items():
        state = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in state.items()}
    folder.mkdir()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    widths = {"block_out_channels": [base * mult for mult in (1, 2, 2, 2)], "norm_num_groups": min(32, base // 4)}
    (folder / "config.json").write_text(json.dumps(OLD_UNET | widths))
    (folder / "scheduler_config.json").write_text(json.dumps(OLD_SCHEDULER))
    return model


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def folder(tmp_path):
    interop.write(tmp_path / "small", *network(SMALL))
    return tmp_path / "small"


@pytest.mark.parametrize("overrides", [
    [], ["diffusion.beta_schedule=cosine"],
    ["diffusion.prediction=x0", "diffusion.num_timesteps=7", "grid.nfe=1", "eval.nfe=1"],
    ["diffusion.prediction=v", "diffusion.beta_schedule=linear_zero_snr"],
    ["model.channel_mults=[1]", "model.attn_resolutions=[32]", "model.dropout=0.25"],
    ["model.channel_mults=[1,3,2]", "model.num_res_blocks=1", "model.attn_resolutions=[32,16]"],
])
def test_what_is_written_is_read(tmp_path, overrides):
    config, model, diffusion = network(SMALL, *overrides)
    interop.write(tmp_path / "new" / "folder", config, model, diffusion)
    again, process = interop.read(tmp_path / "new" / "folder")
    assert equal(model, again) and torch.equal(process.betas, diffusion.betas) and not again.training
    assert process.prediction == diffusion.prediction and again.down[0][0].dropout.p == config.model.dropout
    x_t, t = torch.randn(2, 3, 32, 32), torch.tensor([0, 6])
    with torch.no_grad():
        assert torch.equal(model(x_t, t), again(x_t, t))


def test_names_and_layout_are_theirs(folder):
    model = network(SMALL)[1]
    length = int.from_bytes((folder / "unet" / interop.WEIGHTS).read_bytes()[:8], "little")
    content = (folder / "unet" / interop.WEIGHTS).read_bytes()
    header = json.loads(content[8:8 + length])
    attention, third = model.down[3][1], model.down[3][1].qkv.weight[16:32, :, 0, 0]  # k
    entry = header["down_blocks.1.attentions.0.to_k.weight"]
    start, end = entry["data_offsets"]
    assert attention.qkv.weight.shape[0] == 48 and entry["shape"] == [16, 16] and entry["dtype"] == "F32"
    assert content[8 + length + start:8 + length + end] == third.detach().numpy().tobytes() and length % 8 == 0
    assert {"mid_block.resnets.1.conv2.bias", "mid_block.attentions.0.to_out.0.weight", "conv_norm_out.weight",
            "up_blocks.2.attentions.2.group_norm.bias", "up_blocks.0.upsamplers.0.conv.weight",
            "down_blocks.2.downsamplers.0.conv.bias", "time_embedding.linear_2.weight"} < header.keys()
    assert header["up_blocks.3.resnets.0.conv_shortcut.weight"]["shape"] == [8, 24, 1, 1]
    assert "down_blocks.0.resnets.0.conv_shortcut.weight" not in header
    assert not {name for name in header if name.startswith(("down_blocks.3.downsamplers", "up_blocks.3.upsamplers"))}
    assert len(header) - 1 == len(list(model.parameters())) + 2 * 2 * 6  # q, k and v of 6 attentions


def test_tensors_are_aligned(tmp_path):
    for n in range(8):
        interop.write_safetensors(tmp_path / "x", {"x" * n: torch.arange(3.0)})
        assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0
        assert interop.read_safetensors(tmp_path / "x")["x" * n].tolist() == [0, 1, 2]


def test_groups_are_those_of_the_network():
    with torch.device("meta"):
        for base in (4, 8, 128, 256):
            args = base, (1,), 1, (), 0.0
            assert UNet(*args).norm_out.num_groups == interop.unet_config(*args)["norm_num_groups"]


def test_the_layout_of_older_versions_is_read(tmp_path):
    model = old_layout(tmp_path / "old", 8)
    again, diffusion = interop.read(tmp_path / "old")
    assert equal(model, again) and diffusion.T == 1000 and diffusion.prediction == "eps"


def test_what_diffusers_cannot_hold_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="channel_mults .2, 2."):
        interop.write(tmp_path / "wide", *network(SMALL, "model.channel_mults=[2,2]"))
    with pytest.raises(UserError, match="small"):
        interop.write(folder, *network(SMALL))
    assert not (tmp_path / "wide").exists()


@pytest.mark.parametrize("file, key, value", [
    *(("unet/config.json", key, value) for key, value in {
        "_class_name": "UNet2DConditionModel", "act_fn": "relu", "add_attention": False, "attention_head_dim": 8,
        "block_out_channels": [8, 12, 16, 16], "center_input_sample": True, "down_block_types": ["DownBlock2D"] * 4,
        "downsample_padding": 1, "dropout": "much", "flip_sin_to_cos": True, "freq_shift": 0, "layers_per_block": 3,
        "mid_block_scale_factor": 2, "norm_eps": 1e-5, "norm_num_groups": 4, "out_channels": 6, "sample_size": 64,
        "of_the_future": 1}.items()),
    *(("scheduler/scheduler_config.json", key, value) for key, value in {
        "beta_schedule": "scaled_linear", "prediction_type": "flow", "rescale_betas_zero_snr": True,
        "trained_betas": [0.1, 0.2], "beta_end": 1.0, "num_train_timesteps": None}.items()),
])
def test_a_setting_that_is_not_ours_is_refused(folder, file, key, value):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"small/{file.split('/')[0]}/"):
        interop.read(folder)


def test_a_setting_that_is_missing_is_refused(folder):
    path = folder / "unet" / "config.json"
    settings = json.loads(path.read_text())
    for key in settings.keys() - interop.NEUTRAL.keys():
        path.write_text(json.dumps({name: value for name, value in settings.items() if name != key}))
        with pytest.raises(UserError, match="config.json"):
            interop.read(folder)


def test_damaged_weights_are_refused(folder):
    path = folder / "unet" / interop.WEIGHTS
    whole, state = path.read_bytes(), interop.read_safetensors(path)
    name = "conv_in.weight"
    wrong = [state | {"more": torch.zeros(1)}, {key: state[key] for key in state if key != name},
             state | {name: state[name][:, :, :1]}, state | {name: state[name] * float("nan")}]
    for tensors in wrong:
        interop.write_safetensors(path, tensors)
        with pytest.raises(UserError, match=interop.WEIGHTS):
            interop.read(folder)
    for content in (b"", whole[:7], whole[:100], whole[:-1], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=interop.WEIGHTS):
            interop.read(folder)
    path.unlink()
    path.with_suffix(".bin").write_bytes(b"no pickle")
    with pytest.raises(UserError, match=".bin"):
        interop.read(folder)
    path.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError):
        interop.read(folder)


# ---- evaluate.py ----

@pytest.mark.parametrize("flags, n, nfe, sampler, seed", [
    ([], 5000, 50, "ddpm", 1077), (["--n=3", "--nfe=2", "--sampler=ddim", "--seed=5"], 3, 2, "ddim", 5)])
def test_distances_of_a_stored_network(tmp_path, folder, monkeypatch, capsys, flags, n, nfe, sampler, seed):
    calls = []

    def few_samples(model, diffusion, *args):
        calls.append((model, *args[:4]))
        return sample_images(model, diffusion, 3, "ddim", 2, 5)

    images = {"cifar10": make_shapes(20)}
    monkeypatch.setattr(evaluate, "load_images", lambda name, *_: images[name])
    monkeypatch.setattr(evaluate, "feature_network", tiny_network)
    monkeypatch.setattr(evaluate, "sample_images", few_samples)
    assert evaluate.main(["--diffusers", str(folder), "--distance", "--device", "cpu",
                          "--stats-root", str(tmp_path / "stats"), *flags]) == 0
    line = json.loads(capsys.readouterr().out)
    (model, *drawn), = calls
    assert drawn == [n, sampler, nfe, seed] and equal(model, network(SMALL)[1])
    assert line["diffusers"] == str(folder) and line["seed"] == seed and line["reference"].startswith("cifar10 train")
    features = tiny_network()(few_samples(*interop.read(folder))).numpy()
    distances = Distances(tiny_network(), "cifar10", images["cifar10"], images["cifar10"], tmp_path / "stats")
    assert line["val/fid"] == distances.estimates(features)["val/fid"].value


# ---- against diffusers ----

@pytest.fixture
def diffusers():
    module = pytest.importorskip("diffusers", reason="diffusers: benchmarks/requirements.txt")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@torch.no_grad()
def check_same(ours, theirs):
    """That ours and a UNet2DModel are one function: in float32, and at t = 0 to 12 digits.

    At other t the frequencies of the time embedding, which both have in float32, are rounded differently.
    """
    x_t, t = torch.randn(4, 3, 32, 32, generator=generator(0, "interop_input")), torch.tensor([0, 3, 700, 999])
    a, b = ours(x_t, t), theirs.eval()(x_t, t).sample
    assert (a - b).abs().max() < 1e-5 and 0.05 < a.std() < 5
    a, b = ours.double()(x_t[:1].double(), t[:1]), theirs.double()(x_t[:1].double(), t[:1]).sample
    assert (a - b).abs().max() < 1e-12
    ours.float(), theirs.float()


@pytest.mark.long
@pytest.mark.parametrize("overrides", [
    *([f"model.base_channels={base}"] for base in (32, 64, 128)),
    ["model.base_channels=4", "model.channel_mults=[1]", "model.attn_resolutions=[32]"],
    [SMALL, "model.channel_mults=[1,3,2]", "model.num_res_blocks=1", "model.attn_resolutions=[32,16]"],
    [SMALL, "model.channel_mults=[1,1,1,1,1,1]", "model.num_res_blocks=3", "model.attn_resolutions=[]"],
])
def test_their_network_is_ours(tmp_path, diffusers, overrides):
    config, model, diffusion = network(*overrides)
    interop.write(tmp_path / "new", config, model, diffusion)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "new")
    check_same(model, pipeline.unet)
    dropouts = {m.p for m in pipeline.unet.modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {0.0, config.model.dropout}  # 0: a layer in their attention
    pipeline.save_pretrained(tmp_path / "theirs")   # in their hand, with all settings of this version
    again, process = interop.read(tmp_path / "theirs")
    assert equal(model, again) and torch.equal(process.betas, diffusion.betas)


@pytest.mark.long
@pytest.mark.parametrize("base", [32, 64, 128])
def test_a_network_of_theirs_is_read(tmp_path, diffusers, base):
    settings = OLD_UNET | {"block_out_channels": [base * mult for mult in (1, 2, 2, 2)],
                           "norm_num_groups": min(32, base // 4)}
    theirs = shaken(diffusers.UNet2DModel(**{k: v for k, v in settings.items() if k[0] != "_"}), base)
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler(beta_end=0.01)).save_pretrained(tmp_path / "theirs")
    ours, diffusion = interop.read(tmp_path / "theirs")
    check_same(ours, theirs)
    assert (diffusion.betas - torch.linspace(1e-4, 0.01, 1000)).abs().max() < 1e-9


@pytest.mark.long
def test_the_layout_of_older_versions_is_what_diffusers_takes_it_for(tmp_path, diffusers):
    model = old_layout(tmp_path / "old", 128)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "old", use_safetensors=False)
    check_same(model, theirs)
    check_same(interop.read(tmp_path / "old")[0], theirs)


@pytest.mark.long
@pytest.mark.parametrize("T, nfe", [(5, 5), (1000, 4)])
@pytest.mark.parametrize("overrides", [[], ["diffusion.beta_schedule=cosine"], ["diffusion.prediction=x0"],
                                       ["diffusion.prediction=v", "diffusion.beta_schedule=linear_zero_snr"]])
def test_their_samples_are_ours(tmp_path, diffusers, overrides, T, nfe):
    config, model, diffusion = network(SMALL, f"diffusion.num_timesteps={T}", *overrides, *["grid.nfe=1", "eval.nfe=1"])
    interop.write(tmp_path / "new", config, model, diffusion)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "new")
    theirs = pipeline(2, torch.Generator().manual_seed(3), nfe, "pt", return_dict=False)[0]
    rng = torch.Generator().manual_seed(3)
    x_T = torch.randn(2, 3, 32, 32, generator=rng)
    ours = (ddpm_sample(model, diffusion, x_T, nfe, rng) / 2 + 0.5).clamp(0, 1)
    assert (ours - theirs).abs().max() < 1e-4 and ours.std() > 0.04  # their schedule is float32
