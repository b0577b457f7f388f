"""What happens beside training: progress, samples, export."""

from lightning_hybrid.callbacks.export import HFExport
from lightning_hybrid.callbacks.progress import PhaseProgressBar
from lightning_hybrid.callbacks.samples import SampleLog

__all__ = ["HFExport", "PhaseProgressBar", "SampleLog"]
