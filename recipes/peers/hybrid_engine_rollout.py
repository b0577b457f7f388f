"""DeepSpeed's own rollout helper on the module that trains."""

from __future__ import annotations

from types import SimpleNamespace

from peers.base import Peer, pad_prompts, why_not_importable
from peers.workload import Workload


class HybridEngineRollout(Peer):
    """Sampled sequences run to the maximum: it looks for EOS afterwards."""

    name = "HybridEngineRollout"

    @staticmethod
    def absent() -> str | None:
        """Why it cannot be measured here, or None where it can."""
        return why_not_importable("deepspeed.runtime.rollout.hybrid_engine_rollout")

    def generate(self, workload: Workload, seed: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        from deepspeed.runtime.rollout import base, hybrid_engine_rollout

        # It reads an engine's module, which must be the causal LM itself, and two ids of a tokenizer.
        engine = SimpleNamespace(module=self.subject.causal_lm)
        tokenizer = SimpleNamespace(pad_token_id=workload.pad_id, eos_token_id=list(workload.eos_ids))
        ids, mask = pad_prompts(workload, self.subject.device)
        sampling = base.SamplingConfig(max_new_tokens=workload.max_new_tokens, temperature=1.0, top_p=1.0, top_k=0)
        rollout = hybrid_engine_rollout.HybridEngineRollout(engine, tokenizer)
        batch = rollout.generate(base.RolloutRequest(ids, mask), sampling)
        rows: list[list[int]] = batch.input_ids[:, ids.shape[1] :].tolist()
        return rows
