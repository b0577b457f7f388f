"""The body of a cell: PPO through Lightning's Trainer with one backend, measured from inside its ranks.

Run as ``python -m peers.inside_ppo '<cell as JSON>' <file for the figures>``; each rank is such a process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_hybrid.config import PPOConfig, RolloutConfig, VLLMConfig
from lightning_hybrid.data import PromptDataModule
from lightning_hybrid.engines import prepare_deepspeed
from lightning_hybrid.modules import PPOModule
from lightning_hybrid.strategy import HybridDeepSpeedStrategy
from peers.cell import Cell
from peers.measure import Resident, cache_bytes_per_token
from peers.pushes import Pushes
from peers.subject import Source, device
from peers.workload import Workload

LEARNING_RATE = 1e-6  # so low that responses stay as long as they are
_SWITCHES = {"push": "sync", "wake": "wake", "sleep": "sleep"}
PAGE = 32  # tokens of a page of vLLM's cache on a CPU, and more than of one on CUDA


class Iterations(L.Callback):
    """What each iteration took and logged.

    Args:
        rows: responses of one, over all ranks.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._taken: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Keep the figures of one; the engine's are those of the one before, which is then whole."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._taken:
            self._taken[-1]["generate"] = logged["engine/generate_seconds"]
        self._taken.append(
            {
                "tokens": round(logged["rollout/response_length"] * self._rows),
                "rollout": logged["seconds/rollout"],
                "gap_mean": logged["rollout/logprob_gap_mean"],
                "gap_max": logged["rollout/logprob_gap_max"],
                **_switches(module.backend),
            }
        )

    @property
    def taken(self) -> list[dict[str, float]]:
        """Those that count: the first warms up, and of the last the engine's seconds are not known."""
        return self._taken[1:-1]


def _switches(backend: Any) -> dict[str, float]:
    """Seconds of vLLM's push, wakes and sleep in the last rollout; other backends have none."""
    return {name: backend.figures.get(f"{logged}_seconds", 0.0) for name, logged in _SWITCHES.items()}


def measure(cell: Cell) -> dict[str, Any]:
    """Train for some iterations.

    Returns:
        ``iterations``: of each that counts the ``tokens`` of all ranks; seconds of the whole ``rollout`` and, of them,
        to ``generate``, ``push``, ``wake`` and ``sleep``; ``gap_mean`` and ``gap_max`` to the training forward, nats.
        ``resident``: bytes of this rank in each phase at most. ``libraries``: bytes that were resident before there was
        a model. ``pushes``: see :class:`~peers.pushes.Pushes`. ``parameters``: of the policy. ``load``: of the machine
        over the last minute, when it ended.
    """
    torch.set_num_threads(cell.threads)
    _load_libraries(cell)
    resident = Resident()
    libraries = resident.now()
    source = Source(cell.path, cell.shape, cell.prompt_tokens)
    module, workload = _module(cell, source)
    module.phases.listeners.append(resident.enter)
    iterations, pushes = Iterations(cell.rows), Pushes(cell.pushes)
    parameters = sum(parameter.numel() for parameter in module.actor.parameters())
    with resident.sampling(), tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(cell, [_Settle(resident), iterations, *([pushes] if cell.backend == "vllm" else [])])
        trainer.fit(module, datamodule=_data(cell, workload, Path(folder)))
    return {
        "iterations": iterations.taken,
        "resident": resident.bytes,
        "libraries": libraries,
        "pushes": pushes.taken,
        "parameters": parameters,
        "load": os.getloadavg()[0],
    }


def _load_libraries(cell: Cell) -> None:
    """What would be imported later anyway, and belongs to no model."""
    prepare_deepspeed(device().type)
    import_module("deepspeed")
    import_module("transformers.modeling_utils")
    if cell.backend == "vllm":
        import_module("lightning_hybrid.rollout.vllm.startup").import_vllm()


class _Settle(L.Callback):
    """Count the memory of the last iteration alone: optimizers make their states in the first."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident

    def on_train_batch_start(self, *_: Any) -> None:
        gc.collect()
        self._resident.bytes.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self._resident.enter(None)


def _module(cell: Cell, source: Source) -> tuple[PPOModule, Workload]:
    policy = source.policy().cpu()
    workload = source.workload(cell.rows, cell.max_new_tokens, policy)
    workload.tell(policy.model)
    longest = max(map(len, workload.prompts)) + cell.max_new_tokens
    pages = cell.rows // cell.ranks * -(-longest // PAGE)
    cache = pages * PAGE * cache_bytes_per_token(policy.model)
    module = PPOModule(
        policy,
        reward=lambda prompts, responses: [len(response) % 7 / 7 for response in responses],
        config=PPOConfig(epochs=1, micro_batch_size=16, actor_lr=LEARNING_RATE, critic_lr=LEARNING_RATE),
        rollout=RolloutConfig(
            backend=cell.backend,  # type: ignore[arg-type]
            max_new_tokens=cell.max_new_tokens,
            vllm=VLLMConfig(kv_cache_gib=cache / 2**30),  # for all rows at once, which is what native takes
        ),
        tokenizer=source.tokenizer(),
        seed=0,
    )
    return module, workload


def _trainer(cell: Cell, callbacks: list[L.Callback]) -> L.Trainer:
    on_cuda = torch.cuda.is_available()
    return L.Trainer(
        strategy=HybridDeepSpeedStrategy(stage=cell.stage),
        accelerator="cuda" if on_cuda else "cpu",
        precision="bf16-mixed" if on_cuda else "32-true",
        devices=cell.ranks,
        max_steps=cell.iterations + 2,  # the first warms up; an engine's seconds are logged one iteration later
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _data(cell: Cell, workload: Workload, folder: Path) -> PromptDataModule:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in workload.texts))
    return PromptDataModule(file, batch_size=cell.rows // cell.ranks)


def main() -> None:
    """Measure one cell; rank 0 writes the figures."""
    settings = json.loads(sys.argv[1])
    cell = Cell(**settings | {"prompt_tokens": tuple(settings["prompt_tokens"])})
    figures = measure(cell)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        Path(sys.argv[2]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
