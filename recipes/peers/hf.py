"""Transformers' ``generate`` on the module that trains."""

from __future__ import annotations

from peers.base import Peer, hf_sampling, pad_prompts
from peers.workload import Workload


class HFGenerate(Peer):
    """One padded batch until the last row has ended."""

    name = "HF generate"

    def generate(self, workload: Workload, seed: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        ids, mask = pad_prompts(workload, self.subject.device)
        model, sampling = self.subject.causal_lm, hf_sampling(workload)
        output = model.generate(ids, attention_mask=mask, generation_config=sampling)
        rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return rows
