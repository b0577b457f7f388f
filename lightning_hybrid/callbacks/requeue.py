"""Ask SLURM to run the job again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping


def slurm_job(environment: Mapping[str, str] = os.environ) -> str:
    """The id by which SLURM requeues this job; for one of an array, that one alone."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return environment["SLURM_JOB_ID"] if array is None else f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"


def requeue() -> str:
    """Requeue this job.

    Returns:
        what happened, for the user.
    """
    job = slurm_job()
    command = f"scontrol requeue {job}"
    try:
        ended = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"could not run '{command}': {error}; give it by hand"
    if ended.returncode:
        return f"'{command}' failed with exit code {ended.returncode}: {ended.stderr.strip()}; give it by hand"
    return f"job {job} is in SLURM's queue again"
