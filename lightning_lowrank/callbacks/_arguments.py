"""Checks of constructor arguments: each says what was given, and what can be."""

from __future__ import annotations

import math
from typing import Any


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """A whole number of at least ``least``, or None where it is optional."""
    if (optional and value is None) or (isinstance(value, int) and value >= least):
        return
    what = "a positive integer" if least == 1 else f"an integer of at least {least}"
    raise ValueError(f"{name} must be {what}{' or None' if optional else ''}, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_coefficient(name: str, value: Any, *, automatic: bool = False) -> None:
    """A finite number of at least 0, or "auto" where that is allowed."""
    if not (is_coefficient(value) or (automatic and value == "auto")):
        what = "'auto' or a number" if automatic else "a number"
        raise ValueError(f"{name} must be {what} of at least 0, got {value!r}")


def is_coefficient(value: Any) -> bool:
    """Whether this is a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
