"""The export at the end of training: asked for before it begins, and with a card that says what was done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lightning_hybrid import HybridDeepSpeedStrategy, InstructionDataModule
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.config import SFTConfig
from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.data import TaskFiles, write_task
from lightning_hybrid.data.task import TaskSizes, build_tokenizer
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.export.card import portable
from lightning_hybrid.models import Policy, load_policy, with_adapter
from lightning_hybrid.modules import SFTModule
from tests.helpers import quiet_trainer, tiny_policy, weights_of

TOKENS = torch.randint(3, 45, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    return write_task(tmp_path_factory.mktemp("task"), sizes=TaskSizes(sft=64))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_policy().model.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fit(task: TaskFiles, policy: Policy, export: HFExport, stage: int = 2, **arguments: Any) -> SFTModule:
    module = SFTModule(policy, SFTConfig(lr=1e-2))
    data = InstructionDataModule(str(task.sft), tokenizer=build_tokenizer(), batch_size=16)
    strategy = HybridDeepSpeedStrategy(stage=stage)
    strategy.run_config = {"model": {"path": f"{Path.cwd()}/a/model"}, "home": f"{Path.home()}/data", "seed": 7}
    quiet_trainer(strategy, callbacks=[export], **({"max_steps": 3} | arguments)).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_trained_adapter_is_merged_into_a_plain_model(
    task: TaskFiles, base: Path, tmp_path: Path, stage: int
) -> None:
    policy = with_adapter(load_policy(base), AdapterConfig(r=4))
    module = fit(task, policy, HFExport(tmp_path / "model", "policy", build_tokenizer()), stage)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    names = loaded.state_dict().keys()
    assert names == AutoModelForCausalLM.from_pretrained(base).state_dict().keys()
    twin = with_adapter(load_policy(base), AdapterConfig(r=4))
    vector = weights_of(module.policy)
    torch.nn.utils.vector_to_parameters(vector, twin.parameters())
    expected = twin.model.merge_and_unload().eval()
    assert (loaded(TOKENS).logits - expected(TOKENS).logits).abs().max() == 0
    assert (loaded(TOKENS).logits - load_policy(base).model(TOKENS).logits).abs().max() > 1e-3


def test_an_adapter_alone_is_loaded_from_any_folder(
    task: TaskFiles, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy = with_adapter(load_policy("base"), AdapterConfig(r=4))
    module = fit(task, policy, HFExport(tmp_path / "out" / "model", "policy", build_tokenizer(), "adapter"))
    monkeypatch.chdir(tmp_path / "out")  # where 'base' means nothing
    loaded = load_policy("model").eval().model(TOKENS).logits
    torch.testing.assert_close(loaded, module.policy.eval().model(TOKENS).logits, rtol=0, atol=5e-6)
    # Trained again, the base is no longer the one that the adapter belongs to.
    tiny_policy(seed=5).model.save_pretrained(base)
    with pytest.raises(ConfigError, match="was not trained on the weights of"):
        load_policy("model")


def test_a_second_run_replaces_the_first_ones_export(task: TaskFiles, tmp_path: Path) -> None:
    for seed in (0, 1):
        module = fit(task, tiny_policy(seed), HFExport(tmp_path / "model", "policy", build_tokenizer()))
    assert torch.equal(weights_of(load_policy(tmp_path / "model")), weights_of(module.policy))


@pytest.mark.parametrize(
    ("form", "child", "problem"),
    [
        (
            "merged",
            "policy",
            r"cannot export to '.*model': it is not empty and no export \(no export.json\); it holds mine",
        ),
        ("adapter", "policy", "export=adapter: the model has no adapter"),
        ("merged", "actor", "cannot export 'actor': the module has no such child; it has: policy"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(
    form: Any, child: str, problem: str, task: TaskFiles, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    policy = tiny_policy()
    before = weights_of(policy)
    with pytest.raises(ConfigError, match=problem):
        fit(task, policy, HFExport(tmp_path / "model", child, build_tokenizer(), form))
    assert torch.equal(weights_of(policy), before)
    assert (tmp_path / "model" / "mine").read_text() == "kept"


def test_a_configuration_that_cannot_be_saved_is_refused_before_training(task: TaskFiles, tmp_path: Path) -> None:
    policy = tiny_policy()
    before = weights_of(policy)
    policy.model.generation_config.do_sample = False
    policy.model.generation_config.temperature = 0.3  # which Transformers refuses to save beside it
    with pytest.raises(
        ConfigError, match=r"configuration of LlamaForCausalLM cannot be saved: .*`temperature` is set to `0.3`"
    ) as raised:
        fit(task, policy, HFExport(tmp_path / "model", "policy", build_tokenizer()))
    assert "Mend the model's config.json or generation_config.json" in str(raised.value)
    assert torch.equal(weights_of(policy), before)


def test_the_card_says_what_was_trained_on_what_and_how_and_nothing_about_the_machine(
    task: TaskFiles, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit(task, load_policy("base"), HFExport("model", "policy", build_tokenizer()))
    card = (tmp_path / "model" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "trained from `base` for 3 steps" in card
    row = re.search(r"\| \S*sft.jsonl \| 64 \| [\d,]+ \| `([0-9a-f]{64})` \|", card)
    assert row is not None
    assert re.search(r"\| loss \| [\d.]+ \|", card)
    assert portable("/data/teams/a/models/base") == "…/a/models/base"
    assert portable("https://me:secret@host/score?key=secret") == "https://…@host/score?…"
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings == {"model": {"path": "a/model"}, "home": "~/data", "seed": 7}
    assert "- torch 2." in card
    texts = [path.read_text() for path in (tmp_path / "model").iterdir() if path.suffix in (".md", ".json")]
    assert not [text for text in texts if str(Path.home()) in text or str(Path.cwd()) in text]
