"""Proximal policy optimization inside ``Trainer.fit``."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lightning_hybrid.config import PPOConfig, RolloutConfig
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.models import Policy, ScalarModel, disable_dropout, end_of_text_ids, max_positions
from lightning_hybrid.modules import roles
from lightning_hybrid.modules.experience import Experience, state_values
from lightning_hybrid.modules.metrics import mismatch_metrics, rollout_metrics, update_metrics
from lightning_hybrid.modules.needs import models_run, remedies
from lightning_hybrid.modules.old_logprobs import LogprobGap, OldLogprobSource, measured_gap
from lightning_hybrid.modules.optimization import make_adamw, make_schedule
from lightning_hybrid.modules.passes import critic_values, policy_logprobs
from lightning_hybrid.modules.phases import Phases
from lightning_hybrid.modules.scoring import moments_with, on_every_rank, reward_scores
from lightning_hybrid.modules.update import PPOUpdate
from lightning_hybrid.rewards import RewardCallable
from lightning_hybrid.rl import RunningMoments, gae, token_rewards, whiten
from lightning_hybrid.rollout import Rollout, make_backend
from lightning_hybrid.strategy import EngineSpec, HybridDeepSpeedStrategy
from lightning_hybrid.strategy.residency import Residency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PPOModule(L.LightningModule):
    """Actor, critic, frozen reference and reward in one LightningModule; one ``training_step`` is one PPO iteration.

    An iteration samples a response to each prompt of the batch, scores it, and takes ``epochs × minibatches`` optimizer
    steps. ``max_steps``, ``every_n_train_steps``, learning-rate schedules and the logger's step all count iterations;
    the optimizer steps inside are logged as ``optimizer_steps``.

    Args:
        actor: a :class:`~lightning_hybrid.models.Policy`, or the path or hub name of a causal LM.
        reward: a function ``(prompts, responses) -> one number per response``, a
            :class:`~lightning_hybrid.models.ScalarModel`, or the path of a reward model's folder.
        config: of the algorithm.
        rollout: of the sampling.
        tokenizer: the policy's; read from ``actor`` where that is a path.
        critic: path of the folder that the critic starts from; by default the reward model's weights where there is
            one, else the actor's trunk with a zero head.
        reference: path of the frozen reference; by default a copy of the actor as given.
        reward_tokenizer: the reward model's; read from its path, else the policy's.
        seed: of sampling and of the order of minibatches.

    Raises:
        ConfigError: if a tokenizer is needed and none was given, or the rollout is to give old log-probs that it does
            not know.
    """

    def __init__(
        self,
        actor: Policy | str | Path,
        reward: RewardCallable | ScalarModel | str | Path,
        config: PPOConfig | None = None,
        rollout: RolloutConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        critic: ScalarModel | str | Path | None = None,
        reference: Policy | str | Path | None = None,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config or PPOConfig()
        self.rollout_config = rollout or RolloutConfig()
        self.seed = seed
        self.tokenizer = tokenizer or roles.tokenizer_beside(actor)
        self.actor = roles.make_policy(actor, self.tokenizer, self.config.logprob_chunk)
        self.reference = (
            copy.deepcopy(self.actor)
            if reference is None
            else roles.make_policy(reference, self.tokenizer, self.config.logprob_chunk)
        )
        self.reward_model, self.reward = roles.make_reward(reward, reward_tokenizer or self.tokenizer)
        self.critic = roles.make_critic(critic, self.reward, self.actor, self.tokenizer)
        for model in (self.actor, self.critic):
            disable_dropout(model)
        self.kl_controller = roles.make_kl_controller(self.config)
        self.score_moments = self._moments_now = RunningMoments()
        self.old_logprob_source = OldLogprobSource(self.config, self.rollout_config)
        self.phases, self.validation_phases = Phases(), Phases()
        self.optimizer_steps = 0
        pad = self.tokenizer.pad_token_id
        eos_ids = end_of_text_ids(self.actor, self.tokenizer)
        self.backend = make_backend(self.rollout_config, eos_ids, 0 if pad is None else pad, self.tokenizer)

    @property
    def max_positions(self) -> int | None:
        """Tokens that a prompt and its response may have together; None for no limit.

        The model's positions, and while training with containers no more than ``hybrid_engine.max_out_tokens``.
        """
        of_model = max_positions(self.actor.config)
        strategy = self._trainer.strategy if self._trainer is not None else None
        if self.rollout_config.backend != "native" or not isinstance(strategy, HybridDeepSpeedStrategy):
            return of_model
        workspace = strategy.max_out_tokens
        return workspace if of_model is None else min(of_model, workspace)

    # ---- what the Trainer asks for ---------------------------------------------------------------------------------

    def configure_engines(self) -> dict[str, EngineSpec]:
        """A hybrid engine for the actor, a plain one for the critic, evaluation engines for what is frozen."""
        clipping = {"gradient_clipping": self.config.max_grad_norm or 0.0}
        specs = {
            "actor": EngineSpec("hybrid", clipping),
            "critic": EngineSpec("train", clipping),
            "reference": EngineSpec("frozen"),
        }
        if self.reward_model is not None:
            specs["reward_model"] = EngineSpec("frozen")
        return specs

    def configure_optimizers(self) -> Any:
        """One AdamW for the actor and one for the critic, with schedules that count iterations."""
        config = self.config
        if not isinstance(self.trainer.strategy, HybridDeepSpeedStrategy):
            raise ConfigError(
                f"PPOModule generates with its training engine and runs under strategy='hybrid_deepspeed'; "
                f"the Trainer has {type(self.trainer.strategy).__name__}"
            )
        configured = []
        for model, lr in ((self.actor, config.actor_lr), (self.critic, config.critic_lr)):
            optimizer = make_adamw(model.parameters(), lr, config.weight_decay, config.betas)
            schedule = make_schedule(
                optimizer, config.schedule, config.warmup_steps, self.trainer.estimated_stepping_batches
            )
            configured.append({"optimizer": optimizer, "lr_scheduler": schedule})
        return configured

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One PPO iteration on a batch of prompts, see :class:`~lightning_hybrid.data.PromptDataModule`."""
        strategy: Any = self.trainer.strategy
        with strategy.one_global_step():
            with self._phase("rollout"):
                rollout = self.roll_out(batch["prompt_ids"])
            with self._phase("reward"):
                scores = self.score(batch["prompts"], rollout)
            with self._phase("experience"):
                experience = self.gain_experience(rollout, scores)
            with self._phase("update"):
                updater = PPOUpdate(self, strategy)
                update = updater.run(experience)
            self._finish(rollout, experience, update, measured_gap(self, rollout, experience, updater.gap))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log ``val/score``, ``val/response_length`` and ``val/eos_rate`` of sampled responses to held-out prompts."""
        with self._phase("rollout", self.validation_phases):
            rollout = self.roll_out(batch["prompt_ids"], stream=batch_idx + 1)
        with self._phase("reward", self.validation_phases):
            scores = reward_scores(self, batch["prompts"], rollout)
        if self._residency is not None:
            self._residency.enter(None)  # callbacks may read the trained weights
        metrics = {
            "val/score": scores.mean(),
            "val/response_length": rollout.lengths.float().mean(),
            "val/eos_rate": rollout.finished.float().mean(),
        }
        self.log_dict(metrics, batch_size=len(scores), sync_dist=True)

    # ---- the stages of an iteration ----------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, prompt_ids: list[list[int]], stream: int = 0, greedy: bool = False) -> Rollout:
        """Switch the actor to inference, sample a response to each prompt, and leave it in evaluation mode.

        Args:
            prompt_ids: token ids of each prompt.
            stream: tells apart rollouts of the same iteration.
            greedy: take the most probable tokens.
        """
        engine = self._engine("actor")
        engine.eval()
        seed = hash((self.seed, self.global_step, stream)) % 2**63
        # As the sampler dealt them out: what a prompt gets does not depend on how many ranks there are.
        indices = [i * self.trainer.world_size + self.global_rank for i in range(len(prompt_ids))]
        return on_every_rank(
            lambda: self.backend.generate(engine, prompt_ids, seed=seed, greedy=greedy, indices=indices),
            "the rollout",
            RolloutError,
        )

    def score(self, prompts: list[str], rollout: Rollout) -> Tensor:
        """Scores as they enter the token rewards, ``[batch]``: normalised if configured, less the EOS penalty."""
        scores = reward_scores(self, prompts, rollout)
        self.raw_scores = scores
        if self.config.normalize_reward:
            # Kept at the end of the iteration: a checkpoint written before it is one of its start.
            self._moments_now = moments_with(self, scores)
            scores = scores / max(self._moments_now.std, 1e-4)
        if self.config.missing_eos_penalty is not None:
            scores = scores - self.config.missing_eos_penalty * (~rollout.finished).float()
        return scores

    @torch.no_grad()
    def gain_experience(self, rollout: Rollout, scores: Tensor) -> Experience:
        """Add log-probs, values, rewards and advantages to a rollout."""
        config, mask = self.config, rollout.response_mask
        size, temperature, source = config.micro_batch_size, self.rollout_config.temperature, self.old_logprob_source
        if source.recompute:
            old = policy_logprobs(self.actor, rollout, size, temperature)
        else:
            old = source.of_rollout(rollout)
        ref = policy_logprobs(self.reference, rollout, size, temperature)
        values = state_values(critic_values(self.critic, rollout, size), mask)
        rewards = token_rewards(scores, old, ref, mask, self.kl_controller.value, config.reward_clip)
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=self._sum_over_ranks)
        return Experience(
            tokens=rollout.tokens,
            attention_mask=rollout.attention_mask,
            mask=mask,
            scores=scores,
            old_logprobs=old,
            ref_logprobs=ref,
            values=values,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            weights=source.importance_weights(old, rollout),
        )

    def _finish(self, rollout: Rollout, experience: Experience, update: dict[str, float], gap: LogprobGap) -> None:
        """Adjust what lasts: KL coefficient, moments of the scores, source of old log-probs, schedules; log."""
        metrics = rollout_metrics(self, rollout, experience) | mismatch_metrics(self, gap, experience)
        metrics |= self.phases.memory_figures(self.trainer.strategy)  # type: ignore[arg-type]
        self.score_moments = self._moments_now
        self.old_logprob_source.judge(gap)
        if math.isfinite(metrics["policy/kl"]):  # the steps of an iteration that is not were skipped, too
            self.kl_controller.update(metrics["policy/kl"], len(experience) * self.trainer.world_size)
        metrics |= update_metrics(self, update, rollout)
        self._step_schedules()
        self.last_rollout = rollout
        self.log_dict(metrics, batch_size=len(experience))
        self.log_dict({"score": metrics["reward/score"], "kl": metrics["policy/kl"]}, prog_bar=True, logger=False)

    def _step_schedules(self) -> None:
        with warnings.catch_warnings():
            # A warming critic or an early stop may leave an optimizer without a step in its first iterations.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for schedule in self.lr_schedulers():  # type: ignore[union-attr]
                schedule.step()

    def _engine(self, name: str) -> Any:
        """The engine of a child, or the model inside the child outside ``fit``, where there are no engines."""
        engines = getattr(self.trainer.strategy, "engines", {})
        return engines[name] if name in engines else getattr(self, name).model

    @property
    def _residency(self) -> Residency | None:
        return getattr(self.trainer.strategy, "residency", None)

    def _phase(self, name: str, phases: Phases | None = None) -> AbstractContextManager[None]:
        """A phase on the models that it runs, announced by :attr:`phases` or by others."""
        return (phases or self.phases)(name, self._residency, models_run(self, name), remedies(self, name))

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        reduced: Tensor = self.trainer.strategy.reduce(x.clone(), reduce_op="sum")
        return reduced

    # ---- state -------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the KL controller, the running moments of the scores and the choice of old log-probs."""
        checkpoint["ppo"] = {
            "kl": self.kl_controller.state_dict(),
            "scores": self.score_moments.state_dict(),
            "old_logprobs": self.old_logprob_source.state_dict(),
            "optimizer_steps": self.optimizer_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the KL controller, the running moments of the scores and the choice of old log-probs."""
        self.kl_controller.load_state_dict(checkpoint["ppo"]["kl"])
        self.score_moments.load_state_dict(checkpoint["ppo"]["scores"])
        self._moments_now = self.score_moments
        # Older checkpoints hold no choice.
        self.old_logprob_source.load_state_dict(checkpoint["ppo"].get("old_logprobs", {}))
        self.optimizer_steps = checkpoint["ppo"]["optimizer_steps"]
