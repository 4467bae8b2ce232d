"""The repository as a whole: exports, imports, layers, layout, and what the source may not hold."""

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import multimodal_dlm
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "multimodal_dlm"
ASSET_FOLDERS = ("tokenizers", "pipelines", "datasets", "configs")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
TEXT_SUFFIXES = {
    ".py", ".md", ".toml", ".yaml", ".yml", ".json", ".cff", ".txt", ".cfg", ".jinja", "", ".sh",
}  # fmt: skip


def tracked_files() -> list[Path]:
    """Files of the checkout: what git tracks, or all but outputs where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0 and listing.stdout:
        paths = [REPOSITORY / name for name in listing.stdout.split("\0") if name]
    else:
        skip = {".git", ".venv", "out", "runs", "__pycache__"}
        paths = [
            path
            for path in REPOSITORY.rglob("*")
            if not skip & set(path.relative_to(REPOSITORY).parts)
        ]
    found = [path for path in paths if path.is_file()]
    assert len(found) > 50
    return found


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def run_python(code: str, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules() -> list[str]:
    walked = pkgutil.walk_packages([str(PACKAGE)], prefix="multimodal_dlm.")
    return [info.name for info in walked if not info.name.endswith("__main__")]


# Exports and imports.


def test_all_is_sorted_and_every_name_loads():
    assert multimodal_dlm.__all__ == sorted(multimodal_dlm.__all__)
    for name in multimodal_dlm.__all__:
        assert getattr(multimodal_dlm, name) is not None
    assert set(multimodal_dlm.__all__) <= set(dir(multimodal_dlm))


def test_all_matches_what_type_checkers_see():
    """The lazy table, the `TYPE_CHECKING` imports and `__all__` name the same objects."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {name: f"multimodal_dlm.{module}" for name, module in multimodal_dlm._MODULE_OF.items()}
    assert imported == lazy
    assert set(lazy) | {"__version__"} == set(multimodal_dlm.__all__)


def test_every_error_is_exported():
    errors = importlib.import_module("multimodal_dlm.errors")
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert len(classes) > 5
    assert classes <= set(multimodal_dlm.__all__)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'UnifiedTextToImagPipeline'"):
        _ = multimodal_dlm.UnifiedTextToImagPipeline


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"`{name}` must say what it is"


@pytest.mark.parametrize("name", [name for name in modules() if name.count(".") == 1])
def test_all_of_every_package_is_sorted_and_true(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(names)
    assert all(hasattr(module, each) for each in names)


def test_import_is_lazy_and_fast():
    code = """
import sys, time
start = time.process_time()
import multimodal_dlm
seconds = time.process_time() - start
heavy = {"torch", "numpy", "diffusers", "transformers", "PIL", "accelerate"} & set(sys.modules)
print(seconds, ",".join(sorted(heavy)))
"""
    runs = [run_python(code).split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), runs  # Nothing heavy.
    assert min(float(run[0]) for run in runs) < 0.1


def top_level_imports(path: Path) -> set[str]:
    """Names imported when the file is imported: outside functions and `TYPE_CHECKING`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_package_imports_its_own_dependencies_only():
    """No extra is needed to import any module; extras are imported where they are used."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=; ]", name)[0].lower() for name in project["dependencies"]}
    owners = importlib.metadata.packages_distributions()
    missing = {}
    for path in PACKAGE.rglob("*.py"):
        names = top_level_imports(path) - set(sys.stdlib_module_names) - {"multimodal_dlm"}
        for name in names:
            if not declared & {owner.lower().replace("_", "-") for owner in owners[name]}:
                missing[relative(path)] = name
    assert not missing


def test_version_is_the_projects():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == multimodal_dlm.__version__
    assert (PACKAGE / "py.typed").is_file()


# Layout.


def test_every_package_and_test_folder_has_an_init():
    folders = {path.parent for path in python_files()}
    inside = [f for f in folders if relative(f).split("/")[0] in ("multimodal_dlm", "tests")]
    assert len(inside) > 5
    missing = [relative(folder) for folder in inside if not (folder / "__init__.py").is_file()]
    assert not missing


def test_root_asset_folders_hold_no_python():
    found = [path for path in tracked_files() if relative(path).split("/")[0] in ASSET_FOLDERS]
    assert not [relative(path) for path in found if path.suffix in (".py", ".pyi", ".pyc")]


@pytest.mark.parametrize("name", ["tokenizers", "datasets"])
def test_root_folders_do_not_shadow_hugging_face(name):
    code = f"import importlib.util as u; print(u.find_spec({name!r}).origin)"
    origin = run_python(code)
    assert origin != "None", f"`{name}` resolves to a namespace folder"
    venv = REPOSITORY / ".venv"
    path = Path(origin).resolve()
    assert venv.resolve() in path.parents or REPOSITORY not in path.parents


def test_transformers_still_finds_its_tokenizers_from_the_root():
    code = "from transformers import PreTrainedTokenizerFast as c; print(c.__name__)"
    assert run_python(code) not in ("", "None")


def test_import_contracts_are_kept():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
        + ["--no-cache"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


# Size.


def test_no_file_is_too_long():
    lengths = {relative(path): len(path.read_text().splitlines()) for path in python_files()}
    assert not {name: count for name, count in lengths.items() if count > MAX_FILE_LINES}


def test_no_function_is_too_long():
    long = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    long[f"{relative(path)}:{node.name}"] = count
    assert not long


# What the source may not hold.

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "torch.save", "torch.hub.load", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "pickle.load", "pickle.loads",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_literal(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def violations(source: str) -> Iterator[str]:
    """What a load path could be attacked through: pickles, dynamic code, shells."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            yield from (f"import {name}" for name in names if name in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in FORBIDDEN_MODULES:
                yield f"from {node.module} import"
        elif isinstance(node, ast.Call):
            yield from _call_violations(node)


def _call_violations(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and name in FORBIDDEN_BUILTINS:
        yield f"{name}()"
    if name in FORBIDDEN_CALLS:
        yield f"{name}()"
    if name == "torch.load" and not is_literal(keywords.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    for keyword in ("shell", "trust_remote_code", "allow_pickle"):
        if keyword in keywords and not is_literal(keywords[keyword], False):
            yield f"{keyword}="


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["import pickle"]),
        ("from pickle import load", ["from pickle import"]),
        ("torch.load(path)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=True)", []),
        ("eval('1')", ["eval()"]),
        ("model.eval()", []),
        ("subprocess.run(c, shell=True)", ["shell="]),
        ("subprocess.run(c, shell=False)", []),
        ("os.system(c)", ["os.system()"]),
        ("f(trust_remote_code=flag)", ["trust_remote_code="]),
        ("re.compile('a')", []),
    ],
)
def test_the_gate_sees_what_it_should(source, found):
    assert list(violations(source)) == found


def test_package_holds_no_pickle_no_dynamic_code_and_no_shell():
    paths = [path for path in python_files() if PACKAGE in path.parents]
    assert len(paths) > 30
    assert not {relative(path): v for path in paths if (v := list(violations(path.read_text())))}


# Written with breaks so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|mnt|Users)/\w")
REGISTRY_HOST = re.compile(
    r"regis" + r"try\.npmjs|py" + r"pi\.org|python" + r"hosted|download\.py" + r"torch\.org"
    r"|deb\.deb" + r"ian\.org|npm\.piped"
)  # fmt: skip


def texts() -> Iterator[tuple[str, str]]:
    for path in tracked_files():
        if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 2_000_000:
            yield relative(path), path.read_text(encoding="utf-8", errors="ignore")


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST])
def test_no_machine_path_and_no_registry_host(pattern):
    found = {name: match[0] for name, text in texts() if (match := pattern.search(text))}
    assert not found


def test_nothing_large_is_tracked():
    sizes = {relative(path): path.stat().st_size for path in tracked_files()}
    assert not {name: size for name, size in sizes.items() if size > 48 * 2**20}
