"""docs/stats.schema.json, which every /stats document has to fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

ROOT = Path(__file__).resolve().parent.parent
SCHEMA: dict[str, Any] = json.loads((ROOT / "docs/stats.schema.json").read_text())


def check_stats(document: Any, definition: str | None = None) -> None:
    """AssertionError naming what does not fit: the whole schema, or one of its definitions."""
    schema = SCHEMA if definition is None else {"$ref": f"#/$defs/{definition}", "$defs": SCHEMA["$defs"]}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(json.loads(json.dumps(document, allow_nan=False)))
    assert [f"{error.json_path}: {error.message[:300]}" for error in errors] == []
