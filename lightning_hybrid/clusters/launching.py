"""What the command does: reserve the workers, send them their order, and start them again where one was lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from lightning_hybrid.callbacks.interruption import INTERRUPTED
from lightning_hybrid.clusters.beginning import Mark
from lightning_hybrid.clusters.connection import connected, has_gpus, refuse_what_does_not_fit, say
from lightning_hybrid.clusters.demand import ranks_share, shares_of
from lightning_hybrid.clusters.lines import without_prefixes
from lightning_hybrid.clusters.meeting import config_of_meeting
from lightning_hybrid.clusters.order import Order, shown_variables
from lightning_hybrid.clusters.stopping import Stop
from lightning_hybrid.clusters.worker import task_of
from lightning_hybrid.config import Run
from lightning_hybrid.environ import variables
from lightning_hybrid.errors import ConfigError, LightningHybridError, RankLostError
from lightning_hybrid.serving.background import in_background

RunT = TypeVar("RunT", bound=Run)
LONGEST = 2000  # characters of what is said of one worker's end


def launch(run: RunT, job: Callable[[RunT], object]) -> None:
    """Call ``job(run)`` on every rank, in workers of Ray Train; a lost one has all of them started again.

    They then go on from the newest checkpoint that they have written. An error of ours ends the run at once; any other
    counts as a loss.

    Args:
        run: with ``launcher.name = "ray"``.
        job: a recipe's function; one of a script is sent to the workers as it is.

    Raises:
        ConfigError: if Ray is not installed, or the cluster is not there or too small.
        LightningHybridError: what a rank raised.
        RankLostError: after more losses than ``launcher.max_failures``.
        SystemExit: after SIGTERM, SIGUSR1 or Ctrl-C, when the ranks have ended in order as they do without Ray, or at
            once where they had not begun or it was the second.
    """
    run_id = uuid4().hex[:12]
    with without_prefixes(), variables(_FOR_RAY | _timeouts(run)), connected(run.launcher) as ray:
        run = _on_known_hardware(run, ray)
        refuse_what_does_not_fit(ray, shares_of(run))
        _say_what_a_loss_costs(run)
        stop = Stop(Mark.of(run, run_id))
        try:
            with stop.watching():
                _start_until_done(run, Order.of(job, run, run_id), stop)
        except KeyboardInterrupt:
            say("ended at once; ckpt_path=last goes on from the newest checkpoint, if there is one")
            raise SystemExit(INTERRUPTED) from None
        finally:
            _remove_traces(run, run_id, stop)
    if stop.exit_code is not None:
        raise SystemExit(stop.exit_code)


def _remove_traces(run: Run, run_id: str, stop: Stop) -> None:
    with suppress(OSError):  # this host need not see the folder
        stop.forget()
        Mark.of(run, run_id).path.unlink(missing_ok=True)
    shutil.rmtree(Path(run.output_dir) / _folder_of_ray(run_id), ignore_errors=True)


def _folder_of_ray(run_id: str) -> str:
    return f".ray-{run_id}"


def _start_until_done(run: Run, order: Order, stop: Stop) -> None:
    lost = 0
    while (end := _end_of(run, order, stop)) is not None:
        lost += 1
        if stop.exit_code is not None:
            raise RankLostError(f"workers were lost while they were to stop: {end}; ckpt_path=last goes on")
        if lost > run.launcher.max_failures:
            raise RankLostError(
                f"workers were lost {lost} times, more often than launcher.max_failures={run.launcher.max_failures}: "
                f"{end}. Checkpoints are in '{Path(run.output_dir) / 'checkpoints'}': ckpt_path=last goes on from them"
            )
        say(f"{end}; starting the workers again (loss {lost} of at most {run.launcher.max_failures})")


def _end_of(run: Run, order: Order, stop: Stop) -> str | None:
    """Have Ray Train start the workers; None where all came to their end, otherwise how some were lost.

    Raises:
        LightningHybridError: one of ours, on which starting again would end in the same way.
    """
    from ray.train import TrainingFailedError

    try:
        _beside(_trainer_of(run, order).fit, stop)
    except TrainingFailedError as error:
        failures: Mapping[int, Exception] | None = getattr(error, "worker_failures", None)
        if failures is None:
            raise _unstarted(run, error) from error
        _raise_ours(failures)
        return "; ".join(f"rank {rank}: {_how(failure)}" for rank, failure in sorted(failures.items()))
    return None


def _beside(call: Callable[[], object], stop: Stop) -> None:
    """Call and wait, and pass signals on. In the main thread Ray would answer them, and end this process at once."""
    running = in_background(call)
    while not running.done():
        wait([running], 0.5)
        stop.pass_on()
    running.result()


def _trainer_of(run: Run, order: Order) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    train: Any = ray.train  # its annotations are those of an older interface
    share = ranks_share(run)
    return TorchTrainer(
        task_of(order),
        torch_config=config_of_meeting(),
        scaling_config=train.ScalingConfig(
            num_workers=share.count,
            use_gpu=share.gpus > 0,
            resources_per_worker=share.resources(),
            placement_strategy=run.launcher.placement,
        ),
        run_config=train.RunConfig(
            name=_folder_of_ray(order.run_id),
            storage_path=str(Path(run.output_dir).absolute()),
            # Losses are counted here, where they are told from errors that would come again.
            failure_config=train.FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": shown_variables()},
            logging_config=train.LoggingConfig(log_level="CRITICAL"),  # what failed is said here
        ),
    )


def _raise_ours(failures: Mapping[int, Exception]) -> None:
    """Raise an error of ours that a rank ended with, unless it is the loss of another rank."""
    for failure in failures.values():
        for error in (failure, *vars(failure).values()):
            if isinstance(error, LightningHybridError) and not isinstance(error, RankLostError):
                raise error


def _how(failure: Exception) -> str:
    """The last line of what Ray or a traceback says, without Ray's advice."""
    said = (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
    return said.partition(" Some common causes")[0][-LONGEST:]


def _unstarted(run: Run, error: Exception) -> ConfigError:
    launcher, share = run.launcher, ranks_share(run)
    return ConfigError(
        f"Ray could not start {share.count} ranks with {share.cpus:g} CPU and {share.gpus:g} GPU each, "
        f"{launcher.placement}, within launcher.startup_timeout_seconds={launcher.startup_timeout_seconds:g}: {error}"
    )


def _on_known_hardware(run: RunT, ray: Any) -> RunT:
    """``trainer.accelerator=auto``, decided by the cluster: the host of the command may have other hardware."""
    if run.trainer.accelerator != "auto":
        return run
    gpus = run.launcher.gpus_per_rank
    wanted = has_gpus(ray) if gpus is None else gpus > 0
    trainer = run.trainer.model_copy(update={"accelerator": "gpu" if wanted else "cpu"})
    return run.model_copy(update={"trainer": trainer})


def _say_what_a_loss_costs(run: Run) -> None:
    if not run.launcher.max_failures:
        return
    if not run.trainer.enable_checkpointing:
        say(
            "no checkpoints are written (trainer.enable_checkpointing=false): after the loss of a worker the run "
            "starts from its beginning"
        )
    elif run.callbacks.checkpoint_every_n_steps is None:
        say(
            "checkpoints are written at the end of epochs only: after the loss of a worker the run goes on from there. "
            "callbacks.checkpoint_every_n_steps=N writes more of them"
        )


# Ray Train would send what ranks print through its own log, and leave the folder of the command.
_FOR_RAY = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}


def _timeouts(run: Run) -> dict[str, str]:
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(run.launcher.startup_timeout_seconds)}
