"""Learning from one's own rollouts inside ``Trainer.fit``: PPO, and its relatives without a critic."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_hybrid.algorithms import OnlineConfig, PPOConfig
from lightning_hybrid.config import AdapterConfig, EvaluationConfig, RolesConfig, RolloutConfig
from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.engines import config_dtype
from lightning_hybrid.engines.agreement import on_every_rank
from lightning_hybrid.errors import ConfigError, RolloutError
from lightning_hybrid.models import Policy, ScalarModel, end_of_text_ids, max_positions, with_adapter
from lightning_hybrid.modules import roles as making
from lightning_hybrid.modules.conclusion import conclude
from lightning_hybrid.modules.engines import engine_specs, optimizers_of, refuse_other_strategies
from lightning_hybrid.modules.evaluation import Evaluation
from lightning_hybrid.modules.experience import gain_experience
from lightning_hybrid.modules.metrics import response_kl
from lightning_hybrid.modules.needs import models_run, remedies
from lightning_hybrid.modules.old_logprobs import OldLogprobSource, measured_gap
from lightning_hybrid.modules.phases import Phases
from lightning_hybrid.modules.pipeline import EndPipeline, Pipeline, make_pipeline, refuse_staleness
from lightning_hybrid.modules.ptx import PTX
from lightning_hybrid.modules.sampling import collect_samples, draw_seed, entering_scores
from lightning_hybrid.modules.scoring import moments_with
from lightning_hybrid.modules.separate import EndServers, SeparateRoles
from lightning_hybrid.modules.state import restore_state, state_of
from lightning_hybrid.modules.update import PPOUpdate
from lightning_hybrid.rewards import RewardCallable
from lightning_hybrid.rl import RunningMoments
from lightning_hybrid.rollout import Rollout, RolloutBackend, make_backend
from lightning_hybrid.strategy import EngineSpec, HybridDeepSpeedStrategy
from lightning_hybrid.strategy.residency import Residency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PPOModule(L.LightningModule):
    """Actor, frozen reference, reward, and a critic where the algorithm has one; a ``training_step`` is an iteration.

    An iteration samples responses to each prompt of the batch, scores them, gives every token credit, and takes
    ``epochs × minibatches`` optimizer steps. ``max_steps``, ``every_n_train_steps``, learning-rate schedules and the
    logger's step all count iterations; the optimizer steps inside are logged as ``optimizer_steps``.

    Args:
        actor: a :class:`~lightning_hybrid.models.Policy`, or the path or hub name of a causal LM.
        reward: a function ``(prompts, responses) -> one number per response``, a
            :class:`~lightning_hybrid.models.ScalarModel`, or the path of a reward model's folder.
        config: of the algorithm, which its class decides: ``PPOConfig``, ``GRPOConfig``, ``RLOOConfig`` and the others
            of :data:`lightning_hybrid.algorithms.ALGORITHMS`.
        rollout: of the sampling.
        tokenizer: the policy's; read from ``actor`` where that is a path.
        critic: path of the folder that the critic starts from; by default the reward model's weights where there is
            one, else the actor's trunk with a zero head.
        reference: path of the frozen reference; by default a copy of the actor as given, or where it has adapters, the
            actor with them switched off.
        reward_tokenizer: of a reward model that is given as a module; by default the policy's.
        seed: of sampling and of the order of minibatches.
        ptx: texts of the PTX loss, needed with ``config.ptx_coef`` above 0.
        roles: what differs between the models.
        critic_adapter: put on the critic, whose head and adapter are then all that is trained of it.
        evaluation: of validation, on held-out prompts.

    Raises:
        ConfigError: if a tokenizer is needed and none was given, the rollout is to give old log-probs that it does not
            know, or of older weights that the algorithm does not correct for, or something was given that the algorithm
            has no use for.
    """

    def __init__(
        self,
        actor: Policy | str | Path,
        reward: RewardCallable | ScalarModel | str | Path,
        config: OnlineConfig | None = None,
        rollout: RolloutConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        critic: ScalarModel | str | Path | None = None,
        reference: Policy | str | Path | None = None,
        reward_tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        ptx: InstructionDataModule | None = None,
        roles: RolesConfig | None = None,
        critic_adapter: AdapterConfig | None = None,
        evaluation: EvaluationConfig | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config or PPOConfig()
        self.rollout_config = rollout or RolloutConfig()
        self.roles = roles or RolesConfig()
        of_critic = {"critic": critic, "critic_adapter": critic_adapter, "roles.critic": self.roles.critic}
        making.check_given(self.config, of_critic, reference, ptx)
        self.seed = seed
        self.tokenizer = tokenizer or making.tokenizer_beside(actor)
        self.actor = making.make_policy(actor, self.tokenizer, self.config.logprob_chunk)
        self.reference = making.make_reference(
            self.config, reference, self.actor, self.tokenizer, actor, self.roles.reference
        )
        if reward_tokenizer is not None and not isinstance(reward, ScalarModel):
            raise ConfigError(
                "reward_tokenizer belongs to a reward model that is given as a module, and reward is "
                f"{type(reward).__name__}: a path brings its own, others have none; leave it out"
            )
        reward_models, self.reward = making.make_reward(reward, reward_tokenizer or self.tokenizer, self.roles.reward)
        for name, model in reward_models.items():
            self.add_module(name, model)
        self.reward_models = tuple(reward_models)
        making.prepare_for_training(self.actor, self.roles.actor)
        self.critic = None
        if self.config.critic:
            whole = making.make_critic(critic, self.reward, self.actor, self.tokenizer)
            self.critic = with_adapter(whole, critic_adapter)
            making.prepare_for_training(self.critic, self.roles.critic)
        self.ptx = None if ptx is None else PTX(ptx)
        self.kl_controller = making.make_kl_controller(self.config)
        self.score_moments = self.moments_now = RunningMoments()
        self.old_logprob_source = OldLogprobSource(self.config, self.rollout_config)
        refuse_staleness(self.config, self.rollout_config)
        self.phases, self.validation_phases = Phases(), Phases()
        self.separate = SeparateRoles()
        self.evaluation = Evaluation(evaluation or EvaluationConfig())
        self.optimizer_steps = self.without_signal = 0
        self._ends = end_of_text_ids(self.actor.model, self.tokenizer)
        self.backend = self._make_backend()
        self.pipeline: Pipeline | None = None

    @property
    def looks_ahead(self) -> bool:
        """Whether training needs to know the batch after the one it works on."""
        return self.rollout_config.max_staleness > 0

    @property
    def trained(self) -> list[str]:
        """Names of the children that are trained."""
        return ["actor"] if self.critic is None else ["actor", "critic"]

    @property
    def frozen(self) -> list[str]:
        """Names of the children that are not; a reference inside the actor is none."""
        return [*(["reference"] if isinstance(self.reference, nn.Module) else []), *self.reward_models]

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

    def setup(self, stage: str) -> None:
        """Look at what the data brings, read the texts of the PTX loss, and forget another run's prompts."""
        making.check_columns(self.reward, getattr(self.trainer, "datamodule", None))
        self._prepare_backend()
        self.separate.start(self)
        self.evaluation.forget()
        self.pipeline = make_pipeline(self) if stage == "fit" else None
        if self.ptx is not None and stage == "fit":
            self.ptx.setup(self)

    def teardown(self, stage: str) -> None:
        """Give back what generates beside the model."""
        self.pipeline = None
        self.separate.close()
        self.backend.close()

    def configure_callbacks(self) -> list[Callback]:
        """What ends processes beside the ranks where an error or an interrupt ends the run without a teardown."""
        return [EndServers(), EndPipeline()]

    def _make_backend(self) -> RolloutBackend:
        pad = self.tokenizer.pad_token_id
        return make_backend(self.rollout_config, self._ends, 0 if pad is None else pad, self.tokenizer)

    def _prepare_backend(self) -> None:
        """Let rollouts end where the model, its tokenizer and the chat template say, which data may have brought."""
        ends, strategy = end_of_text_ids(self.actor.model, self.tokenizer), self.trainer.strategy
        if ends != self._ends:
            self.backend.close()
            self._ends = ends
            self.backend = self._make_backend()
        if isinstance(strategy, HybridDeepSpeedStrategy):
            self.backend.prepare(self.actor.model, strategy.root_device, config_dtype(strategy.engine_config()))

    def configure_engines(self) -> dict[str, EngineSpec]:
        """A hybrid engine for the actor, a plain one for the critic, evaluation engines for what is frozen."""
        return engine_specs(self)

    def configure_optimizers(self) -> Any:
        """An AdamW for each trained model, with schedules that count iterations."""
        refuse_other_strategies(self)
        return optimizers_of(self)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One iteration on a batch of prompts, see :class:`~lightning_hybrid.data.PromptDataModule`."""
        strategy: Any = self.trainer.strategy
        self.phases.begin()
        with strategy.one_global_step():
            samples = collect_samples(self, batch)  # phases rollout and reward
            self.raw_scores = samples.raw_scores
            if self.config.normalize_reward:
                # Kept at the end of the iteration: a checkpoint written before it is one of its start.
                self.moments_now = moments_with(self, samples.raw_scores)
            with self.phase("experience"):
                scores = entering_scores(self, samples)
                experience = gain_experience(self, samples.rollout, scores, samples.group)
            with self.phase("update"):
                updater = PPOUpdate(self, strategy)
                update = updater.run(experience)
            gap = measured_gap(self, samples.rollout, experience, updater.gap)
            conclude(self, samples, experience, update, gap)
            self.last_rollout, self.last_kl = samples.rollout, response_kl(self, experience)

    def on_validation_epoch_start(self) -> None:
        """Begin an evaluation."""
        self.evaluation.begin()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Judge the policy on a batch of held-out prompts."""
        self.evaluation.judge(self, batch)

    def on_validation_epoch_end(self) -> None:
        """Log figures over all prompts of all ranks, see :func:`~lightning_hybrid.modules.judgement.figures_of`."""
        # The same on all ranks already; Lightning warns where it does not average validations itself.
        self.log_dict(self.evaluation.conclude(self), sync_dist=True)

    # ---- the stages of an iteration ----------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, prompt_ids: list[list[int]], n: int = 1, first: int = 0) -> Rollout:
        """Switch the actor to inference, sample responses to each prompt, and leave it in evaluation mode.

        Args:
            prompt_ids: token ids of each prompt.
            n: responses to each prompt.
            first: position of the first prompt in this rank's batch.
        """
        engine = self._engine("actor")
        engine.eval()
        seed = draw_seed(self, self.global_step)
        # As the sampler dealt them out: what a prompt gets does not depend on how many ranks there are.
        positions = range(first, first + len(prompt_ids))
        indices = [position * self.trainer.world_size + self.global_rank for position in positions]
        return on_every_rank(
            lambda: self.backend.generate(engine, prompt_ids, seed=seed, indices=indices, n=n),
            "the rollout",
            RolloutError,
        )

    def _engine(self, name: str) -> Any:
        """The engine of a child, or the model inside the child outside ``fit``, where there are no engines."""
        engines = getattr(self.trainer.strategy, "engines", {})
        return engines[name] if name in engines else getattr(self, name).model

    @property
    def _residency(self) -> Residency | None:
        return getattr(self.trainer.strategy, "residency", None)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A phase on the models that it runs, announced by :attr:`phases`."""
        return self.phases(name, self._residency, models_run(self, name), remedies(self, name))

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """A small tensor added up over all ranks."""
        reduced: Tensor = self.trainer.strategy.reduce(x.clone(), reduce_op="sum")
        return reduced

    # ---- state -------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what lasts beside the weights, see :func:`~lightning_hybrid.modules.state.state_of`."""
        if self.ptx is not None:
            checkpoint["ptx"] = self.ptx.data.state_dict()
        checkpoint["ppo"] = state_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        if self.ptx is not None and "ptx" in checkpoint:
            self.ptx.data.load_state_dict(checkpoint["ptx"])
        restore_state(self, checkpoint["ppo"])
