"""What a pass holds at most: it is run on tensors without memory, and every storage is counted while it lives.

That is exact for any architecture: the model's own forward runs, autograd saves what it saves, and its backward frees
it. What kernels take inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import Policy, ScalarModel
from lightning_hybrid.models.policy import extra_arguments, run_trunk
from lightning_hybrid.plan.networks import Network, without_memory


@dataclass(frozen=True)
class Size:
    """What a pass is run over.

    Attributes:
        rows: sequences.
        tokens: of each, prompt and response.
        asked: tokens of each whose log-probs are asked for; 0 for a scalar model.
        chunk: tokens whose logits exist at once.
        entropy: whether the loss contains entropies.
    """

    rows: int
    tokens: int
    asked: int = 0
    chunk: int = 1024
    entropy: bool = False


@dataclass(frozen=True)
class Peak:
    """What a pass holds where it holds most.

    Attributes:
        activations: bytes beside weights and logits.
        logits: bytes with one entry for each token of the vocabulary.
        gradients: bytes of the weights' gradients that have come so far, of those that stay.
    """

    activations: int
    logits: int
    gradients: int = 0

    @property
    def bytes(self) -> int:
        """In all."""
        return self.activations + self.logits + self.gradients

    def beyond(self, other: Peak, steps: int) -> Peak:
        """Where the line through this peak and ``other`` leads, so many steps from here."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Peak(*(a + steps * (b - a) for a, b in pairs))


# Layers of which a part of a deep model has at least as many.
SHALLOW = 4
_TRACED: dict[Any, Peak] = {}


def forward_peak(network: Network, size: Size) -> Peak:
    """Of a forward pass without autograd."""
    return _traced(network, size, None)


def training_peak(network: Network, size: Size, kept: int) -> Peak:
    """Of a forward and backward pass.

    Args:
        network: what is trained.
        size: of the micro-batch.
        kept: bytes of gradients that pile up at most while the pass goes on; 0 where each leaves as it comes.
    """
    peak = _traced(network, size, kept)
    whole = min(kept, network.trained * network.itemsize)
    # With few layers activations may be more than gradients, and with many less: then all gradients are the peak.
    return peak if peak.bytes >= whole else Peak(0, 0, whole)


def _traced(network: Network, size: Size, kept: int | None) -> Peak:
    """Of a pass; ``kept`` is None for one without autograd.

    Layers of a kind hold alike: of a deep model, two depths are run, and what the others hold follows.
    """
    key = (network.key, size, kept)
    if key not in _TRACED:
        period = network.period
        few = network.layers % period + period * -(-SHALLOW // period)
        if network.layers <= few + period:
            _TRACED[key] = _trace(network, size, kept)
        else:
            low, high = (_trace(network.with_layers(layers), size, kept) for layers in (few, few + period))
            _TRACED[key] = low.beyond(high, (network.layers - few) // period)
    return _TRACED[key]


def _trace(network: Network, size: Size, kept: int | None) -> Peak:
    """Run the pass; ``kept`` is None for one without autograd."""
    try:
        with without_memory():
            module = network.build().train(kept is not None)
            ids = torch.zeros(size.rows, size.tokens, dtype=torch.long)
            mask = torch.ones(size.rows, size.tokens, dtype=torch.bool)
            live = Live(module, kept or 0)
            with live, torch.set_grad_enabled(kept is not None):
                said = _pass(module, ids, mask, size)
                if kept is not None:
                    sum(said[1:], said[0]).sum().backward()
            return live.peak
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"the {network.name}'s architecture {network.config.model_type!r} cannot be planned: its forward needs "
            f"values, not shapes alone ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _pass(module: Any, ids: Tensor, mask: Tensor, size: Size) -> list[Tensor]:
    """As the module's forward, but for picking the asked positions, of which a shape alone does not know how many."""
    if isinstance(module, ScalarModel):
        return [module(ids, mask)]
    if not isinstance(module, Policy):
        return [module(input_ids=ids, attention_mask=mask.long()).logits]
    hidden = run_trunk(module.model, ids, mask, extra_arguments(module.model))
    begin = size.tokens - 1 - size.asked
    flat = hidden[:, :-1][:, begin:].reshape(-1, hidden.shape[-1])
    module.chunk = size.chunk
    logprobs, entropy = module.score_hidden(flat, ids[:, begin + 1 :].reshape(-1), 1.0)
    return [logprobs, entropy] if size.entropy else [logprobs]


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made inside, from when they come to when they go.

    Args:
        module: whose parameters and buffers are not counted, and whose gradients are counted apart.
        kept: bytes of gradients that pile up at most.

    Attributes:
        peak: what was held where most was held.
    """

    def __init__(self, module: nn.Module, kept: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = Peak(0, 0)
        self._kept, self._gradients = kept, 0
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._held = {False: 0, True: 0}  # by whether it is logits
        config: Any = module.config
        self._vocabulary = int(config.get_text_config().vocab_size)
        self._width = int(config.get_text_config().hidden_size)
        self._known = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        # Rows of logits; not the head's weight, or its gradient, whichever way round.
        logits = tensor.dim() == 2 and tensor.shape[1] == self._vocabulary and tensor.shape[0] != self._width
        self._sizes[key] = storage.nbytes(), logits
        self._held[logits] += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self._compare()

    def _forget(self, key: int) -> None:
        size, logits = self._sizes.pop(key)
        self._held[logits] -= size

    def _take(self, parameter: Tensor) -> None:
        """Take a gradient out of the pass, as engines do, and count it where it stays."""
        assert parameter.grad is not None
        self._gradients = min(self._kept, self._gradients + parameter.grad.nbytes)
        parameter.grad = None
        self._compare()

    def _compare(self) -> None:
        now = Peak(self._held[False], self._held[True], self._gradients)
        if now.bytes > self.peak.bytes:
            self.peak = now
