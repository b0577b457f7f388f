"""TRL's GRPO: its rollout of the weights that train, and its whole step on a copy of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from peers.base import Peer, Sample, why_not_importable
from peers.measure import now
from peers.steps import Step, StepRun
from peers.subject import Source
from peers.workload import Workload

_PER_PROMPT = 2  # the fewest generations per prompt that GRPO takes
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class _Sampled(Exception):
    """Raised by the reward of a rollout, which ends the step there."""


class GRPORollout(Peer):
    """From the start of a GRPO step until its reward function is called; half of the prompts, two responses each."""

    name = "TRL GRPO rollout"

    @staticmethod
    def absent() -> str | None:
        """Why it cannot be measured here, or None where it can."""
        return why_not_importable("trl", "datasets", "trl.trainer.grpo_trainer")

    def sample(self, workload: Workload, seed: int) -> Sample:
        """Generate; the trainer is built before the clock starts."""
        sampled: list[Any] = []

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            sampled.extend([now(), completion_ids])
            raise _Sampled

        begun: list[float] = []
        trainer = _trainer(self.subject.causal_lm, self.subject.source, workload, _PER_PROMPT, 1, seed, reward)
        trainer.add_callback(_on_step_begin(lambda: begun.append(now())))
        try:
            trainer.train()
        except _Sampled:
            return Sample(workload.until_eos(sampled[1]), sampled[0] - begun[0])
        raise RuntimeError("TRL's trainer ended without calling the reward function")

    def generate(self, workload: Workload, seed: int) -> list[list[int]]:
        """The new tokens of each row."""
        return self.sample(workload, seed).responses


class GRPOSteps(StepRun):
    """A GRPO step: rollout, reward, one update; no reference model, as by TRL's default."""

    name = "TRL GRPO step"

    absent = staticmethod(GRPORollout.absent)

    def run(self, source: Source, workload: Workload, per_prompt: int, steps: int, seed: int) -> list[Step]:
        """Train a fresh copy of the weights for some steps."""
        begun: list[float] = []
        rollouts: list[float] = []
        tokens: list[int] = []

        def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            rollouts.append(now() - begun[-1])
            tokens.append(sum(map(len, completion_ids)))
            return self.reward(completions)

        # One step more than is timed: a step ends where the next begins.
        trainer = _trainer(source.policy().model, source, workload, per_prompt, steps + 1, seed, reward)
        trainer.add_callback(_on_step_begin(lambda: begun.append(now())))
        trainer.train()
        return self.between(begun, rollouts, tokens)


def _trainer(
    model: Any, source: Source, workload: Workload, per_prompt: int, steps: int, seed: int, reward: Callable[..., Any]
) -> Any:
    """A GRPO trainer of these weights: all rows in one batch, one optimizer step per rollout."""
    from transformers import PrinterCallback

    datasets, trl = import_module("datasets"), import_module("trl")
    rows = len(workload.prompts)
    workload.tell(model)
    with _without_launch_variables(), tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=model.device.type == "cpu",
            bf16=False,  # the weights are in the dtype that they train in
            gradient_checkpointing=False,
            per_device_train_batch_size=rows,
            num_generations=per_prompt,
            max_completion_length=workload.max_new_tokens,
            max_steps=steps,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            shuffle_dataset=False,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            log_level="error",
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": list(workload.texts[: rows // per_prompt])}),
            processing_class=source.tokenizer(),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _on_step_begin(act: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class OnStepBegin(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            act()

    return OnStepBegin()


@contextmanager
def _without_launch_variables() -> Iterator[None]:
    """Accelerate would take the variables that DeepSpeed reads for a launch of several processes."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCH if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
