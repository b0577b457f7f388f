"""What a peer is, and what several of them need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from peers.measure import now
from peers.subject import Subject
from peers.workload import Workload

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Sample:
    """Responses of a rollout, cut after their EOS, and the seconds it took."""

    responses: list[list[int]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Sampled tokens, the EOS included."""
        return sum(map(len, self.responses))


class Peer(ABC):
    """Something that can roll out the subject's weights.

    Args:
        subject: the model in its engine.

    Attributes:
        name: as the table shows it.
        must_run: its failure ends the benchmark; another's is a line in the table.
        prepares: whether its first call after a switch does more than the next ones.
        extra_weight_bytes: bytes of weights held beyond those that train.
        held_bytes: memory held between rollouts, weights included.
    """

    name: ClassVar[str]
    must_run: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    extra_weight_bytes: int = 0
    held_bytes: int = 0

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @staticmethod
    def absent() -> str | None:
        """Why it cannot be measured here, or None where it can."""
        return None

    def too_slow(self, workload: Workload) -> str | None:
        """Why it is left out unless asked for, or None."""
        return None

    def enter(self) -> None:
        """Switch from training to inference."""
        self.subject.causal_lm.eval()

    def leave(self) -> None:
        """Switch from inference to training."""
        self.subject.causal_lm.train()

    @abstractmethod
    def generate(self, workload: Workload, seed: int) -> list[list[int]]:
        """The new tokens of each prompt, in the prompts' order; what follows an EOS does not count."""

    def sample(self, workload: Workload, seed: int) -> Sample:
        """Generate against the clock, on a random stream that leaves the surrounding one as it was."""
        devices = [self.subject.device] if self.subject.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            begin = now()
            rows = self.generate(workload, seed)
            return Sample(workload.until_eos(rows), now() - begin)


def why_not_importable(*names: str) -> str | None:
    """The first of the modules that cannot be imported, and why; None when all can."""
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # a broken installation is as absent as a missing one, and says so
            return f"'import {name}' fails: {type(error).__name__}: {error}".splitlines()[0]
    return None


def pad_prompts(workload: Workload, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left: ``[batch, time]`` long ids, and the mask of the same type."""
    from lightning_hybrid.rollout import pad_left

    tokens, mask = pad_left(workload.prompts, workload.pad_id, device)
    return tokens, mask.long()


def hf_sampling(workload: Workload) -> GenerationConfig:
    """The workload in Transformers' words; what it leaves open would be filled from the model's own settings."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=workload.max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(workload.eos_ids),
        pad_token_id=workload.pad_id,
    )
