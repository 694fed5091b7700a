"""Writes the Avro schemas: `python -m schemas.generate`. What they are made from is `schemas.avro_schema`."""

import json
from pathlib import Path

from schemas.avro_schema import all_schemas

DIRECTORY = Path(__file__).parent / "avro"


def files() -> dict[Path, str]:
    """Return the text of every schema file by its path."""
    return {
        DIRECTORY / f"{name}.avsc": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in all_schemas().items()
    }


def main() -> None:
    """Write the schema files that differ."""
    for path, text in files().items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
