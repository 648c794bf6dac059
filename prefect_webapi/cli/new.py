"""`prefect-webapi new plugin`: a package of its own, green at once, with marks where to change it.

The folder `template/` beside this module is a working plugin for a service named Acme; only names are replaced.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prefect_webapi.contract.errors import ConfigurationError

__all__ = ["app"]

app = App(name="new", help="Begin something of your own.")

TEMPLATE = Path(__file__).parent / "template"
MARK = "CHANGE"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_LONGEST = 40


@app.command
def plugin(
    name: Annotated[
        str,
        Parameter(help="Of the service, in small letters, words parted by `-`: `acme-batch`."),
    ],
    /,
    *,
    into: Annotated[
        Path, Parameter(help="The folder in which the package's own folder is made.")
    ] = Path(),
) -> None:
    """Make a package for a plugin: block, models, plugin, tests with a stand-in of the service, a flow, a page of docs.

    Its tests pass as it is: run them, then change what is marked, and run them again.

    Example: `prefect-webapi new plugin acme-batch --into ~/src`
    """
    from rich.text import Text

    from prefect_webapi.cli.screen import console

    folder = into / f"prefect-webapi-{_checked(name)}"
    if folder.exists():
        raise ConfigurationError(f"{folder} is there already. Remove it, or choose another name.")
    made = _write(name, folder)
    marks = sum(path.read_text().count(MARK) for path in made)
    out = console()
    for path in made:
        out.print(Text(str(path)))
    out.print(
        f"\n{marks} places to change are marked {MARK}. Now:\n\n"
        f"  cd {folder}\n  pip install -e '.[dev]'\n  pytest\n  grep -rn {MARK} .\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        hint = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:_LONGEST].strip("-")
        raise ConfigurationError(
            f"{name!r} can't be a plugin's name: small letters and digits, a letter first, words parted by one `-`, "
            f"at most {_LONGEST} characters" + (f". Try {hint!r}." if hint else ".")
        )
    package = f"prefect_webapi_{name.replace('-', '_')}"
    if find_spec(package) is not None:
        raise ConfigurationError(f"there is a package {package} already. Choose another name.")
    return name


def _write(name: str, folder: Path) -> list[Path]:
    sources = sorted(
        path
        for path in TEMPLATE.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and ".pytest_cache" not in path.parts
    )
    made: list[Path] = []
    for source in sources:
        path = folder / _renamed(str(source.relative_to(TEMPLATE)), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_renamed(source.read_text(), name))
        made.append(path)
    return made


def _renamed(text: str, name: str) -> str:
    """`text` of the template with this name in Acme's place."""
    words = name.split("-")
    title = "".join(word.capitalize() for word in words)
    for old, new in (
        ("prefect-webapi-acme", f"prefect-webapi-{name}"),
        ('"acme"', f'"{name}"'),
        ("`acme`", f"`{name}`"),
        ("https://acme.", f"https://{name}."),
        ('acme = "', f'{name} = "'),
        ("acme", name.replace("-", "_")),
        ("Acme", title),
    ):
        text = text.replace(old, new)
    return text
