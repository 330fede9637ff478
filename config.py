"""experiments.toml -> a frozen, validated Config.

An experiment states only what it changes: its values are laid over those of the one it `extends`, and at the root
over [defaults], which states every key. So this file holds types and ranges, and no default values. The names of
weightings, schedules, samplers and feature networks are the keys of WEIGHTINGS, BETAS, SAMPLERS and FEATURES.
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from diffusion import BETAS, SAMPLERS
from errors import UserError, nearest
from fid import FEATURES
from weighting import WEIGHTINGS

EXPERIMENTS = Path(__file__).with_name("experiments.toml")
MAX_SAMPLES = 1_000_000


class ConfigError(UserError, ValueError):
    """One line: file, key, what is wrong, and the nearest valid name if there is one."""


@dataclass(frozen=True)
class Range:
    """low <= x <= high, or low < x if `open`; x is finite."""
    low: float
    high: float = math.inf
    open: bool = False

    def check(self, x: float) -> None:
        if not self.low <= x <= self.high or x in (math.inf, self.low if self.open else None):
            raise ValueError(f"{x} is out of range, must be {'>' if self.open else '>='} {self.low}"
                             + (f" and <= {self.high}" if self.high < math.inf else " and finite"))


@dataclass(frozen=True)
class OneOf:
    names: Iterable[str]

    def check(self, x: str) -> None:
        if x not in self.names:
            raise ValueError(f"unknown value {x!r}{nearest(x, self.names)}")


Count = Annotated[int, Range(1, 2**62)]
Samples = Annotated[int, Range(2, MAX_SAMPLES)]
Fraction = Annotated[float, Range(0, math.nextafter(1, 0))]
Positive = Annotated[float, Range(0, open=True)]
Sampler = Annotated[str, OneOf(SAMPLERS)]


@dataclass(frozen=True)
class DataConfig:
    name: Annotated[str, OneOf(("cifar10", "shapes"))]
    root: str                                       # folder that holds cifar-10-batches-py


@dataclass(frozen=True)
class ModelConfig:
    base_channels: Annotated[int, Range(4, 4096)]   # channels at 32x32; a multiple of the GroupNorm groups
    channel_mults: tuple[Annotated[int, Range(1, 64)], ...]  # one per resolution: 32, 16, 8, ...
    num_res_blocks: Annotated[int, Range(1, 64)]    # per resolution on the way down; one more on the way up
    attn_resolutions: tuple[Count, ...]             # resolutions whose blocks end in attention
    dropout: Fraction


@dataclass(frozen=True)
class DiffusionConfig:
    beta_schedule: Annotated[str, OneOf(BETAS)]
    num_timesteps: Annotated[int, Range(1, 10_000)]  # T


@dataclass(frozen=True)
class LossConfig:
    weighting: Annotated[str, OneOf(WEIGHTINGS)]
    gamma: Positive                                 # of the weightings that have one


@dataclass(frozen=True)
class TrainConfig:
    total_steps: Count
    batch_size: Annotated[int, Range(1, 100_000)]
    lr: Positive                                    # of Adam, constant
    grad_clip: Positive                             # largest global L2 norm of the gradient
    amp: bool                                       # bf16 mixed precision, on a GPU that has it
    checkpoint_every: Count                         # steps


@dataclass(frozen=True)
class EmaConfig:
    decay: Fraction


@dataclass(frozen=True)
class LogConfig:
    every: Count                                    # steps


@dataclass(frozen=True)
class GridConfig:
    every: Count                                    # steps; and once at the end
    n: Annotated[int, Range(1, 10_000)]
    sampler: Sampler
    nfe: Count


@dataclass(frozen=True)
class EvalConfig:
    every: Count                                    # steps between milestones; and once at the end
    profile_t: Annotated[str, OneOf(("even", "dense"))]  # timesteps of the per-t profile: see evaluate.py
    profile_images: Annotated[int, Range(1, 10_000)]  # held-out images of the per-t profile
    features: Annotated[str, OneOf((*FEATURES, "none"))]  # network of the distances; "none" measures none
    inception_weights: str                          # path; "" for torch.hub's cache or download
    stats_root: str                                 # folder of reference statistics, made when first needed
    nfe: Count
    sampler: Sampler                                # of milestones
    n_samples: Samples
    final_samplers: tuple[Sampler, ...]             # of the evaluation at the end
    final_n_samples: Samples


@dataclass(frozen=True)
class CurvatureConfig:
    every: Annotated[int, Range(0, 2**62)]          # steps; 0 never
    num_probes: Annotated[int, Range(2, 100_000)]


@dataclass(frozen=True)
class Config:
    """A resolved experiment. Its sections are the tables of experiments.toml."""
    exp: str
    title: str
    question: str
    seed: Annotated[int, Range(0, 2**63 - 1)]
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


def _leaves(cls: type, prefix: str = "") -> dict[str, object]:
    """Dotted key -> type, for every key of a config."""
    leaves = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        leaves |= _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return leaves


def _flatten(table: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


LEAVES = _leaves(Config)
PATHS = ("data.root", "eval.stats_root", "eval.inception_weights")  # these change no result
OWN = ("title", "question")                         # each experiment's own: neither inherited nor overridden
SETTABLE = [key for key in LEAVES if key not in ("exp", *OWN)]


def flatten(config: Config) -> dict[str, object]:
    """{"train.lr": 0.0001, ...}: every value of the config under its dotted key."""
    return _flatten(dataclasses.asdict(config))


def _convert(value: object, hint: object) -> object:
    """value as the type that `hint` says. Raises ValueError with the reason."""
    if typing.get_origin(hint) is Annotated:
        kind, check = typing.get_args(hint)
        value = _convert(value, kind)
        check.check(value)
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r} is not a list")
        return tuple(_convert(v, typing.get_args(hint)[0]) for v in value)
    if hint is float and type(value) is int and abs(value) <= 2**53:  # exact
        return float(value)
    if type(value) is not hint:  # type(), since True is an int to isinstance
        raise ValueError(f"{value!r} is not of type {hint.__name__}")
    return value


def _conflicts(v: dict[str, object]):
    """Yield (key, reason) for values that are in range alone but not together."""
    base, groups = v["model.base_channels"], min(32, v["model.base_channels"] // 4)
    if base % 2 or base % groups:
        yield "model.base_channels", f"{base} must be even and divisible by its {groups} GroupNorm groups"
    resolutions = [32 >> i for i in range(len(v["model.channel_mults"]))]
    if not 1 <= len(resolutions) <= 6:
        yield "model.channel_mults", f"{len(resolutions)} levels; 32x32 images allow 1 to 6"
    if not {*v["model.attn_resolutions"]} <= {*resolutions}:
        yield "model.attn_resolutions", f"{v['model.attn_resolutions']} are not all among {resolutions}"
    if len({*v["eval.final_samplers"]}) != max(1, len(v["eval.final_samplers"])):
        yield "eval.final_samplers", "must name at least one sampler, and each once"
    for key in ("grid.nfe", "eval.nfe"):
        if v[key] > v["diffusion.num_timesteps"]:
            yield key, f"{v[key]} exceeds diffusion.num_timesteps = {v['diffusion.num_timesteps']}"


def _resolve(raw: dict[str, tuple[object, str]], file: str) -> Config:
    """The Config of flat {key: (value, who set it)}."""
    for key, (_, who) in raw.items():
        if key not in LEAVES:
            raise ConfigError(f"{file}: {who}: unknown key {key}{nearest(key, SETTABLE)}")
    values = {}
    for key, hint in LEAVES.items():
        if key not in raw:
            raise ConfigError(f"{file}: {key} is missing")
        try:
            values[key] = _convert(raw[key][0], hint)
        except ValueError as error:
            raise ConfigError(f"{file}: {raw[key][1]}: {key}: {error}") from None
    for key, reason in _conflicts(values):
        raise ConfigError(f"{file}: {raw[key][1]}: {key}: {reason}")

    def build(cls, prefix=""):
        return cls(**{name: build(hint, f"{name}.") if dataclasses.is_dataclass(hint) else values[prefix + name]
                      for name, hint in typing.get_type_hints(cls).items()})

    return build(Config)


def config_from_dict(table: dict, file: str) -> Config:
    """A Config from the nested dict that config.json and checkpoints hold, validated again. Raises ConfigError."""
    return _resolve({key: (value, "config") for key, value in _flatten(table).items()}, file)


TABLES = ("defaults", "experiments", "profiles", "figures", "comparisons")


def _read(path: str | Path) -> tuple[dict[str, dict], str]:
    """The file's tables ({} for one that is missing) and the file's name. Raises ConfigError."""
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # of TOML or UTF-8
        raise ConfigError(f"{path.name}: {error}") from None
    for name, table in tables.items():
        if name not in TABLES:
            raise ConfigError(f"{path.name}: unknown table {name}{nearest(name, TABLES)}")
        inner = table.values() if isinstance(table, dict) and name != "defaults" else [table]
        if not all(isinstance(content, dict) for content in inner):
            raise ConfigError(f"{path.name}: {name}: must hold tables only")
    return {name: tables.get(name, {}) for name in TABLES}, path.name


def _known(name: object, names: Iterable[str], where: str) -> None:
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"{where}: unknown name {name!r}{nearest(str(name), names)}")


def load_tables(name: str, path: str | Path = EXPERIMENTS) -> dict[str, dict]:
    """The tables [figures.*] or [comparisons.*]. Raises ConfigError."""
    keys = {"figures": ("kind", "runs", "until"), "comparisons": ("title", "runs", "factor")}[name]
    tables, file = _read(path)
    for inner, table in tables[name].items():
        for key in table:
            _known(key, keys, f"{file}: [{name}.{inner}]")
        for exp in table.get("runs", []):
            _known(exp, tables["experiments"], f"{file}: [{name}.{inner}]: runs")
    return tables[name]


def list_experiments(path: str | Path = EXPERIMENTS) -> list[str]:
    """The names of all experiments, in the order of the file."""
    return list(_read(path)[0]["experiments"])


def load_config(exp: str, path: str | Path = EXPERIMENTS, overrides: Sequence[str] = (),
                profile: str | None = None) -> Config:
    """The resolved config of experiment `exp`, with overrides such as "train.total_steps=300" laid over it.

    An override's value is read as TOML, and as a plain string if it is not TOML. profile: a table of [profiles], laid
    over the experiment before the overrides; its sub-table E applies to experiment E and those that extend it only.
    Raises ConfigError.
    """
    tables, file = _read(path)
    experiments, chain = tables["experiments"], []
    name, where = exp, file
    while name is not None:
        _known(name, experiments, where)
        if name in chain:
            raise ConfigError(f"{where}: inheritance loop {' -> '.join([*chain, name])}")
        chain.insert(0, name)
        name, where = experiments[name].get("extends"), f"{file}: [experiments.{name}]: extends"

    layers = [("[defaults]", tables["defaults"])]
    for name in chain:
        own = {k: v for k, v in experiments[name].items() if k != "extends" and (name == exp or k not in OWN)}
        layers.append((f"[experiments.{name}]", own))
    if profile is not None:
        _known(profile, tables["profiles"], f"{file}: --profile")
        table, who = tables["profiles"][profile], f"[profiles.{profile}]"
        layers.append((who, {k: v for k, v in table.items() if k not in experiments}))
        layers += [(who, table[name]) for name in chain if name in table]
    raw = {key: (value, who) for who, layer in layers for key, value in _flatten(layer).items()}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        _known(key, SETTABLE, f"{file}: --set {override}")
        if not equals:
            raise ConfigError(f"{file}: --set {override}: must read KEY=VALUE")
        try:
            table = tomllib.loads(f"value = {text}")
        except (ValueError, RecursionError):
            table = {}
        raw[key] = (table["value"] if table.keys() == {"value"} else text, f"--set {override}")
    return _resolve(raw | {"exp": (exp, "name")}, file)
