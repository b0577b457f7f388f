"""PPO and its relatives with vLLM inside the ranks: the same responses on one rank and on two, however they share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lightning_hybrid as lh
from lightning_hybrid.algorithms import GRPOConfig
from lightning_hybrid.config import AdapterConfig, VLLMConfig
from lightning_hybrid.models import Policy, load_policy, load_tokenizer, with_adapter
from tests.conftest import RunRanks
from tests.vllm.wide_heads import perturbed, write_wide_model

pytest.importorskip("vllm", reason="vLLM is in an environment of its own: see .ci/vllm")
pytestmark = pytest.mark.slow

STEPS = 4
FIGURES = ("reward/score", "policy/kl", "rollout/logprob_gap_max", "rollout/response_length")


class Figures(L.Callback):
    """Keeps what each iteration logged, and how often weights had been pushed."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        engine: Any = getattr(pl_module.backend, "engine", None)
        row = {name: float(trainer.callback_metrics[name]) for name in FIGURES}
        self.rows.append(row | ({} if engine is None else {"pushes": engine.pushes}))


def the_words(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count(" the")) for response in responses]


def train(
    folder: str, ranks: int, stage: int, tp: int, lora: bool, backend: str = "vllm", separate: int = 0
) -> list[dict[str, float]]:
    """Figures of each iteration.

    Args:
        folder: with model and prompts.
        ranks: that train.
        stage: of ZeRO.
        tp: devices of an engine.
        lora: train an adapter.
        backend: of the rollouts.
        separate: engines in processes of their own; 0: inside the ranks.
    """
    root = Path(folder)
    torch.manual_seed(0)  # of the adapter
    policy = load_policy(root / "wide")
    if lora:
        policy = with_adapter(policy, AdapterConfig(r=4))
    engines = {"colocate": False, "num_engines": separate, "bucket_mib": 1} if separate else {}
    vllm = VLLMConfig(tensor_parallel_size=tp, kv_cache_gib=0.1, **engines)
    rollout = lh.RolloutConfig(backend=backend, max_new_tokens=16, vllm=vllm)
    config = GRPOConfig(group_size=4, actor_lr=1e-3, kl_coef=0.01, micro_batch_size=64)
    tokenizer = load_tokenizer(root / "wide")
    module = lh.PPOModule(policy, the_words, config, rollout, tokenizer, seed=1)
    figures = Figures()
    trainer = L.Trainer(
        strategy=lh.HybridDeepSpeedStrategy(stage=stage),
        accelerator="cpu",
        devices=ranks,
        max_steps=STEPS,
        callbacks=[figures],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, lh.PromptDataModule(root / "prompts.jsonl", batch_size=8 // ranks))
    return figures.rows


def evaluate(folder: str, lora: bool, backend: str) -> list[tuple[str, str | None]]:
    """Greedy responses of a policy, and of its reference, to each prompt."""
    root = Path(folder)
    torch.manual_seed(0)  # of the adapter
    plain = load_policy(root / "wide")
    policy = with_adapter(plain, AdapterConfig(r=4)) if lora else Policy(perturbed(plain.model))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    rollout = lh.RolloutConfig(backend=backend, max_new_tokens=12, vllm=VLLMConfig(kv_cache_gib=0.1))
    module = lh.PPOModule(
        policy,
        the_words,
        GRPOConfig(kl_coef=0.01),
        rollout,
        load_tokenizer(root / "wide"),
        reference=None if lora else root / "wide",
    )
    trainer = L.Trainer(strategy="hybrid_deepspeed", accelerator="cpu", devices=1, logger=False)
    data = lh.PromptDataModule(root / "prompts.jsonl", validation_path=root / "prompts.jsonl", batch_size=8)
    trainer.validate(module, data, verbose=False)
    return [(judged.response, judged.reference_response) for judged in module.evaluation.judgements]


def evaluate_and_print(*arguments: Any) -> None:
    print("FIGURES " + json.dumps(evaluate(*arguments)))


def train_and_print(*arguments: Any) -> None:
    print("FIGURES " + json.dumps(train(*arguments)))


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    write_wide_model(shared / "models" / "tinystories-656k", tmp_path / "wide")
    begun = ("Once upon a time", "The little girl", "A big dog", "One day, a cat")
    named = ("Sam", "Lily", "Ben", "Anna", "Max", "Sue", "Tim", "Jo")
    rows = [{"prompt": f"{words} named {name}"} for words in begun for name in named]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def on_ranks(run_ranks: RunRanks, folder: Path, ranks: int, *rest: Any) -> list[dict[str, float]]:
    outputs = run_ranks(train_and_print, ranks, str(folder), ranks, *rest, timeout=1200)
    each = [json.loads(text.rpartition("FIGURES ")[2].splitlines()[0]) for text in outputs]
    assert all(rows == each[0] for rows in each)
    return each[0]


@pytest.mark.parametrize(
    ("stage", "tp", "lora"), [(2, 1, False), (3, 1, False), (2, 2, False), (3, 2, False), (3, 2, True)]
)
def test_two_ranks_learn_like_one_whether_they_share_an_engine_or_not(
    folder: Path, run_ranks: RunRanks, stage: int, tp: int, lora: bool
) -> None:
    alone = on_ranks(run_ranks, folder, 1, 2, 1, lora)
    together = on_ranks(run_ranks, folder, 2, stage, tp, lora)
    assert all(row["rollout/logprob_gap_max"] < 1e-4 for row in together)
    # Sums over ranks round differently: sooner or later a response takes another turn, and then the policy.
    assert together[0]["reward/score"] == alone[0]["reward/score"]
    assert together[1]["reward/score"] == pytest.approx(alone[1]["reward/score"], abs=0.1)
    assert together[1]["policy/kl"] == pytest.approx(alone[1]["policy/kl"], abs=2e-3)
    assert [row["pushes"] for row in together] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("ranks", "stage", "engines", "tp", "lora"), [(2, 3, 1, 1, True), (1, 2, 2, 1, False), (2, 3, 1, 2, False)]
)
def test_ranks_learn_from_separate_engines_as_from_their_own(
    folder: Path, run_ranks: RunRanks, ranks: int, stage: int, engines: int, tp: int, lora: bool
) -> None:
    inside = on_ranks(run_ranks, folder, 1, 2, 1, lora)
    beside = on_ranks(run_ranks, folder, ranks, stage, tp, lora, "vllm", engines)
    assert all(row["rollout/logprob_gap_max"] < 1e-4 for row in beside)
    assert beside[0]["reward/score"] == inside[0]["reward/score"]
    assert beside[1]["reward/score"] == pytest.approx(inside[1]["reward/score"], abs=0.1)
    assert beside[1]["policy/kl"] == pytest.approx(inside[1]["policy/kl"], abs=2e-3)


def test_it_learns_like_the_native_backend(folder: Path, run_ranks: RunRanks) -> None:
    by_vllm = on_ranks(run_ranks, folder, 1, 2, 1, False)
    native = on_ranks(run_ranks, folder, 1, 2, 1, False, "native")
    # Other random streams, hence other responses.
    for one, other in zip(by_vllm, native, strict=True):
        assert one["rollout/logprob_gap_max"] < 1e-4
        assert one["reward/score"] == pytest.approx(other["reward/score"], abs=0.7)
    assert by_vllm[0]["policy/kl"] == pytest.approx(0.0, abs=1e-4)
    assert by_vllm[-1]["policy/kl"] > 0.05 < native[-1]["policy/kl"]


@pytest.mark.parametrize("lora", [False, True])
def test_policy_and_reference_are_evaluated_like_with_the_native_backend(
    folder: Path, run_ranks: RunRanks, lora: bool
) -> None:
    outputs = [run_ranks(evaluate_and_print, 1, str(folder), lora, backend)[0] for backend in ("vllm", "native")]
    by_vllm, native = (json.loads(text.rpartition("FIGURES ")[2].splitlines()[0]) for text in outputs)
    assert by_vllm == native
    assert any(own != of_reference for own, of_reference in by_vllm)
