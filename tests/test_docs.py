"""The documentation is true: its code, commands, paths and quotations; it names every module."""

import ast
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from multimodal_dlm import cli
from multimodal_dlm.datasets import open_manifest
from multimodal_dlm.datasets.validation import validate_manifest
from tests.conftest import REPOSITORY
from tests.test_packaging import modules

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [page for page in PAGES if page.parent == DOCS]
# Commands and what only they import are described by their own `--help`.
NO_API_PAGE = ("multimodal_dlm.cli", "multimodal_dlm.commands")
OUTPUTS = {"out", "runs", "data"}
# Files of Diffusers that docs/diffusers_contract.md names.
FOREIGN = {"tests/pipelines/test_pipelines_common.py", "tests/schedulers/test_schedulers.py"}


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="needs the extra `docs`")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nav_pages(entries: list) -> list[str]:
    found = []
    for entry in entries:
        for value in entry.values():
            found += nav_pages(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert sorted(nav_pages(settings["nav"])) == sorted(name(page) for page in PAGES)
    assert len(PAGES) > 15


def test_every_module_has_its_place_in_the_api_once():
    listed = re.findall(
        r"^::: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.MULTILINE
    )
    packages = {each.rpartition(".")[0] for each in modules()}
    expected = {
        each for each in modules() if each not in packages and not each.startswith(NO_API_PAGE)
    }
    assert len(listed) == len(set(listed))
    assert set(listed) - packages == expected


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_python_blocks_compile_and_import_what_exists(page):
    for source in blocks(page, "python"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), source


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_inline_commands_exist(page):
    for words in re.findall(r"`multimodal-dlm ([^`]+)`", prose(page)):
        assert any(words.startswith(command) for command in cli.COMMANDS), words


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_named_files_exist(page):
    """Every `folder/file` in backticks, from the root or from the package."""
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    folders |= {path.name for path in (REPOSITORY / "multimodal_dlm").iterdir() if path.is_dir()}
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", prose(page)):
        first = path.split("/")[0]
        if first in OUTPUTS or first not in folders or path in FOREIGN:
            continue
        places = (REPOSITORY, REPOSITORY / "multimodal_dlm")
        assert any((place / path).exists() for place in places), path


def test_tables_named_in_how_to_add_exist():
    text = (DOCS / "how_to_add.md").read_text()
    sources = "\n".join(p.read_text() for p in (REPOSITORY / "multimodal_dlm").rglob("*.py"))
    tables = set(re.findall(r"`([A-Z_]{4,})`", text))
    assert len(tables) > 8
    for table in tables:
        assert re.search(rf"^{table}\b.*=", sources, re.MULTILINE), table


def test_the_dataset_of_the_training_page_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = blocks(DOCS / "training.md", "python")[0]
    exec(compile(source, "training.md", "exec"), {"__name__": "page"})  # noqa: S102
    manifest = open_manifest("data/squares.yaml")
    assert validate_manifest(manifest).is_valid
    (squares,) = manifest.sources.values()
    assert squares.tasks == {"text_to_image": 2, "caption": 1, "vqa": 1}
    for split, count in {"train": 96, "test": 12}.items():
        assert squares.count(split) == count


def test_the_mixture_of_the_training_page_opens(tmp_path):
    (text,) = blocks(DOCS / "training.md", "yaml")
    path = tmp_path / "mixture.yaml"
    path.write_text(text.replace("manifest: ", f"manifest: {REPOSITORY}/datasets/"))
    mixture = open_manifest(path)
    assert {each.name: each.weight for each in mixture.sources.values()} == {
        "emoji": 40,
        "easy_vqa": 30,
    }
    assert mixture.sources["easy_vqa"].question_weights == {
        "is_color": 4,
        "is_shape": 4,
        "shape": 2,
    }


# Options that make the commands of the page on one's own pictures quick.
QUICK = {
    "data tokenize": "--workers 1",
    "train": "--num_train_steps 2 --data.batch_size 4 --evaluation.num_rows 4",
    "generate": "--num_inference_steps 2",
    "evaluate": "--limit 2",
}


@pytest.mark.slow
def test_the_way_from_a_folder_to_a_shared_model(released_pipeline, tmp_path, monkeypatch, capsys):
    """All of the page in an empty folder: its code and commands in order, its outputs compared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPO", str(REPOSITORY))
    page = DOCS / "train_your_own.md"
    making, sharing = blocks(page, "python")
    exec(compile(making, page.name, "exec"), {"__name__": "page"})  # noqa: S102
    lines = "".join(blocks(page, "bash")).splitlines()
    commands = [line for line in lines if line.startswith("multimodal-dlm")]
    said = {}
    for line in commands:
        words = shlex.split(line.replace("$REPO", str(REPOSITORY)))[1:]
        name = next(each for each in cli.COMMANDS if line[15:].startswith(each))
        capsys.readouterr()
        assert cli.main([*words, *QUICK.get(name, "").split()]) == 0, line
        said[name] = re.sub(r" in [\d.]+ s", " in some time", capsys.readouterr().out)
    shown = re.sub(r" in [\d.]+ s", " in some time", "".join(blocks(page, "text")))
    for name in ("data from-folder", "data validate", "data tokenize"):
        assert said[name] in shown, name
    assert len(commands) == 9
    assert not (tmp_path / "tokenizers").exists()
    exec(compile(sharing, page.name, "exec"), {"__name__": "page"})  # noqa: S102
    assert (tmp_path / "shared" / "finetune" / "SHA256SUMS").is_file()
    assert "Limits" in (tmp_path / "shared" / "finetune" / "README.md").read_text()


@pytest.mark.slow
def test_the_example_of_the_evaluation_page_runs(released_pipeline, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (source,) = blocks(DOCS / "evaluation.md", "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        small = source.replace("limit=64", "limit=2")
        exec(compile(small, "evaluation.md", "exec"), {"__name__": "page"})  # noqa: S102
    assert 0.0 <= float(printed.getvalue()) <= 1.0


def test_quotations_are_found_and_their_links_are_mended(tmp_path, monkeypatch):
    module = hooks()
    text = (
        "# A\n\n## B\n\nSee [c](docs/c.md).\n\n```text\n## no heading\n```\n\n### D\n\ne\n\n## F\n"
    )
    (tmp_path / "x.md").write_text(text)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    page = module.on_page_markdown("before\n<!-- quote: x.md # B -->\nafter")
    assert page == ("before\nSee [c](c.md).\n\n```text\n## no heading\n```\n\n### D\n\ne\nafter")
    with pytest.raises(Exception, match="heading `G`"):
        module.on_page_markdown("<!-- quote: x.md # G -->")
    with pytest.raises(Exception, match="does not exist"):
        module.on_page_markdown("<!-- quote: y.md # G -->")


@pytest.mark.parametrize(
    ("html", "is_refused"),
    [
        ('<a href="https://example.org">x</a>', False),
        ('<script src="assets/a.js"></script>', False),
        ('<script async src="https://example.org/a.js"></script>', True),
        ('<link rel="stylesheet" href="//example.org/a.css">', True),
        ('<img alt="a" src="https://example.org/a.png">', True),
    ],
)
def test_pages_that_need_the_network_are_refused(html, is_refused):
    module = hooks()
    page = type("Page", (), {"file": type("File", (), {"src_path": "x.md"})})
    if is_refused:
        with pytest.raises(Exception, match=r"x\.md must be readable offline"):
            module.on_post_page(html, page=page)
    else:
        assert module.on_post_page(html, page=page) == html
