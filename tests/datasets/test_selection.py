"""Filters, templates, weighting, skipping and the ledger: declared, exact, alike everywhere."""

import json
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from multimodal_dlm.datasets import MixtureReader, mixture, open_manifest
from multimodal_dlm.datasets.manifest import write_dataset_manifest
from multimodal_dlm.datasets.schema import Record, Sample
from multimodal_dlm.datasets.weighting import slot_shares, temperature_shares
from multimodal_dlm.datasets.writing import write_shards
from multimodal_dlm.errors import DataError
from multimodal_dlm.intake import encode_png
from multimodal_dlm.training.ledger import Ledger, ledger_lines, rows_digest
from multimodal_dlm.training.objectives.base import Batch

SIZES = {"big": 40, "small": 10}
STYLES = ("flat", "round", "line")
BATCH = 12


def write_source(root, name, *, spoiled=()):
    """A source whose samples `spoiled` have no picture in their picture's bytes."""
    folder = root / name
    folder.mkdir(parents=True)
    samples = []
    for number in range(SIZES[name]):
        meta = {"style": STYLES[number % 3], "number": number}
        record = Record(
            f"{name}-{number:02d}", name, "train", "MIT", ("x" * (number + 1),), (), meta
        )
        png = encode_png(np.full((8, 8, 3), number, dtype=np.uint8))
        samples.append(Sample(record, png[:40] if number in spoiled else png))
    shards = write_shards(samples, folder, f"{name}-train", 7)
    content = {
        "name": name, "recipe": name, "recipe_version": 1, "folder": name, "license": "MIT",
        "packages": [], "caption_templates": [], "weight": 1, "tasks": {"text_to_image": 1},
        "caption_weights": {"text_to_image": [1]},
    }  # fmt: skip
    write_dataset_manifest(root / f"{name}.yaml", content, {"train": shards}, "toy")


@pytest.fixture
def mix(tmp_path):
    for name in SIZES:
        write_source(tmp_path, name)

    def make(big=None, small=None, **options):
        members = [
            {"manifest": "big.yaml", **(big or {})},
            {"manifest": "small.yaml", **(small or {})},
        ]
        path = tmp_path / "mix.yaml"
        path.write_text(yaml.safe_dump({"name": "mix", **options, "mixture": members}))
        return open_manifest(path)

    return make


def epoch(reader):
    batches = islice(reader, reader.batches_per_epoch)
    return [row for batch in batches for row in batch if row.outcome != "filled"]


@pytest.mark.parametrize(
    ("declared", "keeps"),
    [
        ({"allow": {"meta.style": ["flat", "line"]}}, lambda n: n % 3 != 1),
        ({"deny": {"meta.style": "flat", "meta.number": [1, 2]}}, lambda n: n % 3 and n > 2),
        ({"caption_length": [5, 9]}, lambda n: 5 <= n + 1 <= 9),
        ({"key_suffix": ["-03", "7"]}, lambda n: n == 3 or n % 10 == 7),
        ({"allow": {"split": ["train"]}, "key_suffix": "0"}, lambda n: n % 10 == 0),
    ],
)
def test_a_filter_decides_what_is_drawn(mix, declared, keeps):
    reader = MixtureReader(mix({"filter": declared, "passes": 1}, {"passes": 1}), batch_size=BATCH)
    drawn = [row.record.meta["number"] for row in epoch(reader) if row.source == "big"]
    assert sorted(drawn) == [n for n in range(40) if keeps(n)]
    selection = reader.selections["big"]
    assert selection.size + sum(selection.filtered.values()) == 40


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"alow": {}}, "Unknown filter `alow`. Did you mean `allow`"),
        ({"allow": {"style": ["flat"]}}, "field of a record `style`. Did you mean `meta.style`"),
        ({"allow": {"meta.stile": ["flat"]}}, "no record has .*`meta.stile`.* `meta.style`"),
        ({"allow": {"meta.style": ["flaat"]}}, "left none of 40 .*Values that occur: .*'flat'"),
        ({"caption_length": [9, 5]}, r"must be \[shortest, longest\]"),
        ({"key_suffix": [3]}, "`filter.key_suffix` must be texts"),
        (["allow"], "`filter` must be a mapping"),
        ({"deny": ["flat"]}, "`filter.deny` must map fields to values"),
    ],
)  # fmt: skip
def test_a_wrong_filter_is_named(mix, declared, message):
    with pytest.raises(DataError, match=message):
        MixtureReader(mix({"filter": declared}), batch_size=BATCH)


def test_templates_make_the_captions(mix):
    templates = ["{meta.style} no. {meta.number}", "{source}: {caption}", "{key}"]
    manifest = mix({"templates": templates, "passes": 4}, {"passes": 1})
    rows = [row for row in epoch(MixtureReader(manifest, batch_size=BATCH)) if row.source == "big"]
    uses = Counter()
    for row in rows:
        made = [
            f"{row.record.meta['style']} no. {row.record.meta['number']}",
            f"big: {row.record.captions[0]}",
            row.key,
        ]
        uses[made.index(row.text)] += 1
    assert min(uses.values()) > len(rows) / 5
    weighed = mix({"templates": templates, "caption_weights": {"text_to_image": [0, 0, 1]}})
    rows = epoch(MixtureReader(weighed, batch_size=BATCH))
    assert all(row.text == row.key for row in rows if row.source == "big")


def test_a_field_comes_with_its_article(mix):
    templates = ["{a meta.style} one: {a caption}, {a meta.number}"]
    manifest = mix({"templates": templates, "passes": 1}, {"passes": 1})
    rows = [row for row in epoch(MixtureReader(manifest, batch_size=BATCH)) if row.source == "big"]
    articles = {style: f"a {style}" for style in STYLES}
    assert {row.text for row in rows} == {
        f"{articles[row.record.meta['style']]} one: a {row.record.captions[0]},"
        f" a {row.record.meta['number']}"
        for row in rows
    }


def test_a_dataset_is_a_member_twice_under_two_names(mix, tmp_path):
    few = {"manifest": "big.yaml", "name": "few", "filter": {"key_suffix": ["-03"]}, "passes": 2}
    mix({"passes": 1}, {"passes": 1})
    path = tmp_path / "mix.yaml"
    members = [{"manifest": "big.yaml", "passes": 1}, few]
    path.write_text(yaml.safe_dump({"name": "mix", "mixture": members}))
    rows = epoch(MixtureReader(open_manifest(path), batch_size=BATCH))
    assert Counter(row.source for row in rows) == {"big": 40, "few": 2}
    assert {row.key for row in rows if row.source == "few"} == {"big-03"}
    path.write_text(yaml.safe_dump({"name": "mix", "mixture": members[:1] * 2}))
    with pytest.raises(DataError, match="`big` twice. Give one of the members another `name`"):
        open_manifest(path)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (["{meta.stile}"], "needs `meta.stile`.*Did you mean `meta.style`"),
        (["{style}"], "got `style`. Did you mean `meta.style`"),
        (["{meta.style.__class__}"], "must use the fields"),
        (["{0}"], "must use the fields"),
        (["{meta.style!r:>9}"], "must use the fields"),
        (["a {key"], "close every brace"),
        ("{key}", "must be 1 to 256 texts"),
        ([" "], "must be a text"),
    ],
)
def test_a_wrong_template_is_named(mix, templates, message):
    with pytest.raises(DataError, match=message):
        epoch(MixtureReader(mix({"templates": templates}), batch_size=BATCH))


def test_temperature_and_passes_set_the_shares(mix):
    assert temperature_shares({"a": 900, "b": 100}, 1.0) == {"a": 900, "b": 100}
    assert temperature_shares({"a": 900, "b": 100}, 2.0) == {"a": 750, "b": 250}
    assert temperature_shares({"a": 900, "b": 1, "c": 1}, 1e9) == {"a": 334, "b": 333, "c": 333}
    assert temperature_shares({"a": 10**9, "b": 1}, 1.0)["b"] == 1
    assert slot_shares({"a": 3}, {"a": 5}) == ({"a": 3}, 5)
    plan = MixtureReader(mix(temperature=2), batch_size=BATCH).epoch_plan
    assert plan.slots == {"big": 667, "small": 333}
    reader = MixtureReader(mix({"passes": 2}, {"passes": 0.5}), batch_size=BATCH)
    drawn = Counter(row.key for row in epoch(reader))
    assert {key: n for key, n in drawn.items() if key.startswith("big")} == {
        f"big-{n:02d}": 2 for n in range(40)
    }
    assert sum(n for key, n in drawn.items() if key.startswith("small")) == 5


@pytest.mark.parametrize(
    ("big", "small", "options", "message"),
    [
        ({"passes": 1}, {}, {}, "for every member or for none"),
        ({"passes": 1}, {"passes": 1}, {"temperature": 2}, "not both"),
        ({"weight": 2}, {}, {"temperature": 2}, "`weight` must not be given with"),
        ({}, {}, {"temperature": 0.5}, "`temperature` must be at least 1; got 0.5"),
        ({"passes": 0}, {"passes": 1}, {}, "`passes` must be a number above 0; got 0"),
        ({}, {}, {"temprature": 2}, "Unknown entry `temprature`. Did you mean `temperature`"),
        ({"filtr": {}}, {}, {}, "Unknown entry `filtr`. Did you mean `filter`"),
        ({}, {}, {"licenses": ["MITT", "CC0-1.0"]}, "it has MIT. Did you mean `MITT`"),
        ({}, {}, {"licenses": "MIT"}, "`licenses` must be a list"),
    ],
)
def test_a_wrong_mixture_is_named(mix, big, small, options, message):
    with pytest.raises(DataError, match=message):
        mix(big, small, **options)


FULL = (
    {"filter": {"deny": {"meta.style": ["line"]}}, "templates": ["{key}", "{meta.style}"]},
    {"templates": ["a {caption}", "{meta.number}"]},
)


def test_every_draw_is_the_same_on_any_ranks_and_workers(mix, tmp_path, monkeypatch):
    manifest = mix(*FULL, temperature=3, licenses=["MIT"])
    whole = list(islice(MixtureReader(manifest, batch_size=BATCH), 8))
    for ranks, workers in ((2, 0), (3, 2), (1, 4)):
        got = []
        for number in range(8):
            batch = []
            for rank in range(ranks):
                reader = MixtureReader(manifest, batch_size=BATCH, rank=rank, world_size=ranks)
                if workers:
                    info = SimpleNamespace(id=number % workers, num_workers=workers)
                    monkeypatch.setattr(mixture, "get_worker_info", lambda info=info: info)
                batch += list(islice(reader, number // max(workers, 1) + 1))[-1]
                monkeypatch.undo()
            got.append(batch)
        assert got == whole


@pytest.fixture
def spoiled(tmp_path):
    root = tmp_path / "spoiled"
    write_source(root, "big", spoiled=(3, 20))
    return open_manifest(root / "big.yaml")


def test_a_skipped_sample_is_a_row_of_weight_zero_and_moves_nothing(spoiled, mix):
    good = epoch(MixtureReader(mix({"passes": 1}, {"passes": 1}), batch_size=BATCH))
    assert len(good) == 50
    reader = MixtureReader(spoiled, batch_size=8, max_skipped=2)
    rows = epoch(reader)
    assert Counter(row.outcome for row in rows) == {"yielded": 38, "picture": 2}
    assert {row.weight for row in rows if row.outcome == "picture"} == {0.0}
    assert sorted(row.index for row in rows if row.weight) == sorted(set(range(40)) - {3, 20})
    unspoiled = MixtureReader(open_manifest(mix().sources["big"].splits["train"][0].path.parents[1]
                                            / "big.yaml"), batch_size=8)  # fmt: skip
    for row, other in zip(rows, epoch(unspoiled), strict=True):
        assert row.weight == 0 or (row.key, row.window_draw) == (other.key, other.window_draw)
    parts = [
        MixtureReader(spoiled, batch_size=8, max_skipped=0.05, rank=rank, world_size=2).batch(2)
        for rank in (0, 1)
    ]
    assert parts[0] + parts[1] == rows[16:24]
    with pytest.raises(DataError, match=r"at most 1 of 40 .*2 are unusable \(picture 2\)"):
        MixtureReader(spoiled, batch_size=8, max_skipped=1)


def test_a_repaired_shard_that_a_filter_now_judges_ends_the_order(mix, tmp_path):
    manifest = mix({"filter": {"deny": {"meta.number": [3]}}})
    (shard, *_) = manifest.sources["big"].splits["train"]
    whole = shard.path.read_bytes()
    before = MixtureReader(manifest, batch_size=BATCH)
    shard.path.write_bytes(whole[:600] + b"?" + whole[601:])
    damaged = MixtureReader(manifest, batch_size=BATCH, max_skipped=7)
    assert (before.selections["big"].size, damaged.selections["big"].size) == (39, 40)
    state = damaged.state_at(2)
    MixtureReader(manifest, batch_size=BATCH, max_skipped=7).load_state_dict(state)
    shard.path.write_bytes(whole)
    with pytest.raises(DataError, match="The reader's `selection` must be that of the saved state"):
        MixtureReader(manifest, batch_size=BATCH, max_skipped=7).load_state_dict(state)
    before.load_state_dict(MixtureReader(manifest, batch_size=BATCH, max_skipped=7).state_at(2))


def ledger_of(reader, count=None, change=lambda batches: batches):
    ledger, reports = Ledger(reader.epoch_plan), []
    for step in range(count or reader.batches_per_epoch):
        rows = reader.batch(step)
        batch = Batch(
            None,
            tuple(f"{row.source}/{row.key}" for row in rows),
            outcomes=tuple(row.outcome for row in rows),
            numbers=tuple(row.row for row in rows),
        )
        reports.append(ledger.add(step, change([batch])))
    return ledger, reports


def test_the_ledger_adds_up_each_epoch(spoiled, mix):
    _, reports = ledger_of(MixtureReader(spoiled, batch_size=9, max_skipped=2), 10)
    assert [report is not None for report in reports] == [False, False, False, False, True] * 2
    assert reports[9]["sources"]["big"] == {
        "manifest": 40, "filtered": {}, "slots": 40, "yielded": 38, "skipped": {"picture": 2},
    }  # fmt: skip
    assert reports[9]["filled"] == 5
    assert ledger_lines(reports[9]) == [
        "Ledger, epoch 1, big: 38 yielded + 2 skipped (picture 2) + 0 filtered = 40 in the"
        " manifest."
    ]
    filtered = mix({"filter": {"allow": {"meta.style": "flat"}}, "passes": 1}, {"passes": 2})
    _, reports = ledger_of(MixtureReader(filtered, batch_size=BATCH))
    assert ledger_lines(reports[-1]) == [
        "Ledger, epoch 0, big: 14 yielded + 0 skipped + 26 filtered (allow.meta.style 26) = 40 in"
        " the manifest.",
        "Ledger, epoch 0, small: 20 yielded + 0 skipped = 20 rows, 2.00 passes over 10 samples; + 0"
        " filtered = 10 in the manifest.",
    ]


def test_the_ledger_goes_on_from_a_checkpoint_on_other_ranks(spoiled):
    whole = MixtureReader(spoiled, batch_size=8, max_skipped=2)
    first, _ = ledger_of(whole, 3)
    first.share()
    others = []  # What rank 1 counted, as it would be gathered.
    second = Ledger(whole.epoch_plan, lambda own: [*own, *others])
    second.restore(json.loads(json.dumps(first.state())))
    for step in (3, 4):
        for rank in (1, 0):
            reader = MixtureReader(spoiled, batch_size=8, max_skipped=2, rank=rank, world_size=2)
            rows = reader.batch(step)
            places = np.arange(4) + 4 * rank
            if rank == 1:
                counts = Counter((row.source, row.outcome) for row in rows)
                others[:] = [(dict(counts), rows_digest(places + 8 * step))]
                continue
            keys = tuple(f"{row.source}/{row.key}" for row in rows)
            outcomes = tuple(row.outcome for row in rows)
            numbers = tuple(row.row for row in rows)
            assert numbers == tuple((places + 8 * step).tolist())
            batch = Batch(None, keys, outcomes=outcomes, numbers=numbers)
            report = second.add(step, [batch])
            if step == 3:
                second.share()
    assert report["sources"]["big"]["yielded"] == 38


@pytest.mark.parametrize("fault", ["lost", "twice", "other source"])
def test_the_ledger_notices_lost_and_repeated_rows(mix, fault):
    def change(batches):
        (batch,) = batches
        if fault == "lost":
            return [
                Batch(
                    None,
                    batch.keys[:-1],
                    outcomes=batch.outcomes[:-1],
                    numbers=batch.numbers[:-1],
                )
            ]
        if fault == "twice":
            numbers = (*batch.numbers[:-1], batch.numbers[0])
            return [Batch(None, batch.keys, outcomes=batch.outcomes, numbers=numbers)]
        keys = tuple(key.replace("small", "big") for key in batch.keys)
        return [Batch(None, keys, outcomes=batch.outcomes, numbers=batch.numbers)]

    with pytest.raises(DataError, match="Rows were lost or came twice") as caught:
        ledger_of(MixtureReader(mix(), batch_size=BATCH), change=change)
    assert caught.value.reason == "ledger"


def test_the_ledger_notices_a_batch_that_comes_again(mix):
    reader = MixtureReader(mix(), batch_size=BATCH)
    first = reader.batch(0)
    reader.batch = lambda number: first
    with pytest.raises(DataError, match="Rows were lost or came twice"):
        ledger_of(reader)
