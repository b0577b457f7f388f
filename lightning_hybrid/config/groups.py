"""Settings of the groups beside data, algorithm and reward: model, rollout, strategy, trainer and its helpers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lightning_hybrid.config.adapters import AdapterConfig
from lightning_hybrid.config.vllm import VLLMConfig
from lightning_hybrid.settings import Problem, Rule, Settings

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DeviceList = Annotated[str, Field(pattern=r"^(auto|\d+(,\d+)*)$")]


def _path_or_architecture(config: ModelConfig) -> Problem | None:
    if (config.path is None) == (config.architecture is None):
        given = "nothing" if config.path is None else f"{config.path!r} beside model.architecture"
        return Problem("path", "give exactly one of path (weights to start from) and architecture (a new model)", given)
    return None


def _architecture_is_named(config: ModelConfig) -> Problem | None:
    if config.architecture is None or "model_type" in config.architecture:
        return None
    given = f"keys {sorted(config.architecture)}"
    return Problem("architecture", "must have the key model_type, such as 'llama'", given)


def architecture_needs_tokenizer(config: ModelConfig) -> Problem | None:
    """A new model brings no tokenizer of its own."""
    if config.architecture is None or config.tokenizer is not None:
        return None
    return Problem("tokenizer", "required with model.architecture: a folder or hub name of a tokenizer", "None")


def adapter_needs_weights(config: ModelConfig) -> Problem | None:
    """An adapter beside weights that nobody trained would be all that ever learns."""
    if config.adapter is None or config.architecture is None:
        return None
    return Problem("adapter", "trains beside frozen weights: give model.path, or leave it out", config.adapter.kind)


class ModelConfig(Settings):
    """The causal language model to train."""

    rules: ClassVar[tuple[Rule, ...]] = (
        _path_or_architecture,
        _architecture_is_named,
        architecture_needs_tokenizer,
        adapter_needs_weights,
    )

    path: str | None = None
    """folder or hub name of a pretrained model"""
    tokenizer: str | None = None
    """folder or hub name of the tokenizer; null for the one beside the model"""
    architecture: dict[str, Any] | None = None
    """arguments of a transformers config, with model_type, for a model with fresh weights"""
    adapter: AdapterConfig | None = None
    """train an adapter beside the frozen weights; null: train the weights"""


class PPOModelConfig(ModelConfig):
    """The policy, and the models that PPO keeps beside it."""

    critic: str | None = None
    """folder of an SFT or reward model that the critic starts from; null for the policy's"""
    reference: str | None = None
    """folder or hub name of the frozen reference policy; null for the policy as it starts"""
    critic_adapter: AdapterConfig | None = None
    """train an adapter and the head of the critic; null: train all of it"""


def _response_lengths_are_ordered(config: RolloutConfig) -> Problem | None:
    if config.min_new_tokens <= config.max_new_tokens:
        return None
    remedy = f"must not exceed max_new_tokens ({config.max_new_tokens})"
    return Problem("min_new_tokens", remedy, str(config.min_new_tokens))


def _vllm_ends_at_tokens(config: RolloutConfig) -> Problem | None:
    if config.backend != "vllm" or not config.stop:
        return None
    remedy = "the backend vllm ends responses at tokens only: use backend=native, or an end-of-text token"
    return Problem("stop", remedy, repr(config.stop))


def _vllm_bounds_its_own_cache(config: RolloutConfig) -> Problem | None:
    if config.backend != "vllm" or config.max_tokens_in_flight is None:
        return None
    remedy = "the backend vllm bounds its cache by vllm.gpu_memory_utilization or vllm.kv_cache_gib: leave it out"
    return Problem("max_tokens_in_flight", remedy, str(config.max_tokens_in_flight))


def _staleness_takes_separate_engines(config: RolloutConfig) -> Problem | None:
    if not config.max_staleness or (config.backend == "vllm" and not config.vllm.colocate):
        return None
    remedy = "takes engines that generate while the ranks train: use backend=vllm with vllm.colocate=false, or 0"
    return Problem("max_staleness", remedy, str(config.max_staleness))


class RolloutConfig(Settings):
    """How responses are sampled."""

    rules: ClassVar[tuple[Rule, ...]] = (
        _response_lengths_are_ordered,
        _vllm_ends_at_tokens,
        _vllm_bounds_its_own_cache,
        _staleness_takes_separate_engines,
    )

    backend: Literal["native", "deepspeed", "hf", "vllm"] = "native"
    """what generates: native (containers over the trained weights), hf (`generate`), vllm (engines that sleep while \
the ranks train), deepspeed (says why it cannot)"""
    max_new_tokens: PositiveInt = 64
    """tokens that a response may have"""
    min_new_tokens: NonNegativeInt = 0
    """tokens that a response has before it may end"""
    temperature: PositiveFloat = 1.0
    """logits are divided by it before sampling"""
    top_k: NonNegativeInt = 0
    """sample among the k most likely tokens; 0 for all"""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """sample among the most likely tokens of this total probability"""
    min_p: Fraction = 0.0
    """sample among tokens at least this probable relative to the most likely one; 0 for all"""
    repetition_penalty: PositiveFloat = 1.0
    """divides positive and multiplies negative logits of tokens that the prompt or the response holds already"""
    stop: list[str] = Field(default_factory=list)
    """texts that end a response, beside the end-of-text token; the token that completes one is kept"""
    max_tokens_in_flight: PositiveInt | None = None
    """prompt and response tokens that the KV cache holds at once; null for a share of the free memory"""
    max_staleness: NonNegativeInt = 0
    """weight updates that a response's first token may be old when it is learned from; 0: generation and training \
take turns; above 0 needs vllm.colocate=false"""
    vllm: VLLMConfig = Field(default_factory=VLLMConfig)
    """engines of the backend vllm"""


class HybridEngineConfig(Settings):
    """DeepSpeed's `hybrid_engine` settings, with its meanings and defaults."""

    max_out_tokens: PositiveInt = 512
    """prompt and response tokens together that the generation workspace holds"""
    inference_tp_size: PositiveInt = 1
    """ranks that share one copy of the model during generation"""
    release_inference_cache: bool = False
    """give the memory of the workspace back after generation"""
    pin_parameters: bool = True
    """ZeRO-3: gather all layers at once for generation, rather than layer by layer"""
    tp_gather_partition_size: PositiveInt = 8
    """layers gathered at a time when the model is shared between ranks"""


class SleepConfig(Settings):
    """What leaves the device in the phases of an iteration (generate, score, train) that do not need it."""

    optimizer: bool = False
    """optimizer states go to host memory outside training"""
    gradients: bool = False
    """memory of the gradients is given back outside training"""
    master_weights: bool = False
    """fp32 master weights go to host memory outside training"""
    weights: bool = False
    """weights of a trained model go to host memory in phases that do not run it, such as the critic's in generation"""
    kv_cache: bool = False
    """the KV cache and the workspace of generation are given back after it"""
    frozen_models: bool = False
    """reference and reward model go to host memory outside scoring"""


class CheckpointConfig(Settings):
    """How checkpoints are written."""

    asynchronous: bool = False
    """write from a copy in host memory while training goes on"""
    frozen_models: Literal["reference", "value"] = "reference"
    """reference: a fingerprint of frozen weights, checked on resume; value: the frozen weights too"""


StrategyName = Literal[
    "hybrid_deepspeed",
    "hybrid_deepspeed_stage_1",
    "hybrid_deepspeed_stage_2",
    "hybrid_deepspeed_stage_3",
    "hybrid_deepspeed_stage_2_offload",
    "hybrid_deepspeed_stage_3_offload",
]


def _one_hybrid_engine_group(config: StrategyConfig) -> Problem | None:
    if "hybrid_engine" not in config.config:
        return None
    return Problem("config.hybrid_engine", "belongs in strategy.hybrid_engine", "a DeepSpeed key")


def _stage_agrees_with_name(config: StrategyConfig) -> Problem | None:
    zero = config.config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage is None or "_stage_" not in config.name or f"_stage_{stage}" in config.name:
        return None
    remedy = f"strategy.name is {config.name!r}: change one of them"
    return Problem("config.zero_optimization.stage", remedy, repr(stage))


class StrategyConfig(Settings):
    """Which strategy shards what, and how its engines are configured."""

    rules: ClassVar[tuple[Rule, ...]] = (_one_hybrid_engine_group, _stage_agrees_with_name)

    name: StrategyName = "hybrid_deepspeed"
    """registered name of the strategy; the ZeRO stage says what the ranks share between them"""
    hybrid_engine: HybridEngineConfig = Field(default_factory=HybridEngineConfig)
    """settings of the engine that both trains and generates"""
    sleep: SleepConfig = Field(default_factory=SleepConfig)
    """what leaves the device while another phase runs"""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """how checkpoints are written"""
    timeout_seconds: PositiveFloat = 1800.0
    """a rank that is not heard of, or a collective that lasts longer, stops the run"""
    max_nonfinite_steps: PositiveInt = 10
    """optimizer steps in a row that may be skipped because loss or gradients are not finite"""
    config: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed keys, laid over the strategy's own"""


def _training_ends(config: TrainerConfig) -> Problem | None:
    if config.max_steps is None and config.max_epochs is None:
        return Problem("max_steps", "give max_steps or max_epochs, so that training ends", "None")
    return None


def _half_precision_needs_a_gpu(config: TrainerConfig) -> Problem | None:
    if config.accelerator == "cpu" and config.precision in ("16-true", "16-mixed"):
        return Problem("precision", "fp16 does not run on a CPU: use 32-true or bf16-true", repr(config.precision))
    return None


class TrainerConfig(Settings):
    """Arguments of `lightning.Trainer`, by the same names; null leaves Lightning's own default."""

    rules: ClassVar[tuple[Rule, ...]] = (_training_ends, _half_precision_needs_a_gpu)

    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    """hardware to run on"""
    devices: PositiveInt | DeviceList = 1
    """number of devices per node, 'auto' for all, or their indices such as '0,1'"""
    num_nodes: PositiveInt = 1
    """number of machines"""
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed"] = "32-true"
    """number format of weights and arithmetic"""
    max_steps: PositiveInt | None = None
    """training steps; with PPO one step is one iteration of rollout and update"""
    max_epochs: PositiveInt | None = None
    """passes over the training data"""
    accumulate_grad_batches: PositiveInt = 1
    """batches of one optimizer step"""
    gradient_clip_val: PositiveFloat | None = None
    """gradients are scaled down to this norm"""
    log_every_n_steps: PositiveInt = 1
    """steps between two rows of the log"""
    val_check_interval: PositiveInt | Fraction | None = None
    """batches (with PPO: iterations), over all epochs, or share of an epoch, between two validations"""
    limit_val_batches: NonNegativeInt | Fraction | None = None
    """batches, or share of them, in one validation; 0 for no validation"""
    num_sanity_val_steps: NonNegativeInt = 0
    """validation batches tried before training"""
    enable_progress_bar: bool = True
    """show a progress bar"""
    enable_checkpointing: bool = True
    """write checkpoints"""
    deterministic: bool = False
    """refuse operations whose result may differ between runs"""


class CallbacksConfig(Settings):
    """What happens beside training."""

    export_model: bool = True
    """write the trained model as a Hugging Face folder to output_dir/model at the end"""
    export: Literal["merged", "adapter"] = "merged"
    """merged: a whole model, adapters added into its weights; adapter: the adapter only, which names its base"""
    checkpoint_every_n_steps: PositiveInt | None = None
    """training steps between two checkpoints; null for one at the end of every epoch"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints to keep; older ones are removed once a newer one is complete"""
    best_metric: str | None = None
    """keep the checkpoint with the best value of this metric too, such as val/score; null: only the newest ones"""
    best_mode: Literal["max", "min"] | None = None
    """whether the largest or the smallest value of best_metric is the best; null: the smallest of a loss, else the \
largest"""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """average what is trained after each optimizer step, with this weight of the average so far (DeepSpeed-Chat: \
0.992), and write it to output_dir/ema at the end; null for no average"""
    progress: Literal["tqdm", "rich"] = "tqdm"
    """what draws the progress bar; trainer.enable_progress_bar=false for none"""
    print_samples: PositiveInt | None = None
    """training steps from one table of sampled responses in the terminal to the next; null for none"""


class LoggerConfig(Settings):
    """Where metrics are written."""

    name: Literal["csv", "tensorboard", "wandb", "none"] = "csv"
    """csv: output_dir/metrics.csv; tensorboard, wandb: there and in that file; none: nowhere"""
    project: str = "lightning-hybrid"
    """project at Weights & Biases"""
    offline: bool = False
    """keep what is for Weights & Biases in output_dir/wandb"""
