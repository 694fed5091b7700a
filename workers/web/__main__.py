"""``python -m workers.web`` writes the OpenAPI and the AsyncAPI document to ``docs/``."""

from workers.web.openapi import texts

for path, text in texts().items():
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
