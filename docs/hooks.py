"""What building the site adds to MkDocs: quoted sections, and no page that needs the network.

A line `<!-- quote: PATH # HEADING -->` in a page becomes the text below that heading of a Markdown
file of the repository, so that figures and examples are written once. Links into `docs/` then lead
to the pages, which themselves lie in `docs/`.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
QUOTE = re.compile(r"^<!-- quote: (?P<path>\S+) # (?P<heading>.+?) -->$", re.MULTILINE)
HEADING = re.compile(r"^(?P<marks>#+) (?P<title>.+)$")
OUTSIDE = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
)


def section(path: str, heading: str) -> str:
    """The text below a heading of a Markdown file, up to the next heading of its rank.

    Args:
        path: File, from the root of the repository.
        heading: Title without its marks.
    """
    file = ROOT / path
    if not file.is_file():
        raise PluginError(f"A page quotes {path}, which does not exist.")
    found: list[str] | None = None
    rank, is_code = 0, False
    for line in file.read_text(encoding="utf-8").splitlines():
        is_code ^= line.startswith("```")
        title = None if is_code else HEADING.match(line)
        if title and found is not None and len(title["marks"]) <= rank:
            break
        if found is not None:
            found.append(line)
        elif title and title["title"] == heading:
            found, rank = [], len(title["marks"])
    if found is None:
        raise PluginError(f"A page quotes the heading `{heading}`, which {path} does not have.")
    return re.sub(r"\]\((?:\.\./)*docs/", "](", "\n".join(found).strip())


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in the quoted sections."""
    return QUOTE.sub(lambda match: section(match["path"], match["heading"]), markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Refuse a page that fetches something from outside."""
    found = OUTSIDE.search(output)
    if found:
        raise PluginError(f"{page.file.src_path} must be readable offline; it has `{found[0]}`.")
    return output
