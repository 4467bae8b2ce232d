import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.errors import CheckpointError, ConfigError
from multimodal_dlm.tokenizers.text import (
    load_text_tokenizer,
    text_fingerprint,
    train_text_tokenizer,
)

TEXTS = ["a red apple on a pale background", "how many cats?", "a noto emoji of an owl"] * 5
PLAIN = {"add_special_tokens": False, "split_special_tokens": True}


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(TEXTS, vocab_size=300)


def test_special_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<eos>", "<fill>"]) == [0, 1]
    assert tokenizer.eos_token_id == 0


def test_typed_special_tokens_are_plain_characters(tokenizer):
    ids = tokenizer.encode("a <eos> and <fill>", **PLAIN)
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids).strip() == "a <eos> and <fill>"


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20))
def test_any_text_comes_back(tokenizer, text):
    import unicodedata

    ids = tokenizer.encode(text, **PLAIN)
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.decode(ids).strip() == unicodedata.normalize("NFC", text).strip()


def test_save_and_load_keep_ids_and_fingerprint(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_text_tokenizer(tmp_path)
    assert again.encode("a red owl", **PLAIN) == tokenizer.encode("a red owl", **PLAIN)
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())["fingerprint"]
    assert stored == text_fingerprint(again) == text_fingerprint(tokenizer)


def test_changed_files_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not match its fingerprint"):
        load_text_tokenizer(tmp_path)


def test_training_is_deterministic(tokenizer):
    assert text_fingerprint(train_text_tokenizer(TEXTS, vocab_size=300)) == text_fingerprint(
        tokenizer
    )


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ConfigError, match="at least 258"):
        train_text_tokenizer(TEXTS, vocab_size=200)
