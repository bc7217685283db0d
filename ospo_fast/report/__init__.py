"""The report: one self-contained HTML page about a run, with an inspector of its preference pairs."""

from ospo_fast.report.page import write_report

__all__ = ["write_report"]
