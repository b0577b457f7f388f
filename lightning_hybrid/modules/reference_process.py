"""The process of a frozen reference: loads it as a rank would; answers ``POST /logprobs`` and ``POST /respond``."""

from __future__ import annotations

import base64
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_hybrid.checkpoint import fingerprint
from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.engines import cast_parameters
from lightning_hybrid.generation import lay_out
from lightning_hybrid.models import Policy, load_tokenizer
from lightning_hybrid.modules.passes import token_logprobs
from lightning_hybrid.modules.roles import make_policy
from lightning_hybrid.rollout import RolloutBackend, make_backend
from lightning_hybrid.serving import Route, main_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def routes(settings: dict[str, Any]) -> dict[str, Route]:
    """``logprobs``: ``{prompts, responses, temperature, micro_batch_size}`` in, ``{logprobs}`` of each token out.

    ``respond``: ``{prompts, seed, indices}`` in, greedy ``{responses, finish_reasons, policy_logprobs,
    sampling_logprobs}`` out. ``about``: a digest of the ``weights``. All prompts and responses are token ids.

    Args:
        settings: what :meth:`~lightning_hybrid.modules.reference.ServedReference.spec` writes.
    """
    tokenizer = _tokenizer(settings["tokenizer"])
    policy = make_policy(settings["source"], tokenizer, settings["chunk"]).requires_grad_(False).eval()
    cast_parameters(policy, getattr(torch, settings["dtype"]))
    policy.to(torch.device("cuda" if settings["cuda"] else "cpu"))
    about = {"weights": fingerprint([policy])}
    pad = tokenizer.pad_token_id or 0
    backend = make_backend(RolloutConfig(**settings["rollout"]), settings["ends"], pad, tokenizer)
    one_at_a_time = threading.Lock()  # all ranks ask at once, and the device has the room for one batch

    def logprobs(request: dict[str, Any]) -> dict[str, Any]:
        with one_at_a_time:
            return {"logprobs": _logprobs(policy, request)}

    def respond(request: dict[str, Any]) -> dict[str, Any]:
        with one_at_a_time:
            return _responses(policy, backend, request)

    return {"logprobs": logprobs, "respond": respond, "about": lambda _: about}


def _logprobs(policy: Policy, request: dict[str, Any]) -> list[list[float]]:
    device = next(policy.parameters()).device
    tokens, prompted, responded = lay_out(request["prompts"], request["responses"], 0, device)
    size, temperature = request["micro_batch_size"], request["temperature"]
    values = token_logprobs(policy, tokens, prompted | responded, responded, size, temperature)
    return [row[mask].tolist() for row, mask in zip(values, responded, strict=True)]


@torch.no_grad()
def _responses(policy: Policy, backend: RolloutBackend, request: dict[str, Any]) -> dict[str, Any]:
    rollout = backend.generate(
        policy.model, request["prompts"], seed=request["seed"], greedy=True, indices=request["indices"]
    )
    drawn_from = zip(rollout.sampling_logprobs, rollout.response_mask, strict=True)
    return {
        "responses": rollout.responses,
        "finish_reasons": list(rollout.finish_reasons),
        "policy_logprobs": rollout.logprobs,
        "sampling_logprobs": [row[mask].tolist() for row, mask in drawn_from],
    }


def _tokenizer(files: dict[str, str]) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            file = Path(folder) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(content))
        return load_tokenizer(folder)


if __name__ == "__main__":
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # what it prints is shown among the lines of the run
    main_of(routes)
