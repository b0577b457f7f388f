"""The process of a reward model: loads it as a rank would, and answers ``POST /score``."""

from __future__ import annotations

import threading
from typing import Any

import torch

from lightning_hybrid.checkpoint import fingerprint
from lightning_hybrid.config.reward import RewardTermConfig
from lightning_hybrid.engines import cast_parameters
from lightning_hybrid.rewards.load import load_model_reward
from lightning_hybrid.serving import Route, main_of


def routes(settings: dict[str, Any]) -> dict[str, Route]:
    """``score``: ``{prompts, responses, fields}`` in, ``{scores}`` out. ``about``: a digest of the ``weights``.

    Args:
        settings: ``source`` with ``path`` or ``classifier``, ``dtype``, and ``cuda``: whether it has such a device.
    """
    reward = load_model_reward(RewardTermConfig(**settings["source"]))
    device = torch.device("cuda" if settings["cuda"] else "cpu")
    for model in reward.models.values():
        model.requires_grad_(False).eval()
        cast_parameters(model, getattr(torch, settings["dtype"]))
        model.to(device)
    reward.to(device)
    about = {"weights": fingerprint(reward.models.values())}
    one_at_a_time = threading.Lock()  # all ranks ask at once, and the device has the room for one batch

    def score(request: dict[str, Any]) -> dict[str, Any]:
        with one_at_a_time:
            return {"scores": reward(request["prompts"], request["responses"], request["fields"]).tolist()}

    return {"score": score, "about": lambda _: about}


if __name__ == "__main__":
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # what it prints is shown among the lines of the run
    main_of(routes)
