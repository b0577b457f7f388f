"""PPO's relatives with vLLM engines that generate the next batch while the ranks train on this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import lightning_hybrid as lh
from lightning_hybrid.algorithms import GRPOConfig
from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.models import load_policy, load_tokenizer
from tests.conftest import RunRanks
from tests.vllm.wide_heads import write_wide_model

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: see .ci/vllm")
pytestmark = pytest.mark.slow

NAMES = ("Sam", "Lily", "Ben", "Anna", "Max", "Sue", "Tim", "Jo")
BATCH = 8  # over all ranks


class Diary(L.Callback):
    """Prompts that each iteration learned from, and what it logged."""

    def __init__(self) -> None:
        self.learned: list[str] = []
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        prompts = pl_module.last_rollout.prompts[:: pl_module.config.group_size]
        self.learned += pl_module.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        figures = trainer.callback_metrics.items()
        self.rows.append({name: float(value) for name, value in figures if name.startswith(("rollout/", "reward/"))})


def the_words(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count(" the")) for response in responses]


def train(folder: str, ranks: int, staleness: int) -> tuple[list[str], list[dict[str, float]]]:
    root = Path(folder)
    engines = VLLMConfig(colocate=False, kv_cache_gib=0.1, bucket_mib=1)
    rollout = lh.RolloutConfig(backend="vllm", vllm=engines, max_new_tokens=48, max_staleness=staleness)
    config = GRPOConfig(group_size=2, actor_lr=1e-3, kl_coef=0.01, micro_batch_size=64, importance_cap=2.0)
    tokenizer = load_tokenizer(root / "wide")
    module = lh.PPOModule(load_policy(root / "wide"), the_words, config, rollout, tokenizer, seed=1)
    diary = Diary()
    trainer = L.Trainer(
        strategy="hybrid_deepspeed",
        accelerator="cpu",
        devices=ranks,
        max_epochs=1,
        callbacks=[diary],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, lh.PromptDataModule(root / "prompts.jsonl", batch_size=BATCH // ranks))
    return diary.learned, diary.rows


def train_and_print(*arguments: Any) -> None:
    print("SEEN " + json.dumps(train(*arguments)))


@pytest.mark.parametrize(("ranks", "staleness"), [(1, 1), (2, 2)])
def test_each_prompt_is_learned_from_once_and_no_token_is_too_old(
    ranks: int, staleness: int, shared: Path, tmp_path: Path, run_ranks: RunRanks
) -> None:
    write_wide_model(shared / "models" / "tinystories-656k", tmp_path / "wide")
    prompts = [f"{begun} {name}" for begun in ("Once upon a time", "The little girl", "A big dog") for name in NAMES]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    output = run_ranks(train_and_print, ranks, str(tmp_path), ranks, staleness, timeout=280)
    seen = [json.loads(text.split("SEEN ", 1)[1].splitlines()[0]) for text in output]
    learned = [text.strip() for of_rank, _ in seen for text in of_rank]
    assert sorted(learned) == sorted(prompts)
    rows = seen[0][1]
    assert len(rows) == len(prompts) // BATCH
    ages = [row["rollout/staleness_max"] for row in rows]
    assert all(age <= staleness for age in ages)
    assert max(ages) >= 1
    assert rows[-1]["rollout/carried_over"] == 0
    assert all(0.5 < row["rollout/importance_weight_mean"] < 1.5 for row in rows)
    assert rows[0]["rollout/logprob_gap_mean"] < 1e-3  # nothing has changed yet
