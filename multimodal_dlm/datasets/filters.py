"""Filters that a mixture declares: record fields and values, of which nothing is evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multimodal_dlm.datasets.schema import Record
from multimodal_dlm.errors import DataError, unknown_name

FILTER_ENTRIES = ("allow", "deny", "caption_length", "key_suffix")
RECORD_FIELDS = ("key", "source", "split", "license")


def record_value(record: Record, name: str) -> Any:
    """The value of `key`, `source`, `split`, `license` or `meta.<name>`; None where absent."""
    if name in RECORD_FIELDS:
        return getattr(record, name)
    return record.meta.get(name.removeprefix("meta."))


@dataclass(frozen=True)
class Filter:
    """Which records are drawn: those that every entry keeps.

    Args:
        allow: Field -> values; a record must have one of them.
        deny: Field -> values; a record must have none of them.
        caption_length: Shortest and longest caption in characters; every caption must fit.
        key_suffix: The key must end in one of these; empty for any.
    """

    allow: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    deny: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    caption_length: tuple[int, int] | None = None
    key_suffix: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, content: Any, where: str) -> "Filter":
        """Read the `filter` of a mixture's member.

        Raises:
            DataError: Naming the entry that is unknown or wrong.
        """
        if not isinstance(content, Mapping):
            raise DataError(f"{where}: `filter` must be a mapping; got {content!r}.")
        for name in content:
            if name not in FILTER_ENTRIES:
                raise DataError(f"{where}: {unknown_name('filter', str(name), FILTER_ENTRIES)}")
        lists = {
            name: _value_lists(content.get(name, {}), name, where) for name in ("allow", "deny")
        }
        suffixes = content.get("key_suffix", ())
        suffixes = [suffixes] if isinstance(suffixes, str) else suffixes
        if not isinstance(suffixes, Sequence) or not all(isinstance(s, str) for s in suffixes):
            raise DataError(f"{where}: `filter.key_suffix` must be texts; got {suffixes!r}.")
        bounds = content.get("caption_length")
        if bounds is not None and not _are_bounds(bounds):
            raise DataError(
                f"{where}: `filter.caption_length` must be [shortest, longest] in characters; got"
                f" {bounds!r}. Write for example [3, 80]."
            )
        return cls(
            allow=lists["allow"],
            deny=lists["deny"],
            caption_length=None if bounds is None else (bounds[0], bounds[1]),
            key_suffix=tuple(suffixes),
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Record fields that it looks at."""
        return tuple(dict.fromkeys([*self.allow, *self.deny]))

    def reason(self, record: Record) -> str | None:
        """The first entry that leaves a record out, None when it is drawn."""
        for name, values in self.allow.items():
            if record_value(record, name) not in values:
                return f"allow.{name}"
        for name, values in self.deny.items():
            if record_value(record, name) in values:
                return f"deny.{name}"
        if self.caption_length is not None:
            shortest, longest = self.caption_length
            if not all(shortest <= len(text) <= longest for text in record.captions):
                return "caption_length"
        if self.key_suffix and not record.key.endswith(self.key_suffix):
            return "key_suffix"
        return None


def _value_lists(content: Any, name: str, where: str) -> dict[str, tuple[Any, ...]]:
    if not isinstance(content, Mapping):
        raise DataError(f"{where}: `filter.{name}` must map fields to values; got {content!r}.")
    for path, values in content.items():
        if path not in RECORD_FIELDS and not str(path).startswith("meta."):
            known = (*RECORD_FIELDS, f"meta.{path}")
            raise DataError(f"{where}: {unknown_name('field of a record', str(path), known)}")
        if isinstance(values, Mapping):
            raise DataError(f"{where}: `filter.{name}.{path}` must be a list of values.")
    return {p: tuple(v) if isinstance(v, list | tuple) else (v,) for p, v in content.items()}


def _are_bounds(bounds: Any) -> bool:
    is_pair = isinstance(bounds, list | tuple) and len(bounds) == 2
    return is_pair and all(isinstance(b, int) for b in bounds) and 0 <= bounds[0] <= bounds[1]
