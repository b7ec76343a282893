"""Settings: there and back, and refusals that name the flag."""

import dataclasses
from pathlib import Path

import pytest

from twinspect.config import ModelConfig, RunConfig, TrainConfig
from twinspect.errors import ConfigError, unknown_name


def test_there_and_back() -> None:
    config = RunConfig(ModelConfig(teacher="dinov2-small", size=112), TrainConfig(steps=7, seed=3))
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_dict({}) == RunConfig()


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[model]\nteacher = "resnet18"\n[train]\nlr = 0.01\n')
    config = RunConfig.from_toml(path)
    assert (config.model.teacher, config.train.lr) == ("resnet18", 0.01)
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file"):
        RunConfig.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_toml_of_windows_editors(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes('[model]\r\nteacher = "resnet18"\r\n'.encode(encoding))
    assert RunConfig.from_toml(path).model.teacher == "resnet18"
    path.write_bytes('[model]\nteacher = "caf\xe9"\n'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 text .*save it as UTF-8"):
        RunConfig.from_toml(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modell": {}}, "unknown section 'modell'. Did you mean 'model'"),
        ({"model": {"teachr": "x"}}, "unknown setting 'teachr'. Did you mean 'teacher'"),
        ({"model": {"size": 10}}, "--size 10: accepted 64 to 4,096, or 0"),
        ({"model": {"dropout": 1.0}}, "--dropout 1.0: accepted 0 to 0.99"),
        ({"model": {"ee_depth": 1.5}}, "--ee-depth 1.5: accepted 0 to 1"),
        ({"model": {"model": "snl", "recentre": True}}, "recentre: for --model dual only, not snl"),
        ({"model": {"scoring": "white"}}, "unknown --scoring 'white'. Accepted: "),
        ({"train": {"steps": -1}}, "--steps -1: accepted 0 or more"),
        ({"train": {"batch": 1}}, "--batch 1: accepted 2 to 65,536"),
        ({"train": {"lr": 0.0}}, "--lr 0.0: accepted a number above 0"),
        ({"train": {"holdout": 0.9}}, "--holdout 0.9: accepted 0.05 to 0.5"),
        ({"train": {"time_budget_s": -1.0}}, "--time-budget -1.0: accepted 0"),
        ({"model": {"size": 100_000}}, "--size 100000: accepted 64 to 4,096"),
        ({"model": {"depth": -1}}, "--depth -1: accepted 0 or more"),
        ({"train": {"seed": -5}}, "--seed -5: accepted 0 to 4,294,967,295"),
        ({"train": {"seed": 2**32}}, "--seed 4294967296: accepted 0 to"),
        ({"train": {"batch": 1_000_000}}, "--batch 1000000: accepted 2 to 65,536"),
        ({"train": {"cache_gb": -1}}, "--cache-gb -1: accepted 0"),
        ({"train": {"checkpoint_every": 0}}, "--checkpoint-every 0: accepted 1 or more"),
        ({"train": {"lr": float("nan")}}, "lr nan: a finite number is needed"),
        ({"train": {"time_budget_s": float("inf")}}, "time_budget_s inf: a finite number is needed"),
        ({"train": {"steps": "ten"}}, "steps 'ten': a whole number is needed"),
        ({"train": {"steps": 2.5}}, "steps 2.5: a whole number is needed"),
        ({"train": {"steps": True}}, "steps True: a whole number is needed"),
        ({"model": {"recentre": 1}}, "recentre 1: true or false is needed"),
        ({"model": {"teacher": 3}}, "teacher 3: a text is needed"),
        ({"model": "resnet18"}, "'resnet18' stands where a table of settings is needed"),
    ],
)
def test_refusals(values: dict[str, dict[str, object]], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_dict(values)
    assert words in str(refused.value)


def test_settings_of_older_models_that_are_gone_are_read_at_their_only_value() -> None:
    assert RunConfig.from_dict({"model": {"temperature": 1.0, "cram_add_back": True}}) == RunConfig()
    with pytest.raises(ConfigError, match="unknown setting 'cram_add_back'"):
        RunConfig.from_dict({"model": {"cram_add_back": False}})


def test_settings_are_frozen_and_explained() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.steps = 3  # type: ignore[misc]
    for kind in (ModelConfig, TrainConfig):
        assert all(one.metadata["help"].endswith((".", ")")) for one in dataclasses.fields(kind))


def test_unknown_names() -> None:
    assert unknown_name("fruit", "aple", ["apple", "fig"]) == (
        "unknown fruit 'aple'. Did you mean 'apple'? Accepted: apple, fig"
    )
    assert unknown_name("fruit", "zzz", ["apple"]) == "unknown fruit 'zzz'. Accepted: apple"


def test_the_dial_sets_what_costs_time_and_gives_way_to_what_is_given() -> None:
    from twinspect import Detector

    fast, default = (Detector(effort=name).config for name in ("fast", "default"))
    assert default == Detector().config
    assert fast.train.steps < default.train.steps
    assert Detector(effort="fast", size=128).config.model.size == 128
    same = [dataclasses.replace(c.model, size=0) for c in (fast, default)]
    assert same[0] == same[1]
    with pytest.raises(ConfigError, match="instant, fast, default"):
        Detector(effort="hard")


def test_no_steps_are_for_models_that_have_more_than_students() -> None:
    from twinspect import Detector

    assert Detector(effort="instant").config.train.steps == 0
    for model in ({"scoring": "plain"}, {"model": "rd"}):
        with pytest.raises(ConfigError, match="--steps 0"):
            RunConfig.from_dict({"model": model, "train": {"steps": 0}})
