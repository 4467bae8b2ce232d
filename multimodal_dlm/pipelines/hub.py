"""Loading, saving and sharing of pipeline folders: safetensors and JSON only, hashes checked.

Diffusers refuses components of other packages when it downloads, so a Hub repository is fetched
first and loaded as a folder. Nothing here runs code from a folder.
"""

import importlib
import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download

from multimodal_dlm.errors import CheckpointError, ConfigError, unknown_name
from multimodal_dlm.pipelines.card_metrics import (
    Origin,
    changed_subject,
    origin_of,
    subject_of,
)
from multimodal_dlm.pipelines.manifest import (
    SHARED_PATTERNS,
    shared_files,
    verify_manifest,
    write_manifest,
)
from multimodal_dlm.pipelines.model_card import CardInfo, render_card

INDEX_NAME = "model_index.json"
COMPONENTS = ("transformer", "scheduler", "tokenizer", "image_tokenizer")
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_LOAD_OPTIONS = ("dtype", "torch_dtype", "device_map", "max_memory", "variant", "low_cpu_mem_usage")
_REFUSED = ("trust_remote_code", "custom_pipeline", "use_onnx", "use_flashpack")
_ORIGIN = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
_LIBRARIES = ("multimodal_dlm", "transformers", "diffusers")

logger = logging.getLogger(__name__)
Sharing = TypeVar("Sharing", bound="SharingMixin")


class SharingMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of every pipeline."""

    card: CardInfo = CardInfo()
    _origin: Origin | None = None  # What the metrics of a loaded or saved card are of.

    @classmethod
    def from_pretrained(
        cls: type[Sharing],
        pretrained_model_name_or_path: str | Path,
        *,
        verify: bool = True,
        **kwargs: Any,
    ) -> Sharing:
        """Load a pipeline from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path: Folder, or `owner/name` on the Hub. Any of the five
                pipelines loads any folder; `load_pipeline` picks the class the folder names.
            verify: Compare every file with the folder's `SHA256SUMS`, if it has one.
            kwargs: `dtype`, `device_map`, `variant`, ...; for the Hub `revision`, `token`,
                `cache_dir`, `force_download`, `local_files_only`; components by name.

        Raises:
            ConfigError: When an option is unknown or would run foreign code or unpickle.
            CheckpointError: When there is no such folder, or its files have changed.
        """
        check_load_options(kwargs)
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder = fetch_folder(pretrained_model_name_or_path, **hub_options)
        if verify:
            verify_manifest(folder)
        import_components(read_index(folder))
        kwargs = {"use_safetensors": True, **kwargs}
        pipeline = super().from_pretrained(str(folder), local_files_only=True, **kwargs)  # type: ignore[misc]
        pipeline.card = CardInfo.load(folder)
        pipeline._origin = origin_of(pipeline, folder, kwargs)
        return pipeline

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        card: CardInfo | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the components, the model card and the file hashes.

        The card loses metrics that were taken of other weights or with another scheduler, and a
        warning says so.

        Args:
            save_directory: Folder; made when missing.
            safe_serialization: True; pickles are never written.
            variant: Part of the weight file names, such as `bf16`.
            max_shard_size: Largest weight file, such as `5GB`.
            push_to_hub: Also upload to `repo_id` (by default the folder's name): what
                `multimodal_dlm.pipelines.manifest.SHARED_PATTERNS` name, nothing hidden.
            card: What the card says beyond the components; None keeps what was loaded.
            kwargs: `repo_id`, `commit_message`, `private`, `token`, `create_pr` for the upload.

        Raises:
            ConfigError: When asked for a pickle.
        """
        if not safe_serialization:
            raise ConfigError(
                "`safe_serialization` must be True: this library writes no pickles; got False."
                " Leave it out."
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"`save_directory` must be a folder; got the file `{folder}`.")
        super().save_pretrained(  # type: ignore[misc]
            str(folder), variant=variant, max_shard_size=max_shard_size
        )
        forget_origin(folder)
        if card is not None:
            self.card = card
        self.drop_foreign_metrics()
        self.card.save(folder)
        hashes = write_manifest(folder)
        (folder / "README.md").write_text(render_card(self, hashes), encoding="utf-8")
        if push_to_hub:
            upload(folder, kwargs.pop("repo_id", folder.resolve().name), **kwargs)

    def drop_foreign_metrics(self) -> None:
        """Take the metrics off the card where they are of other networks or another scheduler.

        Metrics are of what `card.measured` says; where it says nothing, of the model that the card
        was loaded with, and new ones of the present model.
        """
        if not self.card.metrics:
            return
        subject = subject_of(self)
        changed = changed_subject(self.card, self._origin, subject)
        if changed:
            logger.warning(
                "The model card loses its metrics: they are of another model, by its %s. Measure"
                " what you saved with `multimodal-dlm evaluate FOLDER`, and put the metrics in with"
                " `multimodal-dlm card FOLDER --report REPORT`.",
                " and ".join(f"`{name}`" for name in changed),
            )
            self.card = replace(self.card, metrics={}, measured={})
        else:
            self._origin = Origin(self.card.metrics, subject)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        card: CardInfo | None = None,
    ) -> str:
        """Save the pipeline with its card and upload it, all files in one commit.

        Args:
            repo_id: `owner/name` on the Hub, made when missing; or a local folder (`./name` or an
                absolute path), to see what would be uploaded.
            commit_message: Of the commit.
            private: Make a new repository private.
            token: Access token; None uses the stored login.
            create_pr: Open a pull request instead of committing.
            safe_serialization: True; pickles are never written.
            variant: Part of the weight file names.
            subfolder: Folder inside the repository.
            card: What the card says beyond the components; None keeps what was loaded.

        Returns:
            Address of the commit, or the local folder.
        """
        options = {"safe_serialization": safe_serialization, "variant": variant, "card": card}
        if is_path(repo_id):
            folder = Path(repo_id) / (subfolder or "")
            self.save_pretrained(folder, **options)
            return str(folder)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(scratch, **options)
            return upload(
                Path(scratch),
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
            )


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Upload the shared files of a folder in one commit, all or nothing; the commit's address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    inside = PurePosixPath(subfolder or "")
    commit = api.create_commit(
        repo_id,
        [
            CommitOperationAdd((inside / name).as_posix(), path)
            for name, path in shared_files(folder).items()
        ],
        commit_message=commit_message or "Upload pipeline",
        create_pr=create_pr,
    )
    return str(commit.commit_url)


def forget_origin(folder: Path) -> None:
    """Remove from saved configs where on this machine the components were loaded from."""
    configs = [path for name in COMPONENTS for path in (folder / name).glob("*config.json")]
    for path in (folder / INDEX_NAME, *configs):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            continue
        kept = {name: value for name, value in values.items() if name not in _ORIGIN}
        if len(kept) < len(values):
            text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def is_path(name: str | Path) -> bool:
    """True for what can only be a folder on this machine: a path, not `owner/name`."""
    text = str(name)
    return (
        isinstance(name, Path)
        or text.startswith((".", "/", "~", "\\"))
        or text.count("/") > 1
        or Path(text).is_dir()
    )


def fetch_folder(name: str | Path, **hub_options: Any) -> Path:
    """A local folder as it is, or a snapshot of a Hub repository.

    Raises:
        CheckpointError: When a path does not exist or holds no pipeline.
    """
    if is_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(
                f"`{name}` must be an existing folder or a Hub repository `owner/name`; there is no"
                " such folder. Check the spelling and the working directory."
            )
    else:
        folder = Path(
            snapshot_download(str(name), allow_patterns=list(SHARED_PATTERNS), **hub_options)
        )
    if not (folder / INDEX_NAME).is_file():
        raise CheckpointError(
            f"`{name}` must hold a `{INDEX_NAME}`; got a folder without one. Save a pipeline there"
            " with `pipe.save_pretrained(...)`."
        )
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """Read `model_index.json`.

    Raises:
        CheckpointError: When it is no JSON object.
    """
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"`{path}` is not valid JSON: {error}. Download it again.") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"`{path}` must hold a JSON object; got {type(index).__name__}.")
    return index


def import_components(index: Mapping[str, Any]) -> None:
    """Import our modules that hold the components: Diffusers looks in imported ones only.

    Raises:
        CheckpointError: When a component is missing or comes from a library that is not trusted.
    """
    for component in COMPONENTS:
        entry = index.get(component)
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not entry[0]:
            raise CheckpointError(
                f"`{INDEX_NAME}` must name library and class of `{component}`; got {entry!r}."
            )
        library = str(entry[0])
        if library.split(".")[0] not in _LIBRARIES:
            raise CheckpointError(
                f"`{component}` must come from {', '.join(_LIBRARIES)}; got `{library}`. Foreign"
                " code is never run."
            )
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise CheckpointError(
                f"`{component}` needs the module `{library}`, which this version does not have."
                " Upgrade multimodal_dlm."
            ) from error


def check_load_options(kwargs: Mapping[str, Any]) -> None:
    """Refuse options of `from_pretrained` that are unknown, run foreign code or read pickles."""
    for name in _REFUSED:
        if kwargs.get(name):
            raise ConfigError(f"`{name}` must be left out: foreign code is never run; got a value.")
    if kwargs.get("use_safetensors") is False:
        raise ConfigError("`use_safetensors` must be True: pickles are never read; got False.")
    known = (*HUB_OPTIONS, *_LOAD_OPTIONS, *COMPONENTS, *_REFUSED, "use_safetensors")
    known += ("quantization_config", "offload_folder", "offload_state_dict", "disable_mmap")
    for name in kwargs:
        if name not in known:
            raise unknown_name("option of `from_pretrained`", name, known)
