"""Metrics of a card: whose they are, and that a changed pipeline does not keep its parent's."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from multimodal_dlm.errors import DataError
from multimodal_dlm.pipelines import CardInfo, UnifiedTextToImagePipeline, load_pipeline
from multimodal_dlm.pipelines.card_metrics import scheduler_fingerprint, subject_of
from multimodal_dlm.pipelines.manifest import hash_files, hash_shared, write_manifest
from multimodal_dlm.pipelines.model_card import CARD_NAME, read_report, render_card
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.pipelines.tiny import tiny_components

METRICS = {"vqa": 0.5}
OTHER = {"modalities": {"text": {"eos_column": 0, "fill_column": 1}, "image": {"temperature": 0.3}}}


@pytest.fixture(scope="module", params=[0, 2, 3], ids=lambda count: f"{count} fingerprints")
def parent(request, tmp_path_factory):
    """A saved pipeline with metrics; its card says what they are of, or is one of before."""
    folder = tmp_path_factory.mktemp("parent")
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    said = ("model_fingerprint", "scheduler_fingerprint", "image_tokenizer_fingerprint")
    found = subject_of(pipe)
    assert found.keys() == set(said)
    measured = {name: found[name] for name in said[: request.param]}
    card = CardInfo(metrics=METRICS, measured=measured and {"suite": "quick", **measured})
    pipe.save_pretrained(folder)
    card.save(folder)
    write_manifest(folder)
    (folder / "README.md").write_text(render_card(load_pipeline(folder), hash_shared(folder)))
    return folder


def saved_metrics(pipe, folder, **options):
    pipe.save_pretrained(folder, **options)
    info, text = CardInfo.load(folder), (folder / "README.md").read_text()
    assert ("| vqa | 0.5 |" in text) == bool(info.metrics)
    if not info.metrics:
        assert info.measured == {}
        assert "taken with" not in text
    return dict(info.metrics)


def train(pipe):
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(0.1)


def train_unseen(pipe):
    next(pipe.transformer.parameters()).data.mul_(1.1)  # What no version of a tensor counts.


def sharpen(pipe):
    with torch.no_grad():
        pipe.image_tokenizer.decoder[-2].weight.mul_(1.1)  # The codes stay.


def reschedule(pipe):
    pipe.register_modules(scheduler=ConfidenceScheduler(**OTHER))


def test_metrics_stay_with_an_unchanged_pipeline(parent, tmp_path, caplog):
    pipe = load_pipeline(parent)
    assert saved_metrics(pipe, tmp_path / "one") == METRICS
    assert (tmp_path / "one" / CARD_NAME).read_bytes() == (parent / CARD_NAME).read_bytes()
    again = load_pipeline(tmp_path / "one")
    assert saved_metrics(again, tmp_path / "two", card=replace(again.card, title="T")) == METRICS
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (train, "model_fingerprint"),
        (train_unseen, "model_fingerprint"),
        (sharpen, "image_tokenizer_fingerprint"),
        (reschedule, "scheduler_fingerprint"),
    ],
)
def test_a_changed_pipeline_does_not_publish_its_parents_metrics(
    parent, tmp_path, caplog, change, named
):
    pipe = load_pipeline(parent)
    card = replace(pipe.card, title="Child")
    change(pipe)
    with caplog.at_level(logging.WARNING):
        assert saved_metrics(pipe, tmp_path / "one") == {}
        # Nor when its card is given with another title.
        assert saved_metrics(pipe, tmp_path / "two", card=card) == {}
    assert CardInfo.load(tmp_path / "two").title == "Child"
    assert [record.args for record in caplog.records] == [(f"`{named}`",)] * 2
    assert "multimodal-dlm card FOLDER --report" in caplog.text
    # What is measured of the child is its own.
    assert saved_metrics(pipe, tmp_path / "own", card=CardInfo(metrics={"vqa": 0.5, "b": 1})) != {}


def test_a_card_of_before_does_not_follow_to_another_decoder_by_hand(parent, tmp_path):
    loaded = load_pipeline(parent)
    other = load_pipeline(parent).image_tokenizer
    with torch.no_grad():
        other.decoder[-2].weight.mul_(1.1)
    made = UnifiedTextToImagePipeline.from_pipe(loaded, image_tokenizer=other)
    kept = saved_metrics(made, tmp_path / "made", card=loaded.card)
    # Without any fingerprint a card is of the model that it is saved with.
    assert kept == ({} if loaded.card.measured else METRICS)


def test_components_handed_in_are_not_the_folders(parent, tmp_path):
    loaded = load_pipeline(parent, scheduler=ConfidenceScheduler(**OTHER))
    assert saved_metrics(loaded, tmp_path / "scheduler") == {}
    kept = load_pipeline(parent, scheduler=ConfidenceScheduler())
    assert saved_metrics(kept, tmp_path / "kept") == METRICS
    changed = load_pipeline(parent)
    train(changed)
    sharpen(changed)
    for name in ("transformer", "image_tokenizer"):
        loaded = load_pipeline(parent, **{name: getattr(changed, name)})
        assert saved_metrics(loaded, tmp_path / name) == {}


def test_metrics_given_to_a_pipeline_are_of_the_state_it_was_saved_in(tmp_path):
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    assert saved_metrics(pipe, tmp_path / "one", card=CardInfo(metrics=METRICS)) == METRICS
    assert saved_metrics(pipe, tmp_path / "two") == METRICS
    train(pipe)
    assert saved_metrics(pipe, tmp_path / "three") == {}


def test_a_setting_that_is_not_set_does_not_change_the_fingerprint():
    config = dict(ConfidenceScheduler().config)
    found = scheduler_fingerprint("A", config)
    assert scheduler_fingerprint("A", {**config, "new": None, "more": {}, "_of_diffusers": 1}) == (
        found
    )
    assert scheduler_fingerprint("A", {**config, "new": 1}) != found
    assert scheduler_fingerprint("B", config) != found


def test_only_a_report_of_the_same_files_is_read(parent, tmp_path):
    path = tmp_path / "report.json"
    files = hash_files(parent)
    report = {"metrics": {"a": 1.0}, "pipeline": {"files": files}, "settings": {"suite": "quick"}}

    def read(**changes):
        path.write_text(json.dumps({**report, **changes}))
        return read_report(path, parent)

    assert read() == ({"a": 1.0}, {"suite": "quick"})
    unlike = {CARD_NAME: "0" * 64, "notes.md": "0" * 64, "train.log": "0" * 64}
    assert read(pipeline={"files": {**files, **unlike}})[0] == {"a": 1.0}
    name = "scheduler/scheduler_config.json"
    with pytest.raises(
        DataError, match=rf"`{name}` is 000000000000\.\.\. there and {files[name][:12]}"
    ):
        read(pipeline={"files": {**files, name: "0" * 64}})
    with pytest.raises(DataError, match=rf"`{name}` is missing there"):
        read(pipeline={"files": {k: v for k, v in files.items() if k != name}})
    with pytest.raises(DataError, match=r"and 5 more\. Measure this one, `multimodal-dlm evaluate"):
        read(pipeline={"files": {"gone.json": "0" * 64}})
    with pytest.raises(DataError, match="lists none: what was measured came from the Hub"):
        read(pipeline={"name": None, "files": {}})
    path.write_text(json.dumps({"metrics": {"a": 1.0}}))
    with pytest.raises(DataError, match=r"must hold the entries `metrics` and `pipeline`"):
        read_report(path, parent)


@pytest.mark.slow
def test_the_released_card_is_written_again_word_for_word(released_pipeline, tmp_path):
    pipe = load_pipeline(released_pipeline)
    text = (released_pipeline / "README.md").read_text(encoding="utf-8")
    made = render_card(pipe, hash_shared(released_pipeline))
    # Metrics and their baselines are kept by name, and were written in the order of the report.
    words = [sorted(card.replace(",", " ").split()) for card in (made, text)]
    assert words[0] == words[1]
    pipe.save_pretrained(tmp_path)
    assert pipe.card.metrics
    saved = (tmp_path / CARD_NAME).read_bytes()
    assert saved == (released_pipeline / CARD_NAME).read_bytes()
