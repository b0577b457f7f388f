"""`lightning-hybrid export`: the folder that a run would have written, from its checkpoint; adapters merged."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_hybrid import HybridDeepSpeedStrategy, PPOModule, RolloutConfig
from lightning_hybrid.callbacks import HFExport
from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.config.export import ExportedModelConfig, ExportRun
from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.errors import CheckpointError, ConfigError
from lightning_hybrid.export import export_model
from lightning_hybrid.export.source import from_checkpoint, from_folder
from lightning_hybrid.models import load_policy, load_scalar, scalar_from_policy, with_adapter
from tests.helpers import quiet_trainer, tiny_policy
from tests.modules.test_ppo import prompts, warm_share

ROOT = Path(__file__).resolve().parents[2]
TOKENS = torch.randint(3, 45, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_policy().model.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def files(folder: Path) -> dict[str, bytes]:
    left_out = ("README.md", "export.json")  # which say where from
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in left_out}


def ppo_run(
    base: Path,
    tmp_path: Path,
    adapter: AdapterConfig | None = None,
    stage: int = 2,
    config: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Path, dict[str, Path]]:
    """Two iterations, a checkpoint, and what the run itself exports."""
    policy = with_adapter(load_policy(base), adapter)
    settings = RolloutConfig(max_new_tokens=8)
    module = PPOModule(policy, warm_share, rollout=settings, tokenizer=build_tokenizer())
    model = {"path": str(base), "adapter": None if adapter is None else adapter.model_dump()}
    strategy = HybridDeepSpeedStrategy(stage=stage)
    strategy.run_config = {"model": model} | (config or {})
    folders = {child: tmp_path / "of-the-run" / child for child in ("actor", "critic")}
    callbacks = [HFExport(folder, child, build_tokenizer()) for child, folder in folders.items()]
    trainer = quiet_trainer(
        strategy, max_steps=2, callbacks=[*callbacks, SaveAtTheEnd(tmp_path / "a.ckpt")], **arguments
    )
    trainer.fit(module, prompts())
    return tmp_path / "a.ckpt", folders


class SaveAtTheEnd(L.Callback):
    """A checkpoint of what is exported."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("adapter", "stage", "precision"),
    [
        (None, 2, "32-true"),
        pytest.param(AdapterConfig(r=4), 3, "bf16-true", marks=pytest.mark.slow),
        pytest.param(None, 3, "bf16-true", marks=pytest.mark.slow),
        pytest.param(AdapterConfig(kind="dora", r=4), 2, "32-true", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:LlamaForCausalLM has no inference container")  # with DoRA
def test_a_checkpoint_holds_the_folders_that_the_run_exports(
    adapter: AdapterConfig | None, stage: int, precision: Any, base: Path, tmp_path: Path
) -> None:
    checkpoint, folders = ppo_run(base, tmp_path, adapter, stage, precision=precision)
    for child, folder in folders.items():
        run = ExportRun(checkpoint=str(checkpoint), child=child, output_dir=str(tmp_path / child))
        model, tokenizer, facts = from_checkpoint(str(checkpoint), run.child, run.model)
        export_model(model, tmp_path / child, tokenizer, facts=facts)
        mine, theirs = files(tmp_path / child), files(folder)
        assert mine.keys() == theirs.keys()
        assert mine["model.safetensors"] == theirs["model.safetensors"]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    card = (tmp_path / "actor" / "README.md").read_text()
    assert "of the checkpoint `a.ckpt`, the model's `actor`" in card
    of_the_run = (folders["actor"] / "README.md").read_text()
    rows = [line for line in of_the_run.splitlines() if line.startswith("| reward/") or line.startswith("| policy/")]
    assert len(rows) > 5
    assert set(rows) < set(card.splitlines())
    assert not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def test_a_base_that_changed_since_and_a_model_that_is_not_there_are_refused(base: Path, tmp_path: Path) -> None:
    checkpoint, _ = ppo_run(base, tmp_path, AdapterConfig(r=4))
    torch.distributed.destroy_process_group()
    run = ExportRun(checkpoint=str(checkpoint), output_dir=str(tmp_path / "model"))
    assert from_checkpoint(str(checkpoint.parent), None, run.model)[2].step == 2  # the newest one there
    with pytest.raises(CheckpointError, match=r"has no model 'policy': give child, one of \['actor', 'critic'\]"):
        from_checkpoint(str(checkpoint), "policy", run.model)
    tiny_policy(seed=9).model.save_pretrained(base)
    with pytest.raises(CheckpointError, match="frozen weights of 'actor' are not those"):
        from_checkpoint(str(checkpoint), None, run.model)
    tiny_policy(hidden_size=64).model.save_pretrained(base)
    with pytest.raises(CheckpointError, match="is of another model"):
        from_checkpoint(str(checkpoint), None, run.model)


TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}"


def test_the_tokenizer_has_the_template_that_the_run_s_data_gave_it(base: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    data = {"path": "rows.jsonl", "template": f"{tmp_path}/own.jinja"}
    beside = {"path": None, "template": "plain"}  # not read, as it has no path
    checkpoint, _ = ppo_run(base, tmp_path, config={"data": data, "ptx": beside})
    given = ExportRun(checkpoint=str(checkpoint), output_dir="unused").model
    model, tokenizer, facts = from_checkpoint(str(checkpoint), None, given)
    export_model(model, tmp_path / "model", tokenizer, facts=facts)
    exported = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported.apply_chat_template([{"role": "user", "content": "the sea"}], tokenize=False) == "<the sea>"
    (tmp_path / "own.jinja").unlink()
    with pytest.raises(ConfigError, match=r"own.jinja' is neither a file .* give model.path, and model.tokenizer"):
        from_checkpoint(str(checkpoint), None, given)
    elsewhere = ExportedModelConfig(tokenizer=str(tmp_path / "model"))
    assert from_checkpoint(str(checkpoint), None, elsewhere)[1].chat_template == TEMPLATE


def test_a_critic_began_with_a_reward_model_only_if_that_reads_the_policy_s_tokens(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    scalar_from_policy(tiny_policy(hidden_size=64)).model.save_pretrained(other)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    checkpoint, _ = ppo_run(base, tmp_path, config={"reward": {"path": str(other)}})
    given = ExportRun(checkpoint=str(checkpoint), output_dir="unused").model
    assert from_checkpoint(str(checkpoint), "critic", given)[2].base == str(base)
    build_tokenizer().save_pretrained(other)
    with pytest.raises(
        CheckpointError, match="no 'model.model.embed_tokens.weight' of shape .*loaded was '.*other': give model.path"
    ):
        from_checkpoint(str(checkpoint), "critic", given)
    other.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"other' does not exist .*If it lies elsewhere now, give model.path"):
        from_checkpoint(str(checkpoint), "critic", given)


def test_a_checkpoint_over_four_bits_is_not_read_as_one_over_whole_weights(base: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed, and this run's base was not quantized")
    model = {"path": str(base), "adapter": AdapterConfig(r=4, quantize="nf4").model_dump()}
    checkpoint, _ = ppo_run(base, tmp_path, AdapterConfig(r=4), config={"model": model})
    given = ExportRun(checkpoint=str(checkpoint), output_dir="unused").model
    with pytest.raises(ConfigError, match="model.adapter.quantize=nf4 needs bitsandbytes"):
        from_checkpoint(str(checkpoint), None, given)


def test_a_run_s_file_needs_one_source() -> None:
    with pytest.raises(ConfigError, match="checkpoint = None: give the checkpoint of a run, or model.path"):
        ExportRun(output_dir="a")
    with pytest.raises(ConfigError, match="child = 'actor': names a model of a checkpoint"):
        ExportRun(output_dir="a", child="actor", model={"path": "b"})  # type: ignore[arg-type]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "lightning_hybrid_cli.py"), "export", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
def test_a_classifier_of_the_hub_stays_one(tmp_path: Path) -> None:
    cached = tmp_path / "models--me--judge"
    model = scalar_from_policy(tiny_policy(tie_word_embeddings=False)).model
    for saved in (model, build_tokenizer()):
        saved.save_pretrained(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    answer = command(
        "model.path=me/judge", f"output_dir={tmp_path}/out", HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1"
    )
    assert answer.returncode == 0, answer.stderr
    written = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert written.config.architectures == [type(model).__name__]


@pytest.mark.slow
def test_the_command_merges_an_adapter_onto_its_base(base: Path, tmp_path: Path) -> None:
    policy = with_adapter(load_policy(base), AdapterConfig(r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    export_model(policy, tmp_path / "adapter", build_tokenizer(), form="adapter")
    target = tmp_path / "merged"
    answer = command(f"model.path={tmp_path}/adapter", f"output_dir={target}")
    assert answer.returncode == 0, answer.stderr
    assert f"exported: {target}" in answer.stdout
    loaded = AutoModelForCausalLM.from_pretrained(target).eval()
    expected = policy.model.merge_and_unload().eval()
    assert (loaded(TOKENS).logits - expected(TOKENS).logits).abs().max() == 0
    (target / "notes.txt").write_text("mine")
    refused = command(f"model.path={tmp_path}/adapter", f"output_dir={target}")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: cannot export to '{target}': it holds 'notes.txt'")


def test_a_reward_model_s_adapter_and_a_whole_model_are_read_as_what_they_are(base: Path, tmp_path: Path) -> None:
    critic = with_adapter(load_scalar(base), AdapterConfig(r=4))
    export_model(critic, tmp_path / "adapter", build_tokenizer(), form="adapter")
    export_model(scalar_from_policy(tiny_policy()), tmp_path / "whole", build_tokenizer())
    for name in ("adapter", "whole"):
        run = ExportRun(model={"path": str(tmp_path / name)}, output_dir="unused")  # type: ignore[arg-type]
        assert type(from_folder(run.model)[0]).__name__ == "ScalarModel"
    run = ExportRun(model={"path": str(base)}, output_dir="unused")  # type: ignore[arg-type]
    assert type(from_folder(run.model)[0]).__name__ == "Policy"
