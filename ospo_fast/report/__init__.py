"""The report: one self-contained HTML page about a run, with an inspector of its preference pairs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ospo_fast.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    # The page needs Jinja. `overlay` is in this package, too, and needs Pillow alone.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ospo_fast.report.page import write_report

    return write_report
