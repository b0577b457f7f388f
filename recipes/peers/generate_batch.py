"""Transformers' continuous batching, ``generate_batch``, on the module that trains."""

from __future__ import annotations

from peers.base import Peer, hf_sampling
from peers.workload import Workload

_LIMIT_ON_CPU = 8192  # tokens: a quarter of a minute at the few hundred per second that it reaches there
_BLOCK = 256  # tokens that a block of its cache holds


class GenerateBatch(Peer):
    """Rows leave the batch when they end; paged cache."""

    name = "generate_batch"

    @staticmethod
    def absent() -> str | None:
        """Why it cannot be measured here, or None where it can."""
        from transformers import GenerationMixin

        return None if hasattr(GenerationMixin, "generate_batch") else "this transformers has no generate_batch"

    def too_slow(self, workload: Workload) -> str | None:
        """Why it is left out unless asked for, or None."""
        on_cpu = self.subject.device.type == "cpu"
        too_many = len(workload.prompts) * workload.max_new_tokens > _LIMIT_ON_CPU
        return f"minutes on a CPU above {_LIMIT_ON_CPU} tokens; --all measures it" if on_cpu and too_many else None

    def generate(self, workload: Workload, seed: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        # Left to themselves, some versions take most of the free memory for these two, and clear all that they take.
        at_once = 8192 if self.subject.device.type == "cuda" else 1024
        sizes = ContinuousBatchingConfig(num_blocks=_blocks(workload), max_batch_tokens=at_once, seed=seed)
        outputs = self.subject.causal_lm.generate_batch(
            inputs=[list(prompt) for prompt in workload.prompts],
            generation_config=hf_sampling(workload),
            continuous_batching_config=sizes,
        )
        if len(outputs) != len(workload.prompts):
            raise RuntimeError(f"generate_batch finished {len(outputs)} of {len(workload.prompts)} requests")
        return [list(output.generated_tokens) for output in outputs.values()]


def _blocks(workload: Workload) -> int:
    """As many as all rows can fill."""
    return sum(-(-(len(prompt) + workload.max_new_tokens) // _BLOCK) for prompt in workload.prompts)
