"""Hashes of what is shared: the file manifest of a saved folder and the fingerprint of weights.

The manifest is a `SHA256SUMS` file in the format of the command `sha256sum`, so that
`sha256sum -c SHA256SUMS` checks a folder without this library.
"""

import hashlib
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from multimodal_dlm.errors import CheckpointError

MANIFEST_NAME = "SHA256SUMS"
# What is listed, uploaded and downloaded; the rest of a folder is its owner's.
SHARED_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md", MANIFEST_NAME)
_CHUNK = 1 << 20
# State of a module's tensors, and the fingerprint they had in it.
_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[tuple, str]] = WeakKeyDictionary()
# The model card is prose that its owner may edit; the rest is written by the Hub.
_UNLISTED = {MANIFEST_NAME, "README.md", ".gitattributes", ".gitignore"}


def hash_files(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the card, by relative path, sorted."""
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.is_file() and _is_listed(path, root))
    return {path.relative_to(root).as_posix(): _hash(path) for path in files}


def is_shared(name: str) -> bool:
    """True for the relative path of a file that is shared: of a known kind, and nothing hidden."""
    is_hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return not is_hidden and any(fnmatch(name, pattern) for pattern in SHARED_PATTERNS)


def shared_files(folder: str | Path) -> dict[str, Path]:
    """The files of a folder that are shared, by relative path, sorted."""
    root = Path(folder)
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*"))}
    return {name: path for name, path in files.items() if is_shared(name) and path.is_file()}


def hash_shared(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every shared file but the card, by relative path: what a manifest lists."""
    files = shared_files(folder)
    return {name: _hash(path) for name, path in files.items() if path.name not in _UNLISTED}


def write_manifest(folder: str | Path) -> dict[str, str]:
    """Write `SHA256SUMS` and return the hashes."""
    hashes = hash_shared(folder)
    text = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    (Path(folder) / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return hashes


def read_manifest(folder: str | Path) -> dict[str, str] | None:
    """Hashes by relative path; None when the folder has no manifest.

    Raises:
        CheckpointError: When a line is not a hash and a name inside the folder.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    hashes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        digest, _, name = line.partition("  ")
        parts = Path(name).parts
        is_inside = bool(name) and not Path(name).is_absolute() and ".." not in parts
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or not is_inside:
            raise CheckpointError(
                f"`{path}` line {number} must be `<sha256>  <name>`; got `{line[:80]}`. Download"
                " the folder again."
            )
        hashes[name] = digest
    return hashes


def verify_manifest(folder: str | Path, *, but: Collection[str] = ()) -> bool:
    """Compare a folder with its manifest.

    Args:
        folder: Pipeline folder.
        but: Names of files that may have changed.

    Returns:
        False when there is no manifest to compare with.

    Raises:
        CheckpointError: When a listed file is missing or changed, or a file that loading could
            read is not listed.
    """
    expected = read_manifest(folder)
    if expected is None:
        return False
    found = hash_files(folder)
    for name, digest in expected.items():
        if name not in found:
            raise CheckpointError(
                f"`{folder}` misses `{name}`, which its {MANIFEST_NAME} lists. Download it again."
            )
        if found[name] != digest and name not in but:
            raise CheckpointError(
                f"`{name}` in `{folder}` has changed since it was saved: sha256 must be"
                f" {digest[:16]}..., got {found[name][:16]}... . Download it again, or save the"
                " pipeline anew if you changed it on purpose."
            )
    for name in found:
        if name not in expected and is_shared(name) and not name.endswith(".md"):
            raise CheckpointError(
                f"`{folder}` holds `{name}`, which its {MANIFEST_NAME} does not list. Remove it, or"
                " save the pipeline anew."
            )
    return True


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and the float32 bytes of all tensors of a module, in name order.

    bfloat16 weights and the same weights read as float32 have the same fingerprint. Of a tensor
    that wraps others, such as an int8 weight with its scales, it is over those.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        for part in _wrapped(tensor):
            digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _wrapped(tensor: Any) -> list[Tensor]:
    """The plain tensors that a tensor consists of: itself, or those that it wraps."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _wrapped(getattr(tensor, name))]


def remembered_fingerprint(module: nn.Module) -> str:
    """`weights_fingerprint`, computed again only where a tensor has another address or version."""
    tensors = [part for t in module.state_dict(keep_vars=True).values() for part in _wrapped(t)]
    state = tuple((each.data_ptr(), each.dtype, each._version) for each in tensors)
    known = _FINGERPRINTS.get(module)
    if known is None or known[0] != state:
        known = _FINGERPRINTS[module] = (state, weights_fingerprint(module))
    return known[1]


def _is_listed(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return parts[-1] not in _UNLISTED and not any(part in (".git", ".cache") for part in parts)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
