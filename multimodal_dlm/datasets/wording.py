"""English for captions: plain names, articles, plurals, numbers."""

import re
import unicodedata

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}

_PLURALS = {
    "fish": "fish", "sheep": "sheep", "deer": "deer", "bison": "bison", "squid": "squid",
    "shrimp": "shrimp", "goose": "geese", "mouse": "mice", "tooth": "teeth", "ox": "oxen",
    "foot": "feet", "man": "men", "woman": "women", "person": "people", "child": "children",
    "knife": "knives", "leaf": "leaves", "wolf": "wolves", "loaf": "loaves", "scarf": "scarves",
    "hippopotamus": "hippopotamuses", "cactus": "cacti", "potato": "potatoes", "moose": "moose",
    "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes", "reindeer": "reindeer",
}  # fmt: skip
# Names that end in s and are one thing all the same.
_SINGULAR_S = re.compile(r"(ss|us|os|lens|tennis)$")
# Things without an article: materials, games, signs of the zodiac, proper names.
_NO_ARTICLE = {
    "aquarius", "aries", "cancer", "capricorn", "gemini", "leo", "libra", "ophiuchus", "pisces",
    "sagittarius", "scorpio", "taurus", "virgo", "santa claus", "mrs claus", "mx claus", "zzz",
    "mount fuji", "tokyo tower", "ice", "salt", "soap", "sushi", "bread", "bacon", "honey", "dna",
    "butter", "wood", "coral", "spaghetti", "custard", "skis", "thread", "yarn",
    "tennis", "softball", "badminton", "american football", "soccer", "judo",
    "garlic", "cooked rice", "curry rice", "sparkles", "fire", "lipstick", "popcorn", "fog",
    "broccoli", "celery", "ginger root", "confetti", "ice hockey", "field hockey", "lacrosse",
    "cricket game", "high voltage", "leafy green", "cut of meat", "folded hands", "canned food",
}  # fmt: skip
_VOWEL_SOUND = re.compile(r"(?!u[ns]i|use|euro|ewe|one\b|one-|ufo)[aeiou]|hour|x-|sos\b")


def plain_name(label: str) -> str:
    """An emoji's label as people type it: lower case, ASCII, without remarks and colons."""
    text = unicodedata.normalize("NFKD", label.replace("’", "'"))
    text = re.sub(r"\([^)]*\)|[“”\".]", " ", text.encode("ascii", "ignore").decode().lower())
    head, colon, rest = text.partition(":")
    head, rest = head.strip(), rest.strip()
    if colon:
        parts = [part.strip() for part in rest.split(",")]
        listed = ", ".join(parts[:-1]) + (" and " if parts[1:] else "") + parts[-1]
        joiner = {"keycap": "", "flag": "of "}.get(head, "of ")
        if head in ("man", "woman", "person"):
            joiner = "with "
        if rest.startswith("facing"):
            joiner = ""
        text = f"{rest} {head}" if rest == "bald" else f"{head} {joiner}{listed}"
    return " ".join(text.split())


def head_noun(name: str) -> str:
    """The word a plural is formed on: the last one before `with`, `of`, `in`, `showing` ..."""
    start = re.split(r" (?:with|of|in|on|showing|without|over|behind|from|for|at|to) ", name)[0]
    return start.split()[-1]


def is_plural(name: str) -> bool:
    """Whether the name already stands for several things (`grapes`, `men holding hands`)."""
    first = name.split()[0]
    if first in ("person", "woman", "man") and " and " not in name:
        return False
    head = head_noun(name)
    return head.endswith("s") and not _SINGULAR_S.search(head) and not head.endswith("'s")


def with_article(name: str) -> str:
    """`a red apple`, `an owl`, `grapes`."""
    if name in _NO_ARTICLE or is_plural(name):
        return name
    return f"an {name}" if _VOWEL_SOUND.match(name) else f"a {name}"


def plural(name: str) -> str:
    """`apples`, `strawberries`, `mouse faces`; the last word takes the ending."""
    *first, last = name.split()
    if last in _PLURALS:
        last = _PLURALS[last]
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    else:
        last += "s"
    return " ".join([*first, last])
