"""What a folder says about its pictures: metadata files or text files beside them -> rows.

Understood are `metadata.jsonl` and `metadata.csv` as Hugging Face's imagefolder has them,
`captions.csv`, `captions.json`, and without any of these a `.txt` (one caption a line) or a `.json`
(one row) beside each picture. Names and texts come from anybody: a name that leaves the folder is
refused, and so is a row that cannot be read; neither stops the others.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from multimodal_dlm.datasets.schema import QuestionAnswer
from multimodal_dlm.errors import DataError

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "captions.csv", "captions.json")
NAME_COLUMNS = ("file_name", "image", "file")
TEXT_COLUMNS = ("text", "caption", "captions")
MAX_METADATA_BYTES = 2**30
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".svg", ".heic", ".avif", ".ico", ".psd")


@dataclass(frozen=True)
class Refusal:
    """One thing of the folder that was left out.

    Args:
        reason: `row`, `picture` or `text`.
        name: File, or metadata file and row.
        message: What is wrong and what to do.
    """

    reason: str
    name: str
    message: str


@dataclass
class FolderRow:
    """A picture of the folder and what is said about it.

    Args:
        name: Path inside the folder, with `/`.
        captions: Texts, each once, in their order.
        qa: Questions with answers, in their order.
    """

    name: str
    captions: list[str] = field(default_factory=list)
    qa: list[QuestionAnswer] = field(default_factory=list)


def read_folder(folder: Path) -> tuple[list[FolderRow], list[Refusal]]:
    """Rows of a folder sorted by name, and what was refused on the way.

    Raises:
        DataError: When there is no such folder or no picture in it, or its metadata file as a whole
            cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"`folder` must be a folder of pictures; there is no `{folder}`.")
    found = [name for name in METADATA_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} must have one metadata file; got {', '.join(found)}. Leave one of them."
        )
    names, refused = _pictures(folder)
    rows = {name: FolderRow(name) for name in names}
    entries = _metadata(folder, folder / found[0]) if found else _sidecars(folder, names)
    for where, entry in entries:
        try:
            if isinstance(entry, DataError):
                raise entry
            _take_in(rows, folder, entry)
        except DataError as error:
            refused.append(Refusal("row", where, str(error)))
    place = found[0] if found else "a `.txt` of the same name beside it"
    message = f"must have a caption. Give it one in {place}."
    refused += [Refusal("text", row.name, message) for row in rows.values() if not row.captions]
    return [row for row in rows.values() if row.captions], refused


def _pictures(folder: Path) -> tuple[list[str], list[Refusal]]:
    """Names of the pictures, sorted, and of those in formats that are not read."""
    names, refused = [], []
    for name in _file_names(folder):
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in PICTURES:
            names.append(name)
        elif suffix in OTHER_PICTURES:
            message = f"must be PNG, JPEG or WebP; got `{suffix}`. Convert it."
            refused.append(Refusal("picture", name, message))
    if not names:
        raise DataError(f"{folder} must hold PNG, JPEG or WebP pictures; there is none.")
    return names, refused


def _file_names(folder: Path) -> list[str]:
    """Files below the folder, hidden ones left out."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(n.as_posix() for n in names if not any(part.startswith(".") for part in n.parts))


Entry = tuple[str, Mapping[str, Any] | DataError]


def _metadata(folder: Path, path: Path) -> Iterator[Entry]:
    """Place and content of each row of a metadata file."""
    text = _read_text(folder, path)
    if path.suffix == ".csv":
        yield from _csv_rows(path, text)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path.name}, line {number}", _json_row(line)
    else:
        content = _json(text, path.name)
        if isinstance(content, Mapping):  # File -> caption, captions, or a whole row.
            content = [
                {"file_name": name, **(value if isinstance(value, Mapping) else {"text": value})}
                for name, value in content.items()
            ]
        if not isinstance(content, list):
            raise DataError(f"{path.name} must be a list of rows; got {type(content).__name__}.")
        for number, row in enumerate(content, start=1):
            is_row = isinstance(row, Mapping)
            yield f"{path.name}, row {number}", row if is_row else _no_row(row)


def _csv_rows(path: Path, text: str) -> Iterator[Entry]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = reader.fieldnames or []
    if not set(columns) & set(NAME_COLUMNS) or not set(columns) & set(TEXT_COLUMNS):
        raise DataError(
            f"{path.name} must have the columns `file_name` and `text`; got"
            f" {', '.join(f'`{column}`' for column in columns) or 'none'}. Name them in the first"
            " line."
        )
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{path.name}, line {reader.line_num}", DataError(f"must be CSV; got {error}.")
        else:
            yield f"{path.name}, line {reader.line_num}", row


def _sidecars(folder: Path, names: list[str]) -> Iterator[Entry]:
    """The `.txt` and `.json` beside each picture."""
    for name in names:
        text, row = ((folder / name).with_suffix(suffix) for suffix in (".txt", ".json"))
        for path in (text, row):
            if not path.is_file():
                continue
            where = path.relative_to(folder).as_posix()
            try:
                content = _read_text(folder, path)
            except DataError as error:
                yield where, error
                continue
            found = {"text": content.split("\n")} if path == text else _json_row(content)
            yield where, found if isinstance(found, DataError) else {**found, "file_name": name}


def _take_in(rows: dict[str, FolderRow], folder: Path, entry: Mapping[str, Any]) -> None:
    """Add a row of metadata to its picture."""
    name = next((entry[column] for column in NAME_COLUMNS if entry.get(column)), None)
    if not isinstance(name, str):
        raise DataError("must name its picture in `file_name`.")
    name = PurePosixPath(name.removeprefix("./")).as_posix()
    if name not in rows:
        raise DataError(
            f"`file_name` must be a picture inside the folder; got `{name[:200]}`."
            f"{_hint(name, folder)}"
        )
    row = rows[name]
    for text in _texts(entry):
        if text not in row.captions:
            row.captions.append(text)
    pairs = entry.get("qa") or ([entry] if entry.get("question") else [])
    if not isinstance(pairs, list):
        raise DataError("`qa` must be a list of questions with answers.")
    for pair in pairs:
        asked = pair if isinstance(pair, Mapping) else {}
        question, answer, kind = (asked.get(n) for n in ("question", "answer", "type"))
        if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
            raise DataError("a `question` must have an `answer`, both texts.")
        found = QuestionAnswer(question.strip(), answer.strip(), str(kind or "question"))
        if found not in row.qa:
            row.qa.append(found)


def _texts(entry: Mapping[str, Any]) -> list[str]:
    texts: list[str] = []
    for column in TEXT_COLUMNS:
        value = entry.get(column)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise DataError(f"`{column}` must be a text or a list of texts.")
            if text and text.strip():
                texts.append(text.strip())
    return texts


def _hint(name: str, folder: Path) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return " Write it relative to the folder, without `..`."
    if PurePosixPath(name).suffix.lower() not in PICTURES:
        return " It must end in .png, .jpg, .jpeg or .webp."
    return f" There is no such file in {folder}."


def require_inside(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of the folder.

    Raises:
        DataError: When it does.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError("must lie inside the folder; it is a link to elsewhere. Copy it.")


def _read_text(folder: Path, path: Path) -> str:
    """The text of a file, every line of it ended by a line feed alone.

    Lines are split there and nowhere else: JSON strings may hold U+2028, U+2029 and U+0085 as they
    are, at which `str.splitlines` splits as well.
    """
    require_inside(folder, path)
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise DataError(f"{path.name} must have at most {MAX_METADATA_BYTES} bytes. Split it.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} must be UTF-8; got {error}. Save it as UTF-8.") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} must be JSON; got {type(error).__name__}: {error}.") from error


def _json_row(text: str) -> Mapping[str, Any] | DataError:
    try:
        row = _json(text, "The row")
    except DataError as error:
        return error
    return row if isinstance(row, Mapping) else _no_row(row)


def _no_row(row: object) -> DataError:
    return DataError(f"a row must be a JSON object; got {type(row).__name__}.")
