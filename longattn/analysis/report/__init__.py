"""Reports: a study's page, its summary in the terminal, its JSON document, and the comparison of two studies."""

from longattn.analysis.report.page import compare_document, compare_page, compare_summary, document, page, summary
from longattn.analysis.report.sentences import UNRESOLVED, ranking, separate
from longattn.analysis.report.study import Study, load

__all__ = [
    "UNRESOLVED",
    "Study",
    "compare_document",
    "compare_page",
    "compare_summary",
    "document",
    "load",
    "page",
    "ranking",
    "separate",
    "summary",
]
