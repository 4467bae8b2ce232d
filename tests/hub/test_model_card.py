"""The generated model card: complete, valid for the Hub, and true."""

import ast

import pytest
import yaml

from multimodal_dlm import pipelines
from multimodal_dlm.errors import CheckpointError, ConfigError, DataError
from multimodal_dlm.pipelines import CardInfo, UnifiedTextToImagePipeline, load_pipeline
from multimodal_dlm.pipelines.model_card import CARD_NAME, SECTIONS, read_report
from tests.pipelines.tiny import tiny_components


@pytest.fixture(scope="module")
def pipe():
    return UnifiedTextToImagePipeline(**tiny_components())


def card_of(pipe, folder, info=None):
    pipe.save_pretrained(folder, card=info)
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_is_what_the_hub_wants(pipe, tmp_path):
    info = CardInfo(datasets=("someone/data",), base_model="someone/base", language=("en", "de"))
    front, _ = card_of(pipe, tmp_path, info)
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "any-to-any"
    assert {"text-to-image", "visual-question-answering", "discrete-diffusion"} <= set(
        front["tags"]
    )
    assert front["language"] == ["en", "de"]
    assert front["datasets"] == ["someone/data"]
    assert front["base_model"] == "someone/base"


def test_every_section_is_there_and_nothing_is_left_to_fill_in(pipe, tmp_path):
    _, body = card_of(pipe, tmp_path, CardInfo())
    titles = [line[3:] for line in body.splitlines() if line.startswith("## ")]
    assert titles == list(SECTIONS)
    sections = [part.split("\n", 1)[1].strip() for part in body.split("\n## ")[1:]]
    assert all(sections)
    assert "More Information Needed" not in body
    assert body.count("not measured") >= 2
    assert "None" not in body


def test_usage_has_five_lines_for_each_of_the_five_pipelines(pipe, tmp_path):
    _, body = card_of(pipe, tmp_path, CardInfo())
    blocks = [part.split("```")[0].strip() for part in body.split("```python\n")[1:]]
    assert len(blocks) == 5
    named = set()
    for block in blocks:
        ast.parse(block)
        assert len(block.splitlines()) == 5
        named |= {name for name in pipelines.__all__ if name in block}
    assert len(named) == 5


def test_layout_and_fingerprints_are_those_of_the_model(pipe, tmp_path):
    _, body = card_of(pipe, tmp_path, CardInfo())
    vocabulary = pipe.transformer.vocabulary
    for segment in vocabulary.segments:
        assert f"| {segment.offset} | {segment.stop - 1} | {segment.size} |" in body
    for fingerprint in (*vocabulary.fingerprints.values(), vocabulary.fingerprint):
        assert fingerprint in body
    assert pipe.model_fingerprint in body
    for state in vocabulary.states:
        assert f"| `{state.name}` | {state.id} | mask state |" in body


def test_file_hashes_are_those_of_the_manifest(pipe, tmp_path):
    _, body = card_of(pipe, tmp_path, CardInfo())
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 9
    for line in lines:
        digest, name = line.split("  ")
        assert f"| `{name}` | `{digest}` |" in body


def test_metrics_are_listed(pipe, tmp_path):
    metrics = {"vqa": {"accuracy": 0.91234, "speed": None}}
    info = CardInfo(metrics=metrics, data="emoji", training="two hours", limits="small")
    _, body = card_of(pipe, tmp_path / "model", info)
    assert "| vqa / accuracy | 0.9123 |" in body
    assert "| vqa / speed | not measured |" in body
    for text in ("emoji", "two hours", "small"):
        assert text in body


def test_what_a_card_says_survives_loading_and_saving(pipe, tmp_path):
    info = CardInfo(title="Emoji model", metrics={"a": 1.5}, language=("en",), datasets=("x/y",))
    first = card_of(pipe, tmp_path / "first", info)
    loaded = load_pipeline(tmp_path / "first")
    assert loaded.card == info
    assert card_of(loaded, tmp_path / "second") == first
    for path in (tmp_path / "second").rglob("*.json"):  # Nor do paths of this machine get in.
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
        assert (
            path.read_bytes()
            == (tmp_path / "first" / path.relative_to(tmp_path / "second")).read_bytes()
        )


def test_damaged_cards_and_reports_are_refused(tmp_path):
    (tmp_path / CARD_NAME).write_text('{"titel": "x"}')
    with pytest.raises(ConfigError, match="Did you mean `title`"):
        CardInfo.load(tmp_path)
    (tmp_path / CARD_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        CardInfo.load(tmp_path)
    with pytest.raises(DataError, match="readable JSON report"):
        read_report(tmp_path / "missing.json", tmp_path)
    with pytest.raises(ConfigError, match="Unknown task of a model card `vqaa`"):
        CardInfo(tasks=("vqaa",))
