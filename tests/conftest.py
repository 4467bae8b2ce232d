"""Fixtures for every test: no network, no Hub, explicit generators."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
LOOPBACK = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", ""}


class NetworkBlockedError(RuntimeError):
    """A test tried to reach a host other than this machine."""


def _check_host(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name is not None and name not in LOOPBACK:
        raise NetworkBlockedError(f"Tests run offline; something asked for host `{name}`.")


@pytest.fixture(autouse=True, scope="session")
def _offline() -> Iterator[None]:
    """Refuse every connection and every name look-up except loopback."""
    patch = pytest.MonkeyPatch()

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _check_host(address[0])
            return original(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _check_host(host)
        return look_up(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guard(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _restore_torch_defaults() -> Iterator[None]:
    """Undo a changed default dtype, so that no test depends on the one before it."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root folder of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def released_pipeline() -> Path:
    """The released pipeline folder; the test is skipped where it is not there."""
    folder = REPOSITORY / "pipelines" / "emoji-small"
    if not (folder / "model_index.json").is_file():
        pytest.skip("pipelines/emoji-small is not in this checkout")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
