"""What a scene shows, decided before anything is drawn: kinds, places, words, held-out rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from multimodal_dlm.datasets.recipes.emoji_rendering import BACKGROUNDS
from multimodal_dlm.datasets.sampling import KeyedDraws, hash_fraction
from multimodal_dlm.datasets.schema import QuestionAnswer
from multimodal_dlm.datasets.wording import NUMBER_WORDS, plural, with_article

HELD_OUT_SHARE = 0.10
WHITE_SHARE = 0.3
KINDS = {"count": 0.35, "relation": 0.45, "place": 0.20}
QUADRANTS = ((17, 17), (47, 17), (17, 47), (47, 47))
CELLS = {
    "top left": (0, 0), "top": (1, 0), "top right": (2, 0),
    "left": (0, 1), "centre": (1, 1), "right": (2, 1),
    "bottom left": (0, 2), "bottom": (1, 2), "bottom right": (2, 2),
}  # fmt: skip
REVERSED = {"to the left of": "to the right of", "above": "below"}


@dataclass(frozen=True)
class SceneObject:
    """Something a scene can show.

    Args:
        name: One or two words.
        category: Kind of thing; distractors come from the same one.
        styles: Styles it may be drawn in here.
    """

    name: str
    category: str
    styles: tuple[str, ...]


@dataclass(frozen=True)
class ScenePlan:
    """A scene before drawing.

    Args:
        kind: `count`, `relation` or `place`.
        style: Key of the emoji styles.
        background: Name of the colour.
        placed: Object, centre x and y, side in pixels, for each thing drawn.
        sentence: What it shows, without style and background.
        alternative: Another way to say it.
        questions: Questions about what is placed.
        held_out: Rules the scene falls under: `triple`, `style_background`, `count`.
    """

    kind: str
    style: str
    background: str
    placed: tuple[tuple[str, int, int, int], ...]
    sentence: str
    alternative: str
    questions: tuple[QuestionAnswer, ...]
    held_out: frozenset[str]


def is_held_out(rule: str, *parts: str) -> bool:
    """Whether a combination is kept out of training: one in ten, by SHA-256."""
    return hash_fraction("scene", rule, *parts) < HELD_OUT_SHARE


def draw_plan(
    objects: Sequence[SceneObject], styles: Mapping[str, str], draws: KeyedDraws
) -> ScenePlan:
    """Decide one scene.

    Args:
        objects: What may appear.
        styles: Words of the styles by key.
        draws: Source of randomness of this scene alone.
    """
    kind = draws.choice(list(KINDS), list(KINDS.values()))
    first = draws.choice(objects)
    style = draws.choice(first.styles)
    background = "white"
    if draws.uniform() >= WHITE_SHARE:
        background = draws.choice([name for name in BACKGROUNDS if name != "white"])
    held_out = {"style_background"} if is_held_out("style_background", style, background) else set()
    if kind == "count":
        placed, sentence, alternative, questions = _count(first, draws)
        if len(placed) == 4 and is_held_out("count", first.name):
            held_out.add("count")
    elif kind == "relation":
        others = [o for o in objects if o.name != first.name and style in o.styles]
        second = draws.choice(others)
        placed, sentence, alternative, questions, triple = _relation(first, second, draws)
        if is_held_out("triple", *triple):
            held_out.add("triple")
    else:
        placed, sentence, alternative, questions = _place(first, draws)
    asked = (
        *questions,
        *_presence(objects, [first, *(second,)] if kind == "relation" else [first], draws),
        QuestionAnswer("what color is the background?", background, "background"),
        QuestionAnswer("which style?", styles[style], "style"),
    )
    return ScenePlan(
        kind, style, background, placed, sentence, alternative, asked, frozenset(held_out)
    )


Placed = tuple[tuple[str, int, int, int], ...]


def _count(
    thing: SceneObject, draws: KeyedDraws
) -> tuple[Placed, str, str, tuple[QuestionAnswer, ...]]:
    """Two to four of the same object in the quadrants."""
    number = 2 + draws.integer(3)
    size = 24 + 2 * draws.integer(3)
    quadrants = [QUADRANTS[i] for i in draws.permutation(4)[:number]]
    placed = tuple((thing.name, x + _jitter(draws, 2), y + _jitter(draws, 2), size)
                   for x, y in quadrants)  # fmt: skip
    several, word = plural(thing.name), NUMBER_WORDS[number]
    wrong = draws.choice([w for n, w in NUMBER_WORDS.items() if n in (2, 3, 4) and w != word])
    questions = (
        QuestionAnswer(f"how many {several}?", word, "count"),
        QuestionAnswer(f"are there {word} {several}?", "yes", "is_count"),
        QuestionAnswer(f"are there {wrong} {several}?", "no", "is_count"),
    )
    return placed, f"{word} {several}", f"a picture of {word} {several}", questions


def _relation(
    first: SceneObject, second: SceneObject, draws: KeyedDraws
) -> tuple[Placed, str, str, tuple[QuestionAnswer, ...], tuple[str, str, str]]:
    """`first` to the left of or above `second`.

    Yes/no questions with "left of" and "above" are of another type than those with "right of" and
    "below": asked all alike, no two of picture, names and relation say anything about the answer,
    so that training has nothing to start from (`question_weights` can begin with one type).
    """
    relation = draws.choice(list(REVERSED))
    size = 26 + 2 * draws.integer(2)
    spread, drift = 16 + _jitter(draws, 1), _jitter(draws, 6)
    wobble = _jitter(draws, 2)
    ends = [(32 - spread, 32 + drift), (32 + spread, 32 + drift + wobble)]
    if relation == "above":
        ends = [(y, x) for x, y in ends]
    placed = tuple((o.name, *end, size) for o, end in zip((first, second), ends, strict=True))
    a, b = first.name, second.name
    opposite = REVERSED[relation]
    short, short_opposite = (text.replace("to the ", "") for text in (relation, opposite))
    questions = (
        QuestionAnswer(f"what is {short} the {b}?", a, "what_relation"),
        QuestionAnswer(f"what is {short_opposite} the {a}?", b, "what_relation"),
        QuestionAnswer(f"is the {a} {short} the {b}?", "yes", "is_relation"),
        QuestionAnswer(f"is the {b} {short} the {a}?", "no", "is_relation"),
        QuestionAnswer(f"is the {b} {short_opposite} the {a}?", "yes", "is_reverse_relation"),
        QuestionAnswer(f"is the {a} {short_opposite} the {b}?", "no", "is_reverse_relation"),
    )
    sentence = f"{with_article(a)} {relation} {with_article(b)}"
    alternative = f"{with_article(b)} {opposite} {with_article(a)}"
    return placed, sentence, alternative, questions, (a, relation, b)


def _place(
    thing: SceneObject, draws: KeyedDraws
) -> tuple[Placed, str, str, tuple[QuestionAnswer, ...]]:
    """One big or small object in one of nine cells."""
    where = draws.choice(list(CELLS))
    size_word = draws.choice(("big", "small"))
    size = (32 if size_word == "big" else 18) + 2 * draws.integer(2)
    column, row = CELLS[where]
    margin = size // 2 + 1
    x, y = ((margin, 32, 63 - margin)[i] for i in (column, row))
    placed = ((thing.name, x, y, size),)
    sentence = f"a {size_word} {thing.name} in the {where}"
    if where in ("top", "bottom", "left", "right"):
        sentence = f"a {size_word} {thing.name} at the {where}"
    questions = (
        QuestionAnswer(f"where is the {thing.name}?", where, "where"),
        QuestionAnswer("big or small?", size_word, "size"),
    )
    return placed, sentence, f"a picture of {sentence}", questions


def _presence(
    objects: Sequence[SceneObject], present: Sequence[SceneObject], draws: KeyedDraws
) -> tuple[QuestionAnswer, ...]:
    """Is there ...? once with yes and once with no, the absent thing of the same category."""
    asked = draws.choice(present)
    names = {thing.name for thing in present}
    absent = [o for o in objects if o.category == asked.category and o.name not in names]
    if not absent:
        return ()
    other = draws.choice(absent)
    return (
        QuestionAnswer(f"is there {with_article(asked.name)}?", "yes", "is_there"),
        QuestionAnswer(f"is there {with_article(other.name)}?", "no", "is_there"),
    )


def _jitter(draws: KeyedDraws, reach: int) -> int:
    return draws.integer(2 * reach + 1) - reach
