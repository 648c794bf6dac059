"""Labels in BigQuery's alphabet."""

import re
from collections.abc import Mapping

LABELS = 64


def labels_of(wanted: Mapping[str, str]) -> dict[str, str]:
    """A letter first in names. The last ones stay where there are too many."""
    fit = {
        re.sub(r"^(?![a-z])", "l", _plain(name))[:63]: _plain(value)[:63]
        for name, value in wanted.items()
    }
    return dict(list(fit.items())[-LABELS:])


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "-", text.lower())
