"""Options of a modality: defaults, presets, messages."""

import pytest

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.schedulers import (
    AbsorbingAncestralScheduler,
    ConfidenceScheduler,
    ModalitySettings,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_schedle": "linear"}, r"Did you mean `mask_schedule`\?"),
        ({"mask_schedule": "cosin"}, r"Did you mean `cosine`\?"),
        ({"start": 0.5, "stop": 0.5}, r"0 <= stop < start <= 1; got start 0.5 and stop 0.5"),
        ({"start": 1.5}, r"0 <= stop < start <= 1; got start 1.5"),
        ({"temperature": -1.0}, r"`temperature` must be a finite number, 0 or more; got -1.0"),
        ({"choice_temperature": float("inf")}, r"`choice_temperature` must be a finite.*got inf"),
        ({"top_k": 0}, r"`top_k` must be at least 1; got 0"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]; got 0.0"),
        ({"eos_column": 0}, r"`eos_column` and `fill_column` must be given together; got 0 and No"),
        ({"eos_column": 2, "fill_column": 2}, r"two different columns, 0 or more; got 2 and 2"),
        ("linear", r"`modalities\['words'\]` must be a dictionary of options; got str"),
        ({"temperature": "hot"}, r"Modality `words`:"),
    ],
)
def test_messages(options, message):
    with pytest.raises(ConfigError, match=message):
        ConfidenceScheduler(modalities={"words": options})


def test_modalities_must_hold_an_entry():
    with pytest.raises(ConfigError, match=r"`modalities` must be a dictionary.*one entry or more"):
        ConfidenceScheduler(modalities={})


def test_unknown_count_rule():
    with pytest.raises(ConfigError, match=r"Unknown `counts` rule `plan`. Did you mean `planned`"):
        AbsorbingAncestralScheduler(counts="plan")


def test_options_left_out_take_their_defaults_and_are_stored():
    scheduler = ConfidenceScheduler(modalities={"words": {"temperature": 0.7}})
    stored = scheduler.config.modalities["words"]
    assert stored == {**ModalitySettings().to_options(), "temperature": 0.7}
    assert ModalitySettings.from_options("words", stored).to_options() == stored


def test_presets():
    text = ConfidenceScheduler().config.modalities["text"]
    image = ConfidenceScheduler().config.modalities["image"]
    assert (text["temperature"], text["eos_column"], text["fill_column"]) == (0.0, 0, 1)
    assert (image["mask_schedule"], image["temperature"]) == ("cosine", 1.0)
    assert image["choice_temperature"] > 0.0
    ancestral = AbsorbingAncestralScheduler().config.modalities
    assert all(options["temperature"] == 1.0 for options in ancestral.values())


def test_local_time_and_masked_share():
    settings = ModalitySettings(start=0.75, stop=0.25)
    assert settings.local_time(1.0) == 1.0
    assert settings.local_time(0.5) == pytest.approx(0.5)
    assert settings.local_time(0.1) == 0.0
    assert settings.masked_share(0.5) == pytest.approx(0.5)
    assert settings.masked_share(0.25) == 0.0
    assert settings.masked_share(0.75) == 1.0
