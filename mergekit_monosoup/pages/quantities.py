"""What a page draws by depth and has in its table: which numbers, under which names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """A number of each matrix that can be drawn.

    Attributes:
        key: of it in a row.
        label: as people read it.
        meaning: a sentence for those who do not know it.
        logarithmic: whether its values span powers of ten.
        low, high: what the axis reaches to at least; None: what the values reach to.
        with_key, with_label: of a second number that is drawn beside it, if there is one.
    """

    key: str
    label: str
    meaning: str
    logarithmic: bool = False
    low: float | None = None
    high: float | None = None
    with_key: str | None = None
    with_label: str | None = None


QUANTITIES = (
    Quantity(
        "lambda_high",
        "λ_high",
        "Shares of the strong directions (λ_high) and of the weak ones (λ_low) that are kept.",
        low=0,
        high=1,
        with_key="lambda_low",
        with_label="λ_low",
    ),
    Quantity(
        "gamma_median",
        "γ, median",
        "Factor of the directions of the merged update; above 1 they are amplified.",
        low=0,
        high=1,
    ),
    Quantity("k_share", "k / rank", "Share of the directions that count as strong.", low=0, high=1),
    Quantity(
        "rank_share",
        "effective rank / rank",
        "Share of the directions that the update uses in effect: 1 where all are equally strong.",
        low=0,
        high=1,
    ),
    Quantity(
        "rel_update",
        "‖ΔW‖ / ‖W0‖",
        "Size of the update, relative to the pretrained weight.",
        logarithmic=True,
    ),
    Quantity("rel_edit", "edit / ‖ΔW‖", "Size of the edit, relative to the update.", low=0, high=1),
    Quantity("edit_norm", "edit norm", "Size of the edit, ‖W − W1‖.", logarithmic=True),
    Quantity(
        "realised",
        "realised",
        "Share of the intended edit that survives rounding to the dtype.",
        low=0,
        high=1,
    ),
    Quantity("seconds", "seconds", "Time that was spent on the matrix.", low=0),
)

# The columns of the table: key, header, digits after the point (None: as many as tell something).
COLUMNS = (
    ("name", "matrix", None),
    ("at", "layer", None),
    ("kind", "projection", None),
    ("action", "action", None),
    ("k_share", "k / rank", 3),
    ("rank_share", "e. rank / rank", 3),
    ("P_k", "P_k", 3),
    ("lambda_high", "λ_high", 3),
    ("lambda_low", "λ_low", 3),
    ("gamma_median", "γ, median", 3),
    ("gamma_max", "γ, max", 3),
    ("rel_update", "‖ΔW‖ / ‖W0‖", None),
    ("rel_edit", "edit / ‖ΔW‖", 3),
    ("realised", "realised", 3),
    ("seconds", "seconds", 3),
)


def present(files: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the quantities and columns of which a report has a value, ready for JSON."""
    found = {
        key
        for file in files
        for number, key in enumerate(file["columns"])
        if any(row[number] not in (None, "") for row in file["rows"])
    }
    return {
        "quantities": [asdict(q) for q in QUANTITIES if q.key in found],
        "headers": [list(column) for column in COLUMNS if column[0] in found],
    }
