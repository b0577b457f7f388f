"""What a run has come to: learning curves, samples before and after, and one page that shows both."""

from lightning_hybrid.report.comparison import draw_comparison
from lightning_hybrid.report.curves import draw_curves
from lightning_hybrid.report.metrics import Metrics, read_metrics
from lightning_hybrid.report.page import Comparison, write_report
from lightning_hybrid.report.run_page import report_run

__all__ = ["Comparison", "Metrics", "draw_comparison", "draw_curves", "read_metrics", "report_run", "write_report"]
