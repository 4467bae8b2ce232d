"""Which of two statements about a scene is true, told by likelihood: relations and names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from multimodal_dlm.errors import DataError
from multimodal_dlm.evaluation.encoding import encode_images
from multimodal_dlm.evaluation.held_out import HeldOut
from multimodal_dlm.evaluation.measurement import (
    NO_SCORE_IN_BLOCKS,
    Measurement,
    mean_metric,
    register_measure,
)
from multimodal_dlm.evaluation.measures.likelihood import trained_caption
from multimodal_dlm.evaluation.scene_slots import slots_of_caption
from multimodal_dlm.pipelines import UnifiedImageToTextPipeline
from multimodal_dlm.tasks import TASKS

NUM_DRAWS = 8
OPPOSITES = {"to the left of": "to the right of", "above": "below"}
OPPOSITES |= {opposite: relation for relation, opposite in OPPOSITES.items()}


@dataclass(frozen=True)
class Statement:
    """`first relation second tail`: a scene's caption in parts.

    Args:
        first: What is named first, with its article.
        relation: A key of `OPPOSITES`.
        second: What is named second, with its article.
        tail: What follows, such as the background.
    """

    first: str
    relation: str
    second: str
    tail: str

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}{self.tail}"


def parse_statement(caption: str) -> Statement | None:
    """The parts of a caption; None where it states no relation."""
    slots = slots_of_caption(caption)
    if "relation" not in slots:
        return None
    things = slots["first"], slots["second"]
    for relation in OPPOSITES:
        for first, second in (things, things[::-1]):
            if caption.startswith(start := f"{first} {relation} {second}"):
                return Statement(first, relation, second, caption[len(start) :])
    return None


def false_statements(true: Sequence[Statement], seed: int) -> dict[str, list[Statement]]:
    """Of each true statement three false ones, each by one change.

    `swapped`: the same words, the two things exchanged. `reversed`: the opposite relation.
    `renamed`: one of the two things, by turns, is one of another row that is neither of them.

    Args:
        true: Statements, of at least three things in all.
        seed: Of the draw of other things.

    Raises:
        DataError: When a row has no third thing to name.
    """
    rng = np.random.default_rng(seed)
    things = sorted({thing for row in true for thing in (row.first, row.second)})
    found: dict[str, list[Statement]] = {"swapped": [], "reversed": [], "renamed": []}
    for place, row in enumerate(true):
        others = [thing for thing in things if thing not in (row.first, row.second)]
        if not others:
            raise DataError(
                "False statements need scenes of at least three things; got"
                f" {', '.join(things)}. Measure more scenes."
            )
        other = str(rng.choice(others))
        first, second = (other, row.second) if place % 2 else (row.first, other)
        found["swapped"].append(Statement(row.second, row.relation, row.first, row.tail))
        found["reversed"].append(
            Statement(row.first, OPPOSITES[row.relation], row.second, row.tail)
        )
        found["renamed"].append(Statement(first, row.relation, second, row.tail))
    return found


@register_measure(
    "scene_statements",
    "UnifiedImageToTextPipeline",
    ["caption"],
    only_whole_texts=NO_SCORE_IN_BLOCKS,
)
def measure_scene_statements(
    pipeline: UnifiedImageToTextPipeline,
    data: HeldOut,
    *,
    num_draws: int = NUM_DRAWS,
    tasks: Sequence[str] = TASKS,
) -> Measurement:
    """How often a picture speaks for its true caption against one that differs in one thing.

    The yes/no questions about relations as two statements to choose between, after the test of
    Yuksekgonul et al. 2023 (arXiv 2210.01936), which models that know bags of words fail: `swapped`
    has the same words. A statement's score is NELBO(text) - NELBO(text | picture) with the same
    masks for both, -NELBO(text | picture) alone where the model was not trained on texts without
    pictures; the higher one counts as chosen, a tie half. Baselines: `text_alone` chooses the text
    that is likelier without the picture, `chance` is one half. The pipeline answers no question
    here: see `answers` for what it says when asked.

    Args:
        pipeline: Scores captions.
        data: Scenes; the truth is the caption the model was trained to write, and captions that
            state no relation are left out.
        num_draws: Masks per text and estimate, the same for the texts of one picture.
        tasks: What the model was trained for.

    Raises:
        DataError: When no caption states a relation, or the scenes show fewer than three things.
    """
    samples = data.samples()
    captions = [trained_caption(data.source, sample.record) for sample in samples]
    stated = [(place, parse_statement(text)) for place, text in enumerate(captions)]
    rows = [(place, statement) for place, statement in stated if statement is not None]
    if not rows:
        raise DataError(
            f"`{data.source.name}` must have captions such as `a cat to the left of a dog` in split"
            f" `{data.split}`; none of {len(captions)} states a relation."
        )
    true = [statement for _, statement in rows]
    images = [samples[place].image for place, _ in rows]
    codes = encode_images(pipeline, images, data.batch_size)
    options: dict[str, Any] = {"num_draws": num_draws, "batch_size": data.batch_size}

    def score(task: str, statements: Sequence[Statement]) -> np.ndarray:
        generators = data.generators(slice(0, len(statements)))
        texts = [str(statement) for statement in statements]
        found = pipeline.score(task, codes=codes, text=texts, generator=generators, **options)
        return np.array([estimate.value for estimate in found])

    texts = {"true": true, **false_statements(true, data.seed)}
    given = {name: score("caption", statements) for name, statements in texts.items()}
    alone = {}
    if "unconditional_text" in tasks:
        alone = {name: score("unconditional_text", some) for name, some in texts.items()}
    metrics = {}
    for name in list(texts)[1:]:
        gains = {who: alone.get(who, 0.0) - given[who] for who in ("true", name)}
        baselines: dict[str, Any] = {"chance": 0.5}
        if alone:
            baselines["text_alone"] = list(_chosen(-alone["true"], -alone[name]))
        metrics[name] = mean_metric(
            list(_chosen(gains["true"], gains[name])), baselines=baselines, seed=data.seed
        )
    return Measurement(metrics)


def _chosen(scores: np.ndarray, others: np.ndarray) -> Iterator[float]:
    """1 where the first is higher, one half where they tie."""
    for score, other in zip(scores, others, strict=True):
        yield float(score > other) + 0.5 * float(score == other)
