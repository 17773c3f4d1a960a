"""Data as classic scripts: pages opened from a file may not fetch one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_script(path: Path, name: str, data: Any) -> None:
    """Write a script that assigns one constant."""
    text = f'"use strict";\nconst {name} = {script_json(data)};\n'
    path.write_text(text, encoding="ascii", newline="\n")


def write_call(path: Path, function: str, data: Any) -> None:
    """Write a script that hands data to a function of the page that loads it."""
    text = f'"use strict";\n{function}({script_json(data)});\n'
    path.write_text(text, encoding="ascii", newline="\n")


def script_json(data: Any) -> str:
    """Return JSON in ASCII without the characters that could end a script or start markup."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
