"""Recipe `reasoning`: how items are written down, splits, packing, and what is built of them."""

from pathlib import Path

import pytest

from multimodal_dlm.datasets import Sample, iterate_samples, open_manifest
from multimodal_dlm.datasets.build import build
from multimodal_dlm.datasets.recipes.reasoning import TASKS, Item, pack_examples
from multimodal_dlm.datasets.validation import validate_manifest
from multimodal_dlm.tokenizers.text import encode_text, load_text_tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "tokenizers" / "reasoning"
LIMIT = {"train": 40, "val": 10, "test": 20}
NUMBERS = {"count_bits": 100, "manipulate_matrix": 1_000}


def test_bits_are_written_with_the_ones_so_far() -> None:
    task = TASKS["count_bits"]
    assert task.write({"metadata": {"binary": "1011"}}) == (
        "ones : 1 ? 0 ? 1 ? 1 ? =",
        "1 1 0 1 1 2 1 3",
    )
    assert task.result("1 1 0 1 1 2 1 3") == "3"
    assert task.result("") == ""


def test_a_matrix_is_written_row_by_row() -> None:
    task = TASKS["manipulate_matrix"]
    multiples = {"transform": "zero_divisible", "k": 3}

    def write(operation: dict, before: list, after: list) -> tuple[str, str] | None:
        return task.write(
            {"metadata": {"operations": [operation], "matrix": before, "solution": after}}
        )

    before = [[3, 6, 9, 1], [3, 4, 6, 9]]
    question, answer = write(multiples, before, [[0, 0, 0, 1], [0, 4, 0, 0]]) or ("", "")
    assert question == "zero multiples of 3 : 3 6 9 1 / 3 4 6 9 ="
    assert answer == "0 0 0 1 / 0 4 0 0"
    assert task.result(answer) == "0 0 0 1\n0 4 0 0"
    nearly_a_copy = [[0, 2, 0, 1], [0, 4, 0, 0]]
    assert write(multiples, [[3, 2, 9, 1], [3, 4, 6, 9]], nearly_a_copy) is None
    assert write({"transform": "crop"}, before, before) is None


def test_examples_are_packed_up_to_the_limit() -> None:
    examples = [Item("t", n, f"{n} + 1 =", f"{n + 1}") for n in range(5)]
    prompt, chosen = pack_examples("9 + 1 =", examples, 15)  # Six words each, and four.
    assert prompt == "0 + 1 = 1 | 9 + 1 ="
    assert chosen == examples[:1]
    prompt, chosen = pack_examples("9 + 1 =", examples, 16)
    assert chosen == examples[:2]
    assert len(prompt.split()) == 16
    assert pack_examples("9 + 1 =", examples, 4) == ("9 + 1 =", [])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("reasoning_gym")
    root = tmp_path_factory.mktemp("reasoning")
    build("reasoning", root, limit=LIMIT, show_progress=False)
    return root / "reasoning.yaml"


@pytest.fixture(scope="module")
def samples(built: Path) -> dict[str, list[Sample]]:
    source = open_manifest(built).sources["reasoning"]
    return {split: list(iterate_samples(source, split)) for split in LIMIT}


def test_the_same_bytes_are_built_each_time(built: Path, tmp_path: Path) -> None:
    again = build("reasoning", tmp_path, limit=LIMIT, show_progress=False)
    assert (tmp_path / "reasoning.yaml").read_text() == built.read_text()
    assert again["license"] == "Apache-2.0"
    assert validate_manifest(open_manifest(built)).num_good == sum(LIMIT.values())


def test_splits_share_no_question_and_examples_are_of_train(
    samples: dict[str, list[Sample]],
) -> None:
    asked = {s: {x.record.qa[0].question for x in rows} for s, rows in samples.items()}
    assert all(len(asked[split]) == LIMIT[split] for split in LIMIT)
    for split, questions in asked.items():
        assert {Item("", 0, question, "").split for question in questions} == {split}
    shown = 0
    for rows in samples.values():
        for record in (sample.record for sample in rows):
            for packed in record.qa[1:]:
                *examples, question = packed.question.split(" | ")
                assert question == record.qa[0].question
                assert packed.answer == record.qa[0].answer
                for example in examples:
                    # What is before the answer: twenty bits have 43 words, a matrix 53.
                    words = example.split()
                    length = 43 if packed.type.startswith("count_bits") else 53
                    assert Item("", 0, " ".join(words[:length]), "").split == "train"
                    assert " ".join(words[:length]) != question
                    shown += 1
    assert shown > 20


def test_a_word_is_a_token_and_lengths_are_kept(samples: dict[str, list[Sample]]) -> None:
    tokenizer = load_text_tokenizer(TOKENIZER)
    longest = 0
    for record in (sample.record for rows in samples.values() for sample in rows):
        for pair in record.qa:
            prompt, answer = (encode_text(tokenizer, t) for t in (pair.question, pair.answer))
            assert len(prompt) == len(pair.question.split())
            assert len(answer) == len(pair.answer.split())
            assert 32 <= len(answer) <= 64
            longest = max(longest, len(prompt) + len(answer) + 3)
    assert 256 < longest <= 1024
    for number in range(100):
        assert len(encode_text(tokenizer, str(number))) == 1


@pytest.mark.parametrize("name", TASKS)
def test_worked_answers_are_right_by_the_generators_own_scorer(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    task, num_written = TASKS[name], 0
    for number in range(NUMBERS[name]):
        entry = task.generator[number]
        written = task.write(entry)
        if written is None:
            continue
        num_written += 1
        assert task.generator.score_answer(task.result(written[1]), entry) == 1.0
        assert task.generator.score_answer(task.result("100 / 100"), entry) < 1.0
    assert num_written > 40
