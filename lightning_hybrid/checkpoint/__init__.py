"""Checkpoints of a whole run: by parameter, in safetensors, complete or not there."""

from lightning_hybrid.checkpoint.differences import differences
from lightning_hybrid.checkpoint.engine_state import engine_state, merged_numbers, restore_engine
from lightning_hybrid.checkpoint.exchange import exchange_weights
from lightning_hybrid.checkpoint.folder import newest_complete, problems
from lightning_hybrid.checkpoint.frozen import (
    fingerprint,
    fingerprints,
    frozen_parameters,
    frozen_tensors,
    refuse_other_weights,
    restore_frozen,
)
from lightning_hybrid.checkpoint.loader import Position, ResumableLoader
from lightning_hybrid.checkpoint.restore import (
    LIGHTNING,
    Checkpoint,
    engine_folder,
    load_weights,
    rank_file,
    refuse_other_engines,
)
from lightning_hybrid.checkpoint.save import CheckpointWriter, Part, TensorFile
from lightning_hybrid.checkpoint.streams import capture_streams, restore_streams

__all__ = [
    "LIGHTNING",
    "Checkpoint",
    "CheckpointWriter",
    "Part",
    "Position",
    "ResumableLoader",
    "TensorFile",
    "capture_streams",
    "differences",
    "engine_folder",
    "engine_state",
    "exchange_weights",
    "fingerprint",
    "fingerprints",
    "frozen_parameters",
    "frozen_tensors",
    "load_weights",
    "merged_numbers",
    "newest_complete",
    "problems",
    "rank_file",
    "refuse_other_engines",
    "refuse_other_weights",
    "restore_engine",
    "restore_frozen",
    "restore_streams",
]
