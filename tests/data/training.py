"""A little training on several ranks that writes down what each of them was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAVED_AT = 7


def train(paths: str | list[str], arguments: dict[str, Any], out: str, name: str, steps: int, ckpt: str | None) -> None:
    """Train on this rank, keep a checkpoint of step 7, and write the token ids of each batch with their epoch down."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_hybrid.data import InstructionDataModule
    from lightning_hybrid.data.task import build_tokenizer
    from lightning_hybrid.modules import SFTModule
    from tests.helpers import quiet_trainer, tiny_policy

    given: list[tuple[int, list[list[int]]]] = []

    class Watched(SFTModule):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
            given.append((self.current_epoch, rows_of(batch)))
            return super().training_step(batch, batch_idx)

    module = Watched(tiny_policy(max_position_embeddings=512))
    data = InstructionDataModule(paths, tokenizer=build_tokenizer(), batch_size=4, **arguments)
    keep = ModelCheckpoint(out, filename="saved-{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)
    trainer = quiet_trainer(
        "hybrid_deepspeed",
        devices=2,
        max_steps=steps,
        use_distributed_sampler=True,
        enable_checkpointing=ckpt is None,
        callbacks=[keep] if ckpt is None else [],
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    Path(out, f"{name}-{trainer.global_rank}.json").write_text(json.dumps(given))


def rows_of(batch: dict[str, Any]) -> list[list[int]]:
    """Token ids of each row of a batch, without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def train_and_resume(run_ranks: Any, paths: str | list[str], out: Path, steps: int, **arguments: Any) -> list[Any]:
    """Train on two ranks, and again from the checkpoint in the middle; what each rank was given in all steps.

    Fails where the run that goes on is given anything else than the first one after the same step.
    """
    run_ranks(train, 2, paths, arguments, str(out), "whole", steps, None, timeout=300)
    run_ranks(
        train, 2, paths, arguments, str(out), "rest", steps, str(out / f"saved-step={SAVED_AT}.ckpt"), timeout=300
    )
    whole, rest = ([json.loads((out / f"{name}-{r}.json").read_text()) for r in (0, 1)] for name in ("whole", "rest"))
    assert rest == [given[SAVED_AT:] for given in whole]
    return whole
