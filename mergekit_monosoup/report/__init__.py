"""What a merge did to each matrix: records, the file that holds them, and the table of it."""

from mergekit_monosoup.report.journal import OLD, PLANNING_ONLY, Journal, check_path, start
from mergekit_monosoup.report.record import REALISED_WARNING, Record, by_depth, rank_share, read
from mergekit_monosoup.report.table import Row, layer_group, summarise, table

__all__ = [
    "OLD",
    "PLANNING_ONLY",
    "REALISED_WARNING",
    "Journal",
    "Record",
    "Row",
    "by_depth",
    "check_path",
    "layer_group",
    "rank_share",
    "read",
    "start",
    "summarise",
    "table",
]
