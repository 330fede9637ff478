import dataclasses

import pytest
from conftest import ROOT

from config import ConfigError, config_from_dict, flatten, list_experiments, load_config, load_tables

ALL = ["E1", "E2", "E3", "E4", "E5", "E6", "E7a", "E7b", "E7c", "E8a", "E8b", "E8c", "E9a", "E9b",
       "E10a", "E10b", "smoke"]


def difference(a, b):
    """Keys in which two experiments differ, apart from what each is called."""
    a, b = flatten(load_config(a)), flatten(load_config(b))
    return {key for key in a if a[key] != b[key]} - {"exp", "title", "question"}


def test_the_studys_table():
    """STUDY's table of experiments: weighting, gamma, base channels, steps, evaluation."""
    table = {
        "E1": ("constant", 5, 32, 50_000, 10_000), "E2": ("minsnr", 5, 32, 50_000, 10_000),
        "E3": ("minsnr", 5, 32, 10_000, 2000), "E4": ("minsnr_norm", 5, 32, 10_000, 2000),
        "E5": ("constant", 5, 32, 10_000, 2000), "E6": ("minsnr", 5, 32, 10_000, 2000),
        "E7a": ("constant", 5, 32, 10_000, 2000), "E7b": ("constant", 5, 32, 50_000, 2000),
        "E7c": ("constant", 5, 64, 10_000, 2000), "E8a": ("minsnr", 1, 64, 5000, 2000),
        "E8b": ("minsnr", 3, 64, 5000, 2000), "E8c": ("minsnr", 5, 64, 5000, 2000),
        "E9a": ("constant", 5, 32, 10_000, 2000), "E9b": ("minsnr", 5, 32, 10_000, 2000),
        "E10a": ("constant", 5, 32, 10_000, 2000), "E10b": ("minsnr", 5, 32, 10_000, 2000),
    }
    for exp, row in table.items():
        c = load_config(exp)
        assert (c.loss.weighting, c.loss.gamma, c.model.base_channels, c.train.total_steps, c.eval.every) == row
        assert c.diffusion.beta_schedule == ("cosine" if exp.startswith("E9") else "linear")
        assert c.diffusion.prediction == ("v" if exp.startswith("E10") else "eps")
        assert (c.exp, c.seed, c.data.name, c.train.batch_size, c.train.lr) == (exp, 1077, "cifar10", 4, 1e-4)
        assert (c.train.grad_clip, c.ema.decay, c.diffusion.num_timesteps, c.log.every) == (1.0, 0.999, 1000, 100)
        assert (c.grid.every, c.grid.n, c.grid.sampler, c.grid.nfe) == (5000, 36, "ddim", 20)
        assert (c.eval.features, c.eval.sampler, c.eval.nfe, c.eval.n_samples) == ("inception", "ddpm", 50, 5000)
        final = {"E4": ("ddpm", "ddim"), "E8a": ("ddim",), "E8b": ("ddim",), "E8c": ("ddim",)}
        assert (c.eval.final_samplers, c.eval.final_n_samples) == (final.get(exp, ("ddpm",)), 10_000)


def test_every_experiment_loads_and_says_what_it_asks():
    assert list_experiments() == ALL
    configs = [load_config(exp) for exp in ALL]
    assert len({c.title for c in configs}) == len({c.question for c in configs}) == len(ALL)
    assert all(c.question.endswith("?") for c in configs)


def test_a_comparison_differs_in_its_factor_only():
    assert difference("E1", "E2") == difference("E5", "E6") == difference("E9a", "E9b") == {"loss.weighting"}
    assert difference("E10a", "E10b") == {"loss.weighting"} and difference("E5", "E10a") == {"diffusion.prediction"}
    assert difference("E8a", "E8b") == difference("E8b", "E8c") == {"loss.gamma"}
    assert difference("E2", "E3") == {"train.total_steps", "eval.every"}
    assert difference("E3", "E4") == {"loss.weighting", "eval.final_samplers"}
    assert difference("E5", "E9a") == {"diffusion.beta_schedule"}
    assert difference("E5", "E7a") == set()


def test_overrides():
    c = load_config("E8c", overrides=["train.total_steps=300", "train.lr=1", "data.name=shapes", "seed=5",
                                      "model.channel_mults=[1, 2]", 'data.root="a b"', "train.amp=false"])
    assert (c.train.total_steps, c.train.lr, c.data.name, c.seed) == (300, 1.0, "shapes", 5)
    assert (c.model.channel_mults, c.data.root, c.train.amp) == ((1, 2), "a b", False)
    assert type(c.train.lr) is float and load_config("E8c").train.total_steps == 5000


def test_a_profile_is_laid_over_experiments_and_its_tables_over_the_one_they_name():
    for exp, samplers, every in (("E5", ("ddpm", "ddim"), 200), ("E4", ("ddpm", "ddim"), 200), ("E8a", ("ddim",), 250)):
        plain, small = load_config(exp), load_config(exp, profile="study", overrides=["eval.n_samples=300"])
        assert small.eval.features == "lite0" and small.eval.final_n_samples == 2000 and small.eval.n_samples == 300
        assert small.eval.final_samplers == samplers and small.curvature.every == every
        changed = {key for key, value in flatten(small).items() if flatten(plain)[key] != value}
        assert {key.split(".")[0] for key in changed} <= {"eval", "curvature", "log", "train"}
        assert {key for key in changed if key.startswith("train.")} == {"train.amp"}
    with pytest.raises(ConfigError, match="'studi'.*study"):
        load_config("E5", profile="studi")


def test_a_profile_with_a_key_that_does_not_exist(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace("[profiles.study]", "[profiles.study]\neval.n_sample = 3"))
    with pytest.raises(ConfigError, match=r"mine.toml: \[profiles.study\].*eval.n_sample';.*eval.n_samples"):
        load_config("E5", path, profile="study")
    assert load_config("E5", path).eval.n_samples == 5000


def test_configs_are_frozen_and_survive_their_own_json():
    c = load_config("E4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.train.lr = 1.0
    assert config_from_dict(dataclasses.asdict(c), "config.json") == c


GOOD = (ROOT / "experiments.toml").read_text()

BAD_OVERRIDES = [  # one of each kind of fault, and the facts that the line must carry
    ("train.totl_steps=3", ["train.totl_steps", "train.total_steps"]), ("exp=E1", ["exp"]), ("title=x", ["title"]),
    ("train.lr", ["KEY=VALUE"]), ("eval.final_samplers=['ddpm','ddpm']", ["once"]),
    ("loss.gamma=0", ["loss.gamma", "0.0", "1e-12"]), ("loss.gamma=nan", ["nan"]),
    ("diffusion.prediction=epsilon", ["'epsilon'", "eps"]),
    ("diffusion.beta_schedule=linear_zero_snr", ["diffusion.beta_schedule", "linear_zero_snr", "prediction x0 or v"]),
    ("loss.gamma=inf", ["loss.gamma", "inf"]), ("loss.gamma=5x", ["loss.gamma", "'5x'", "float"]),
    ("loss.weighting=min_snr", ["'min_snr'", "minsnr"]), ("diffusion.beta_schedule=cosin", ["cosine"]),
    ("grid.sampler=ddpm2", ["'ddpm2'", "ddpm"]), ("eval.features=lite", ["'lite'", "lite0"]),
    ("eval.final_samplers=['euler']", ["'euler'"]), ("eval.final_samplers=[]", ["eval.final_samplers"]),
    ("train.batch_size=4.5", ["4.5", "int"]), ("train.batch_size=true", ["True", "int"]),
    ("train.amp=1", ["train.amp", "bool"]), ("data.root=3", ["data.root", "str"]),
    ("model.dropout=1.0", ["model.dropout", "1.0"]), ("model.base_channels=130", ["130", "32 GroupNorm groups"]),
    ("model.channel_mults=[1,1,1,1,1,1,1]", ["7", "1 to 6"]), ("model.channel_mults=2", ["2 is not a list"]),
    ("model.attn_resolutions=[20]", ["20", "[32, 16, 8, 4]"]), ("grid.nfe=1001", ["1001", "1000"]),
    ("eval.nfe=2000", ["2000", "1000"]), ("seed=-1", ["seed", "-1"]), ("train.lr=" + "[" * 3000, ["train.lr"]),
    *((f"train.lr={value}", ["train.lr"]) for value in ("1" + "0" * 400, "{a=" * 2000, '"' * 5, "1e999", "0x", "\n")),
]


@pytest.mark.parametrize("override, facts", BAD_OVERRIDES)
def test_bad_overrides(override, facts):
    with pytest.raises(ConfigError) as error:
        load_config("E8c", overrides=[override])
    text = str(error.value)
    assert all(fact in text for fact in [*facts, "--set", "experiments.toml"]) and "\n" not in text


def test_a_gamma_that_nothing_reads_is_refused():
    with pytest.raises(ConfigError, match="experiments.toml: --set loss.gamma=3: .*constant"):
        load_config("E1", overrides=["loss.gamma=3"])
    with pytest.raises(ConfigError, match="loss.gamma.*p2"):
        load_config("E8a", overrides=["loss.gamma=3", "loss.weighting=p2"])
    assert load_config("E1", overrides=["loss.gamma=3", "loss.weighting=soft_minsnr"]).loss.gamma == 3
    assert load_config("E8a", overrides=["loss.weighting=p2"]).loss.gamma == 1  # of E8a, and not read


BAD_FILES = [
    (GOOD.replace('extends = "E5"', 'extends = "E55"', 1), "E6", ["[experiments.E6]", "E55"]),
    (GOOD.replace('extends = "E1"', 'extends = "E3"', 1), "E3", ["E2 -> E3"]),
    (GOOD.replace('extends = "E1"', "extends = [1]", 1), "E2", ["extends", "[1]"]),
    (GOOD.replace("lr = 1e-4", ""), "E1", ["train.lr is missing"]),
    (GOOD.replace("lr = 1e-4", "learning_rate = 1e-4"), "E1", ["[defaults]", "train.learning_rate"]),
    (GOOD.replace("loss.gamma = 3.0", "loss.gama = 3.0"), "E8b", ["loss.gama", "loss.gamma"]),
    (GOOD.replace("loss.gamma = 3.0", "loss.gamma = 0"), "E8b", ["[experiments.E8b]", "loss.gamma", "0.0"]),
    (GOOD.replace("\n[defaults]", "\n[default]", 1), "E1", ["default", "defaults"]),
    (GOOD.replace("seed = 1077", "seed = "), "E1", ["line "]),
    (GOOD + '\n[experiments.E99]\nextends = "E1"\ntitle = "t"\n', "E99", ["question is missing"]),
    ("experiments = 5", "E1", ["experiments"]),
    ("defaults = 3", "E1", ["defaults"]), ("experiments.E1 = 5", "E1", ["experiments"]), ("", "E1", ["'E1'"]),
    ("x = " + "[" * 3000, "E1", ["mine.toml"]),
]


@pytest.mark.parametrize("text, exp, facts", BAD_FILES)
def test_bad_files(tmp_path, text, exp, facts):
    assert text != GOOD
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(exp, path)
    assert all(fact in str(error.value) for fact in [*facts, "mine.toml"]) and "\n" not in str(error.value)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("mine.toml", "other.toml"):
        with pytest.raises(ConfigError, match=name):
            load_config("E1", tmp_path / name)
    with pytest.raises(ConfigError, match="'E8d'.*E8"):
        load_config("E8d")


def test_figures_and_comparisons_name_what_exists(tmp_path):
    assert {"min_snr", "cosine"} <= load_tables("comparisons").keys() and "frontier" in load_tables("figures")
    for line, facts in [('rums = ["E1"]', ["rums", "runs"]), ('runs = ["E0"]', ["'E0'"]), ("runs = 5", ["not a list"]),
                        ('runs = ["E1", "E2"]', ["lacks title, factor"]),
                        ('title = "x"\nfactor = []\nruns = ["E1"]', ["two"]), ('title = ["x"]', ["type str"]),
                        ("title = 5", ["type str"]), ("factor = [5]", ["type str"])]:
        (tmp_path / "mine.toml").write_text(f"{GOOD}\n[comparisons.mine]\n{line}\n")
        with pytest.raises(ConfigError) as error:
            load_tables("comparisons", tmp_path / "mine.toml")
        assert all(fact in str(error.value) for fact in [*facts, "comparisons.mine"])
