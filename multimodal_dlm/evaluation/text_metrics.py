"""Measures of captions and answers: exact match, the name inside, CIDEr-D."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from multimodal_dlm.datasets.schema import Sample
from multimodal_dlm.errors import ConfigError

NUM_GRAMS = 4
LENGTH_SIGMA = 6.0

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


def name_of_sample(sample: Sample) -> str:
    """The true name: the concept in the record's meta, else the name in its first caption."""
    concept = sample.record.meta.get("concept")
    return name_of_caption(concept if isinstance(concept, str) else sample.record.captions[0])


def references_of_sample(sample: Sample) -> list[str]:
    """What a caption may say: the true name, and each tag that a caption of the record lists."""
    found = {name_of_sample(sample): None}
    for caption in sample.record.captions:
        _, listed, tags = normalise_text(caption).partition("tags:")
        if listed:
            found |= {tag.strip(): None for tag in tags.split(",") if tag.strip()}
    return list(found)


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each candidate, from 0 to 10 (Vedantam et al. 2015, arXiv 1411.5726, Eq. 7).

    Mean over n = 1..4 and over a row's references of the clipped cosine of n-gram counts, each
    weighted by the log of how few rows' references hold it, times exp(-d^2 / 72) for a difference
    of d words, times 10. Texts are split at blanks; nothing is stemmed.

    Args:
        candidates: One text a row.
        references: The texts each row may be told by, at least one.

    Raises:
        ConfigError: When the numbers differ or a row has no reference.
    """
    if len(candidates) != len(references) or not all(references):
        raise ConfigError(
            "`references` must hold at least one text a candidate; got"
            f" {[len(row) for row in references][:8]} for {len(candidates)}."
        )
    frequency: Counter[tuple[str, ...]] = Counter()
    for row in references:
        frequency.update({gram for text in row for gram in _grams(text)})
    log_rows = math.log(max(len(references), 1))

    def vectors(text: str) -> list[dict[tuple[str, ...], float]]:
        found: list[dict[tuple[str, ...], float]] = [{} for _ in range(NUM_GRAMS)]
        for gram, count in _grams(text).items():
            found[len(gram) - 1][gram] = count * (log_rows - math.log(max(frequency[gram], 1)))
        return found

    scores = []
    for text, row in zip(candidates, references, strict=True):
        own, total = vectors(text), 0.0
        for reference in row:
            others = vectors(reference)
            difference = len(_words(text)) - len(_words(reference))
            near = math.exp(-(difference**2) / (2 * LENGTH_SIGMA**2))
            total += near * sum(map(_clipped_cosine, own, others)) / NUM_GRAMS
        scores.append(10 * total / len(row))
    return scores


def _words(text: str) -> list[str]:
    return normalise_text(text).split()


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = _words(text)
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, NUM_GRAMS + 1)
        for start in range(len(words) - size + 1)
    )


def _clipped_cosine(
    own: Mapping[tuple[str, ...], float], other: Mapping[tuple[str, ...], float]
) -> float:
    lengths = math.hypot(*own.values()) * math.hypot(*other.values())
    if not lengths:
        return 0.0
    return sum(min(own.get(gram, 0.0), weight) * weight for gram, weight in other.items()) / lengths
