"""Exact-match measures of captions and answers."""

import re

from multimodal_dlm.datasets.schema import Sample

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
