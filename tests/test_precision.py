"""The one rule for `mixed_precision: auto`: each set of capabilities, and this machine's own."""

import logging
import platform
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from multimodal_dlm import precision
from multimodal_dlm.commands.loading import pick_device
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline
from multimodal_dlm.precision import (
    BF16Support,
    Precision,
    autocast,
    bf16_support,
    cpu_support,
    resolve_precision,
    software_bf16,
    warn_of_software_bf16,
)
from tests.pipelines.tiny import tiny_components

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "value", "reason"),
    [
        ({}, "no", "this CPU has no bf16 instructions"),
        ({"avx2": True, "fma3": True}, "no", "this CPU has no bf16 instructions"),
        ({"avx512_f": True, "avx512_vnni": True}, "no", "this CPU has no bf16 instructions"),
        ({"amx_tile": True, "amx_int8": True}, "no", "this CPU has no bf16 instructions"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16", "this CPU has AVX512-BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16", "this CPU has AMX"),
        ({"neon": True, "bf16": False, "sve": True}, "no", "this CPU has no bf16 instructions"),
        ({"neon": True, "bf16": True}, "bf16", "this CPU has Arm bf16"),
    ],
)
def test_each_set_of_instructions_has_its_answer(capabilities, value, reason):
    found = resolve_precision("auto", cpu_support(capabilities, has_onednn=True))
    assert (found.value, str(found)) == (value, f"{value} (auto: {reason})")
    without = resolve_precision("auto", cpu_support(capabilities, has_onednn=False))
    assert without.value == "no"
    assert ("no oneDNN" in without.reason) == (value == "bf16")


def test_a_stated_value_stays_on_every_device():
    for value in ("bf16", "no"):
        for is_fast in (False, True):
            found = resolve_precision(value, BF16Support(is_fast, "a reason"))
            assert found == Precision(value)
            assert str(found) == value


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").is_file(), reason="x86 Linux"
)
def test_this_cpu_is_what_the_system_says():
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split()
    is_fast = torch.backends.mkldnn.is_available() and bool({"amx_bf16", "avx512_bf16"} & {*flags})
    assert bf16_support(CPU).is_fast == is_fast
    assert (software_bf16(CPU) is None) == is_fast


def test_a_device_nobody_measured_computes_in_float32():
    found = resolve_precision("auto", bf16_support(torch.device("meta")))
    assert str(found) == "no (auto: bf16 is not known to be fast on `meta`)"
    assert software_bf16(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_what_its_compute_capability_says():
    is_fast = torch.cuda.get_device_capability()[0] >= 8
    support = bf16_support(torch.device("cuda"))
    assert support == BF16Support(is_fast, f"this GPU has {'' if is_fast else 'no '}bf16 units")


def test_forwards_run_in_what_was_resolved():
    left = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (left @ left).dtype == torch.bfloat16
    with autocast(CPU, "no"):
        assert (left @ left).dtype == torch.float32
    with pytest.raises(AssertionError, match="auto"):
        autocast(CPU, "auto")


def test_slow_bf16_is_said_once_with_its_remedy(monkeypatch, caplog):
    precision._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="multimodal_dlm"):
        monkeypatch.setattr(precision, "cpu_capabilities", lambda: {"amx_bf16": True})
        warn_of_software_bf16(CPU, torch.bfloat16)
        monkeypatch.setattr(precision, "cpu_capabilities", dict)
        warn_of_software_bf16(CPU, torch.float32)
        warn_of_software_bf16(torch.device("meta"), torch.bfloat16)
        assert caplog.messages == []
        for _ in range(2):
            warn_of_software_bf16(CPU, torch.bfloat16)
    assert caplog.messages == [
        "bf16 is computed in software, many times slower than float32: this CPU has no bf16"
        " instructions. Load with `dtype=torch.float32`, or call `pipe.to(torch.float32)`."
    ]


def test_a_pipeline_in_software_bf16_says_so_once(monkeypatch, caplog):
    precision._warn_once.cache_clear()
    monkeypatch.setattr(precision, "cpu_capabilities", dict)
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    with caplog.at_level(logging.WARNING, logger="multimodal_dlm"):
        pipe("a red apple", num_inference_steps=1)
        assert caplog.messages == []
        pipe.to(torch.bfloat16)
        for _ in range(2):
            pipe("a red apple", num_inference_steps=1)
    said = [r.getMessage() for r in caplog.records if r.name == "multimodal_dlm.precision"]
    assert len(said) == 1
    assert "`pipe.to(torch.float32)`" in said[0]


def test_a_device_without_float64_is_not_computed_on(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert pick_device("auto") == "cpu"
    for device in ("mps", "mps:0"):
        with pytest.raises(ConfigError, match=f"must compute in float64, .*; got `{device}`"):
            pick_device(device)


def test_a_pipeline_stays_where_float64_is():
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    for call in (
        lambda: pipe.to("mps"),
        lambda: pipe.to(torch.device("mps", 0)),
        lambda: pipe.to(device="mps"),
        lambda: pipe.to("mps", torch.float32),
    ):
        with pytest.raises(
            ConfigError, match="must compute in float64, which Apple's MPS does not"
        ):
            call()
    assert pipe.device.type == "cpu"
    assert pipe.to(device="cpu") is pipe


def test_a_call_on_mps_is_refused_however_the_components_came_there(monkeypatch):
    pipe = UnifiedTextToImagePipeline(**tiny_components())
    monkeypatch.setattr(
        DiffusionPipeline, "_execution_device", property(lambda self: torch.device("mps", 0))
    )
    with pytest.raises(ConfigError, match="must compute in float64, .*; got `mps:0`"):
        pipe("a red apple", num_inference_steps=1)
