"""Scenes as slots: what a caption says of counts and places, and what a picture shows."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from multimodal_dlm.evaluation.text_metrics import normalise_text

COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
_RELATIONS = {"to the left of": "left of", "above": "above"}
_REVERSED = {"to the right of": "left of", "below": "above"}
_BACKGROUND = re.compile(r",? on an? (?P<background>\w+) background$")
_STYLE = re.compile(r", (?P<style>[\w -]+) style$")
_RELATION = re.compile(
    r"^(?P<first>.+?) (?P<relation>to the left of|to the right of|above|below) (?P<second>.+)$"
)
_PLACE = re.compile(r"^an? (?P<size>big|small) (?P<object>.+?) (?:in|at) the (?P<place>[a-z ]+)$")
_COUNT = re.compile(r"^(?P<count>two|three|four) (?P<object>.+)$")
TOLERANCE = 30  # Of a channel, in 0..255: what differs more from the background is an object.
MIN_PIXELS = 24
REACH = 3  # Pixels of one object are at most this far from each other, each way.


def slots_of_caption(text: str) -> dict[str, str]:
    """Slot -> value of what a caption says, for captions in the form of the scenes.

    `two apples on a white background` -> count, object, background; `a pear below an apple` is the
    same as `an apple above a pear`: first, relation, second. A caption of no such form is its
    `object`.
    """
    rest = normalise_text(text).removeprefix("a picture of ")
    slots: dict[str, str] = {}
    for pattern in (_BACKGROUND, _STYLE):
        if found := pattern.search(rest):
            slots |= found.groupdict()
            rest = rest[: found.start()]
    if found := _RELATION.match(rest):
        first, relation, second = found["first"], found["relation"], found["second"]
        if relation in _REVERSED:
            first, second = second, first
        relation = _REVERSED.get(relation) or _RELATIONS[relation]
        return {**slots, "first": first, "relation": relation, "second": second}
    for pattern in (_PLACE, _COUNT):
        if found := pattern.match(rest):
            return {**slots, **found.groupdict()}
    return {**slots, "object": rest}


def count_slots(captions: Iterable[str]) -> dict[str, Counter[str]]:
    """Slot -> how often captions say each of its values."""
    found: dict[str, Counter[str]] = {}
    for caption in captions:
        for slot, value in slots_of_caption(caption).items():
            found.setdefault(slot, Counter())[value] += 1
    return found


def slot_f1(said: Mapping[str, str], true: Mapping[str, str]) -> float:
    """Harmonic mean of the share of said slots that are true and of true slots that are said."""
    right = len(said.items() & true.items())
    return 2 * right / (len(said) + len(true)) if right else 0.0


@dataclass(frozen=True)
class Blob:
    """One thing that stands out from the background.

    Args:
        x: Centre in pixels from the left.
        y: Centre in pixels from the top.
        box: Left, top, right, bottom in pixels, right and bottom outside.
        num_pixels: Pixels that differ from the background.
    """

    x: float
    y: float
    box: tuple[int, int, int, int]
    num_pixels: int


def background_of(picture: np.ndarray) -> np.ndarray:
    """The median color of the rim of a uint8 (height, width, 3) picture."""
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.median(rim, axis=0)


def find_blobs(picture: np.ndarray) -> list[Blob]:
    """The things in a picture with a plain background, the largest first.

    Args:
        picture: uint8 (height, width, 3).
    """
    difference = np.abs(picture.astype(int) - background_of(picture)).max(axis=-1)
    is_object = difference > TOLERANCE
    left = {(int(y), int(x)) for y, x in np.argwhere(is_object)}
    blobs = []
    while left:
        found = _grow(left)
        ys, xs = np.array(found).T
        if len(found) >= MIN_PIXELS:
            box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
            middle = ((box[0] + box[2] - 1) / 2, (box[1] + box[3] - 1) / 2)
            blobs.append(Blob(*middle, box, len(found)))
    return sorted(blobs, key=lambda blob: -blob.num_pixels)


def _grow(left: set[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Take one part, and all that is within reach of it, out of the pixels left."""
    open_, found = [left.pop()], []
    steps = range(-REACH, REACH + 1)
    while open_:
        y, x = open_.pop()
        found.append((y, x))
        for near in [(y + dy, x + dx) for dy in steps for dx in steps]:
            if near in left:
                left.remove(near)
                open_.append(near)
    return found
