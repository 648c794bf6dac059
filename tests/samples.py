"""Type-checks every Python sample of the documents as strictly as the code itself.

Run: `uv run python tests/samples.py`. Exits 1 and tells where a sample is wrong. That what they import is there, and
that their flows run, is tested in `tests/test_documents.py` and `tests/test_samples.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
READ_FROM_TEXT = ("HttpUrl", "SecretStr", "JobApi")
"""Types of fields that pydantic makes of a text; a checker that does not know pydantic refuses the text."""


def samples_in(document: Path) -> list[tuple[int, str]]:
    """Line and text of each."""
    text = document.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, each.start(1)), each[1]) for each in found]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        places: dict[str, tuple[Path, int]] = {}
        for document in DOCUMENTS:
            for line, code in samples_in(document):
                file = Path(folder) / f"sample_{len(places)}.py"
                file.write_text(code)
                places[file.name] = document, line
        settings = {
            "typeCheckingMode": "strict",
            "pythonVersion": "3.11",
            "extraPaths": [str(ROOT), str(ROOT / "plugins")],
        }
        (Path(folder) / "pyrightconfig.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
        done = subprocess.run(
            [*command, "-p", folder], cwd=folder, capture_output=True, text=True, check=False
        )
        wrong = [each for each in _told(done) if not _is_text_for_pydantic(each["message"])]
    for each in wrong:
        document, line = places[Path(each["file"]).name]
        at = line + each["range"]["start"]["line"] + 1
        print(f"{document.relative_to(ROOT)}:{at}: {each['message']}")
    print(f"{len(places)} samples of {len(DOCUMENTS)} documents, {len(wrong)} faults")
    return 1 if wrong else 0


def _told(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    try:
        return json.loads(done.stdout)["generalDiagnostics"]
    except json.JSONDecodeError:
        raise SystemExit(f"pyright did not run:\n{done.stdout}\n{done.stderr}") from None


def _is_text_for_pydantic(message: str) -> bool:
    wanted = re.search(r'cannot be assigned to parameter "\w+" of type "(\w+)"', message)
    return wanted is not None and wanted[1] in READ_FROM_TEXT


if __name__ == "__main__":
    sys.exit(main())
