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
NUMBERS = range(200)


def test_a_sum_is_written_with_its_running_totals() -> None:
    write = TASKS["chain_sum"].write
    assert write({"metadata": {"expression": "7 + 5 - 3"}}) == (
        "7 + 5 = ? - 3 = ? =",
        "7 + 5 = 12 - 3 = 9",
    )
    assert write({"metadata": {"expression": "2 - 5 + 9"}}) is None
    assert TASKS["chain_sum"].result("7 + 5 = 12 - 3 = 9") == "9"
    assert TASKS["chain_sum"].result("") == ""


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ({"transform": "map", "from": 3, "to": 7}, "map 3 to 7"),
        ({"transform": "zero_divisible", "k": 4}, "zero multiples of 4"),
    ],
)
def test_a_matrix_is_written_row_by_row(operation: dict, said: str) -> None:
    task = TASKS["manipulate_matrix"]
    metadata = {"operations": [operation], "matrix": [[3, 1], [4, 3]], "solution": [[7, 1], [4, 7]]}
    question, answer = task.write({"metadata": metadata}) or ("", "")
    assert question == f"{said} : 3 1 / 4 3 ="
    assert answer == "7 1 / 4 7"
    assert task.result(answer) == "7 1\n4 7"
    left_out = {"operations": [{"transform": "crop"}]}
    assert task.write({"metadata": left_out}) is None


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
                    # What is before the answer: a sum of twelve has 46 words, a matrix 53.
                    words = example.split()
                    length = 46 if packed.type.startswith("chain_sum") else 53
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
    task, num_written, others = TASKS[name], 0, set()
    for number in NUMBERS:
        entry = task.generator[number]
        written = task.write(entry)
        if written is None:
            continue
        num_written += 1
        assert task.generator.score_answer(task.result(written[1]), entry) == 1.0
        assert task.generator.score_answer(task.result("100 / 100"), entry) < 1.0
        others.add(written[0].split(" :")[0].split()[0])
    assert num_written > 40
    if name == "manipulate_matrix":
        assert others == {"map", "zero"}
