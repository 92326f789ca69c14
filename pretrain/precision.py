"""How a precision is written."""

from __future__ import annotations

from typing import Any


def spelled(value: Any) -> Any:
    """`no` for False, which is what YAML 1.1 makes of an unquoted `no`; anything else as it is."""
    return "no" if value is False else value
