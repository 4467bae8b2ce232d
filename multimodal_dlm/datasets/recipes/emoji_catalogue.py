"""Nine sets of emoji joined with their Unicode names, in concept families and splits.

A *concept* is one emoji of Unicode, a *style* one set, an *artist* one or more sets that finish the
same drawings. Families, splits and held-out combinations depend on SHA-256 of names alone.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from multimodal_dlm.datasets.fetching import SourceFolder, SourcePackage
from multimodal_dlm.datasets.sampling import hash_fraction
from multimodal_dlm.datasets.wording import plain_name

_APACHE, _MIT, _CC_BY = "Apache-2.0", "MIT", "CC-BY-4.0"


@dataclass(frozen=True)
class Style:
    """One set of emoji.

    Args:
        word: What captions call it.
        artist: Who drew the shapes; sets of one artist go together in held-out combinations.
        package: Where it comes from.
    """

    word: str
    artist: str
    package: SourcePackage


def _icons(set_name: str, version: str, license_id: str, credit: str, sha256: str) -> SourcePackage:
    return SourcePackage(f"@iconify-json/{set_name}", version, "npm", license_id, credit, sha256)


_GOOGLE = "Google Inc, https://github.com/googlefonts/noto-emoji"
_MICROSOFT = "Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"
STYLES: dict[str, Style] = {
    "noto": Style("noto", "noto", _icons("noto", "1.2.9", _APACHE, _GOOGLE,
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad")),
    "noto-v1": Style("classic noto", "noto-v1", _icons("noto-v1", "1.2.5", _APACHE, _GOOGLE,
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37")),
    "twemoji": Style("twemoji", "twemoji", _icons("twemoji", "1.2.5", _CC_BY,
        "Twitter and contributors, https://github.com/jdecked/twemoji",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7")),
    "fluent-emoji": Style("fluent", "fluent", _icons("fluent-emoji", "1.2.7", _MIT, _MICROSOFT,
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b")),
    "fluent-emoji-flat": Style("fluent flat", "fluent", _icons("fluent-emoji-flat", "1.2.6", _MIT,
        _MICROSOFT, "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175")),
    "fluent-emoji-high-contrast": Style("high contrast", "fluent",
        _icons("fluent-emoji-high-contrast", "1.2.6", _MIT, _MICROSOFT,
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0")),
    "fxemoji": Style("fxemoji", "fxemoji", _icons("fxemoji", "1.2.2", _APACHE,
        "Mozilla, https://github.com/mozilla/fxemoji",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef")),
    "emojione": Style("emojione", "emojione", _icons("emojione", "1.2.3", _CC_BY,
        "EmojiOne and EmojiTwo contributors, https://github.com/EmojiTwo/emojitwo",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e")),
    "streamline-emojis": Style("streamline", "streamline", _icons("streamline-emojis", "1.2.4",
        _CC_BY, "Streamline, https://github.com/webalys-hq/streamline-vectors",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc")),
}  # fmt: skip
EMOJIBASE = SourcePackage("emojibase-data", "17.0.0", "npm", _MIT,
    "Miles Johnson, https://emojibase.dev; names from Unicode CLDR",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")  # fmt: skip
PACKAGES = (EMOJIBASE, *(style.package for style in STYLES.values()))

_GENDERED = {"man", "woman", "person", "men", "women", "people", "boy", "girl"}
_PLAIN_TAG = re.compile(r"[a-z][a-z' -]+")
_COMPONENTS, _FLAGS = 2, 9  # Emojibase groups: skin tones and hair; flags.
TEST_SHARE, VAL_SHARE, UNSEEN_SHARE = 0.10, 0.05, 0.08


@dataclass(frozen=True)
class Concept:
    """One emoji of Unicode.

    Args:
        hexcode: Lower-case code points joined by `-`, without variation selectors.
        name: Plain English name.
        family: Label without gender and without what follows a colon; the unit of the splits.
        group: Unicode group, such as `animals-nature`.
        subgroup: Unicode subgroup, such as `animal-mammal`.
        tags: English key words.
        split: `train`, `val` or `test`.
    """

    hexcode: str
    name: str
    family: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Drawing:
    """One concept in one style.

    Args:
        concept: What is drawn.
        style: Key of `STYLES`.
        svg: The whole document.
        split: The concept's split, or `unseen_combinations`.
    """

    concept: Concept
    style: str
    svg: str
    split: str


def concept_family(label: str) -> str:
    """The label with gender words and everything after a colon removed."""
    start = label.split(":")[0].lower()
    return " ".join(word for word in start.split() if word not in _GENDERED) or start


def concept_split(family: str, *, is_flag: bool = False) -> str:
    """Split of a concept family by SHA-256; flags are for training only."""
    if is_flag:
        return "train"
    hundredth = int(hashlib.sha256(family.encode()).hexdigest()[:8], 16) % 100 / 100
    if hundredth < TEST_SHARE:
        return "test"
    return "val" if hundredth < TEST_SHARE + VAL_SHARE else "train"


def is_unseen_combination(family: str, artist: str, artists: set[str]) -> bool:
    """Whether a training family is held out of one artist's drawings.

    Args:
        family: Concept family of the training split.
        artist: The artist in question.
        artists: All who drew the family; the one with the largest hash is never held out, so that
            every family stays in training.
    """

    def fraction(name: str) -> float:
        return hash_fraction("unseen", family, name)

    return fraction(artist) < UNSEEN_SHARE and artist != max(artists, key=fraction)


def load_concepts(sources: SourceFolder) -> dict[str, Concept]:
    """All emoji but skin tones and components, by hexcode."""
    messages = sources.read_json(EMOJIBASE, "en/messages.json")
    groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    concepts = {}
    for entry in sources.read_json(EMOJIBASE, "en/data.json"):
        if entry.get("group", _COMPONENTS) == _COMPONENTS:
            continue
        hexcode = _hexcode(entry["hexcode"])
        family = concept_family(entry["label"])
        concepts[hexcode] = Concept(
            hexcode=hexcode,
            name=plain_name(entry["label"]),
            family=family,
            group=groups[entry["group"]],
            subgroup=subgroups[entry["subgroup"]],
            tags=tuple(tag for tag in entry.get("tags", ()) if _PLAIN_TAG.fullmatch(tag)),
            split=concept_split(family, is_flag=entry["group"] == _FLAGS),
        )
    return concepts


def load_drawings(sources: SourceFolder) -> list[Drawing]:
    """All drawings of all styles, ordered by hexcode and style."""
    concepts = load_concepts(sources)
    slugs = _slug_table(sources, concepts)
    found: dict[tuple[str, str], str] = {}
    for style, entry in STYLES.items():
        for hexcode, svg in _join(sources, entry.package, concepts, slugs):
            found.setdefault((hexcode, style), svg)
    artists: dict[str, set[str]] = defaultdict(set)
    for hexcode, style in found:
        artists[concepts[hexcode].family].add(STYLES[style].artist)
    drawings = []
    for hexcode, style in sorted(found):
        concept = concepts[hexcode]
        split = concept.split
        unseen = is_unseen_combination(
            concept.family, STYLES[style].artist, artists[concept.family]
        )
        if split == "train" and concept.group != "flags" and unseen:
            split = "unseen_combinations"
        drawings.append(Drawing(concept, style, found[hexcode, style], split))
    return drawings


def _hexcode(code: str) -> str:
    return code.lower().replace("-fe0f", "")


def _slug(text: str) -> str:
    """The name as icon sets without separators write it."""
    return re.sub(r"[^a-z0-9]", "", plain_name(text))


def _slug_table(sources: SourceFolder, concepts: Mapping[str, Concept]) -> dict[str, str]:
    """Hexcode by slug: from the names of Unicode, then from the sets that map code points."""
    table: dict[str, str] = {}
    for entry in sources.read_json(EMOJIBASE, "en/data.json"):
        if _hexcode(entry["hexcode"]) in concepts:
            table[re.sub(r"[^a-z0-9]", "", entry["label"].lower())] = _hexcode(entry["hexcode"])
    for concept in concepts.values():
        table.setdefault(_slug(concept.name), concept.hexcode)
    for style in STYLES.values():
        for code, name in (sources.read_json(style.package, "chars.json") or {}).items():
            if _hexcode(code) in concepts:
                table.setdefault(_slug(name), _hexcode(code))
    return table


def _join(
    sources: SourceFolder,
    package: SourcePackage,
    concepts: Mapping[str, Concept],
    slugs: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """Pairs of hexcode and SVG; the surest join of a hexcode comes first."""
    icons = sources.read_json(package, "icons.json")
    by_name: dict[str, str] = {}
    for code, name in (sources.read_json(package, "chars.json") or {}).items():
        if _hexcode(code) in concepts:
            by_name.setdefault(name, _hexcode(code))
    aliases = {name: entry["parent"] for name, entry in icons.get("aliases", {}).items()}
    names = [*icons["icons"], *aliases]
    sure = [(by_name[name], name) for name in names if name in by_name]
    spelled = [(slugs[_slug(name)], name) for name in names if _slug(name) in slugs]
    # Streamline numbers its variants: `bird-1`, `bird-2`; the first stands for the concept.
    first = [(name, re.sub(r"-1$", "", name)) for name in names if name.endswith("-1")]
    numbered = [(slugs[_slug(stem)], name) for name, stem in first if _slug(stem) in slugs]
    for hexcode, name in [*sure, *spelled, *numbered]:
        icon = icons["icons"].get(aliases.get(name, name))
        if icon is not None:
            yield hexcode, _svg(icon, icons)


def _svg(icon: Mapping[str, Any], icons: Mapping[str, Any]) -> str:
    """The whole square SVG document of an icon."""
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="{box}">{icon["body"]}</svg>'
    )
