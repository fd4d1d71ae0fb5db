"""When a model was last used and last verified, and how fast the last download was: notes that may be lost without harm."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dsv4cli import paths


def note(path: Path, what: str) -> None:
    """Writes down that `what` ("used", "verified") happened to the model at `path` just now; silent where it cannot be."""
    _change(str(path.resolve()), what, datetime.now(timezone.utc).isoformat(timespec="seconds"))


def note_rate(rate: float, kind: str = "rate") -> None:
    _change("", kind, rate)


def when(path: Path, what: str) -> datetime | None:
    with suppress(ValueError, TypeError):
        return datetime.fromisoformat(_read().get(str(path.resolve()), {}).get(what, ""))
    return None


def rate(kind: str = "rate") -> float | None:
    """Bytes a second of the last download, or of something else that was noted as `kind`."""
    value = _read().get("", {}).get(kind)
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _file() -> Path:
    return paths.cache() / "usage.json"


def _read() -> dict[str, dict[str, Any]]:
    with suppress(OSError, ValueError):
        notes = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(notes, dict):
            return {key: value for key, value in notes.items() if isinstance(value, dict)}
    return {}


def _change(key: str, what: str, value: Any) -> None:
    with suppress(OSError):
        notes = _read()
        notes.setdefault(key, {})[what] = value
        _file().parent.mkdir(parents=True, exist_ok=True)
        draft = _file().with_name(f".usage.{os.getpid()}")
        draft.write_text(json.dumps(notes), encoding="utf-8")
        os.replace(draft, _file())
