"""What each phase of an iteration runs, and what lets it do with less memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hybrid.models import AdaptersOff

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


def models_run(module: PPOModule, phase: str) -> list[str] | None:
    """Names of the models that a phase runs; None where it runs none, and nothing need make room for it."""
    if phase == "reward":
        return list(module.reward_models) or None
    if phase == "experience":
        inside_actor = isinstance(module.reference, AdaptersOff)
        asked = ["actor"] if module.old_logprob_source.recompute or inside_actor else []
        return [*asked, *(["critic"] if module.critic is not None else []), *set(module.frozen) & {"reference"}]
    return {"rollout": ["actor"], "update": module.trained}[phase]


def remedies(module: PPOModule, phase: str) -> list[str]:
    """What to do about a phase that ran out of memory, with the settings as they are."""
    if phase == "rollout" and module.rollout_config.backend == "vllm":
        vllm, sleep = module.rollout_config.vllm, "let more sleep: strategy.sleep.*"
        if not vllm.colocate:
            return [f"lower rollout.vllm.bucket_mib (now {vllm.bucket_mib})", sleep]
        return [f"lower rollout.vllm.gpu_memory_utilization (now {vllm.gpu_memory_utilization:g})", sleep]
    if phase == "rollout":
        in_flight, new = module.rollout_config.max_tokens_in_flight, module.rollout_config.max_new_tokens
        now = "null, a share of the free memory" if in_flight is None else in_flight
        return [f"lower rollout.max_tokens_in_flight (now {now})", f"lower rollout.max_new_tokens (now {new})"]
    if phase == "reward":
        return ["score fewer prompts at once: lower data.batch_size"]
    rows, chunk = module.config.micro_batch_size, module.config.logprob_chunk
    return [f"lower algorithm.micro_batch_size (now {rows})", f"lower algorithm.logprob_chunk (now {chunk})"]
