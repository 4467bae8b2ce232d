"""Exact-match measures of captions and answers."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_ARTICLE = re.compile(r"^(?:an?|the) ")
_TEMPLATES = (
    re.compile(r"^a picture of (?P<name>.+?)(?:\.? tags:.*)?$"),
    re.compile(r"^an? [\w -]*?\bemoji of (?P<name>.+)$"),
    re.compile(r"^(?P<name>.+?), [\w -]+ style(?:, on .*)?$"),
    re.compile(r"^(?P<name>.+?),? on an? \w+ background$"),
    re.compile(r"^(?P<name>.+?)\.? tags:.*$"),
)


def normalise_text(text: str) -> str:
    """Lower case, single spaces, no full stop or question mark at the end."""
    return " ".join(text.lower().split()).rstrip(".?! ")


def exact_match(prediction: str, truth: str) -> bool:
    """True when two texts are the same after `normalise_text`."""
    return normalise_text(prediction) == normalise_text(truth)


def name_of_caption(caption: str) -> str:
    """The name a caption gives to what it shows, without style, background, tags and article.

    `a flat fluent emoji of a red apple` -> `red apple`; a text of another form is returned without
    its article.
    """
    text = normalise_text(caption)
    for template in _TEMPLATES:
        if found := template.match(text):
            text = found["name"]
            break
    return _ARTICLE.sub("", text).rstrip(". ")


@dataclass
class Accuracy:
    """Counts of right answers by kind.

    Args:
        right: Right answers of each kind.
        total: Answers of each kind.
    """

    right: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, is_right: bool) -> None:
        """Count one answer."""
        self.right[kind] = self.right.get(kind, 0) + int(is_right)
        self.total[kind] = self.total.get(kind, 0) + 1

    def extend(self, rows: Iterable[tuple[str, bool]]) -> "Accuracy":
        """Count several answers and return the same object."""
        for kind, is_right in rows:
            self.add(kind, is_right)
        return self

    @property
    def count(self) -> int:
        """All answers."""
        return sum(self.total.values())

    @property
    def overall(self) -> float:
        """Share of right answers, in [0, 1]; NaN when there is none."""
        return sum(self.right.values()) / self.count if self.count else math.nan

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `overall`."""
        return math.sqrt(self.overall * (1 - self.overall) / self.count) if self.count else math.nan

    def to_dict(self) -> dict[str, float | int | dict[str, float]]:
        """JSON values: overall, by kind and counts."""
        return {
            "accuracy": round(self.overall, 4),
            "standard_error": round(self.standard_error, 4),
            "count": self.count,
            "by_type": {
                kind: round(self.right[kind] / self.total[kind], 4) for kind in sorted(self.total)
            },
        }
