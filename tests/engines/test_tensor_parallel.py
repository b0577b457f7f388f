"""Ranks that share a model during generation draw what one rank alone draws."""

from __future__ import annotations

import pytest

from tests.engines import tensor_parallel

# Every way of slicing at ZeRO-3; where weights are whole, the slices are views and one family of each kind will do.
PLAN = [(name, 3) for name in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "opt", "bloom")]
PLAN += [("llama", 0), ("gpt2", 1), ("gpt_neox", 2)]


@pytest.mark.slow
def test_two_ranks_sharing_a_model_draw_what_one_alone_draws(run_ranks: object) -> None:
    outputs = run_ranks(tensor_parallel.generate_shared, 2, PLAN, timeout=240)
    for rank, output in enumerate(outputs):
        assert "hybrid_engine.inference_tp_size=3 does not divide the 2 ranks: use a divisor of 2" in output
        assert "ranks that share a model must draw in one way, these have: seed 0, SamplingParams(" in output
        assert output.count("stopped: " + ["AnotherRankFailedError", "RolloutError"][rank]) == 4
        assert "broke: " + ["AnotherRankFailedError", "KeyError"][rank] in output
        assert "same" in output
