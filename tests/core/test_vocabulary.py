import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multimodal_dlm.errors import VocabularyError
from multimodal_dlm.vocabulary import Segment, State, UnifiedVocabulary
from tests.core.toy import toy_vocabulary


def three_modalities() -> UnifiedVocabulary:
    return UnifiedVocabulary.build(
        {"text": [("text", 5)], "image": [("image.0", 4), ("image.1", 3)], "action": [("arm", 2)]},
        {"eos": ("text", 0), "fill": ("text", 1)},
        {"text": "abc"},
    )


def test_layout_keeps_64_ids_between_the_first_modality_and_the_others():
    vocabulary = three_modalities()
    assert vocabulary.columns("text") == range(5)
    assert vocabulary.columns("image") == range(69, 76)
    assert vocabulary.columns("action") == range(76, 78)
    assert vocabulary.vocab_size == 78
    assert vocabulary.modalities == ("text", "image", "action")
    names = ("pad", "boi", "eoi", "bos")
    assert [vocabulary.special_id(name) for name in names] == [5, 6, 7, 11]
    assert [vocabulary.mask_token_id(m) for m in vocabulary.modalities] == [8, 9, 10]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.data())
def test_codes_ids_and_columns_translate_back(text, coarse, fine, data):
    vocabulary = UnifiedVocabulary.build(
        {"text": [("text", text)], "image": [("image.0", coarse), ("image.1", fine)]}
    )
    code = data.draw(st.integers(0, fine - 1))
    codes = torch.tensor([code])
    ids = vocabulary.to_input_ids(codes, "image.1")
    assert vocabulary.to_codes(ids, "image.1").item() == code
    assert vocabulary.to_columns(ids, "image").item() == coarse + code
    assert torch.equal(vocabulary.from_columns(torch.tensor([coarse + code]), "image"), ids)


def test_masks_become_the_last_column_and_come_back():
    vocabulary = toy_vocabulary()
    mask = torch.tensor([vocabulary.mask_token_id("image")])
    assert vocabulary.to_columns(mask, "image").item() == 20
    assert torch.equal(vocabulary.from_columns(torch.tensor([20]), "image"), mask)
    assert vocabulary.is_masked(mask).item()
    special = torch.tensor(sorted(vocabulary.special_ids.values()))
    assert not vocabulary.is_masked(special).any()


def test_a_shared_mask_id_serves_every_modality():
    parts = (Segment("text", "text", 0, 4), Segment("image.0", "image", 4, 3))
    vocabulary = UnifiedVocabulary(
        (*parts, Segment("functional", "", 7, 1)), {}, (State("mask", 7, None),)
    )
    assert vocabulary.mask_token_id("text") == vocabulary.mask_token_id("image") == 7
    assert vocabulary.to_columns(torch.tensor([7, 4]), "image").tolist() == [3, 0]


def test_restricted_states_allow_their_columns_only():
    base = toy_vocabulary()
    state = State("mask_dark", base.special_id("bos") + 1, "image", ((0, 3), (5, 6)))
    vocabulary = UnifiedVocabulary(base.segments, base.special_ids, (*base.states, state))
    ids = torch.tensor([vocabulary.mask_token_id("image"), state.id])
    allowed = vocabulary.allowed_columns(ids, "image")
    assert allowed is not None
    assert allowed[0].all()
    assert allowed[1].nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert vocabulary.allowed_columns(ids[:1], "image") is None
    assert vocabulary.is_masked(ids).all()


def test_json_round_trip_keeps_everything():
    vocabulary = three_modalities()
    again = UnifiedVocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert again.fingerprint == vocabulary.fingerprint
    sorted_names = json.loads(json.dumps(vocabulary.to_dict(), sort_keys=True))
    assert UnifiedVocabulary.from_dict(sorted_names) == vocabulary
    other = UnifiedVocabulary(
        vocabulary.segments, vocabulary.special_ids, vocabulary.states, {"text": "changed"}
    )
    assert other.fingerprint != vocabulary.fingerprint


@pytest.mark.parametrize("value", [-1, 20, 1000])
def test_codes_out_of_range_name_the_value(value):
    with pytest.raises(VocabularyError, match=rf"0\.\.19; got {value}"):
        toy_vocabulary().to_input_ids(torch.tensor([0, value]), "image.0")


def test_ids_of_another_modality_are_refused():
    with pytest.raises(VocabularyError, match="input_ids of modality `image`"):
        toy_vocabulary().to_columns(torch.tensor([3]), "image")


def test_names_are_suggested():
    with pytest.raises(VocabularyError, match="Did you mean `image`"):
        toy_vocabulary().columns("imagee")
    with pytest.raises(VocabularyError, match=r"Did you mean `image\.0`"):
        toy_vocabulary().segment("image0")
    with pytest.raises(VocabularyError, match="Did you mean `eos`"):
        toy_vocabulary().special_id("eo")


def test_overlap_and_torn_modalities_are_refused():
    with pytest.raises(VocabularyError, match="overlap"):
        UnifiedVocabulary((Segment("a", "text", 0, 4), Segment("b", "image", 3, 4)), {}, ())
    torn = (Segment("a", "x", 0, 2), Segment("c", "y", 2, 2), Segment("b", "x", 4, 2))
    with pytest.raises(VocabularyError, match="contiguous"):
        UnifiedVocabulary(torn, {}, ())


def test_a_config_of_something_else_is_refused():
    with pytest.raises(VocabularyError, match="to_dict"):
        UnifiedVocabulary.from_dict({"segments": []})
