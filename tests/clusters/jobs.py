"""Small jobs for workers of Ray, as a program: `jobs.py JOB FOLDER [key=value ...]`; ranks write `rank<n>.json`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_hybrid.config import SFTRun
from lightning_hybrid.config.run import compose_run
from lightning_hybrid.engines.agreement import of_all_ranks, own_rank
from lightning_hybrid.errors import DataError, LightningHybridError

NEEDED = ["model.path=a-model", "data.path=rows.jsonl", "trainer=cpu", "trainer.devices=2", "launcher=ray"]


def write(run: SFTRun, **values: Any) -> None:
    file = Path(run.output_dir) / f"rank{own_rank()}.json"
    earlier = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*earlier, values]))


def tell(run: SFTRun) -> None:
    """Where a rank is, and what it sees."""
    import beside_the_command  # type: ignore[import-not-found]
    import lightning as L
    import ray

    from lightning_hybrid.assemble import make_trainer
    from lightning_hybrid.callbacks import HFExport

    trainer = make_trainer(run, "test", HFExport(Path(run.output_dir), "policy", None))  # type: ignore[arg-type]
    assert isinstance(trainer, L.Trainer)
    write(
        run,
        node=ray.get_runtime_context().get_node_id(),
        folder=str(Path.cwd()),
        word=beside_the_command.WORD,
        variables={name: os.environ.get(name) for name in ("PLAIN_WORD", "SECRET_WORD", "DS_ACCELERATOR")},
        ranks=of_all_ranks(own_rank()),
        trainer=[trainer.world_size, trainer.global_rank, trainer.num_devices, trainer.num_nodes],
        sampler=trainer.strategy.distributed_sampler_kwargs,
        shown=dict(ray.get_runtime_context().runtime_env.get("env_vars", {})),
    )


def fail(run: SFTRun) -> None:
    """One rank finds a mistake of the user's; the other waits for it."""
    write(run)
    if own_rank() == 1:
        raise DataError("row 7 of rows.jsonl has no text")
    of_all_ranks("here")


def break_down(run: SFTRun) -> None:
    """Rank 1 is killed whenever it starts."""
    write(run, checkpoint=run.ckpt_path)
    of_all_ranks("here")
    if own_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    of_all_ranks("never")


def serve(run: SFTRun) -> None:
    """Rank 0 starts servers, and asks them."""
    from lightning_hybrid.serving import ServerClient, ServerSpec, start_servers

    if own_rank() == 0:
        specs = [ServerSpec(f"echo {i}", "echo_server", {"word": f"word {i}"}) for i in range(2)]
        servers = start_servers(specs)
        clients = [
            ServerClient(server.url, server.token, spec.what, 60.0) for server, spec in zip(servers, specs, strict=True)
        ]
        answers = [client.call("echo", text="hello") for client in clients]
        running = [server.exited() for server in servers]
        for server in servers:
            server.close()
        try:
            clients[0].call("echo", text="hello")
            after = "it still answers"
        except LightningHybridError as error:
            after = str(error)
        write(run, answers=answers, running=running, urls=[server.url for server in servers], after=after)
        broken = [ServerSpec("broken", "echo_server", {"fail": "no such model"})]
        try:
            start_servers(broken)
        except LightningHybridError as error:
            write(run, broken=str(error))
    of_all_ranks("done")


JOBS: dict[str, Callable[[SFTRun], None]] = {job.__name__: job for job in (tell, fail, break_down, serve)}


def main(job: str, folder: str, *changes: str) -> None:
    from lightning_hybrid.clusters import launch

    run = compose_run("sft", SFTRun, [*NEEDED, f"output_dir={folder}", *changes])
    try:
        launch(run, JOBS[job])
    except LightningHybridError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(2)
    print("came to its end")


if __name__ == "__main__":
    main(*sys.argv[1:])
