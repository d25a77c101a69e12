"""What a merge did to each matrix: records, the file they are written to, and the table that people read."""

from mergekit_monosoup.report.record import (
    LOG,
    OLD,
    REALISED_WARNING,
    REHEARSAL,
    Journal,
    Record,
    Row,
    by_depth,
    check_path,
    layer_group,
    rank_share,
    read,
    start,
    summarise,
    table,
)

__all__ = [
    "LOG",
    "OLD",
    "REALISED_WARNING",
    "REHEARSAL",
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
