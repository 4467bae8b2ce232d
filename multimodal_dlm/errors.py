"""The exceptions of the library. Every message holds the name, the rule, the value and the remedy.

MultimodalDLMError
├── ConfigError (ValueError)       an option, a name or an argument is wrong
├── VocabularyError (ValueError)   an id, a segment or a modality does not exist
├── CanvasError (ValueError)       a canvas breaks one of its invariants
├── BackendError (ValueError)      an attention backend cannot do what is asked
├── DataError (ValueError)         a shard, a sample or a manifest is unusable
├── DivergenceError                a training's loss or gradient is no finite number any more
└── CheckpointError                a saved file is missing, changed or from elsewhere
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

Made = TypeVar("Made")


class MultimodalDLMError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(MultimodalDLMError, ValueError):
    """An option, a name or an argument is wrong."""


class VocabularyError(MultimodalDLMError, ValueError):
    """An id, a segment or a modality is not in the vocabulary."""


class CanvasError(MultimodalDLMError, ValueError):
    """A canvas breaks one of its invariants."""


class BackendError(MultimodalDLMError, ValueError):
    """An attention backend cannot take the device, the dtype or the plan."""


class DataError(MultimodalDLMError, ValueError):
    """A shard, a sample or a manifest is unusable; the message names shard and key.

    Args:
        message: Place, rule, value and remedy.
        reason: One word for counts, such as `picture` or `record`.
    """

    def __init__(self, message: str = "", *, reason: str = "data") -> None:
        super().__init__(message)
        self.reason = reason


class CheckpointError(MultimodalDLMError):
    """A saved file is missing, changed since it was written, or made for something else."""


class DivergenceError(MultimodalDLMError):
    """The loss or the gradient is no longer a number; the message names step and samples."""


def nearest_match(name: str, options: Iterable[str]) -> str:
    """Return a sentence naming the option closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" Did you mean `{close[0]}`?" if close else ""


def unknown_name(kind: str, name: str, options: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not among `options`."""
    known = sorted(options)
    listed = ", ".join(f"`{option}`" for option in known) or "none"
    return ConfigError(f"Unknown {kind} `{name}`.{nearest_match(name, known)} Available: {listed}.")


def make_named(
    kind: str, table: Mapping[str, Callable[..., Made]], name: str, options: Mapping[str, Any]
) -> Made:
    """Make an entry of a table of dataclasses by its name.

    Args:
        kind: What the table holds, for messages.
        table: Name -> dataclass.
        name: The entry.
        options: Its fields.

    Raises:
        ConfigError: When the name or an option is unknown, or the entry refuses a value.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    known = [field.name for field in dataclasses.fields(cast(Any, table[name]))]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {kind} `{name}`:", option, known)
    return table[name](**options)
