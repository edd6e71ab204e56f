"""Reports of a study: HTML page, terminal summary and JSON document, and the same for two studies compared."""

from longattn.study.report.load import Study, load
from longattn.study.report.page import compare_document, compare_page, compare_summary, document, page, summary
from longattn.study.report.sentences import UNRESOLVED, separate

__all__ = [
    "UNRESOLVED",
    "Study",
    "compare_document",
    "compare_page",
    "compare_summary",
    "document",
    "load",
    "page",
    "separate",
    "summary",
]
