"""A run as one web page that needs nothing but itself, and the records it is made of."""

from whalefall.report.page import write_report
from whalefall.report.records import Sample, load_metrics, load_samples, save_samples
from whalefall.report.samples import write_samples

__all__ = [
    "Sample",
    "load_metrics",
    "load_samples",
    "save_samples",
    "write_report",
    "write_samples",
]
