"""One vocabulary for every modality: id ranges, states that are not final, and their columns.

Three words are kept apart. `codes` are ids in one tokenizer's own codebook; `input_ids` are ids in
the unified vocabulary; `columns` are 0..V_m - 1 within one modality (all its segments, end to end),
with V_m standing for "masked". This file is the only place that adds or subtracts an offset.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from multimodal_dlm.errors import VocabularyError, nearest_match

FUNCTIONAL = "functional"
NUM_FUNCTIONAL_IDS = 64


@dataclass(frozen=True)
class Segment:
    """A run of ids that belongs to one tokenizer level.

    Args:
        name: Unique name, such as `text`, `image.0` or `functional`.
        modality: Modality the ids are final values of; empty for `functional`.
        offset: First unified id.
        size: Number of ids.
    """

    name: str
    modality: str
    offset: int
    size: int

    @property
    def stop(self) -> int:
        """One past the last unified id."""
        return self.offset + self.size


@dataclass(frozen=True)
class State:
    """An id that is not final: it may resolve to some columns of a modality.

    Args:
        name: Unique name, such as `mask_image`.
        id: Unified id.
        modality: Modality it resolves in; None means "the modality of its position", which is how
            a single shared mask id (LLaDA, MMaDA) is described.
        columns: Half-open column ranges it may resolve to; empty means every column.
    """

    name: str
    id: int
    modality: str | None
    columns: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class UnifiedVocabulary:
    """The id ranges of all modalities, the special ids and the states that are not final.

    Args:
        segments: Id ranges; they must not overlap and a modality's ranges must be contiguous.
        special_ids: Unified ids by name (`pad`, `boi`, `eoi`, `bos`, `eos`, `fill`).
        states: Ids that are not final, by name.
        fingerprints: Fingerprint of the tokenizer of each modality, compared as strings.

    Raises:
        VocabularyError: When ranges overlap, a modality is torn apart or an id lies outside.
    """

    segments: tuple[Segment, ...]
    special_ids: Mapping[str, int]
    states: tuple[State, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_segments(self.segments)
        for name, value in self.special_ids.items():
            if not 0 <= value < self.vocab_size:
                raise VocabularyError(
                    f"Special id `{name}` must lie in 0..{self.vocab_size - 1}; got {value}."
                )
        for state in self.states:
            if state.modality is not None:
                num_columns = self.num_columns(state.modality)
                for start, stop in state.columns:
                    if not 0 <= start < stop <= num_columns:
                        raise VocabularyError(
                            f"State `{state.name}` resolves to columns {start}..{stop - 1}, outside"
                            f" 0..{num_columns - 1} of `{state.modality}`."
                        )

    @classmethod
    def build(
        cls,
        segments: Mapping[str, Sequence[tuple[str, int]]],
        special: Mapping[str, tuple[str, int]] | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> "UnifiedVocabulary":
        """Lay out a vocabulary: first modality, 64 reserved functional ids, other modalities.

        Args:
            segments: For each modality, the names and sizes of its segments, in order.
            special: Ids that live inside a segment, as (segment, code), such as
                `{"eos": ("text", 0)}`.
            fingerprints: Fingerprint of each modality's tokenizer.

        Returns:
            A vocabulary whose functional ids are `pad`, `boi`, `eoi`, one `mask_<modality>` for
            each modality, then `bos`.
        """
        if not segments:
            raise VocabularyError("A vocabulary needs at least one modality; got none.")
        first, *others = segments
        laid: list[Segment] = []
        offset = 0
        for modality in (first, FUNCTIONAL, *others):
            parts = (
                [(FUNCTIONAL, NUM_FUNCTIONAL_IDS)] if modality == FUNCTIONAL else segments[modality]
            )
            for name, size in parts:
                laid.append(Segment(name, "" if modality == FUNCTIONAL else modality, offset, size))
                offset += size
        by_name = {segment.name: segment for segment in laid}
        start = by_name[FUNCTIONAL].offset
        names = ["pad", "boi", "eoi", *(f"mask_{modality}" for modality in segments), "bos"]
        if len(names) > NUM_FUNCTIONAL_IDS:
            raise VocabularyError(
                f"{len(segments)} modalities need {len(names)} functional ids; there are"
                f" {NUM_FUNCTIONAL_IDS}."
            )
        ids = {name: start + index for index, name in enumerate(names)}
        states = tuple(
            State(f"mask_{modality}", ids[f"mask_{modality}"], modality) for modality in segments
        )
        special_ids = {name: ids[name] for name in ("pad", "boi", "eoi", "bos")}
        for name, (segment, code) in (special or {}).items():
            special_ids[name] = by_name[segment].offset + code
        return cls(tuple(laid), special_ids, states, dict(fingerprints or {}))

    # Sizes and names.

    @cached_property
    def vocab_size(self) -> int:
        """Number of unified ids."""
        return max(segment.stop for segment in self.segments)

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities; `modality_ids` of a canvas index this tuple."""
        return tuple(dict.fromkeys(part.modality for part in self.segments if part.modality))

    def modality_id(self, modality: str) -> int:
        """Index of a modality in `modalities`."""
        if modality not in self.modalities:
            raise VocabularyError(
                f"Unknown modality `{modality}`.{nearest_match(modality, self.modalities)}"
                f" Available: {', '.join(self.modalities)}."
            )
        return self.modalities.index(modality)

    def segment(self, name: str) -> Segment:
        """The segment called `name`."""
        for part in self.segments:
            if part.name == name:
                return part
        names = [part.name for part in self.segments]
        raise VocabularyError(
            f"Unknown segment `{name}`.{nearest_match(name, names)} Available: {', '.join(names)}."
        )

    def modality_segments(self, modality: str) -> tuple[Segment, ...]:
        """The segments of a modality, in column order."""
        self.modality_id(modality)
        return tuple(part for part in self.segments if part.modality == modality)

    @cached_property
    def _columns(self) -> dict[str, range]:
        parts = {name: self.modality_segments(name) for name in self.modalities}
        return {name: range(own[0].offset, own[-1].stop) for name, own in parts.items()}

    def columns(self, modality: str) -> range:
        """Unified ids of all final values of a modality, one contiguous range."""
        self.modality_id(modality)
        return self._columns[modality]

    def num_columns(self, modality: str) -> int:
        """Number of final values of a modality (V_m)."""
        return len(self.columns(modality))

    def special_id(self, name: str) -> int:
        """Unified id of a special token."""
        if name not in self.special_ids:
            raise VocabularyError(
                f"Unknown special token `{name}`.{nearest_match(name, self.special_ids)}"
                f" Available: {', '.join(sorted(self.special_ids))}."
            )
        return self.special_ids[name]

    def column_of(self, special: str, modality: str) -> int:
        """Column of a special token that lives inside a modality, such as `eos` in text."""
        return self.special_id(special) - self.columns(modality).start

    # States.

    @cached_property
    def _state_ids(self) -> tuple[int, ...]:
        return tuple(state.id for state in self.states)

    @cached_property
    def _state_run(self) -> tuple[int, int] | None:
        """First and last state id when they are one run."""
        low, high = min(self._state_ids), max(self._state_ids)
        return (low, high) if high - low + 1 == len(self._state_ids) else None

    def mask_token_id(self, modality: str) -> int:
        """Unified id of the state that may resolve to every column of a modality."""
        self.modality_id(modality)
        for state in self.states:
            if state.modality in (modality, None) and not state.columns:
                return state.id
        raise VocabularyError(f"Modality `{modality}` has no unrestricted mask state.")

    def is_masked(self, ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """True where an id is a state, that is, not final."""
        if len(self._state_ids) == 1:
            return ids == self._state_ids[0]
        if self._state_run is not None:
            return (ids >= self._state_run[0]) & (ids <= self._state_run[1])
        return torch.isin(ids, torch.tensor(self._state_ids, device=ids.device, dtype=ids.dtype))

    def allowed_columns(
        self, ids: Int[Tensor, "*shape"], modality: str
    ) -> Bool[Tensor, "*shape columns"] | None:
        """Columns that each state may resolve to; None when no state present is restricted."""
        restricted = [s for s in self.states if s.columns and s.modality in (modality, None)]
        present = [state for state in restricted if bool((ids == state.id).any())]
        if not present:
            return None
        allowed = torch.ones(
            *ids.shape, self.num_columns(modality), dtype=torch.bool, device=ids.device
        )
        for state in present:
            row = torch.zeros(self.num_columns(modality), dtype=torch.bool, device=ids.device)
            for start, stop in state.columns:
                row[start:stop] = True
            allowed[ids == state.id] = row
        return allowed

    # Translation between codes, unified ids and columns.

    def to_input_ids(self, codes: Int[Tensor, "*shape"], segment: str) -> Int[Tensor, "*shape"]:
        """Codes of one tokenizer level -> unified ids."""
        part = self.segment(segment)
        _check_range(codes, 0, part.size, f"codes of segment `{segment}`")
        return codes + part.offset

    def to_codes(self, ids: Int[Tensor, "*shape"], segment: str) -> Int[Tensor, "*shape"]:
        """Unified ids -> codes of one tokenizer level."""
        part = self.segment(segment)
        _check_range(ids, part.offset, part.stop, f"input_ids of segment `{segment}`")
        return ids - part.offset

    def to_columns(self, ids: Int[Tensor, "*shape"], modality: str) -> Int[Tensor, "*shape"]:
        """Unified ids -> columns of one modality; every state becomes V_m."""
        columns = self.columns(modality)
        is_masked = self.is_masked(ids)
        known = ids.masked_fill(is_masked, columns.start)
        _check_range(known, columns.start, columns.stop, f"input_ids of modality `{modality}`")
        return (known - columns.start).masked_fill_(is_masked, len(columns))

    def from_columns(self, columns: Int[Tensor, "*shape"], modality: str) -> Int[Tensor, "*shape"]:
        """Columns of one modality -> unified ids; V_m becomes the modality's mask id."""
        ids = self.columns(modality)
        _check_range(columns, 0, len(ids) + 1, f"columns of modality `{modality}`")
        is_masked = columns == len(ids)
        return (columns + ids.start).masked_fill_(is_masked, self.mask_token_id(modality))

    # Serialisation.

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as stored in `transformer/config.json`."""
        return {
            "segments": [
                {"name": s.name, "modality": s.modality, "offset": s.offset, "size": s.size}
                for s in self.segments
            ],
            "special_ids": dict(self.special_ids),
            "states": {
                s.name: {
                    "id": s.id,
                    "modality": s.modality,
                    "columns": [list(c) for c in s.columns],
                }
                for s in self.states
            },
            "fingerprints": dict(self.fingerprints),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "UnifiedVocabulary":
        """Read what `to_dict` wrote."""
        try:
            return cls(
                segments=tuple(Segment(**part) for part in values["segments"]),
                special_ids=dict(values["special_ids"]),
                # By id: a JSON writer may have sorted the names.
                states=tuple(
                    State(
                        name,
                        state["id"],
                        state["modality"],
                        tuple((start, stop) for start, stop in state["columns"]),
                    )
                    for name, state in sorted(values["states"].items(), key=_state_id)
                ),
                fingerprints=dict(values.get("fingerprints", {})),
            )
        except (KeyError, TypeError) as error:
            raise VocabularyError(
                "`vocabulary` must hold `segments`, `special_ids` and `states` as written by"
                f" `UnifiedVocabulary.to_dict()`; reading it failed at {error!r}."
            ) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole layout, tokenizer fingerprints included."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _state_id(entry: tuple[str, Mapping[str, Any]]) -> int:
    """Sort key of the entries of `states`."""
    return entry[1]["id"]


def _check_segments(segments: tuple[Segment, ...]) -> None:
    """Refuse overlapping ranges, empty ranges, repeated names and torn modalities."""
    names = [part.name for part in segments]
    if len(set(names)) != len(names):
        raise VocabularyError(f"Segment names must be unique; got {names}.")
    ordered = sorted(segments, key=lambda part: part.offset)
    for part in ordered:
        if part.size < 1 or part.offset < 0:
            raise VocabularyError(
                f"Segment `{part.name}` must have size >= 1 and offset >= 0; got size {part.size},"
                f" offset {part.offset}."
            )
    for left, right in zip(ordered, ordered[1:], strict=False):
        if right.offset < left.stop:
            raise VocabularyError(
                f"Segments `{left.name}` and `{right.name}` overlap: the first ends at"
                f" {left.stop}, the second starts at {right.offset}."
            )
    for modality in {part.modality for part in segments if part.modality}:
        parts = [part for part in segments if part.modality == modality]
        for left, right in zip(parts, parts[1:], strict=False):
            if right.offset != left.stop:
                raise VocabularyError(
                    f"The segments of modality `{modality}` must be contiguous; `{left.name}` ends"
                    f" at {left.stop} and `{right.name}` starts at {right.offset}."
                )


def _check_range(values: Tensor, start: int, stop: int, what: str) -> None:
    """Refuse values outside start..stop - 1, naming the first one."""
    if values.numel() == 0:
        return
    lowest, highest = values.aminmax()
    if int(lowest) < start or int(highest) >= stop:
        first = int(values[(values < start) | (values >= stop)].flatten()[0])
        raise VocabularyError(f"Out of range: {what} must lie in {start}..{stop - 1}; got {first}.")
