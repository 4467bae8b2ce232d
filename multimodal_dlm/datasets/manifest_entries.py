"""Checks of the entries of a dataset manifest, which may come from anybody."""

import re
from collections.abc import Mapping
from typing import Any

from multimodal_dlm.datasets.storage import AnyPath
from multimodal_dlm.errors import DataError, unknown_name
from multimodal_dlm.tasks import TASKS

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def check_names(path: AnyPath, content: Mapping[str, Any]) -> None:
    """Names become parts of paths where shards are tokenized: they must never lead elsewhere."""
    splits = content["splits"]
    if not isinstance(splits, dict):
        raise DataError(f"{path}: `splits` must map names to shards; got {splits!r}.")
    for split, rows in splits.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(
                f"{path}: `splits.{split}` must be a list of shards; got {rows!r:.200}. Leave the"
                " split out if it has none."
            )
    for name in (content["name"], *content["splits"]):
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise DataError(
                f"{path}: the names of a source and its splits must be plain names of letters,"
                f" digits, `_`, `-` and `.`; got {name!r}. Rename it."
            )


def check_tasks(path: AnyPath, content: Mapping[str, Any]) -> None:
    """Tasks that exist, and weights that captions can be drawn by."""
    for entry in ("tasks", "caption_weights"):
        if not isinstance(content[entry], dict):
            raise DataError(f"{path}: `{entry}` must be a mapping; got {content[entry]!r}.")
        for task in content[entry]:
            if task not in TASKS:
                raise DataError(f"{path}: `{entry}`: {unknown_name('task', str(task), TASKS)}")
    for task, weights in content["caption_weights"].items():
        is_list = isinstance(weights, list) and all(
            isinstance(w, int | float) and 0 <= w < 1e9 for w in weights
        )
        if not is_list or (weights and not any(weights)):
            raise DataError(
                f"{path}: `caption_weights.{task}` must be a list of numbers of at least 0, one of"
                f" them above 0; got {weights!r}. Leave it out to draw evenly."
            )


def check_share(path: AnyPath, name: str, value: object, at_least: int = 0) -> int:
    """A weight or a share: an integer of at least `at_least`."""
    if not isinstance(value, int) or value < at_least:
        raise DataError(
            f"{path}: `{name}` must be an integer of at least {at_least}; got {value!r}. Scale the"
            " shares up until they are whole."
        )
    return value


def check_size(path: AnyPath, name: str, value: object, most: int = 2**63 - 1) -> int:
    """A number that a command wrote: an integer in 0..most."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise DataError(
            f"{path}: `{name}` must be an integer in 0..{most}; got {value!r:.100}. Write the"
            " manifest again, with the command in its first line."
        )
    return value
