"""What the documents take from the code when they are built, so that they can't drift from it.

A page holds `<!-- from the code: NAME -->`; the build puts the text of the function NAME of this module in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

_PLACE = re.compile(r"^<!-- from the code: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, /, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return _PLACE.sub(lambda found: PARTS[found[1]](), markdown)


def commands() -> str:
    """The help of every command, as cyclopts writes it."""
    from prefect_webapi.cli import app

    page = app.generate_docs(output_format="markdown", heading_level=1)
    return page[
        page.index("\n## prefect-webapi ") :
    ]  # the page has a title and a table of contents


def settings() -> str:
    """A table of the settings of a process."""
    from prefect_webapi.settings import WebApiSettings

    rows = ["| Setting | Default | Meaning |", "|---|---|---|"]
    for name, field in WebApiSettings.model_fields.items():
        default = _told(name, field.get_default(call_default_factory=False))
        rows.append(f"| `{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def _told(name: str, default: Any) -> str:
    from prefect_webapi.contract.duration import format_duration

    if name == "ledger_url":
        return "`webapi.db` in Prefect's home"
    match default:
        case None | frozenset():
            return "none"
        case bool():
            return f"`{default}`".lower()
        case timedelta():
            return f"`{format_duration(default)}`"
        case _:
            return f"`{default}`"


PARTS: Mapping[str, Callable[[], str]] = {"commands": commands, "settings": settings}
