"""Errors that a user can act on, and the check that an optional extra is installed."""

from __future__ import annotations

import importlib
import math
import os
from types import ModuleType
from typing import ClassVar

__all__ = ["EgjaxError", "NotFiniteError", "check_range", "require", "seconds_from"]


class EgjaxError(Exception):
    """Bad input, told in one line: what is wrong, where, and what mends it.

    Experiment scripts print the message and leave with `exit_code`; nothing that was already
    written is touched.

    Args:
        what: what is wrong.
        where: the file (and line) or argument at fault, if there is one.
        remedy: what the user can do about it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        prefix = f"{where}: " if where else ""
        suffix = f" ({remedy})" if remedy else ""
        super().__init__(" ".join(f"{prefix}{what}{suffix}".split()))


class NotFiniteError(EgjaxError):
    """A training step gave NaN or Inf; scripts leave with exit code 3."""

    exit_code: ClassVar[int] = 3


def check_range(value: float | None, interval: str, *, where: str) -> None:
    """Refuses a number outside of an interval.

    Args:
        value: the number; None passes.
        interval: round brackets leave an end out, e.g. `"(0, inf)"` or `"[0, 0.5)"`.
        where: the argument.

    Raises:
        EgjaxError: it is outside, or NaN.
    """
    if value is None:
        return
    low, high = map(float, interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise EgjaxError(f"{value} is not in {interval}", where=where)


def seconds_from(variable: str, default: float) -> float:
    """Seconds that an environment variable sets, else the default.

    Raises:
        EgjaxError: it is set to something else than seconds.
    """
    text = os.environ.get(variable)
    if not text:
        return float(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise EgjaxError(f"{text!r} is no number of seconds", where=variable, remedy="e.g. 300")
    return seconds


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional library or says which extra brings it.

    Args:
        module: dotted module name, e.g. `"mctx"`.
        extra: the extra of this package that installs it, e.g. `"search"`.

    Raises:
        ImportError: with the command that installs the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here; install it with: pip install 'egjax[{extra}]'"
        ) from error
