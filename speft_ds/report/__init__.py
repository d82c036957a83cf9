"""What runs came to: a pure function of their folders."""

from speft_ds.report.build import write_report
from speft_ds.report.compare import write_comparison
from speft_ds.report.summary import print_summary, summary

__all__ = ["print_summary", "summary", "write_comparison", "write_report"]
