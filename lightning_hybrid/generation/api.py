"""Generation with a bare causal LM, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_hybrid.containers import Decoder, bind, lay_out
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation.carrier import Rollout
from lightning_hybrid.generation.loop import Generation
from lightning_hybrid.generation.memory import capacity_of, slots_for
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.generation.stopping import StopTexts
from lightning_hybrid.generation.workspace import Workspace
from lightning_hybrid.models import base_of, max_positions


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    seed: int = 0,
    *,
    indices: Sequence[int] | None = None,
    tokenizer: Any = None,
    max_tokens_in_flight: int | None = None,
) -> Rollout:
    """Sample responses from a Hugging Face causal LM with the containers' decode loop.

    A response depends on the weights, ``seed``, its prompt's position in ``prompts`` and its sample's number, and not
    on how many others are generated with it: on a CPU to the last bit, on a GPU up to the rounding of its products.

    Args:
        model: a causal LM of a family that has a container, with peft's LoRA adapters or without. Its q, k, v (and
            gate, up) weights are moved next to each other in memory, once; their values stay.
        prompts: token ids, at least one each.
        sampling: how to draw; ``sampling.n`` responses to each prompt.
        seed: of the random streams; torch's own are left alone.
        indices: name the prompts' random streams; by default their positions.
        tokenizer: needed where ``sampling.stop`` has texts.
        max_tokens_in_flight: tokens that the KV cache may hold; more prompts than fit wait for a slot. By default a
            share of the free memory.

    Returns:
        One row per response, those of a prompt together.

    Raises:
        RolloutError: for an empty prompt, one that leaves no room for a response, a family without a container, or
            logits that are not finite.

    Example::

        rollout = generate(model, [[1, 5, 6]], SamplingParams(max_new_tokens=16, n=4))
        rollout.responses  # four lists of token ids
    """
    base = base_of(model)
    vocabulary = base.get_input_embeddings().num_embeddings
    check_prompts(prompts, sampling, max_positions(base.config), vocabulary=vocabulary)
    stop = StopTexts(sampling.stop, tokenizer)
    longest = max(len(prompt) for prompt in prompts)
    lay_out(model)
    with evaluating(model):
        decoder = bind(model, longest + sampling.max_new_tokens)
        capacity = capacity_of(longest, sampling.max_new_tokens)
        slots = slots_for(decoder, capacity, len(prompts) * sampling.n, max_tokens_in_flight)
        workspace = Workspace(decoder, slots, capacity)
        return sample_with(decoder, workspace, prompts, sampling, end_ids(model, sampling), seed, stop, indices)


def sample_with(
    decoder: Decoder,
    workspace: Workspace,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    eos_ids: Sequence[int],
    seed: int,
    stop: StopTexts,
    indices: Sequence[int] | None = None,
    any_rank: Callable[[bool], bool] = bool,
) -> Rollout:
    """Run the decode loop; arguments are those of :class:`~lightning_hybrid.generation.loop.Generation`."""
    eos_ids = [token for token in eos_ids if 0 <= token < decoder.head_rows]
    with torch.inference_mode(), torch.autocast(decoder.device.type, enabled=False):
        rollout = Generation(decoder, workspace, prompts, sampling, eos_ids, seed, indices, stop, any_rank).run()
    return rollout.usable_in_training()


def check_prompts(
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    limit: int | None,
    whose: str = "the model's",
    what: str = "positions",
    vocabulary: int | None = None,
) -> None:
    """Refuse prompts that cannot be generated from, naming the first.

    Args:
        prompts: token ids.
        sampling: how many tokens a response may have.
        limit: tokens that a prompt and its response may have together, None for no limit.
        whose: limit it is, for the message.
        what: it counts, for the message.
        vocabulary: rows of the embedding; None leaves token ids unchecked.

    Raises:
        RolloutError: for no prompts, an empty prompt, one that leaves no room for a response, or an unknown token id.
    """
    if not len(prompts):
        raise RolloutError("there are no prompts: give at least one")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise RolloutError(f"prompt {row} is empty: give it at least one token (a BOS will do)")
        if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
            raise RolloutError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens={sampling.max_new_tokens} that is "
                f"more than {whose} {limit} {what}: shorten the prompt or lower max_new_tokens"
            )
        if vocabulary is not None and not 0 <= min(prompt) <= max(prompt) < vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise RolloutError(
                f"prompt {row} has the token id {wrong}; the model's embedding has rows 0 to {vocabulary - 1}: "
                "is it of another tokenizer?"
            )


def end_ids(model: Any, sampling: SamplingParams) -> list[int]:
    """Tokens that end a response: the asked ones, else those of the model's generation configuration."""
    if sampling.eos_ids is not None:
        return list(sampling.eos_ids)
    configured = getattr(base_of(model).generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return [int(i) for i in ids if i is not None]


def warn_without_container(model: Any, reason: str) -> None:
    """Say that a model generates by itself; Python shows a warning of the same words once."""
    name = type(base_of(model)).__name__
    warnings.warn(
        f"{name} has no inference container and generates with its own `generate`, which is slower: {reason}",
        stacklevel=2,
    )


class evaluating:
    """Hold a module in evaluation mode inside a ``with`` block."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.was_training = self.module.training
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.was_training)
