"""What happens beside training: progress, samples, history, checkpoints, interruptions, export."""

from lightning_hybrid.callbacks.checkpoints import Checkpoints
from lightning_hybrid.callbacks.ema import EMA
from lightning_hybrid.callbacks.export import HFExport
from lightning_hybrid.callbacks.history import History, MetricsEvents, MetricsFile
from lightning_hybrid.callbacks.interruption import Interrupted, StopOnSignal
from lightning_hybrid.callbacks.progress import PhaseProgressBar
from lightning_hybrid.callbacks.samples import SampleLog

__all__ = [
    "EMA",
    "Checkpoints",
    "HFExport",
    "History",
    "Interrupted",
    "MetricsEvents",
    "MetricsFile",
    "PhaseProgressBar",
    "SampleLog",
    "StopOnSignal",
]
