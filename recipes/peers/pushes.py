"""A push of all weights to vLLM in two orders: ours, and parameter by parameter with a barrier behind each.

The second is the order of OpenRLHF: for each parameter, gather it where ZeRO-3 holds shards, hand it to every engine by
a call of its own (``model.load_weights([(name, tensor)])`` in vLLM's worker), and let all ranks wait for each other. On
a CPU vLLM's kernels hold weights in a packed form, into which that call cannot load; so the session of
``reload_weights`` is opened before the first parameter and closed behind the last, which our own order does, too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_hybrid.generation import SamplingParams
from lightning_hybrid.models.merging import Entry, as_published, merged_entries
from lightning_hybrid.modules.passes import policy_logprobs
from lightning_hybrid.rollout.vllm.requests import rollout_of, sampling_of
from lightning_hybrid.rollout.vllm.weights import WeightStream
from peers.measure import now

OURS, THEIRS = "one pass", "per parameter"
_TOKENS = 8  # that each prompt is answered with, to tell right weights from wrong ones


class Pushes(L.Callback):
    """Push the weights in both orders, in turn, when training has ended and the engines are still there.

    Before every push all weights are scaled, so that an engine that kept those of before would show in the log-probs.

    Args:
        count: of each order.

    Attributes:
        taken: of each push its ``order``, ``seconds``, ``calls`` into vLLM, ``bytes`` of all weights, and ``gap``: the
            largest |Δ| of log-probs afterwards to the training forward, nats.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.taken: list[dict[str, Any]] = []

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure."""
        module.actor.eval()  # type: ignore[union-attr]
        for number in range(2 * (self._count + 1)):
            taken = self._push(module, THEIRS if number % 2 else OURS)
            if number > 1:  # the first of each does not count
                self.taken.append(taken)

    def _push(self, module: Any, order: str) -> dict[str, Any]:
        engine, model = module.backend.engine, module.actor.model
        _scale(model)
        # None: of no known version, so that it is given the weights as it wakes.
        with engine.awake(None, WeightStream(model)):
            seconds, calls = engine.figures["sync_seconds"], 1
            if order == THEIRS:
                _scale(model)
                begin = now()
                calls = push_each_parameter(engine.llm, model)
                seconds = now() - begin
            gap = _gap(module, engine)
        return {"order": order, "seconds": seconds, "calls": calls, "bytes": WeightStream(model).bytes, "gap": gap}


def push_each_parameter(llm: Any, model: Any) -> int:
    """Push all weights, one by one; all ranks call it.

    Returns:
        Calls into vLLM that brought a weight.
    """
    entries = as_published(model, merged_entries(model))
    assert entries is not None
    llm.collective_rpc(_open)
    for entry in entries:
        with _whole(entry):
            llm.collective_rpc(_load_one, kwargs={"name": entry.name, "tensor": _value(entry)})
        dist.barrier()
    llm.collective_rpc(_close)
    llm.reset_prefix_cache()
    return len(entries)


def _open(worker: Any) -> None:
    reload = import_module("vllm.model_executor.model_loader.reload")
    reload.initialize_layerwise_reload(worker.model_runner.get_model())


def _load_one(worker: Any, name: str, tensor: Tensor) -> None:
    worker.model_runner.get_model().load_weights([(name, tensor)])


def _close(worker: Any) -> None:
    reload, runner = import_module("vllm.model_executor.model_loader.reload"), worker.model_runner
    model = runner.get_model()
    reload.finalize_layerwise_reload(model, runner.model_config)
    # A head that is the embedding has no weights of its own to be loaded, and is packed anew.
    head: Any = getattr(model, "lm_head", None)
    tied = (module for module in model.modules() if module is not head)
    if head is not None and any(getattr(module, "weight", None) is head.weight for module in tied):
        head.quant_method.process_weights_after_loading(head)


def _value(entry: Entry) -> Tensor:
    """A copy where the parameter is gathered and goes again, as broadcasting it gives one."""
    sharded = any(hasattr(part, "ds_id") for part in entry.parts)
    value = entry.value(lambda part: part.detach())
    assert value is not None
    return value.clone() if sharded else value


def _whole(entry: Entry) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([part for part in entry.parts if hasattr(part, "ds_id")])


@torch.no_grad()
def _scale(model: Any) -> None:
    """Weights that are others than before, on all ranks alike."""
    import deepspeed

    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            if not hasattr(parameter, "ds_id") or dist.get_rank() == 0:
                parameter.mul_(0.95)


def _gap(module: Any, engine: Any) -> float:
    """The largest |Δ| of log-probs, nats, of a few short responses of this rank."""
    prompts = [[7, 11, 13 + number] for number in range(4)]
    sampling = SamplingParams(max_new_tokens=_TOKENS, eos_ids=())
    requests = sampling_of(import_module("vllm"), sampling, 0, range(len(prompts)))
    device = next(module.actor.parameters()).device
    rollout = rollout_of(prompts, engine.generate(prompts, requests), (), 0, device)
    own = policy_logprobs(module.actor, rollout, len(prompts))
    return float((own - rollout.sampling_logprobs)[rollout.response_mask].abs().max())
