"""Checks of the arguments a user gives to a pipeline; every message says what to do instead."""

import math
from collections.abc import Sequence
from typing import Any

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines.guidance import SCHEDULES


def check_count(name: str, value: Any, *, maximum: int | None = None) -> None:
    """Refuse a count that is no integer of at least 1."""
    limit = "" if maximum is None else f" and at most {maximum}"
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < 1 or (maximum is not None and value > maximum):
        raise ConfigError(f"`{name}` must be an integer, at least 1{limit}; got {value!r}.")


def check_guidance(
    scale: Any, start: Any = 0.0, stop: Any = 1.0, schedule: Any = "constant"
) -> None:
    """Refuse a guidance scale or window out of range, or an unknown schedule."""
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not is_number or not math.isfinite(scale) or scale < 0:
        raise ConfigError(
            f"`guidance_scale` must be a finite number, at least 0; got {scale!r}. 1.0 switches"
            " guidance off."
        )
    if not 0.0 <= start <= stop <= 1.0:
        raise ConfigError(
            "`guidance_start` and `guidance_stop` must satisfy 0 <= start <= stop <= 1 (shares of"
            f" the steps); got {start} and {stop}."
        )
    if schedule not in list(SCHEDULES):
        listed = ", ".join(f"`{name}`" for name in SCHEDULES)
        raise ConfigError(
            f"`guidance_schedule` must be one of {listed}; got {schedule!r}. Leave it out for a"
            " constant scale."
        )


def as_texts(name: str, value: Any) -> list[str]:
    """One text or a list of texts -> a list.

    Raises:
        ConfigError: When it is empty or holds anything but strings.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ConfigError(
            f"`{name}` must be a string or a list of at least one string; got {value!r}."
        )
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(f"`{name}` must hold strings only; got {text!r}.")
    return list(texts)


def matching_texts(name: str, value: Any, count: int, per: str) -> list[str]:
    """One text for all or one for each.

    Raises:
        ConfigError: When a list has another length.
    """
    texts = as_texts(name, value)
    if isinstance(value, str):
        return texts * count
    if len(texts) != count:
        raise ConfigError(
            f"`{name}` must be one string or one per {per}; got {len(texts)} for {count}."
        )
    return texts


def repeat(values: Sequence[Any], times: int) -> list[Any]:
    """Each value `times` times in a row."""
    return [value for value in values for _ in range(times)]
