"""Every shipped YAML file composes and validates, alone or as a choice of its group."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from omegaconf import OmegaConf

from lightning_hybrid.algorithms import ALGORITHMS
from lightning_hybrid.config import (
    DataConfig,
    DPORun,
    InstructionDataConfig,
    KTORun,
    PlanRun,
    PPORun,
    PreferenceDataConfig,
    PromptDataConfig,
    QuickstartRun,
    RewardRun,
    Run,
    Settings,
    SFTRun,
    UnpairedDataConfig,
)
from lightning_hybrid.config.export import ExportRun
from lightning_hybrid.config.inspect import InspectRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.paths import conf_dir

SCHEMAS: dict[str, type[Settings]] = {
    "sft": SFTRun,
    "reward": RewardRun,
    "dpo": DPORun,
    "kto": KTORun,
    "ppo": PPORun,
    "plan": PlanRun,
    "export": ExportRun,
    "inspect": InspectRun,
    "quickstart": QuickstartRun,
}
NEEDED = {
    "sft": ["model.path=a-model", "data.path=rows.jsonl"],
    "reward": ["model.path=a-model", "data.path=rows.jsonl"],
    "dpo": ["model.path=a-model", "data.path=rows.jsonl"],
    "kto": ["model.path=a-model", "data.path=rows.jsonl"],
    "ppo": ["model.path=a-model", "data.path=rows.jsonl", "reward.path=a-reward-model"],
    "plan": ["model.path=a-model"],
    "inspect": ["model.tokenizer=a-tokenizer", "data.path=rows.jsonl"],
    "export": ["checkpoint=a.ckpt", "output_dir=a-folder"],
    "quickstart": [],
}
# The recipe to which a choice of these groups belongs; the choices of the other groups serve all recipes.
RECIPE_OF = {
    "data/instructions": "sft",
    "data/texts": "sft",
    "data/preferences": "reward",
    "data/prompts": "ppo",
    "data/unpaired": "inspect",
    "algorithm/sft": "sft",
    "algorithm/reward": "reward",
    "algorithm/dpo": "dpo",
    "algorithm/kto": "kto",
    "rollout/hf": "ppo",
}
FILES = sorted(str(path.relative_to(conf_dir()).with_suffix("")) for path in conf_dir().rglob("*.yaml"))
# What several choices share stands in a folder `base` beside them, and is composed through them.
EXPERIMENTS = [
    name.removeprefix("experiment/") for name in FILES if name.startswith("experiment/") and "/base/" not in name
]
CHOICES = [name for name in FILES if "/" in name and not name.startswith("experiment/") and "/base/" not in name]
BASES = [name for name in FILES if "/base/" in name]


def recipe_of(experiment: str) -> str:
    """An experiment is named after its recipe, or after an algorithm of `ppo`."""
    name = experiment.split("/")[1]
    return "ppo" if name in ALGORITHMS else name


def test_every_primary_config_is_known_here() -> None:
    assert sorted(name for name in FILES if "/" not in name) == sorted(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_primary_config_validates_once_its_open_values_are_given(name: str) -> None:
    assert isinstance(compose_run(name, SCHEMAS[name], NEEDED[name]), SCHEMAS[name])


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_of_a_group_validates(choice: str) -> None:
    recipe = RECIPE_OF.get(choice, "ppo")
    group, _, name = choice.rpartition("/")
    needed = NEEDED[recipe]
    if choice == "model/tiny_llama":
        needed = [*(value for value in needed if "model.path" not in value), "model.tokenizer=a-tokenizer"]
    run = compose_run(recipe, SCHEMAS[recipe], [f"{group}={name}", *needed])
    assert isinstance(run, SCHEMAS[recipe])


@pytest.mark.parametrize("base", BASES)
def test_what_choices_share_is_used_by_one(base: str) -> None:
    name = base.rpartition("/")[2]
    listed = (f"{base.removeprefix('experiment/')}\n", f"base/{name}@_here_", f"- {name}@_here_")
    texts = [file.read_text() for file in conf_dir().rglob("*.yaml")]
    assert any(entry in text for text in texts for entry in listed)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_needs_nothing_more(experiment: str) -> None:
    (folder, name), recipe = experiment.split("/"), recipe_of(experiment)
    run = compose_run(recipe, SCHEMAS[recipe], [f"experiment={experiment}"])
    assert isinstance(run, Run)
    assert run.output_dir == f"outputs/{folder}/{name}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_holds_differences_only(experiment: str) -> None:
    """A value that equals the default has no place in an experiment."""
    recipe = recipe_of(experiment)
    algorithm = [f"algorithm={experiment.split('/')[1]}"] if recipe == "ppo" else []
    default = compose_run(recipe, SCHEMAS[recipe], [*NEEDED[recipe], *algorithm]).model_dump()
    file = conf_dir() / "experiment" / f"{experiment}.yaml"
    changes: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    repeated = [
        f"{group}.{key}"
        for group, values in changes.items()
        if group not in ("defaults", "root", "shared", "output_dir")
        for key, value in values.items()
        if default[group][key] == value
    ]
    assert repeated == []


def test_stages_of_an_experiment_hand_their_folders_on() -> None:
    sft = compose_run("sft", SFTRun, ["experiment=movie_sentiment/sft"])
    reward = compose_run("reward", RewardRun, ["experiment=movie_sentiment/reward"])
    ppo = compose_run("ppo", PPORun, ["experiment=movie_sentiment/ppo"])
    assert reward.model.path == ppo.model.path == f"{sft.output_dir}/model"
    assert ppo.reward.path == f"{reward.output_dir}/model"


def test_another_root_moves_all_folders_of_an_experiment() -> None:
    run = compose_run("ppo", PPORun, ["experiment=quickstart/ppo", "root=elsewhere"])
    folders = [run.output_dir, run.model.path, run.reward.path, run.data.path]
    assert folders == [
        "elsewhere/ppo",
        "elsewhere/sft/model",
        "elsewhere/reward/model",
        "elsewhere/task/prompts.jsonl",
    ]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "ppo"])
def test_defaults_in_yaml_are_the_defaults_in_python(name: str) -> None:
    """One set of defaults, whether a run starts from the command line or from Python."""
    run = compose_run(name, SCHEMAS[name], NEEDED[name])
    assert isinstance(run, SFTRun | RewardRun | DPORun | KTORun | PPORun)
    assert run.algorithm == type(run.algorithm)()
    assert run.strategy == type(run.strategy)()
    assert run.callbacks == type(run.callbacks)()
    assert run.logger == type(run.logger)()
    assert run.data == type(run.data)(path="rows.jsonl")
    if isinstance(run, PPORun):
        assert run.ptx == type(run.ptx)()


@pytest.mark.parametrize(
    ("config", "module", "given_by_the_recipe"),
    [
        (InstructionDataConfig, "InstructionDataModule", {"tokenizer"}),
        (PreferenceDataConfig, "PreferenceDataModule", {"tokenizer"}),
        (UnpairedDataConfig, "UnpairedDataModule", {"tokenizer"}),
        (PromptDataConfig, "PromptDataModule", {"tokenizer", "max_new_tokens"}),
    ],
)
def test_data_settings_are_the_arguments_of_the_data_module(
    config: type[DataConfig], module: str, given_by_the_recipe: set[str]
) -> None:
    import lightning_hybrid.data as data

    arguments = {
        parameter.name: parameter.default
        for kind in getattr(data, module).__mro__
        if kind.__module__.startswith("lightning_hybrid")
        for parameter in inspect.signature(kind.__init__).parameters.values()
        if parameter.name not in ("self", "common", *given_by_the_recipe)
    }
    settings = config(path="rows.jsonl").model_dump()
    assert settings.pop("path") == "rows.jsonl"
    arguments.pop("path")
    assert settings == arguments
