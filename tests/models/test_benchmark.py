"""The training-step benchmark runs and reports what its readers look up."""

import argparse
import importlib.util
from pathlib import Path

import torch

from multimodal_dlm.models.memory import keep_freed_memory

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "training_step.py"


def test_the_report_holds_its_keys():
    spec = importlib.util.spec_from_file_location("training_step", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = {"preset": "tiny", "noise_conditioning": "none", "rows": 4, "length": 12}
    report = module.measure(argparse.Namespace(**options, micro_batch=2, steps=1))
    assert report["utilisation"] > 0
    assert report["tokens_per_second"] > 0
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert report["matmul_flops_per_step"] > 6 * weights * 4 * 12
    assert report["machine"]["threads"] == torch.get_num_threads()


def test_keeping_memory_says_whether_it_could():
    assert isinstance(keep_freed_memory(), bool)
