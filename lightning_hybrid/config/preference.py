"""Settings of preference optimisation without rollouts, and of its models."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from lightning_hybrid.config.algorithm import OptimizerConfig
from lightning_hybrid.config.data import PreferenceDataConfig, UnpairedDataConfig
from lightning_hybrid.config.groups import ModelConfig
from lightning_hybrid.config.roots import Run
from lightning_hybrid.settings import Problem, Rule


def _smoothing_is_of_sigmoid(config: DPOConfig) -> Problem | None:
    if config.label_smoothing == 0 or config.kind == "sigmoid":
        return None
    remedy = f"must be 0 with kind={config.kind}: only sigmoid has a smoothed form"
    return Problem("label_smoothing", remedy, str(config.label_smoothing))


def _ipo_needs_a_reference(config: DPOConfig) -> Problem | None:
    if not config.reference_free or config.kind != "ipo":
        return None
    remedy = (
        "must be false with kind=ipo, which pulls the lead over the reference to 1 / (2 beta) nats, and would pull "
        "bare log-probs of responses of different lengths there: use kind=sigmoid or hinge"
    )
    return Problem("reference_free", remedy, "true")


class DPOConfig(OptimizerConfig):
    """Direct preference optimization (Rafailov et al. 2023) and its relatives: IPO, hinge (SLiC), smoothed, with SFT.

    Log-probs of responses are sums over their tokens, with every kind.
    """

    rules: ClassVar[tuple[Rule, ...]] = (_smoothing_is_of_sigmoid, _ipo_needs_a_reference)

    beta: PositiveFloat = 0.1
    """how strongly the policy is held to the reference; with kind=ipo, its tau"""
    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """loss of a pair: sigmoid (DPO, Rafailov et al. 2023), hinge (SLiC, Zhao et al. 2023), ipo (Azar et al. 2023)"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """share of the preferences taken to be the wrong way round (conservative DPO, Mitchell 2023); sigmoid only"""
    sft_coef: NonNegativeFloat = 0.0
    """weight of the next-token loss on the chosen responses, per token (RPO, Pang et al. 2024); 0 for none"""
    reference_free: bool = False
    """leave the reference out: every response is equally likely under it, and no model is kept for it"""
    logprob_chunk: PositiveInt = 1024
    """tokens whose logits exist at once: memory only, the result stays the same"""


def _one_side_counts(config: KTOConfig) -> Problem | None:
    if config.desirable_weight > 0 or config.undesirable_weight > 0:
        return None
    return Problem("desirable_weight", "must be above 0 where undesirable_weight is 0: nothing would be learned", "0")


class KTOConfig(OptimizerConfig):
    """Kahneman–Tversky optimization: responses that are good or bad, without pairs (Ethayarajh et al. 2024, eq. 8)."""

    rules: ClassVar[tuple[Rule, ...]] = (_one_side_counts,)

    beta: PositiveFloat = 0.1
    """how strongly the policy is held to the reference"""
    desirable_weight: NonNegativeFloat = 1.0
    """weight of good responses; raise it where they are the fewer, until weight times number is even"""
    undesirable_weight: NonNegativeFloat = 1.0
    """weight of bad responses"""
    logprob_chunk: PositiveInt = 1024
    """tokens whose logits exist at once: memory only, the result stays the same"""


class PreferenceModelConfig(ModelConfig):
    """The policy, and the reference that it is held to."""

    reference: str | None = None
    """folder or hub name of the frozen reference policy; null for the policy as it starts"""


def _starts_from_weights(run: DPORun | KTORun) -> Problem | None:
    if run.model.architecture is None:
        return None
    remedy = "preferences are learned by a model that can write: give model.path, as a rule that of an SFT model"
    return Problem("model.architecture", remedy, "an architecture")


def _models_have_no_dropout(run: DPORun | KTORun) -> Problem | None:
    adapter = run.model.adapter
    if adapter is None or adapter.dropout == 0:
        return None
    remedy = "must be 0: policy and reference are compared without dropout"
    return Problem("model.adapter.dropout", remedy, f"{adapter.dropout:g}")


def _nothing_asks_a_reference_that_is_left_out(run: DPORun) -> Problem | None:
    if not run.algorithm.reference_free or run.model.reference is None:
        return None
    remedy = "must be null with algorithm.reference_free=true: nothing would ask it"
    return Problem("model.reference", remedy, repr(run.model.reference))


def _margins_are_for_rewards(run: DPORun) -> Problem | None:
    if run.data.margin_key is None:
        return None
    remedy = "must be null: margins enter the loss of reward models only"
    return Problem("data.margin_key", remedy, repr(run.data.margin_key))


class DPORun(Run):
    """Configuration of the recipe `dpo`."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Run.rules,
        _starts_from_weights,
        _models_have_no_dropout,
        _nothing_asks_a_reference_that_is_left_out,
        _margins_are_for_rewards,
    )

    model: PreferenceModelConfig
    """the policy, and its reference"""
    data: PreferenceDataConfig
    """pairs of a preferred and another response"""
    algorithm: DPOConfig = Field(default_factory=DPOConfig)
    """settings of DPO"""


def _rows_are_compared(run: KTORun) -> Problem | None:
    if run.data.batch_size > 1:
        return None
    remedy = "must be 2 or more: the baseline of a batch is of prompts with each other's responses"
    return Problem("data.batch_size", remedy, str(run.data.batch_size))


class KTORun(Run):
    """Configuration of the recipe `kto`."""

    rules: ClassVar[tuple[Rule, ...]] = (*Run.rules, _starts_from_weights, _models_have_no_dropout, _rows_are_compared)

    model: PreferenceModelConfig
    """the policy, and its reference"""
    data: UnpairedDataConfig
    """responses that are good or bad"""
    algorithm: KTOConfig = Field(default_factory=KTOConfig)
    """settings of KTO"""
