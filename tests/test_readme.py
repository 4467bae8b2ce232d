"""The README is true: its tree, links, commands and code; so are the other documents' commands."""

import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest

from multimodal_dlm import cli
from multimodal_dlm.commands.parser import hyphens_to_underscores
from tests.conftest import REPOSITORY
from tests.test_packaging import tracked_files

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
PLACEHOLDER = "FILL:"
# Files that tools look for in the root; the tree leaves them out.
ROOT_FILES = {
    ".ci", ".gitattributes", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff",
    "CONTRIBUTING.md", "LICENSE", "Makefile", "NOTICE", "README.md", "SECURITY.md",
    "pyproject.toml",
}  # fmt: skip
PACKAGE_FILES = {"__init__.py", "__main__.py", "py.typed"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def tree() -> dict[str, str]:
    """Path -> description of the file tree."""
    text = next(block for block in blocks("text") if block.startswith("multimodal_dlm/"))
    found, folder = {}, ""
    for line in text.splitlines():
        name, description = line.strip().split(maxsplit=1)
        if line.startswith("  "):
            name = folder + name
        else:
            folder = name
        found[name.rstrip("/")] = description
    return found


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_every_line_of_the_tree_exists():
    missing = [name for name in tree() if not (REPOSITORY / name).exists()]
    assert len(tree()) > 15
    assert not missing


def test_everything_at_the_top_is_in_the_tree():
    listed = {path.relative_to(REPOSITORY).parts for path in tracked_files()}
    top = {parts[0] for parts in listed} - ROOT_FILES
    inside = {
        f"multimodal_dlm/{parts[1]}"
        for parts in listed
        if parts[0] == "multimodal_dlm" and len(parts) > 1 and parts[1] not in PACKAGE_FILES
    }
    assert not (top | inside) - set(tree())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing = [link for link in targets if not (document.parent / link).exists()]
    if not (REPOSITORY / "pipelines" / "emoji-small").is_dir():
        missing = [link for link in missing if not link.endswith(".png")]
    assert not missing


def test_no_placeholder_is_left_once_the_model_is_released(released_pipeline):
    left = [line for line in README.splitlines() if PLACEHOLDER in line]
    assert not left


def commands(document: Path) -> list[str]:
    """The `multimodal-dlm` lines of a document's bash blocks, continued lines joined."""
    found = re.findall(
        r"^```bash\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return [
        line.split("#")[0].strip()
        for block in found
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("multimodal-dlm")
    ]


def test_commands_are_found():
    assert len(commands(REPOSITORY / "README.md")) >= 6
    assert sum(len(commands(document)) for document in DOCUMENTS) >= 30


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands(d)], ids=lambda p: p.name)
def test_commands_parse(document):
    """Every `multimodal-dlm` line is accepted by the parser."""
    parser = cli.build_parser()
    for line in commands(document):
        line = line.replace("$REPO/", "")  # Pages whose commands run in a folder of the user's own.
        arguments = hyphens_to_underscores(shlex.split(line)[1:])
        if "--config" in arguments:
            config = REPOSITORY / arguments[arguments.index("--config") + 1]
            assert config.is_file(), line
            arguments[arguments.index("--config") + 1] = str(config)
        assert parser.parse_args(arguments)


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    named = set(re.findall(r"make (\w+) ", "\n".join(blocks("bash"))))
    assert named == {"demo", "test"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.slow
def test_python_blocks_run(released_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").symlink_to(REPOSITORY / "pipelines")
    sources = blocks("python")
    assert sources
    for source in sources:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102
        shown = README.split(source)[1].split("```text\n")[1].split("```")[0]
        assert len(printed.getvalue().splitlines()) == len(shown.splitlines())
    assert Path("apple.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all_tasks", "watch_denoising"])
def test_examples_run(name, released_pipeline, tmp_path, monkeypatch, capsys):
    path = REPOSITORY / "examples" / f"{name}.py"
    monkeypatch.chdir(tmp_path)
    arguments = [str(path), "--pipeline", str(released_pipeline)]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_every_example_is_tested():
    found = {path.stem for path in (REPOSITORY / "examples").glob("*.py")}
    assert found == {"all_tasks", "watch_denoising"}
