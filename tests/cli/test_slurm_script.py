"""The job script for SLURM starts the command as it was given, as large as the job is."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.processes import ROOT, run


def test_the_trainer_is_told_the_size_of_the_job(tmp_path: Path) -> None:
    """There is no SLURM here: in place of srun stands a script that shows what it was given."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    job["SLURM_CPUS_PER_TASK"] = "8"
    ended = run(["bash", ROOT / "recipes" / "slurm.sbatch", "ppo", "output_dir=a b"], tmp_path, 30, **job)
    given = ["--kill-on-bad-exit=1", "--cpus-per-task=8", "lightning-hybrid", "ppo", "output_dir=a b"]
    assert ended.out.splitlines() == [*given, "trainer.num_nodes=2", "trainer.devices=4"], ended
