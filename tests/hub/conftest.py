"""A stand-in for the Hub behind the client's own HTTP layer: nothing leaves the process."""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

httpx = pytest.importorskip("httpx2" if huggingface_hub.__version__ >= "2" else "httpx")

COMMIT = "c" * 40
ENDPOINT = "https://huggingface.co"


@dataclass
class FakeHub:
    """One model repository that answers the requests of `huggingface_hub`."""

    files: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    fails_commit: bool = False
    asks_review: bool = False

    def __call__(self, request: Any) -> Any:
        """Answer one request."""
        path = request.url.path
        self.requests.append((request.method, path))
        if request.url.host == "storage.example":
            self.uploads[path.strip("/")] = request.read()
            return httpx.Response(200)
        if path == "/api/repos/create":
            self.created.append(json.loads(request.read()))
            return httpx.Response(200, json={"url": f"{ENDPOINT}/someone/model"})
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(request.read())["content"])
            return httpx.Response(200, json={"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self._preupload(json.loads(request.read()))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(request.read()))
        if "/commit/" in path:
            self.asks_review = request.url.params.get("create_pr") == "1"
            return self._commit(request.read())
        if "/tree/" in path:
            return httpx.Response(200, json=[self._entry(name) for name in self.files])
        if path.startswith("/api/models/"):
            return self._info()
        if "/resolve/" in path:
            return self._resolve(request.method, path.split("/resolve/")[1].split("/", 1)[1])
        return httpx.Response(404, json={"error": f"not served: {path}"})

    def _preupload(self, payload: dict[str, Any]) -> Any:
        modes = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for entry in payload["files"]
        ]
        return httpx.Response(200, json={"files": modes})

    def _batch(self, payload: dict[str, Any]) -> Any:
        objects = [
            {
                **entry,
                "actions": {"upload": {"href": f"https://storage.example/{entry['oid']}"}},
            }
            for entry in payload["objects"]
        ]
        return httpx.Response(200, json={"transfer": "basic", "objects": objects})

    def _commit(self, body: bytes) -> Any:
        if self.fails_commit:
            return httpx.Response(403, json={"error": "no write access"})
        lines = [json.loads(line) for line in body.splitlines()]
        self.commits.append(lines[0]["value"])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self.uploads[value["oid"]]
            else:
                self.files[value["path"]] = base64.b64decode(value["content"])
        url = f"{ENDPOINT}/someone/model"
        answer = {"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT}
        return httpx.Response(200, json={**answer, "pullRequestUrl": f"{url}/discussions/1"})

    def _info(self) -> Any:
        siblings = [
            {"rfilename": name, "size": len(content)} for name, content in self.files.items()
        ]
        entry = {"_id": "1", "id": "someone/model", "modelId": "someone/model", "sha": COMMIT}
        entry |= {"private": False, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        return httpx.Response(200, json=entry)

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        digest = hashlib.sha256(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}

    def _resolve(self, method: str, name: str) -> Any:
        if name not in self.files:
            return httpx.Response(404, headers={"x-error-code": "EntryNotFound"})
        content = self.files[name]
        headers = {
            "etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "x-repo-commit": COMMIT,
            "content-length": str(len(content)),
        }
        return httpx.Response(200, headers=headers, content=b"" if method == "HEAD" else content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake Hub in place of the client's transport."""
    fake = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    huggingface_hub.set_client_factory(
        lambda: httpx.Client(transport=httpx.MockTransport(fake), follow_redirects=True)
    )
    yield fake
    huggingface_hub.close_session()
    from huggingface_hub.utils._http import default_client_factory

    huggingface_hub.set_client_factory(default_client_factory)
