"""What PPO asks of the strategy for each of its models: an engine, and an optimizer for those that are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_hybrid.algorithms import PPOConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.modules.optimization import make_adamw, make_schedule
from lightning_hybrid.strategy import EngineSpec, HybridDeepSpeedStrategy

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


def engine_specs(module: PPOModule) -> dict[str, EngineSpec]:
    """A hybrid engine for the actor, a plain one for the critic, evaluation engines for what is frozen."""
    roles, clipping = module.roles, {"gradient_clipping": module.config.max_grad_norm or 0.0}
    specs = {"actor": EngineSpec("hybrid", clipping | _at_stage(roles.actor.zero_stage))}
    if module.critic is not None:
        specs["critic"] = EngineSpec("train", clipping | _at_stage(roles.critic.zero_stage))
    for name in module.frozen:
        stage = roles.reference.zero_stage if name == "reference" else roles.reward.zero_stage
        specs[name] = EngineSpec("frozen", _at_stage(stage))
    return specs


def _at_stage(stage: int | None) -> dict[str, Any]:
    return {} if stage is None else {"zero_optimization": {"stage": stage}}


def optimizers_of(module: PPOModule) -> list[dict[str, Any]]:
    """An AdamW with its schedule, which counts iterations, for each trained model."""
    config = module.config
    rates = {"actor": config.actor_lr, "critic": config.critic_lr if isinstance(config, PPOConfig) else config.actor_lr}
    configured = []
    for name in module.trained:
        parameters = module.get_submodule(name).parameters()
        optimizer = make_adamw(parameters, rates[name], config.weight_decay, config.betas)
        steps = module.trainer.estimated_stepping_batches
        schedule = make_schedule(optimizer, config.schedule, config.warmup_steps, steps)
        configured.append({"optimizer": optimizer, "lr_scheduler": schedule})
    return configured


def refuse_other_strategies(module: PPOModule) -> None:
    """Raise a `ConfigError` under a strategy without engines that generate."""
    strategy = module.trainer.strategy
    if not isinstance(strategy, HybridDeepSpeedStrategy):
        raise ConfigError(
            f"PPOModule generates with its training engine and runs under strategy='hybrid_deepspeed'; "
            f"the Trainer has {type(strategy).__name__}"
        )
