"""What happens beside training: progress, samples, history, checkpoints, interruptions, export."""

from lightning_hybrid.callbacks.checkpoints import Checkpoints
from lightning_hybrid.callbacks.ema import EMA
from lightning_hybrid.callbacks.evaluations import EvaluationLog
from lightning_hybrid.callbacks.export import HFExport
from lightning_hybrid.callbacks.history import History, MetricsEvents, MetricsFile
from lightning_hybrid.callbacks.interruption import Interrupted, StopOnSignal
from lightning_hybrid.callbacks.live import LiveCurves
from lightning_hybrid.callbacks.progress import PhaseProgressBar
from lightning_hybrid.callbacks.rich_progress import RichPhaseBar
from lightning_hybrid.callbacks.samples import SampleLog
from lightning_hybrid.callbacks.weights_and_biases import make_wandb

__all__ = [
    "EMA",
    "Checkpoints",
    "EvaluationLog",
    "HFExport",
    "History",
    "Interrupted",
    "LiveCurves",
    "MetricsEvents",
    "MetricsFile",
    "PhaseProgressBar",
    "RichPhaseBar",
    "SampleLog",
    "StopOnSignal",
    "make_wandb",
]
