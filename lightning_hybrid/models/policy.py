"""The policy: a causal language model that answers with log-probs instead of logits."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hybrid.models.scores import TokenScores


class PolicyOutput(NamedTuple):
    """What a policy says about the tokens it was given; zero where nothing was asked.

    Attributes:
        logprobs: ``[batch, time]`` float32; entry ``t`` is log p(token ``t`` | tokens before ``t``).
        entropy: ``[batch, time]`` float32, nats; entropy of the distribution that token ``t`` was drawn from.
    """

    logprobs: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """Wrap a Hugging Face causal LM so that ``[batch, time, vocab]`` never exists at once.

    The head runs over the asked positions only, ``chunk`` tokens at a time; each chunk's logits are recomputed in the
    backward pass. The wrapper is the module one engine owns, so that every call of a layer happens inside its forward.

    Args:
        model: a causal LM (``AutoModelForCausalLM``).
        chunk: tokens per head call.
    """

    def __init__(self, model: Any, chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self._extra = extra_arguments(model)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the wrapped model."""
        return base_of(self.model).config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        temperature: float = 1.0,
        position_ids: Tensor | None = None,
    ) -> PolicyOutput:
        """Score the tokens at ``positions``.

        Args:
            input_ids: ``[batch, time]`` long.
            attention_mask: ``[batch, time]`` bool, True for real tokens; padding may be on either side.
            positions: ``[batch, time]`` bool, True for the tokens to score. Column 0 has no past and may not be True.
            temperature: the logits are divided by it.
            position_ids: ``[batch, time]`` long, of rows that hold several texts: from 0 in each, 0 on padding. Then no
                text sees another, and the first token of none has a past. See :func:`run_packed`.

        Returns:
            Log-probs and entropies, zero where ``positions`` is False.
        """
        hidden = run_trunk(self.model, input_ids, attention_mask, self._extra, position_ids)
        asked = positions[:, 1:]
        flat_hidden, targets = hidden[:, :-1][asked], input_ids[:, 1:][asked]
        logprobs, entropy = self.score_hidden(flat_hidden, targets, temperature)
        return PolicyOutput(_scatter(logprobs, positions), _scatter(entropy, positions))

    def score_hidden(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of each row of ``hidden`` ``[tokens, width]``, both ``[tokens]``."""
        calls = self._head_calls(len(targets), hidden.device)
        # A single chunk is within the memory bound as it is; recomputing it would only cost time.
        recompute = torch.is_grad_enabled() and calls > 1
        pieces = []
        for begin in range(0, calls * self.chunk, self.chunk):
            chunk = (hidden[begin : begin + self.chunk], targets[begin : begin + self.chunk], temperature)
            run = partial(checkpoint, self._score_chunk, use_reentrant=False) if recompute else self._score_chunk
            pieces.append(run(*chunk))
        logprobs, entropy = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropy)

    def _head_calls(self, tokens: int, device: torch.device) -> int:
        """Chunks to run: as many as this rank's tokens fill, at least one.

        Where the head is sharded (ZeRO-3), every call is a collective: all ranks make as many as the one with the most
        tokens, the others some on no tokens.
        """
        calls = max(1, -(-tokens // self.chunk))
        sharded = hasattr(next(self.parameters()), "ds_id")
        if not sharded or torch.distributed.get_world_size() == 1:
            return calls
        most = torch.tensor(calls, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def _score_chunk(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = head_logits(self.model, hidden).float()
        # Ours to overwrite: nobody else holds these logits.
        scores: tuple[Tensor, Tensor] = TokenScores.apply(logits / temperature, targets)  # type: ignore[no-untyped-call]
        return scores


def base_of(model: Any) -> Any:
    """The causal LM inside peft's model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def extra_arguments(model: Any) -> frozenset[str]:
    """Which of the optional arguments the model's trunk understands."""
    accepted = inspect.signature(base_of(model).base_model.forward).parameters
    return frozenset({"position_ids", "use_cache"} & set(accepted))


def run_trunk(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    extra: frozenset[str],
    position_ids: Tensor | None = None,
) -> Tensor:
    """Run a model without its head; ``[batch, time, width]`` last hidden states.

    Positions count real tokens only, so that left padding does not shift them; or they are those of packed texts.
    """
    if position_ids is not None:
        return run_packed(model, input_ids, position_ids, extra)
    arguments: dict[str, Any] = {}
    if "position_ids" in extra:
        arguments["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    if "use_cache" in extra:
        arguments["use_cache"] = False
    output = base_of(model).base_model(input_ids=input_ids, attention_mask=attention_mask.long(), **arguments)
    hidden: Tensor = output.last_hidden_state
    return hidden


def reads_positions_of_one_row(config: Any) -> bool:
    """Whether the attention is Flash attention, which finds packed texts only in a batch of one row."""
    return "flash" in str(config._attn_implementation)


def run_packed(model: Any, input_ids: Tensor, position_ids: Tensor, extra: frozenset[str]) -> Tensor:
    """Run a model without its head over packed rows; ``[batch, time, width]`` last hidden states.

    Transformers tells the texts of a row apart by the positions, which begin again with each, where it is given no
    attention mask: it masks all else for SDPA and eager attention, sliding windows included. Flash attention is given
    one long row instead: it reads positions only of a batch of one, and takes nothing for rows that it may not see.

    Args:
        model: a causal LM that keeps texts apart by their positions.
        input_ids: ``[batch, time]`` long.
        position_ids: ``[batch, time]`` long, from 0 in each text, 0 on padding.
        extra: which optional arguments the model's trunk understands.
    """
    base, shape = base_of(model), input_ids.shape
    if reads_positions_of_one_row(base.config):
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    cache = {"use_cache": False} if "use_cache" in extra else {}
    output = base.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=None, **cache)
    hidden: Tensor = output.last_hidden_state
    return hidden.reshape(*shape, -1)


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Apply the model's head to hidden states ``[..., width]``, with the scalings that some families add."""
    return scaled_logits(model.config.get_text_config(), base_of(model).get_output_embeddings()(hidden))


def scaled_logits(config: Any, logits: Tensor) -> Tensor:
    """The scalings that some families apply to what the head returns."""
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def _scatter(values: Tensor, positions: Tensor) -> Tensor:
    """Put the scored values ``[tokens]`` back where they were asked for, ``[batch, time]``."""
    full = values.new_zeros(positions.shape)
    return full.masked_scatter(positions, values)
