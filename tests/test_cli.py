"""The command line: help, errors, formats, and each command on a real tiny pipeline or manifest."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from multimodal_dlm import cli
from multimodal_dlm.commands.parser import hyphens_to_underscores
from multimodal_dlm.commands.pictures import box_mask, file_stem
from multimodal_dlm.commands.reporting import find_format
from multimodal_dlm.errors import ConfigError
from tests.conftest import REPOSITORY


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of one command."""
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fail(capsys, *arguments: str) -> str:
    """The message of a command that must fail as a user's mistake, without a traceback."""
    status, out, err = run(capsys, *arguments)
    assert status == 2, out + err
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


# Help.


@pytest.mark.parametrize("name", ["", *cli.GROUPS, *cli.COMMANDS])
def test_every_command_has_help_that_names_its_options(capsys, name):
    status, out, _ = run(capsys, *name.split(), "--help")
    assert status == 0
    assert out.startswith(f"usage: multimodal-dlm {name}".rstrip())
    assert "[options]" not in out
    assert max(len(line) for line in out.splitlines()) <= 100
    if name in cli.COMMANDS:
        assert "--format {human,json}" in out
        # Every option says what it is: none has only its type.
        assert not re.search(r"^ {2,}--?[\w.]+ [A-Z_]+\s+\(type:", out, re.MULTILINE)


def test_help_lists_every_command_once(capsys):
    _, out, _ = run(capsys, "--help")
    names = {name.split()[0] for name in cli.COMMANDS}
    assert set(re.findall(r"^    (\w+)  ", out, re.MULTILINE)) == names


def test_version(capsys):
    assert run(capsys, "--version")[1].split()[-1] == cli.__version__


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys\nfrom multimodal_dlm.cli import main\nmain(['generate', '--help'])\n"
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.5


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "multimodal_dlm", "--version"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert cli.__version__ in done.stdout


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "A command must be given. Run `multimodal-dlm --help`"),
        (("genrate", "a"), "Unknown command `genrate`. Did you mean `generate`? Available: "),
        (("data",), "A command must be given. Run `multimodal-dlm data --help`"),
        (("data", "biuld"), "Unknown command `biuld`. Did you mean `build`?"),
        (("generate",), "`prompt` must be given. Run `multimodal-dlm generate --help`"),
        (("generate", "a", "--sed", "1"), "Unknown option `--sed`. Did you mean `--seed`?"),
        (
            ("generate", "a", "--guidance-scal", "2"),
            "Unknown option `--guidance_scal`. Did you mean `--guidance_scale`?",
        ),
        (("generate", "a", "--seed", "x"), "`seed` has a wrong value. Expected a int."),
        (
            ("generate", "a", "--guidance_scale", "x"),
            "`guidance_scale` has a wrong value. Expected float or null. Got value: x.",
        ),
        (("generate", "a", "--format", "xml"), "invalid choice: 'xml'"),
        (("generate", "a", "--pipeline", "./nowhere"), "there is no folder `./nowhere`"),
        (("caption", "nowhere.png"), "there is no file `nowhere.png`"),
        (("inpaint", "a.png", "a"), "One of `mask` and `box` must be given; got neither."),
        (("inpaint", "nowhere.png", "a", "--box", "[0,0,1,1]"), "there is no file `nowhere.png`"),
        (("train",), "must be given. Run `multimodal-dlm train --help`"),
        (("train", "--config", "nowhere.yaml"), "File does not exist"),
        (("data", "inspect", "nowhere.yaml"), "nowhere.yaml"),
        (("data", "build", "emojis"), "Did you mean `emoji`?"),
        (("card", "./nowhere"), "there is no folder `./nowhere`"),
        (("demo", "--pipeline", "./nowhere"), "there is no folder `./nowhere`"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence_with_a_remedy(capsys, arguments, message):
    assert message in fail(capsys, *arguments)


def test_demo_outside_the_repository_says_where_to_run_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Run this in the root of the repository" in fail(capsys, "demo")


def test_unknown_config_entry_names_the_nearest(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    values = {"output_dir": "x", "num_train_steps": 1, "optimizer": {"learning_rate_lr": 1e-3}}
    path.write_text(yaml.safe_dump(values))
    message = fail(capsys, "train", "--config", str(path))
    assert "Unknown entry `optimizer.learning_rate_lr`" in message
    assert "multimodal-dlm train --help" in message


def test_errors_obey_the_json_format(capsys):
    for arguments in (("generate", "a", "--sed", "1"), ("card", "./nowhere")):
        status, out, _ = run(capsys, *arguments, "--format", "json")
        error = json.loads(out)["error"]
        assert status == 2
        assert set(error) == {"type", "message"}


def test_debug_shows_the_traceback(capsys):
    status, _, err = run(capsys, "card", "./nowhere", "--debug")
    assert status == 2
    assert "Traceback" in err


def test_our_own_fault_is_status_1_and_says_so(capsys, monkeypatch):
    def broken(**_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("multimodal_dlm.commands.card.run_card", broken)
    status, _, err = run(capsys, "card", "x")
    assert status == 1
    assert "ZeroDivisionError: division by zero" in err
    assert "--debug" in err


# Small parts.


def test_hyphens_are_accepted_in_option_names_only():
    given = ["--num-images-per-prompt", "2", "a-b", "--output=a-b", "--", "--a-b"]
    expected = ["--num_images_per_prompt", "2", "a-b", "--output=a-b", "--", "--a-b"]
    assert hyphens_to_underscores(given) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "human"),
        (["--format", "json"], "json"),
        (["--format=json"], "json"),
        (["--format", "xml"], "human"),
        (["--format"], "human"),
    ],
)
def test_the_format_is_found_before_parsing(arguments, expected):
    assert find_format(arguments) == expected


def test_box_mask_is_white_inside_only():
    mask = box_mask((8, 4), [0.5, 0.0, 1.0, 0.5])
    assert [mask.getpixel((x, 0)) for x in range(8)] == [0] * 4 + [255] * 4
    assert [mask.getpixel((7, y)) for y in range(4)] == [255, 255, 0, 0]


@pytest.mark.parametrize("box", [[0, 0, 1], [0.5, 0, 0.5, 1], [0, 0, 1.2, 1], [-0.1, 0, 1, 1]])
def test_box_outside_the_picture_is_refused(box):
    with pytest.raises(ConfigError, match=r"`box` must be left, top, right, bottom .* got \["):
        box_mask((8, 8), box)


def test_file_stem_is_safe():
    assert file_stem("A red Apple, 1/2!") == "a-red-apple-1-2"
    assert file_stem("../..") == "picture"
    assert len(file_stem("word " * 40)) <= 40


# Commands on the released pipeline.


@pytest.fixture
def in_repository(released_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(REPOSITORY)
    return released_pipeline


@pytest.mark.slow
def test_demo_writes_everything(capsys, in_repository, tmp_path):
    status, out, err = run(capsys, "demo", "--output", str(tmp_path), "--format", "json")
    assert status == 0, err
    values = json.loads(out)
    assert values == json.loads((tmp_path / "demo.json").read_text())
    assert len(values["prompts"]) >= 8
    assert values["seconds"]["total"] < 60
    rows = values["held_out"]
    assert len(rows) >= 4
    assert all(row["caption"] and row["true_caption"] for row in rows)
    assert any(row["question"] and row["answer"] and row["true_answer"] for row in rows)
    for name in ("prompts.png", "inpaint.png"):
        assert Image.open(tmp_path / name).width > 400


@pytest.mark.slow
def test_generate_caption_and_ask(capsys, in_repository, tmp_path):
    status, out, err = run(
        capsys, "generate", "a red apple", "--output", str(tmp_path), "--format", "json"
    )
    assert status == 0, err
    path = json.loads(out)["pictures"][0]["path"]
    again = tmp_path / "again"
    assert run(capsys, "generate", "a red apple", "--output", str(again))[0] == 0
    assert Image.open(again / Path(path).name).tobytes() == Image.open(path).tobytes()

    status, out, _ = run(capsys, "caption", path, "--format", "json")
    assert status == 0
    assert json.loads(out)["captions"][0]["caption"]
    status, out, _ = run(capsys, "ask", path, "what is this?", "--format", "json")
    assert status == 0
    assert json.loads(out)["answers"][0]["answer"]
