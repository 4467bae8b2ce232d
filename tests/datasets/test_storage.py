"""Remote shards: the same samples by byte ranges, and no command and no unknown protocol."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from multimodal_dlm.datasets import MixtureReader, open_manifest
from multimodal_dlm.datasets.storage import RangeReader, as_path
from multimodal_dlm.datasets.validation import validate_manifest
from multimodal_dlm.errors import DataError
from tests.datasets.toy import toy_mixture


class RangeHandler(SimpleHTTPRequestHandler):
    """Files with byte ranges; notes what was asked for."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        self.asked.append((self.path, span))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        if span is not None:
            first, _, end = span.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(end or last), last)
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Accept-Ranges", "bytes")
        if span is not None:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def served(tmp_path):
    """Address of `tmp_path` on loopback, and the requests."""
    handler = type("Handler", (RangeHandler,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def in_memory(root: Path) -> str:
    files = fsspec.filesystem("memory")
    for path in root.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/toy{root}/{path.relative_to(root)}", path.read_bytes())
    return f"memory://toy{root}"


def rows(manifest, count=6):
    reader = MixtureReader(manifest, batch_size=12)
    batches = [reader.batch(number) for number in range(count)]
    pictures = [reader.readers["shapes"][index].image.tolist() for index in (0, 7, 24)]
    return batches, pictures, manifest.fingerprint


@pytest.mark.parametrize("place", ["memory", "file", "http"])
def test_remote_shards_give_the_same_rows(tmp_path, served, place):
    local = toy_mixture(tmp_path)
    if place == "http":
        pytest.importorskip("aiohttp")
    root = {"memory": in_memory(tmp_path), "file": f"file://{tmp_path}", "http": served[0]}[place]
    remote = open_manifest(f"{root}/mixture.yaml")
    assert rows(remote) == rows(local)
    found = validate_manifest(remote)
    assert found.num_good == found.num_samples == 38
    assert found.findings == []


def test_a_sample_costs_ranges_of_its_shard_alone(tmp_path, served):
    pytest.importorskip("aiohttp")
    toy_mixture(tmp_path)
    manifest = open_manifest(f"{served[0]}/shapes.yaml", served[0])
    served[1].clear()
    assert MixtureReader(manifest, batch_size=1).readers["shapes"][5].key == "shapes-005"
    shards = [(path, span) for path, span in served[1] if path.endswith(".tar")]
    assert {path for path, _ in shards} == {"/shapes/shapes-train-000001.tar"}
    assert all(span is not None for _, span in shards)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_read_remote_shards_after_a_fork(tmp_path):
    local = toy_mixture(tmp_path)
    remote = open_manifest(f"{in_memory(tmp_path)}/mixture.yaml")
    reader = MixtureReader(remote, batch_size=12)
    first = reader.batch(0)  # The filesystem is open before the fork.
    loader = DataLoader(reader, batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = [batch for batch, _ in zip(loader, range(4), strict=False)]
    whole = MixtureReader(local, batch_size=12)
    assert found == [whole.batch(number) for number in range(4)]
    assert first == found[0]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pipe:cat /etc/passwd", "`pipe:` runs a command"),
        ("PIPE:cat x", "`pipe:` runs a command"),
        ("htp://host/x.yaml", "Unknown protocol `htp`. Did you mean `http`"),
        ("ssh://host/x.yaml", "Unknown protocol `ssh`"),
        ("file:x.yaml", "protocol://"),
        ("simplecache::http://host/x.yaml", "Unknown protocol|protocol://"),
        ("python:os.system", "Unknown protocol `python`"),
    ],
)
def test_commands_and_unknown_protocols_are_refused_by_name(place, message):
    for call in (lambda: open_manifest(place), lambda: open_manifest("x.yaml", place)):
        with pytest.raises(DataError, match=message) as caught:
            call()
        assert caught.value.reason == "protocol"


def test_what_cannot_be_reached_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="Manifest memory://nowhere/x.yaml does not exist"):
        open_manifest("memory://nowhere/x.yaml")
    path = as_path(f"file://{tmp_path}/none.tar")
    with pytest.raises(DataError, match="must be readable; got FileNotFoundError") as caught:
        path.read_bytes()
    assert caught.value.reason == "unreachable"
    assert str(as_path("a/b")) == "a/b"


def test_few_files_stay_open(tmp_path):
    ranges = RangeReader(most_open=2)
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 4)
    for number in (0, 1, 2, 3, 4, 0, 4):
        assert ranges.read(tmp_path / str(number), 1, 2) == bytes([number]) * 2
    assert len(ranges._files) == 2
    ranges.close()
