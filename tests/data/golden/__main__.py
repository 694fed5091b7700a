"""Renders the golden documents again and writes down their digests: ``python -m tests.data.golden``.

To be run, and its pictures looked at, when a template or the version of a renderer is changed on purpose.
"""

import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from receipts.render import render_html, render_pdf
from receipts.sheet import LABELS

RENDERERS = ("babel", "jinja2", "typst")


def digests(golden: dict[str, Any], language: str) -> dict[str, str]:
    arguments = golden["document"], language, golden["fiscal"], golden["status"]
    return {
        "html": sha256(render_html(*arguments)).hexdigest(),
        "pdf": sha256(render_pdf(*arguments)).hexdigest(),
    }


for file in sorted(Path(__file__).parent.glob("*.json")):
    golden = json.loads(file.read_text(encoding="utf-8"))
    golden["versions"] = {name: version(name) for name in RENDERERS}
    golden["sha256"] = {language: digests(golden, language) for language in sorted(LABELS)}
    file.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
