"""What a merge did to each matrix: records, the file that holds them, and the table of it."""

from mergekit_monosoup.report.journal import PLANNING_ONLY, Journal
from mergekit_monosoup.report.output import OLD, check_path, replace
from mergekit_monosoup.report.record import (
    LEFT_OUT,
    REALISED_WARNING,
    Record,
    by_depth,
    rank_share,
    read,
)
from mergekit_monosoup.report.table import SORTS, Row, layer_group, sort_rows, summarise, table
from mergekit_monosoup.report.tally import Tally

__all__ = [
    "LEFT_OUT",
    "OLD",
    "PLANNING_ONLY",
    "REALISED_WARNING",
    "SORTS",
    "Journal",
    "Record",
    "Row",
    "Tally",
    "by_depth",
    "check_path",
    "layer_group",
    "rank_share",
    "read",
    "replace",
    "sort_rows",
    "summarise",
    "table",
]
