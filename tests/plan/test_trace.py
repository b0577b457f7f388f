"""What a pass holds, traced on tensors without memory, against the tensors of a real pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lightning_hybrid.models import build_policy, disable_dropout
from lightning_hybrid.models.policy import extra_arguments, run_trunk
from lightning_hybrid.plan import trace
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.trace import Size, forward_peak, training_peak

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 64, "n_head": 4},
    "gemma3_text": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
SIZE = Size(rows=2, tokens=48, asked=16, chunk=32)


def network(family: str, layers: int = 4, scalar: bool = False) -> Network:
    config = AutoConfig.for_model(family, vocab_size=512, num_hidden_layers=layers, **SMALL[family])
    return Network("actor", config, scalar, torch.float32)


@pytest.mark.parametrize("family", SMALL)
def test_what_is_traced_is_what_autograd_saves(family: str) -> None:
    traced = network(family)
    policy = build_policy(traced.config.to_dict() | {"model_type": family}, 512)
    disable_dropout(policy)
    own = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(SIZE.rows, SIZE.tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0  # left padding, so that there is a mask
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run_trunk(policy.model, ids, mask.bool(), extra_arguments(policy.model))
    assert hidden.requires_grad
    peak = training_peak(traced, SIZE, 0)
    # Beside what is saved, the peak has what the first steps of the backward pass make.
    assert sum(saved.values()) <= peak.bytes <= 1.25 * sum(saved.values()) + 3 * SIZE.chunk * 512 * 4


@pytest.mark.parametrize(
    ("family", "scalar"),
    [("llama", False), ("gpt2", True), ("gemma3_text", False)]
    + [pytest.param(*x, marks=pytest.mark.slow) for x in (("llama", True), ("gpt2", False), ("gemma3_text", True))],
)
def test_two_depths_tell_what_a_deep_model_holds(family: str, scalar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = network(family, layers=26, scalar=scalar)
    monkeypatch.setattr(trace, "_TRACED", {})
    short = training_peak(deep, SIZE, 0), forward_peak(deep, SIZE)
    monkeypatch.setattr(trace, "_TRACED", {})
    monkeypatch.setattr(trace, "SHALLOW", 100)
    whole = training_peak(deep, SIZE, 0), forward_peak(deep, SIZE)
    assert short == whole


def test_layers_of_several_kinds_are_repeated_whole() -> None:
    assert network("gemma3_text", layers=26).period == 6
    assert network("llama", layers=26).period == 1


def test_logits_exist_a_chunk_at_a_time() -> None:
    config = AutoConfig.for_model("llama", vocab_size=8192, num_hidden_layers=2, **SMALL["llama"])
    peak = forward_peak(Network("actor", config, False, torch.float32), SIZE)
    assert peak.logits % (SIZE.chunk * 8192 * 4) == 0
    assert 2 <= peak.logits // (SIZE.chunk * 8192 * 4) <= 4


def test_gradients_that_stay_are_counted() -> None:
    traced = network("llama")
    whole = traced.numel * 4
    kept = training_peak(traced, Size(1, 4, 2, 2), whole)
    assert whole <= kept.bytes < 2 * whole
    assert training_peak(traced, Size(1, 4, 2, 2), 0).gradients == 0
