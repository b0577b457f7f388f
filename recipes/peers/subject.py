"""The model that everybody generates with: real weights from a folder, or a known shape with random ones."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_hybrid.engines import build_engine, cast_parameters, engine_config, prepare_deepspeed
from lightning_hybrid.models import Policy, end_of_text_ids, load_policy, load_tokenizer, max_positions
from peers.workload import NUMBER_EOS, Workload, every_nth_id, make_workload, random_prompts, story_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _shape(family: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, tie: bool) -> Any:
    return {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": tie,
        "max_position_embeddings": 4096,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape("llama", 2048, 128, 384, 2, 8, 4, True),
    "llama-4m": _shape("llama", 2048, 256, 704, 4, 8, 4, True),
    "llama-110m": _shape("llama", 32000, 768, 2048, 12, 12, 12, True),
    "qwen2-0.5b": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "qwen2-1.5b": _shape("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "qwen2-7b": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "llama-1b": _shape("llama", 128256, 2048, 8192, 16, 32, 8, True),
    "llama-8b": _shape("llama", 128256, 4096, 14336, 32, 32, 8, False),
}


@dataclass(frozen=True)
class Source:
    """Where the weights come from, and prompts that suit them.

    Attributes:
        path: folder or hub name of a causal LM; None for random weights.
        shape: one of :data:`SHAPES`, where there is no path.
        prompt_tokens: shortest and longest prompt of random ids.
    """

    path: str | None
    shape: str = "tiny"
    prompt_tokens: tuple[int, int] = (8, 32)

    def __str__(self) -> str:
        return Path(self.path).name if self.path else f"{self.shape}, random weights"

    def policy(self) -> Policy:
        """The same weights at every call, on the device that will train them; bf16 on CUDA, float32 on a CPU."""
        if self.path:
            policy = load_policy(self.path)
            cast_parameters(policy, _dtype())
            return policy.to(device())
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(device()):
            config = AutoConfig.for_model(**SHAPES[self.shape])
            return Policy(AutoModelForCausalLM.from_config(config, dtype=_dtype()))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own, or one for random weights."""
        return load_tokenizer(self.path) if self.path else number_tokenizer(SHAPES[self.shape]["vocab_size"])

    def workload(self, count: int, max_new_tokens: int, policy: Policy) -> Workload:
        """Prompts that suit the weights, and what ends a response."""
        tokenizer, vocab_size = self.tokenizer(), policy.config.vocab_size
        if self.path:
            eos_ids = end_of_text_ids(policy.model, tokenizer)
            return make_workload(story_prompts(count), tokenizer, max_new_tokens, eos_ids)
        texts = random_prompts(count, *self.prompt_tokens, vocab_size)
        return make_workload(texts, tokenizer, max_new_tokens, every_nth_id(vocab_size, max_new_tokens))


class Subject:
    """A policy in a hybrid engine at ZeRO stage 2, alone in its process group.

    The optimizer is plain SGD: its states take no part in generation, and 7B parameters then fit beside their cache.
    """

    def __init__(self, source: Source) -> None:
        _start_alone()
        self.source, self.device = source, device()
        self.policy = source.policy()
        precision = "bf16-true" if self.device.type == "cuda" else "32-true"
        cache = {"max_out_tokens": max_positions(self.policy.config)}
        config = engine_config(stage=2, precision=precision, hybrid_engine=cache)
        optimizer = torch.optim.SGD(self.policy.parameters(), lr=1e-5)
        self.engine: Any = build_engine(self.policy, optimizer, config, hybrid=True)
        self.engine.train()

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model inside the engine."""
        return self.policy.model


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _dtype() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def _start_alone() -> None:
    """A process group of this process alone, as DeepSpeed needs one."""
    os.environ.setdefault("LOCAL_RANK", "0")
    prepare_deepspeed(device().type)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)  # that ZeRO was not tested with SGD has no bearing here
    if not torch.distributed.is_initialized():
        from torch._C._distributed_c10d import HashStore

        backend = "nccl" if device().type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(backend, verbose=False)


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """For random weights: the text of id 17 is ``17``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Special tokens are found inside words too, so their names may not be numbers.
    special = {"<pad>": 0, "<eos>": NUMBER_EOS}
    model = Tokenizer(models.WordLevel(special | {str(i): i for i in range(2, vocab_size)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=False, **names)
