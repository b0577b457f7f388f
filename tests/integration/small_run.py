"""A recipe cut down to seconds, as a program: `small_run.py RECIPE FOLDER [key=value ...]`.

What is to go wrong is asked for in the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from lightning_hybrid.data.task import TaskSizes, task_reward, write_task

STEPS = {"ppo": 6, "sft": 10}


def slow_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """The task's, with time to send a signal: PAUSE_FOLDER gets a file when it begins."""
    if folder := os.environ.get("PAUSE_FOLDER"):
        calls = len(list(Path(folder).glob(f"{os.getpid()}-*")))
        (Path(folder) / f"{os.getpid()}-{calls}").touch()
        time.sleep(float(os.environ.get("PAUSE_SECONDS", "1.5")))
    if os.environ.get("FAIL_REWARD"):
        raise RuntimeError("the judge is away")
    return task_reward(prompts, responses)


def overrides(recipe: str, folder: Path) -> list[str]:
    common = [f"output_dir={folder}", f"model.tokenizer={folder.parent}/task/tokenizer", "model=tiny_llama"]
    common += ["trainer=cpu", "strategy=hybrid_deepspeed_stage_1", f"trainer.max_steps={STEPS[recipe]}"]
    common += ["trainer.enable_progress_bar=false", "callbacks.checkpoint_every_n_steps=2"]
    if recipe == "sft":
        data = [f"data.path={folder.parent}/task/sft.jsonl", "data.batch_size=16", "data.limit=64"]
        data += ["data.validation_fraction=0.25", "trainer.val_check_interval=2", "trainer.max_epochs=null"]
        return common + data
    data = [f"data.path={folder.parent}/task/prompts.jsonl", "data.batch_size=8", "data.limit=32"]
    data += ["algorithm.minibatch_size=4", "algorithm.epochs=1", "rollout.max_new_tokens=8"]
    return common + data + [f"reward.function={Path(__file__).stem}:slow_reward", "trainer.limit_val_batches=0"]


def kill_in_step(step: int) -> None:
    """Let this process be killed when the batch after `step` steps has been trained."""
    import lightning as L

    from lightning_hybrid import assemble

    class Killer(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    standard = assemble._standard_callbacks
    assemble._standard_callbacks = lambda *arguments: [*standard(*arguments), Killer()]


def main(recipe: str, folder: str, *changes: str) -> None:
    from lightning_hybrid.callbacks import SampleLog
    from lightning_hybrid.config import PPORun, SFTRun
    from lightning_hybrid.config.run import compose_run
    from lightning_hybrid.paths import recipes_dir

    sys.path.insert(0, str(recipes_dir()))
    if step := os.environ.get("KILL_IN_STEP"):
        kill_in_step(int(step))
    SampleLog.__init__.__defaults__ = (1, 4)  # every iteration
    run = compose_run(recipe, {"ppo": PPORun, "sft": SFTRun}[recipe], [*overrides(recipe, Path(folder)), *changes])
    if recipe == "ppo":
        from ppo import train_ppo

        train_ppo(run)
    else:
        from sft import train_sft

        train_sft(run)
    print("came to its end", flush=True)


def prepare(folder: Path) -> None:
    write_task(folder / "task", 0, TaskSizes())


if __name__ == "__main__":
    main(*sys.argv[1:])
