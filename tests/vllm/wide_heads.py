"""TinyStories with heads of 32, which is the least that vLLM's attention on a CPU runs; the same function."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.models import load_policy, load_tokenizer

WIDTH = 32


def write_wide_model(source: Path, folder: Path) -> Path:
    """Write a Llama with its heads padded to :data:`WIDTH`; logits are the same up to rounding.

    Rows of padding in queries, keys and values, and columns of padding in outputs, are 0 and have no gradient, so that
    it also trains like the original. RoPE turns pairs of dimensions by angles that depend on their place in a head, so
    each keeps the place whose angle it had.
    """
    from transformers import AutoModelForCausalLM

    plain = load_policy(source).model
    config = copy.deepcopy(plain.config)
    config.head_dim = WIDTH
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    place = _places(plain.config.head_dim)
    wide.load_state_dict({name: _padded(name, tensor, place) for name, tensor in plain.state_dict().items()})
    wide.generation_config = plain.generation_config
    wide.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


def _places(width: int) -> Tensor:
    """Where each dimension of a narrow head goes: angle ``i`` of ``width / 2`` is angle ``2 i`` of twice as many."""
    assert 2 * width == WIDTH
    half = torch.arange(width // 2) * 2
    return torch.cat([half, WIDTH // 2 + half])


def _padded(name: str, tensor: Tensor, place: Tensor) -> Tensor:
    width = len(place)
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        rows = torch.zeros(len(tensor) // width, WIDTH, tensor.shape[1])
        # Scores are divided by the root of the width.
        rows[:, place] = tensor.view(-1, width, tensor.shape[1]) * (2**0.5 if "q_proj" in name else 1.0)
        return rows.flatten(0, 1)
    if name.endswith("o_proj.weight"):
        columns = torch.zeros(len(tensor), tensor.shape[1] // width, WIDTH)
        columns[:, :, place] = tensor.view(len(tensor), -1, width)
        return columns.flatten(1)
    return tensor


def perturbed(model: Any, scale: float = 0.05) -> Any:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        nn.Parameter.add_(parameter.data, torch.randn(parameter.shape, generator=generator) * scale)
    return other
