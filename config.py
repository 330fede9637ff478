"""experiments.toml -> a frozen, validated Config.

An experiment states only what it changes in the one it `extends`; the first of such a chain changes [defaults], which
states every key. So this file holds types and ranges, and no default values.
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusion import BETAS, PREDICTIONS, SAMPLERS, Diffusion
from errors import UserError, nearest
from fid import FEATURES
from weighting import WEIGHTINGS

EXPERIMENTS = Path(__file__).with_name("experiments.toml")
TABLES = ("defaults", "experiments", "profiles", "study", "figures", "comparisons")
MAX_SAMPLES = 1_000_000
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)  # of experiments, figures and comparisons: they name files


class ConfigError(UserError, ValueError):
    """One line: file, key, what is wrong, and the nearest valid name if there is one."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What a key holds: one value of `kind`, or a list of them."""
    kind: type
    allowed: Iterable = ()  # of numbers: (lowest, highest); of strings: the valid names; (): any
    is_list: bool = False

    def convert(self, value: object, where: str) -> object:
        """value as this type. Raises ConfigError."""
        if self.is_list:
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{where}: {value!r} is not a list")
            return tuple(Key(self.kind, self.allowed).convert(item, where) for item in value)
        if self.kind is float and type(value) is int and abs(value) <= 2**53:  # exact
            value = float(value)
        if type(value) is not self.kind:  # type(), since True is an int to isinstance
            raise ConfigError(f"{where}: {value!r} is not of type {self.kind.__name__}")
        if self.kind is str and self.allowed:
            check_name(value, self.allowed, where)
        elif self.allowed:
            low, high = self.allowed
            if not low <= value <= high:  # NaN too
                raise ConfigError(f"{where}: {value} is out of range, must be from {low} to {high}")
        return value


def check_name(name: object, names: Iterable[str], where: str) -> None:
    """Raise ConfigError if name is not one of names."""
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"{where}: unknown name {name!r}{nearest(str(name), names)}")


TEXT = Key(str)
COUNT = Key(int, (1, 2**62))
FRACTION = Key(float, (0, 1 - 1e-9))
POSITIVE = Key(float, (1e-12, 1e38))

LEAVES = {
    "exp": TEXT, "title": TEXT, "question": TEXT, "seed": Key(int, (0, 2**63 - 1)),
    "data.name": Key(str, ("cifar10", "shapes")),
    "data.root": TEXT,                                          # folder that holds cifar-10-batches-py
    "model.base_channels": Key(int, (4, 4096)),                 # channels at 32x32
    "model.channel_mults": Key(int, (1, 64), is_list=True),     # one per resolution: 32, 16, 8, ...
    "model.num_res_blocks": Key(int, (1, 64)),                  # per resolution on the way down; one more on the way up
    "model.attn_resolutions": Key(int, (1, 32), is_list=True),  # resolutions whose blocks end in attention
    "model.dropout": FRACTION,
    "diffusion.beta_schedule": Key(str, BETAS),
    "diffusion.num_timesteps": Key(int, (1, 10_000)),           # T
    "diffusion.prediction": Key(str, PREDICTIONS),              # what the network predicts
    "loss.weighting": Key(str, WEIGHTINGS),
    "loss.gamma": POSITIVE,                                     # of the weightings that have one
    "train.total_steps": COUNT,
    "train.batch_size": Key(int, (1, 100_000)),
    "train.lr": POSITIVE,                                       # of Adam, constant
    "train.grad_clip": POSITIVE,                                # largest global L2 norm of the gradient
    "train.amp": Key(bool),                                     # train in bf16 mixed precision, on hardware that has it
    "train.checkpoint_every": COUNT,                            # steps
    "ema.decay": FRACTION,
    "log.every": COUNT,                                         # steps
    "grid.every": COUNT,                                        # steps; and once at the end
    "grid.n": Key(int, (1, 10_000)),
    "grid.sampler": Key(str, SAMPLERS),
    "grid.nfe": COUNT,
    "eval.every": COUNT,                                        # steps between milestones; and once at the end
    "eval.profile_t": Key(str, ("even", "dense")),              # timesteps of the per-t profile: see evaluate.py
    "eval.profile_images": Key(int, (2, 10_000)),               # held-out images of the per-t profile
    "eval.features": Key(str, (*FEATURES, "none")),             # network of the distances; "none" measures none
    "eval.inception_weights": TEXT,                             # path; "" for torch.hub's cache or download
    "eval.stats_root": TEXT,                                    # folder of reference statistics, made when first needed
    "eval.amp": Key(bool),                                      # draw samples in bf16, on hardware that has it
    "eval.nfe": COUNT,
    "eval.sampler": Key(str, SAMPLERS),                         # of milestones
    "eval.n_samples": Key(int, (2, MAX_SAMPLES)),
    "eval.final_samplers": Key(str, SAMPLERS, is_list=True),    # of the evaluation at the end
    "eval.final_n_samples": Key(int, (2, MAX_SAMPLES)),
    "curvature.every": Key(int, (0, 2**62)),                    # steps; 0 never
    "curvature.num_probes": Key(int, (2, 100_000)),
}
PATHS = ("data.root", "eval.stats_root", "eval.inception_weights")  # these change no result
OWN = ("title", "question")  # each experiment's own: neither inherited nor overridden
SETTABLE = [key for key in LEAVES if key not in ("exp", *OWN)]


def _nest(flat: dict[str, object]) -> dict:
    """{"train.lr": x} -> {"train": {"lr": x}}: the inverse of flatten."""
    table = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        inner = table.setdefault(section, {}) if section else table
        inner[name] = value
    return table


# Frozen dataclasses: config.train.lr is the value of "train.lr".
Config = dataclasses.make_dataclass("Config", _nest(LEAVES), frozen=True)
SECTIONS = {name: dataclasses.make_dataclass(name, keys, frozen=True)
            for name, keys in _nest(LEAVES).items() if isinstance(keys, dict)}


def flatten(config: Config | dict, prefix: str = "") -> dict[str, object]:
    """{"train.lr": 0.0001, ...}: every value of a config or a nested dict under its dotted key."""
    flat = {}
    for key, value in (config if isinstance(config, dict) else dataclasses.asdict(config)).items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _conflicts(config: Config):
    """Yield (key, reason) for values that are in range alone but not together."""
    if not NAME.fullmatch(config.exp):
        yield "exp", f"{config.exp!r} must be made of letters, digits and ._-"
    base = config.model.base_channels
    groups = min(32, base // 4)
    if base % 2 or base % groups:
        yield "model.base_channels", f"{base} must be even and divisible by its {groups} GroupNorm groups"
    resolutions = [32 >> i for i in range(len(config.model.channel_mults))]
    if not 1 <= len(resolutions) <= 6:
        yield "model.channel_mults", f"{len(resolutions)} levels; 32x32 images allow 1 to 6"
    if not set(config.model.attn_resolutions) <= set(resolutions):
        yield "model.attn_resolutions", f"{config.model.attn_resolutions} are not all among {resolutions}"
    samplers = config.eval.final_samplers
    if not samplers or len(set(samplers)) < len(samplers):
        yield "eval.final_samplers", "must name at least one sampler, and each once"
    try:
        Diffusion(BETAS[config.diffusion.beta_schedule](config.diffusion.num_timesteps), config.diffusion.prediction)
    except ValueError as error:
        yield "diffusion.beta_schedule", f"{config.diffusion.beta_schedule}: {error}"
    for key, nfe in (("grid.nfe", config.grid.nfe), ("eval.nfe", config.eval.nfe)):
        if nfe > config.diffusion.num_timesteps:
            yield key, f"{nfe} exceeds diffusion.num_timesteps = {config.diffusion.num_timesteps}"


def _resolve(raw: dict[str, tuple[object, str]], file: str) -> Config:
    """The Config of {key: (value, where it was set)}. Raises ConfigError."""
    for key, (_, where) in raw.items():
        check_name(key, LEAVES, where)
    for key in LEAVES:
        if key not in raw:
            raise ConfigError(f"{file}: {key} is missing")
    tables = _nest({key: kind.convert(raw[key][0], f"{raw[key][1]}: {key}") for key, kind in LEAVES.items()})
    config = Config(**tables | {name: section(**tables[name]) for name, section in SECTIONS.items()})
    for key, reason in _conflicts(config):
        raise ConfigError(f"{raw[key][1]}: {key}: {reason}")
    return config


def config_from_dict(table: dict, file: str) -> Config:
    """A Config from the nested dict that config.json and checkpoints hold, validated again. Raises ConfigError."""
    return _resolve({key: (value, file) for key, value in flatten(table).items()}, file)


def _read(path: str | Path) -> dict[str, dict]:
    """The file's tables, {} for one that is missing. Raises ConfigError."""
    file = Path(path).name
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of TOML or UTF-8
        raise ConfigError(f"{file}: {error}") from None
    for name, table in tables.items():
        check_name(name, TABLES, file)
        inner = table.values() if isinstance(table, dict) and name != "defaults" else [table]
        if not all(isinstance(content, dict) for content in inner):
            raise ConfigError(f"{file}: {name}: must hold tables only")
    return {name: tables.get(name, {}) for name in TABLES}


def load_tables(name: str, path: str | Path = EXPERIMENTS) -> dict[str, dict]:
    """The tables [study.*], [figures.*] or [comparisons.*]. Raises ConfigError."""
    keys = {"study": ("runs", "seeds"), "figures": ("kind", "runs"),
            "comparisons": ("title", "runs", "factor")}[name]
    tables = _read(path)
    for inner, table in tables[name].items():
        where = f"{Path(path).name}: [{name}.{inner}]"
        if not NAME.fullmatch(inner):
            raise ConfigError(f"{where}: the name must be made of letters, digits and ._-")
        for key, value in table.items():
            check_name(key, keys, where)
            kind = Key(int if key == "seeds" else str, is_list=key in ("runs", "seeds", "factor"))
            kind.convert(value, f"{where}: {key}")
        for exp in table.get("runs", []):
            check_name(exp, tables["experiments"], f"{where}: runs")
        if lacks := [key for key in keys if key not in table and (name, key) != ("figures", "runs")]:
            raise ConfigError(f"{where}: lacks {', '.join(lacks)}")
        if name == "comparisons" and len(table["runs"]) != 2:
            raise ConfigError(f"{where}: runs must be two, the baseline and the arm")
    return tables[name]


def default(key: str, path: str | Path = EXPERIMENTS) -> object:
    """The value of a key in [defaults]."""
    return flatten(_read(path)["defaults"])[key]


def list_experiments(path: str | Path = EXPERIMENTS) -> list[str]:
    """The names of all experiments, in the order of the file."""
    return list(_read(path)["experiments"])


def load_config(exp: str, path: str | Path = EXPERIMENTS, overrides: Sequence[str] = (),
                profile: str | None = None) -> Config:
    """The resolved config of experiment `exp`, with overrides such as "train.total_steps=300" laid over it.

    An override's value is read as TOML, and as a plain string if it is not TOML. profile names a table of [profiles],
    laid over the experiment; its sub-table E applies to experiment E and those that extend it. Raises ConfigError.
    """
    tables, file = _read(path), Path(path).name
    experiments, chain, layers = tables["experiments"], [], []  # chain: exp and its ancestors; layers: from the root
    name, where = exp, file
    while name is not None:
        check_name(name, experiments, where)
        if name in chain:
            raise ConfigError(f"{where}: inheritance loop {' -> '.join([name, *reversed(chain)])}")
        chain.append(name)
        own = {k: v for k, v in experiments[name].items() if k != "extends" and (name == exp or k not in OWN)}
        layers.insert(0, (f"[experiments.{name}]", own))
        name, where = experiments[name].get("extends"), f"{file}: [experiments.{name}]: extends"
    layers.insert(0, ("[defaults]", tables["defaults"]))
    if profile is not None:
        check_name(profile, tables["profiles"], f"{file}: --profile")
        table, who = tables["profiles"][profile], f"[profiles.{profile}]"
        inner = {k: v for k, v in table.items() if k in experiments and isinstance(v, dict)}
        layers.append((who, {k: v for k, v in table.items() if k not in inner}))
        layers += [(who, inner[name]) for name in reversed(chain) if name in inner]
    raw = {key: (value, f"{file}: {who}") for who, layer in layers for key, value in flatten(layer).items()}
    raw["exp"] = exp, file
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        where = f"{file}: --set {override}"
        check_name(key, SETTABLE, where)
        if not equals:
            raise ConfigError(f"{where}: must read KEY=VALUE")
        try:
            (value,) = tomllib.loads(f"value = {text}").values()
        except (ValueError, RecursionError):  # not TOML, or several lines of it
            value = text
        raw[key] = value, where
    config = _resolve(raw, file)
    kind, gamma_set_by = config.loss.weighting, raw["loss.gamma"][1]
    if gamma_set_by.startswith(f"{file}: --set") and not WEIGHTINGS[kind].reads_gamma:
        raise ConfigError(f"{gamma_set_by}: has no effect with loss.weighting = {kind}")
    return config
