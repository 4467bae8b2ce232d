"""One folder of data and tokenizers for all tests of runs."""

from pathlib import Path

import pytest

from tests.training.runs import write_data, write_tokenizers


@pytest.fixture(scope="session")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_data(root)
    write_tokenizers(root)
    return root
