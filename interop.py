"""Networks in the format of diffusers' DDPMPipeline, written and read without diffusers: docs/diffusers.md.

UNet2DModel with the settings of unet_config is the same function as our UNet. Only names differ, and an attention's 1x1
convolutions are linear layers there, with q, k and v apart.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import replace_file
from config import Config
from diffusion import Diffusion, linear_betas
from errors import UserError
from model import Attention, Downsample, ResBlock, UNet, Upsample
from runs import read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# What our UNet leaves at UNet2DModel's defaults. Older versions lack some of these settings and behave the same.
NEUTRAL = {"center_input_sample": False, "time_embedding_type": "positional", "time_embedding_dim": None,
           "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "downsample_type": "conv",
           "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attn_norm_num_groups": None,
           "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None,
           "num_class_embeds": None, "num_train_timesteps": None}
OUTER = {"time_mlp.0": "time_embedding.linear_1", "time_mlp.2": "time_embedding.linear_2", "conv_in": "conv_in",
         "norm_out": "conv_norm_out", "conv_out": "conv_out"}
BLOCKS = {"down": "down_blocks.{}", "middle": "mid_block", "up": "up_blocks.{}"}
LAYERS = {ResBlock: "resnets", Attention: "attentions", Downsample: "downsamplers", Upsample: "upsamplers"}
INNER = {"emb": "time_emb_proj", "skip": "conv_shortcut", "norm": "group_norm", "qkv": "to_q to_k to_v",
         "proj": "to_out.0"}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in files of older versions
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def unet_config(base_channels, channel_mults, num_res_blocks, attn_resolutions, dropout) -> dict:
    """The settings with which UNet2DModel is UNet(...) of these arguments. Raises UserError if there are none."""
    if channel_mults[0] != 1:
        raise UserError(f"channel_mults {list(channel_mults)}: diffusers has no such network, as UNet2DModel's first "
                        "convolution and its time embedding are as wide as its first level; they must start with 1")
    kinds = ["AttnDownBlock2D" if UNet.image_size >> i in attn_resolutions else "DownBlock2D"
             for i in range(len(channel_mults))]
    return NEUTRAL | {
        "_class_name": "UNet2DModel", "sample_size": UNet.image_size, "in_channels": UNet.image_channels,
        "out_channels": UNet.image_channels, "block_out_channels": [base_channels * mult for mult in channel_mults],
        "layers_per_block": num_res_blocks, "down_block_types": kinds, "dropout": dropout,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "norm_num_groups": min(32, base_channels // 4), "norm_eps": 1e-6,
        "attention_head_dim": None,  # one head of all channels
        "downsample_padding": 0,     # means: pad right and below
        "flip_sin_to_cos": False, "freq_shift": 1}


def names(model: UNet) -> dict[str, list[str]]:
    """diffusers' name of each of our parameters; three for q, k and v."""
    found = {f"{ours}.{kind}": [f"{theirs}.{kind}"] for ours, theirs in OUTER.items() for kind in ("weight", "bias")}
    level, seen = Counter(), Counter()
    for path, layer in model.named_modules():
        if type(layer) in LAYERS:
            side = path.split(".")[0]
            block = f"{BLOCKS[side].format(level[side])}.{LAYERS[type(layer)]}"
            for name, _ in layer.named_parameters():
                inner, kind = name.split(".")
                found[f"{path}.{name}"] = [f"{block}.{seen[block]}.{part}.{kind}"
                                           for part in INNER.get(inner, inner).split()]
            seen[block] += 1
            level[side] += isinstance(layer, Downsample | Upsample)  # a level's last layer
    return found


def to_diffusers(model: UNet) -> dict[str, Tensor]:
    """The state dict of our UNet as UNet2DModel's."""
    state = model.state_dict()
    return {part: tensor.squeeze() if ".attentions." in part else tensor for ours, parts in names(model).items()
            for part, tensor in zip(parts, state[ours].chunk(len(parts)), strict=True)}


def from_diffusers(model: UNet, state: dict[str, Tensor]) -> None:
    """Load UNet2DModel's state dict into our UNet. Raises KeyError or RuntimeError if names or shapes do not fit."""
    state = {re.sub(rf"\b({'|'.join(OLD)})\b", lambda m: OLD[m[1]], name): tensor for name, tensor in state.items()}
    ours = {name: torch.cat([state.pop(part) for part in parts]) for name, parts in names(model).items()}
    if state:
        raise KeyError(*state)
    for name, p in model.named_parameters():
        ours[name] = ours[name].reshape(*ours[name].shape, *[1] * (p.ndim - ours[name].ndim))
    model.load_state_dict(ours)


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """The header's length in 8 bytes, the header in JSON, then the tensors one after the other."""
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in state.items():
        start = len(data)
        data += tensor.cpu().numpy().astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    replace_file(path, len(text).to_bytes(8, "little") + text + data)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    entries = [(name, e) for name, e in json.loads(content[8:start]).items() if name != "__metadata__"]
    return {name: torch.frombuffer(content, dtype=DTYPES[e["dtype"]], count=math.prod(e["shape"]),
                                   offset=start + e["data_offsets"][0]).reshape(e["shape"]) for name, e in entries}


def write(folder: Path, config: Config, model: UNet, diffusion: Diffusion) -> None:
    """A new folder for DDPMPipeline.from_pretrained. Raises UserError, before it writes, if there can be none."""
    unet = unet_config(**dataclasses.asdict(config.model))
    if folder.exists():
        raise UserError(f"{folder}: exists; give the name of a new folder")
    linear = torch.equal(diffusion.betas.cpu(), linear_betas(diffusion.T))
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": diffusion.T, "beta_schedule": "linear",
                 "beta_start": 1e-4, "beta_end": 0.02, "trained_betas": None if linear else diffusion.betas.tolist(),
                 "prediction_type": PREDICTION_TYPES[diffusion.prediction], "variance_type": "fixed_small",
                 "clip_sample": True, "timestep_spacing": "linspace"}
    index = {"_class_name": "DDPMPipeline"} | {part: ["diffusers", content["_class_name"]] for part, content in
                                               (("unet", unet), ("scheduler", scheduler))}
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True)
    write_safetensors(folder / "unet" / WEIGHTS, to_diffusers(model))
    for path, content in {"unet/config.json": unet, "scheduler/scheduler_config.json": scheduler,
                          "model_index.json": index}.items():
        replace_file(folder / path, json.dumps(content, indent=2).encode())


def read(folder: Path, device="cpu") -> tuple[UNet, Diffusion]:
    """Network, in eval mode, and schedule of such a folder; or of one with the files of unet/ and scheduler/ in it.

    How its scheduler samples is not read. Raises UserError for what our UNet and Diffusion do not compute, and for
    files that do not fit; OSError for missing ones.
    """
    unet, scheduler = (folder / part if (folder / part).is_dir() else folder for part in ("unet", "scheduler"))
    path = scheduler / "scheduler_config.json"
    try:
        s = read_json(path)
        T, betas = s["num_train_timesteps"], s.get("trained_betas")
        if betas is None and s["beta_schedule"] == "linear":
            betas = torch.linspace(s["beta_start"], s["beta_end"], T, dtype=torch.float64)
        if betas is None or len(betas) != T or s.get("rescale_betas_zero_snr"):
            raise UserError(f"{path}: beta_schedule {s['beta_schedule']}: give its {T} betas as trained_betas")
        kind = s.get("prediction_type") or ("epsilon" if s.get("predict_epsilon", True) else "sample")
        diffusion = Diffusion(torch.as_tensor(betas, dtype=torch.float64, device=device),
                              {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}[kind])
        path = unet / "config.json"
        stored = NEUTRAL | read_json(path)
        widths, kinds = stored["block_out_channels"], stored["down_block_types"]
        args = {"base_channels": widths[0], "channel_mults": [width // widths[0] for width in widths],
                "num_res_blocks": stored["layers_per_block"], "dropout": stored["dropout"],
                "attn_resolutions": [UNet.image_size >> i for i, kind in enumerate(kinds) if kind.startswith("Attn")]}
        expected = unet_config(**args)
        for key in expected | stored:
            value, ours = stored.get(key, "missing"), expected.get(key)
            if value != ours and key not in ("_diffusers_version", "_name_or_path"):
                raise UserError(f"{path}: {key} = {json.dumps(value)}; in our UNet it is {json.dumps(ours)}")
        model, path = UNet(**args), unet / WEIGHTS
        path = path if path.exists() else path.with_suffix(".bin")
        from_diffusers(model, read_safetensors(path) if path.suffix == ".safetensors" else
                       torch.load(path, map_location="cpu", weights_only=True))
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"{path}: the weights are not finite")
    except (UserError, OSError):
        raise
    except Exception as error:  # torch, pickle and zipfile raise many kinds
        raise UserError(f"{path}: damaged, or of another kind ({type(error).__name__}: {str(error)[:200]})") from None
    return model.eval().to(device, memory_format=torch.channels_last), diffusion
