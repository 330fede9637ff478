"""experiments.toml -> a frozen, validated Config.

An experiment states only what it changes: its values are laid over those of the one it `extends`, and at the root
over [defaults], which states every key. So this file holds types and ranges, and no default values.
"""

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

EXPERIMENTS = Path(__file__).with_name("experiments.toml")


def one_line(text: object) -> str:
    """text with every character that does not print, line breaks above all, as its escape sequence."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class ConfigError(ValueError):
    """One line: file, key, what is wrong, and the nearest valid name where there is one."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Range:
    """Limits of a finite number."""
    ge: float = -math.inf
    le: float = math.inf
    gt: float = -math.inf
    lt: float = math.inf

    def __contains__(self, x: float) -> bool:
        return self.ge <= x <= self.le and self.gt < x < self.lt and math.isfinite(x)

    def __str__(self) -> str:
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        limits = [f"{sign} {getattr(self, k)}" for k, sign in signs.items() if math.isfinite(getattr(self, k))]
        return " and ".join(limits or ["finite"])


Count = Annotated[int, Range(ge=1, lt=2**63)]
MAX_SAMPLES = 1_000_000
Sampler = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class DataConfig:
    name: Literal["cifar10", "shapes"]
    root: str                                       # folder that holds cifar-10-batches-py


@dataclass(frozen=True)
class ModelConfig:
    base_channels: Annotated[int, Range(ge=4, le=4096)]      # channels at 32x32; a multiple of the GroupNorm groups
    channel_mults: tuple[Annotated[int, Range(ge=1, le=64)], ...]  # one per resolution: 32, 16, 8, ...
    num_res_blocks: Annotated[int, Range(ge=1, le=64)]  # per resolution on the way down; one more on the way up
    attn_resolutions: tuple[Count, ...]             # resolutions whose blocks end in attention
    dropout: Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True)
class DiffusionConfig:
    beta_schedule: Literal["linear", "cosine"]
    num_timesteps: Annotated[int, Range(ge=1, le=10_000)]  # T


@dataclass(frozen=True)
class LossConfig:
    weighting: Literal["constant", "minsnr", "minsnr_norm"]
    gamma: Annotated[float, Range(gt=0)]            # of the two Min-SNR weightings; constant has none


@dataclass(frozen=True)
class TrainConfig:
    total_steps: Count
    batch_size: Annotated[int, Range(ge=1, le=100_000)]
    lr: Annotated[float, Range(gt=0)]               # of Adam, constant
    grad_clip: Annotated[float, Range(gt=0)]        # largest global L2 norm of the gradient
    amp: bool                                       # mixed precision, where the device is CUDA
    compile: bool                                   # torch.compile; faster after minutes, and other dropout masks
    checkpoint_every: Count                         # steps


@dataclass(frozen=True)
class EmaConfig:
    decay: Annotated[float, Range(ge=0, lt=1)]


@dataclass(frozen=True)
class LogConfig:
    every: Count                                    # steps


@dataclass(frozen=True)
class GridConfig:
    every: Count                                    # steps; and once at the end
    n: Annotated[int, Range(ge=1, le=10_000)]
    sampler: Sampler
    nfe: Count


@dataclass(frozen=True)
class EvalConfig:
    every: Count                                    # steps between milestones; and once at the end
    profile_images: Annotated[int, Range(ge=1, le=1024)]  # held-out images of the per-t profile
    features: Literal["inception", "lite0", "none"] # network of the Frechet distance and KID; "none" measures neither
    inception_weights: str                          # path; "" for torch.hub's cache or download
    stats_root: str                                 # folder of reference statistics, made when first needed
    nfe: Count
    sampler: Sampler                                # of milestones
    n_samples: Annotated[int, Range(ge=2, le=MAX_SAMPLES)]
    final_samplers: tuple[Sampler, ...]             # of the evaluation at the end
    final_n_samples: Annotated[int, Range(ge=2, le=MAX_SAMPLES)]


@dataclass(frozen=True)
class CurvatureConfig:
    every: Annotated[int, Range(ge=0, lt=2**63)]    # steps; 0 never
    num_probes: Annotated[int, Range(ge=2, le=100_000)]


@dataclass(frozen=True)
class Config:
    """A resolved experiment. Its sections are the tables of experiments.toml."""
    exp: str
    title: str
    question: str
    seed: Annotated[int, Range(ge=0, lt=2**63)]
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    loss: LossConfig
    train: TrainConfig
    ema: EmaConfig
    log: LogConfig
    grid: GridConfig
    eval: EvalConfig
    curvature: CurvatureConfig


def flatten(config: Config) -> dict[str, object]:
    """{"train.lr": 0.0001, ...}: every leaf of the config under its dotted key."""
    return _flatten(dataclasses.asdict(config))


def _flatten(table: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _leaves(cls: type = Config, prefix: str = "") -> dict[str, object]:
    """Dotted key -> type, for every key that a config has."""
    leaves = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        leaves |= _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return leaves


LEAVES = _leaves()
PATHS = ("data.root", "eval.stats_root", "eval.inception_weights")  # where files lie, which changes no result
PER_EXPERIMENT = ("title", "question")              # each experiment's own: neither inherited nor overridden
SETTABLE = [key for key in LEAVES if key not in ("exp", *PER_EXPERIMENT)]


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid are {', '.join(names)}"


def _convert(value: object, hint: object) -> object:
    """value as the type `hint` says, or ValueError with the reason."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _convert(value, args[0])
        if value not in args[1]:
            raise ValueError(f"{value} is out of range, must be {args[1]}")
        return value
    if origin is Literal:
        if value not in args:
            raise ValueError(f"unknown value {value!r}{_nearest(str(value), args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r} is not a list")
        return tuple(_convert(v, args[0]) for v in value)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{value} is too large for a float") from None
    if type(value) is not hint:  # type(), since True is an int to isinstance
        raise ValueError(f"{value!r} is not of type {hint.__name__}")
    return value


def _build(cls: type, values: dict[str, object], prefix: str = ""):
    """The dataclass cls from converted flat values."""
    return cls(**{name: _build(hint, values, f"{prefix}{name}.") if dataclasses.is_dataclass(hint)
                  else values[prefix + name] for name, hint in typing.get_type_hints(cls).items()})


def _conflicts(v: dict[str, object]):
    """Yield (key, reason) for values that are in range alone but not together."""
    base, groups = v["model.base_channels"], min(32, v["model.base_channels"] // 4)
    if base % 2 or base % groups:
        yield "model.base_channels", f"{base} must be even and divisible by its {groups} GroupNorm groups"
    levels = len(v["model.channel_mults"])
    if not 1 <= levels <= 6:
        yield "model.channel_mults", f"{levels} levels; 32x32 images allow 1 to 6"
    resolutions = [32 >> i for i in range(levels)]
    for r in v["model.attn_resolutions"]:
        if r not in resolutions:
            yield "model.attn_resolutions", f"{r} is not among this network's resolutions {resolutions}"
    if not v["eval.final_samplers"]:
        yield "eval.final_samplers", "names no sampler"
    for key in ("grid.nfe", "eval.nfe"):
        if v[key] > v["diffusion.num_timesteps"]:
            yield key, f"{v[key]} exceeds diffusion.num_timesteps = {v['diffusion.num_timesteps']}"


def _resolve(raw: dict[str, tuple[object, str]], file: str) -> Config:
    """Build a Config from flat {key: (value, who set it)}."""
    for key in raw:
        if key not in LEAVES:
            raise ConfigError(f"{file}: {raw[key][1]}: unknown key {key}{_nearest(key, SETTABLE)}")
    for key in LEAVES:
        if key not in raw:
            raise ConfigError(f"{file}: {key} is missing" + (" in [defaults]" if key in SETTABLE else ""))
    values = {}
    for key, hint in LEAVES.items():
        try:
            values[key] = _convert(raw[key][0], hint)
        except ValueError as error:
            raise ConfigError(f"{file}: {raw[key][1]}: {key}: {error}") from None
    for key, reason in _conflicts(values):
        raise ConfigError(f"{file}: {raw[key][1]}: {key}: {reason}")
    return _build(Config, values)


def config_from_dict(table: dict, file: str) -> Config:
    """A Config from the nested dict that config.json and checkpoints hold, validated again."""
    return _resolve({key: (value, "config") for key, value in _flatten(table).items()}, file)


TABLES = ("defaults", "experiments", "profiles", "figures", "comparisons")


def _read(path: str | Path) -> tuple[dict[str, dict], str]:
    """The file's tables, each there even if empty, and its name. All but [defaults] hold tables in turn."""
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # TOML and UTF-8 errors alike
        raise ConfigError(f"{path.name}: {error}") from None
    for name, table in tables.items():
        if name not in TABLES:
            raise ConfigError(f"{path.name}: unknown table {name}{_nearest(name, TABLES)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{path.name}: {name}: must be a table")
        for inner, content in table.items():
            if name != "defaults" and not isinstance(content, dict):
                raise ConfigError(f"{path.name}: {name}.{inner}: must be a table")
    return {name: tables.get(name, {}) for name in TABLES}, path.name


def load_tables(name: str, path: str | Path = EXPERIMENTS) -> dict[str, dict]:
    """The tables [figures.*] or [comparisons.*]. Raises ConfigError."""
    keys = {"figures": {"kind": str, "runs": list, "until": int},
            "comparisons": {"title": str, "runs": list, "factor": list}}[name]
    tables, file = _read(path)
    for inner, table in tables[name].items():
        for key, value in table.items():
            where = f"{file}: [{name}.{inner}]: {key}"
            if key not in keys:
                raise ConfigError(f"{where}: unknown key{_nearest(key, list(keys))}")
            if type(value) is not keys[key]:
                raise ConfigError(f"{where}: {value!r} is not of type {keys[key].__name__}")
            for exp in value if key == "runs" else []:
                if exp not in tables["experiments"]:
                    raise ConfigError(f"{where}: unknown experiment {exp!r}"
                                      f"{_nearest(str(exp), list(tables['experiments']))}")
    return tables[name]


def list_experiments(path: str | Path = EXPERIMENTS) -> list[str]:
    """The names of all experiments, in the order of the file."""
    return list(_read(path)[0]["experiments"])


def load_config(exp: str, path: str | Path = EXPERIMENTS, overrides: Sequence[str] = (),
                profile: str | None = None) -> Config:
    """The resolved config of experiment `exp`, with overrides such as "train.total_steps=300" laid over it.

    An override's value is read as TOML, and as a bare string where it is not TOML. profile: a table of [profiles], laid
    over the experiment before the overrides; its tables by experiments' names hold what is for these and those that
    extend them. Raises ConfigError.
    """
    tables, file = _read(path)
    defaults, experiments, profiles = tables["defaults"], tables["experiments"], tables["profiles"]
    if profile is not None and profile not in profiles:
        raise ConfigError(f"{file}: unknown profile {profile!r}{_nearest(profile, list(profiles))}")
    chain, name = [], exp
    while name is not None:
        if name not in experiments:
            by = f"[experiments.{chain[-1]}]: extends: " if chain else ""
            raise ConfigError(f"{file}: {by}unknown experiment {name!r}{_nearest(str(name), list(experiments))}")
        if name in chain:
            raise ConfigError(f"{file}: [experiments.{name}]: extends: inheritance loop "
                              f"{' -> '.join([*chain[chain.index(name):], name])}")
        chain.append(name)
        name = experiments[name].get("extends")

    raw = {key: (value, "[defaults]") for key, value in _flatten(defaults).items()}
    for name in reversed(chain):
        own = {key: value for key, value in _flatten(experiments[name]).items()
               if key != "extends" and (name == exp or key not in PER_EXPERIMENT)}
        raw |= {key: (value, f"[experiments.{name}]") for key, value in own.items()}
    if profile is not None:
        own = {name: table for name, table in profiles[profile].items() if name in experiments}
        layers = [{key: value for key, value in profiles[profile].items() if key not in own},
                  *(own.get(name, {}) for name in reversed(chain))]
        for layer in layers:
            raw |= {key: (value, f"[profiles.{profile}]") for key, value in _flatten(layer).items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"{file}: --set {override}: must read KEY=VALUE")
        if key not in SETTABLE:
            raise ConfigError(f"{file}: --set {override}: unknown key {key}{_nearest(key, SETTABLE)}")
        raw[key] = (_override_value(text), f"--set {override}")
    raw["exp"] = (exp, "name")

    config = _resolve(raw, file)
    if config.loss.weighting == "constant" and raw["loss.gamma"][1].startswith("--set"):
        raise ConfigError(f"{file}: {raw['loss.gamma'][1]}: loss.gamma has no effect with loss.weighting = constant")
    return config


def _override_value(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except ValueError:  # no TOML; or an integer of more digits than Python reads
        table = {}
    return table["value"] if table.keys() == {"value"} else text.strip()  # a line break in text may add keys
