"""The global order: quotas, purity, resume, ranks and workers."""

import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.data import DataLoader

from multimodal_dlm.datasets import Manifest, MixtureReader, TrainingExample, open_manifest
from multimodal_dlm.datasets.asking import QuestionWeights
from multimodal_dlm.datasets.ordering import QuotaOrder, SourceOrder
from multimodal_dlm.datasets.sampling import KeyedDraws, hash_fraction, pick
from multimodal_dlm.datasets.schema import QuestionAnswer, Record
from multimodal_dlm.errors import ConfigError, DataError
from tests.datasets.toy import SIZES, toy_mixture

BATCH = 12


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return toy_mixture(tmp_path)


def batches(reader: MixtureReader, count: int) -> list[list[TrainingExample]]:
    return list(islice(reader, count))


def test_draws_belong_to_their_key_alone() -> None:
    draws = KeyedDraws(3, "stream", 5, 7)
    together = draws.uniforms(6)
    again = KeyedDraws(3, "stream", 5, 7)
    assert np.array_equal(together, np.concatenate([again.uniforms(2), again.uniforms(4)]))
    others = [
        KeyedDraws(4, "stream", 5, 7),
        KeyedDraws(3, "other", 5, 7),
        KeyedDraws(3, "stream", 5),
    ]
    assert all(not np.array_equal(together, other.uniforms(6)) for other in others)
    # Known answers: a changed generator would silently change every released order.
    assert KeyedDraws(0, "golden").words(2).tolist() == GOLDEN_WORDS
    assert hash_fraction("golden", 1) == pytest.approx(GOLDEN_FRACTION, abs=1e-15)


GOLDEN_WORDS = [9809520577255217123, 4560097605952326215]
GOLDEN_FRACTION = 0.6278487298673132


def test_uniforms_permutations_and_weighted_picks_are_fair() -> None:
    u = KeyedDraws(1, "fair").uniforms(20_000)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert sorted(KeyedDraws(1, "order").permutation(50)) == list(range(50))
    picked = Counter(pick(float(x), (1, 0, 3)) for x in u)
    assert picked[1] == 0
    assert abs(picked[2] / len(u) - 0.75) < 0.01
    assert pick(np.nextafter(1.0, 0), (1, 2)) == 1


@pytest.mark.parametrize("window_shards", [1, 2, 3, 100])
def test_each_pass_holds_every_sample_once(window_shards: int) -> None:
    order = SourceOrder([4, 1, 3, 5], seed=0, stream="s", window_shards=window_shards)
    passes = [[order[13 * p + i] for i in range(13)] for p in range(3)]
    assert all(sorted(numbers) == list(range(13)) for numbers in passes)
    assert len({tuple(numbers) for numbers in passes}) == 3
    again = SourceOrder([4, 1, 3, 5], seed=0, stream="s", window_shards=window_shards)
    assert [again[i] for i in reversed(range(39))] == [n for p in passes for n in p][::-1]
    if window_shards == 1:  # A window of one shard never mixes shards.
        owners = np.repeat([0, 1, 2, 3], [4, 1, 3, 5])[passes[0]]
        assert sum(owners[i] != owners[i + 1] for i in range(12)) == 3


def test_every_block_keeps_its_quotas_and_counts_its_draws() -> None:
    order = QuotaOrder({"a": 40, "b": 35, "none": 0, "c": 25}, seed=0, stream="s")
    assert order.size == 20
    drawn = [order[i] for i in range(60)]
    for block in range(3):
        names = Counter(name for name, _ in drawn[20 * block : 20 * (block + 1)])
        assert names == {"a": 8, "b": 7, "c": 5}
    for name, total in (("a", 24), ("b", 21), ("c", 15)):
        assert sorted(number for other, number in drawn if other == name) == list(range(total))


def test_sources_tasks_and_texts_keep_their_shares(manifest: Manifest) -> None:
    reader = MixtureReader(manifest, batch_size=BATCH)
    rows = [row for batch in batches(reader, 25) for row in batch if row.weight]
    sources = Counter(row.source for row in rows)
    assert abs(sources["shapes"] - 3 / 5 * len(rows)) <= 2
    tasks = Counter(row.task for row in rows if row.source == "shapes")
    assert abs(tasks["text_to_image"] - 2 * tasks["vqa"]) <= 2
    for row in rows:
        if row.task in ("vqa", "text"):
            assert (row.instruction, row.text) in {
                ("which?", row.record.qa[0].answer),
                ("is it?", "yes"),
            }
        else:
            assert row.instruction is None
            assert row.text == row.record.captions[1]  # Its weights are 0 and 1.
        assert row.key == row.record.key == f"{row.source}-{row.index:03d}"
        assert all(0 <= u < 1 for u in (row.window_draw, row.mask_draw))
    # Three passes end with a block of slots, so every sample has come exactly three times.
    passes = [row.index for row in rows if row.source == "shapes"][: 3 * SIZES["shapes"]]
    assert Counter(passes) == dict.fromkeys(range(SIZES["shapes"]), 3)


def test_the_order_is_a_pure_function_of_seed_and_number(manifest: Manifest) -> None:
    forward = batches(MixtureReader(manifest, seed=1, batch_size=BATCH), 9)
    reader = MixtureReader(manifest, seed=1, batch_size=BATCH)
    assert [reader.batch(n) for n in reversed(range(9))] == forward[::-1]
    other = batches(MixtureReader(manifest, seed=2, batch_size=BATCH), 1)
    assert [row.key for row in other[0]] != [row.key for row in forward[0]]
    per_epoch = reader.batches_per_epoch
    assert reader.batch(0) != reader.batch(per_epoch)


def test_a_reader_resumes_exactly_from_every_batch(manifest: Manifest) -> None:
    total = 2 * MixtureReader(manifest, batch_size=BATCH).batches_per_epoch + 2
    whole = batches(MixtureReader(manifest, batch_size=BATCH), total)
    for stop in range(total):
        first = MixtureReader(manifest, batch_size=BATCH)
        batches(first, stop)
        second = MixtureReader(manifest, batch_size=BATCH)
        second.load_state_dict(first.state_dict())
        assert batches(second, total - stop) == whole[stop:]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_give_the_global_batch(manifest: Manifest, world_size: int) -> None:
    whole = batches(MixtureReader(manifest, batch_size=BATCH), 6)
    ranks = [
        batches(MixtureReader(manifest, batch_size=BATCH, rank=r, world_size=world_size), 6)
        for r in range(world_size)
    ]
    assert [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_give_the_same_batches_in_turn(manifest: Manifest, num_workers: int) -> None:
    whole = batches(MixtureReader(manifest, batch_size=BATCH), 9)
    for start in (0, 3):
        reader = MixtureReader(manifest, batch_size=BATCH)
        reader.load_state_dict(reader.state_at(start))
        loader = DataLoader(
            reader, batch_size=None, num_workers=num_workers, multiprocessing_context="fork"
        )
        assert list(islice(loader, 9 - start)) == whole[start:]


def test_the_last_batch_of_an_epoch_is_filled_with_rows_of_weight_zero(manifest: Manifest) -> None:
    reader = MixtureReader(manifest, batch_size=BATCH)
    assert reader.slots_per_epoch == 40  # 38 samples, rounded up to blocks of five slots.
    assert reader.batches_per_epoch == 4
    weights = [[row.weight for row in batch] for batch in batches(reader, 8)]
    assert weights[:3] == [[1.0] * BATCH] * 3
    assert weights[3] == weights[7] == [1.0] * 4 + [0.0] * 8
    assert sum(map(sum, weights)) == 80


def test_readers_survive_pickling(manifest: Manifest) -> None:
    reader = MixtureReader(manifest, batch_size=BATCH)
    expected = reader.batch(3)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.batch(3) == expected


def test_mistakes_are_named(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match="`world_size` must divide .* got 5 and 12"):
        MixtureReader(manifest, batch_size=12, world_size=5)
    with pytest.raises(ConfigError, match="`rank` must lie in 0..1; got 2"):
        MixtureReader(manifest, batch_size=12, world_size=2, rank=2)
    with pytest.raises(DataError, match="Available: `train`"):
        MixtureReader(manifest, split="val", batch_size=12)
    reader = MixtureReader(manifest, batch_size=12)
    for change in ({"seed": 5}, {"batch_size": 8}, {"split": "val"}, {"manifest": "x"}):
        with pytest.raises(DataError, match=f"`{next(iter(change))}` must be that of the saved"):
            reader.load_state_dict({**reader.state_dict(), **change})


@pytest.mark.parametrize("name", ["../outside", "/etc/x", ".hidden", "a/b", "", 3])
def test_names_never_lead_out_of_a_folder(tmp_path: Path, name: object) -> None:
    toy_mixture(tmp_path)
    path = next(path for path in sorted(tmp_path.glob("*.yaml")) if "splits:" in path.read_text())
    content = yaml.safe_load(path.read_text())
    for changed in (
        {**content, "name": name},
        {**content, "splits": {name: content["splits"]["train"]}},
    ):
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(DataError, match="must be plain names"):
            open_manifest(path)


def test_a_source_of_another_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    one = toy_mixture(tmp_path / "a").fingerprint
    assert one == toy_mixture(tmp_path / "b").fingerprint
    assert one != toy_mixture(tmp_path / "c", weights=(1, 1)).fingerprint


def test_every_answer_to_a_question_is_asked_about_as_often() -> None:
    """Nine of ten pictures say no; drawn with the weights, half of the questions do."""
    answers = ["no"] * 9 + ["yes"]
    records = [
        Record(
            key=str(number), source="toy", split="train", license="MIT", captions=("a",),
            qa=(QuestionAnswer("is it red?", answer, "is"), QuestionAnswer("what?", "x", "what")),
        )
        for number, answer in enumerate(answers)
    ]  # fmt: skip
    asking = QuestionWeights(records, balance_answers=True)
    total: Counter[str] = Counter()
    for record in records:
        weights = asking.weights(record)
        assert weights[1] == 1.0
        total[record.qa[0].answer] += weights[0]
    assert total["yes"] == pytest.approx(total["no"])


def test_a_member_of_a_mixture_may_weigh_its_questions(tmp_path: Path) -> None:
    toy_mixture(tmp_path)
    members = [{"manifest": "shapes.yaml", "balance_answers": True, "tasks": {"vqa": 1}}]
    path = tmp_path / "balanced.yaml"
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    manifest = open_manifest(path)
    asked = [
        example.instruction
        for batch in batches(MixtureReader(manifest, batch_size=BATCH), 400)
        for example in batch
    ]
    # `which?` has another answer in each of 25 pictures, `is it?` has one: weights 25 and 1.
    assert abs(asked.count("which?") / len(asked) - 25 / 26) < 0.015
    del members[0]["balance_answers"]
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    evenly = open_manifest(path)
    assert evenly.fingerprint != manifest.fingerprint
    members[0]["question_weights"] = {"number": 0, "is": 3}
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    weighed = MixtureReader(open_manifest(path), batch_size=BATCH)
    assert {e.instruction for batch in batches(weighed, 20) for e in batch} == {"is it?"}
    members[0]["question_weights"] = {"is": 0, "number": 0}
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    with pytest.raises(DataError, match="must have a question of a type with a weight above 0"):
        MixtureReader(open_manifest(path), batch_size=BATCH).batch(0)
    members[0]["question_weights"] = {"numbers": 2}
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    with pytest.raises(DataError, match="question type `numbers`.*`number`"):
        MixtureReader(open_manifest(path), batch_size=BATCH)
    members[0]["question_weights"] = ["number"]
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    with pytest.raises(DataError, match="`question_weights` must map types to weights"):
        open_manifest(path)
    members[0]["question_weights"] = {"number": 0.5}
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    with pytest.raises(DataError, match="`question_weights.number` must be an integer"):
        open_manifest(path)
    members[0]["balance_answers"] = "sometimes"
    path.write_text(yaml.safe_dump({"name": "balanced", "mixture": members}))
    with pytest.raises(DataError, match="`balance_answers` must be true or false; got 'sometimes'"):
        open_manifest(path)
