"""Caption templates of a mixture: texts with `{fields}` of the record, and nothing else in them.

Fields are replaced by name alone: no attribute, index, format or expression is understood. A field
after `a ` comes with its English article: `{a caption}` is "a fish", "an eye" or "two fish".
"""

import re
from collections.abc import Sequence
from typing import Any

from multimodal_dlm.datasets.schema import MAX_TEXT_CHARACTERS, MAX_TEXTS, Record
from multimodal_dlm.datasets.wording import with_article
from multimodal_dlm.errors import DataError, nearest_match

_FIELD = re.compile(r"\{([^{}]*)\}")
_ARTICLE = "a "
_NAME = re.compile(rf"({_ARTICLE})?(key|source|caption|meta\.[A-Za-z0-9_-]+)")


def check_templates(content: Any, where: str) -> tuple[str, ...]:
    """The `templates` of a mixture's member.

    Raises:
        DataError: Naming the template that is wrong.
    """
    is_list = isinstance(content, Sequence) and not isinstance(content, str)
    if not is_list or not 1 <= len(content) <= MAX_TEXTS:
        raise DataError(f"{where}: `templates` must be 1 to {MAX_TEXTS} texts; got {content!r}.")
    for text in content:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: a template must be a text; got {text!r}.")
        if "{" in _FIELD.sub("", text) or "}" in _FIELD.sub("", text):
            raise DataError(f"{where}: template {text!r} must close every brace that it opens.")
        for name in _FIELD.findall(text):
            if not _NAME.fullmatch(name):
                known = ("key", "source", "caption", f"meta.{name}")
                raise DataError(
                    f"{where}: template {text!r} must use the fields key, source, caption and"
                    f" meta.NAME; got `{name}`.{nearest_match(name, known)}"
                )
    return tuple(content)


def fill_template(template: str, record: Record) -> str:
    """The caption that a template makes of a record.

    Raises:
        DataError: When the record lacks a field, or the caption is empty or too long.
    """
    fields: dict[str, Any] = {
        "key": record.key,
        "source": record.source,
        "caption": record.captions[0],
        **{f"meta.{name}": value for name, value in record.meta.items()},
    }

    def value(match: re.Match[str]) -> str:
        name = match.group(1).removeprefix(_ARTICLE)
        found = fields.get(name)
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            known = sorted(n for n, v in fields.items() if isinstance(v, str | int | float))
            raise DataError(
                f"Template {template!r} needs `{name}`, a text or number, in every record; sample"
                f" {record.key} of `{record.source}` has {found!r}.{nearest_match(name, known)}"
                f" Available: {', '.join(known)}."
            )
        return with_article(str(found)) if match.group(1).startswith(_ARTICLE) else str(found)

    text = _FIELD.sub(value, template).strip()
    if not 0 < len(text) <= MAX_TEXT_CHARACTERS:
        raise DataError(
            f"Template {template!r} must make 1 to {MAX_TEXT_CHARACTERS} characters; it made"
            f" {len(text)} of sample {record.key}."
        )
    return text
