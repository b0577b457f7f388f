"""PPO and its relatives: a policy learns to write what a reward prefers, held near its start by a KL penalty.

``algorithm=ppo`` trains a critic; ``grpo``, ``dr_grpo``, ``rloo``, ``reinforce_plus_plus`` (and ``_baseline``),
``gspo``, ``dapo`` and ``cispo`` need none. One step of the Trainer is one iteration: rollout, reward, experience,
update. Out comes a Hugging Face folder, ``<output_dir>/model``, and sampled responses in ``samples.jsonl`` beside it.
With held-out prompts (``data.validation_path`` or ``data.validation_fraction``) the policy is evaluated on them every
``trainer.val_check_interval`` iterations: ``val/...`` in the log, and responses in ``<output_dir>/evaluation.jsonl``.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_hybrid.assemble import (
    data_arguments,
    make_policy,
    make_tokenizer,
    make_trainer,
    reference_of,
    resolve_checkpoint,
)
from lightning_hybrid.callbacks import EvaluationLog, HFExport, SampleLog
from lightning_hybrid.config import PPORun
from lightning_hybrid.config.run import recipe_main
from lightning_hybrid.data import InstructionDataModule, PromptDataModule
from lightning_hybrid.modules import PPOModule
from lightning_hybrid.rewards import reward_from


def train_ppo(run: PPORun, stage: str = "ppo") -> Path:
    """Train and return the folder of the policy."""
    L.seed_everything(run.seed, verbose=False)
    tokenizer = make_tokenizer(run.model)
    policy = make_policy(run.model, tokenizer, run.algorithm.logprob_chunk)
    arguments = data_arguments(run.data, tokenizer, policy)
    data = PromptDataModule(**arguments, max_new_tokens=run.rollout.max_new_tokens)
    module = PPOModule(
        policy,
        reward=reward_from(run.reward, run.roles.reward),
        config=run.algorithm,
        rollout=run.rollout,
        tokenizer=tokenizer,
        critic=run.model.critic,
        reference=reference_of(run),
        seed=run.seed,
        ptx=None if run.ptx.path is None else InstructionDataModule(**data_arguments(run.ptx, tokenizer, policy)),
        roles=run.roles,
        critic_adapter=run.model.critic_adapter,
        evaluation=run.evaluation,
    )
    folder = Path(run.output_dir) / "model"
    samples = SampleLog(Path(run.output_dir) / "samples.jsonl")
    held_out = EvaluationLog(Path(run.output_dir) / "evaluation.jsonl")
    trainer = make_trainer(run, stage, HFExport(folder, "actor", tokenizer), [samples, held_out])
    trainer.fit(module, datamodule=data, ckpt_path=resolve_checkpoint(run))
    return folder


if __name__ == "__main__":
    recipe_main("ppo", PPORun, train_ppo)
