"""The command line: help, errors, formats, and each command on a real tiny pipeline or manifest."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from multimodal_dlm import cli
from multimodal_dlm.commands.parser import hyphens_to_underscores
from multimodal_dlm.commands.pictures import box_mask, file_stem
from multimodal_dlm.commands.reporting import find_format
from multimodal_dlm.errors import ConfigError
from multimodal_dlm.pipelines import UnifiedTextToImagePipeline, read_recipe
from multimodal_dlm.schedulers import ConfidenceScheduler
from tests.conftest import REPOSITORY
from tests.evaluation.toy import write_squares
from tests.pipelines.tiny import tiny_components


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
    # Processor time: the same on a busy machine.
    code = (
        "import sys, time\nfrom multimodal_dlm.cli import main\nmain(['generate', '--help'])\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
        "sys.stderr.write(str(time.process_time()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr) < 1.0


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


@pytest.mark.parametrize("box", [[0], [1, 0, 1, 1], [0, 0, 2, 1], [-1, 0, 1, 1], [0, 0, 1, 0.05]])
def test_box_outside_the_picture_or_without_a_pixel_is_refused(box):
    with pytest.raises(ConfigError, match=r"`box` must (be left, top,|hold at least).* got \["):
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


# Commands on a tiny pipeline with random weights.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved pipeline `pipeline`, a picture and the manifest of some squares."""
    root = tmp_path_factory.mktemp("tiny")
    UnifiedTextToImagePipeline(**tiny_components()).save_pretrained(root / "pipeline")
    Image.new("RGB", (32, 32), (200, 30, 30)).save(root / "picture.png")
    write_squares(root)
    return root


def succeed(capsys, *arguments: str) -> dict:
    """The JSON result of a command."""
    status, out, err = run(capsys, *arguments, "--format", "json")
    assert status == 0, out + err
    return json.loads(out)


def test_generate_saves_pictures_with_recipes_that_repeat(capsys, tiny, tmp_path):
    options = ["--pipeline", str(tiny / "pipeline"), "--num_inference_steps", "4"]
    given = ["a red apple", "a pear", "--num-images-per-prompt", "2", "--seed", "5"]
    values = succeed(capsys, "generate", *given, "--output", str(tmp_path), *options)
    assert [row["seed"] for row in values["pictures"]] == [5, 6, 7, 8]
    assert Path(values["sheet"]).is_file()
    third = values["pictures"][2]
    assert read_recipe(third["path"])["prompt"] == "a pear"
    # Any picture is made again alone by its own seed.
    alone = succeed(
        capsys, "generate", "a pear", "--seed", "7", "--output", str(tmp_path / "alone"), *options
    )
    again = Image.open(alone["pictures"][0]["path"])
    assert again.tobytes() == Image.open(third["path"]).tobytes()


def test_inpaint_keeps_what_is_outside_the_hole(capsys, tiny, tmp_path):
    values = succeed(
        capsys, "inpaint", str(tiny / "picture.png"), "a red apple", "--box", "[0.5, 0, 1, 1]",
        "--num_images", "2", "--output", str(tmp_path), "--pipeline", str(tiny / "pipeline"),
    )  # fmt: skip
    assert len(values["pictures"]) == 2
    result = Image.open(values["pictures"][0]["path"])
    assert result.crop((0, 0, 16, 32)).getcolors() == [(16 * 32, (200, 30, 30))]


def test_joint_names_its_pictures(capsys, tiny, tmp_path):
    pipeline = str(tiny / "pipeline")
    values = succeed(
        capsys, "joint", "--num_samples", "2", "--output", str(tmp_path), "--pipeline", pipeline
    )
    assert len(values["pictures"]) == 2
    assert all(Path(row["path"]).is_file() for row in values["pictures"])


def test_caption_and_ask(capsys, tiny):
    picture, pipeline = str(tiny / "picture.png"), str(tiny / "pipeline")
    values = succeed(
        capsys, "caption", picture, picture, "--gen_length", "4", "--pipeline", pipeline
    )
    assert len(values["captions"]) == 2
    values = succeed(capsys, "ask", picture, "what is this?", "is it red?", "--pipeline", pipeline)
    assert [row["question"] for row in values["answers"]] == ["what is this?", "is it red?"]


def test_rank_sorts_texts_and_is_the_same_again(capsys, tiny):
    arguments = ["rank", str(tiny / "picture.png"), "a pear", "a plum", "a red square",
                 "--num_draws", "4", "--pipeline", str(tiny / "pipeline")]  # fmt: skip
    rows = succeed(capsys, *arguments)["texts"]
    assert [row["nats"] for row in rows] == sorted((row["nats"] for row in rows), reverse=True)
    assert sorted(row["place"] for row in rows) == [0, 1, 2]
    assert rows == succeed(capsys, *arguments)["texts"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert out.splitlines()[0] == f"{rows[0]['nats']:+9.2f} nats  {rows[0]['text']}"
    status, _, err = run(capsys, *arguments[:-4], "--num_draws", "3", *arguments[-2:])
    assert status == 2
    assert "`num_draws` must be even" in err


def test_human_output_names_the_files(capsys, tiny, tmp_path):
    arguments = ["a pear", "--output", str(tmp_path), "--pipeline", str(tiny / "pipeline")]
    status, out, _ = run(capsys, "generate", *arguments)
    assert status == 0
    assert f"{tmp_path}/000-a-pear.png  a pear" in out
    assert "1 pictures in" in out


def test_demo_on_a_tiny_pipeline(capsys, tiny, tmp_path):
    values = succeed(
        capsys, "demo", "--pipeline", str(tiny / "pipeline"), "--data", str(tiny / "squares.yaml"),
        "--output", str(tmp_path),
    )  # fmt: skip
    assert values == json.loads((tmp_path / "demo.json").read_text())
    assert {row["split"] for row in values["held_out"]} == {"test"}
    assert set(values["seconds_each"]) == {"prompts", "inpaint", "captions", "answers"}
    assert 0 <= values["answers_right"] <= 3
    assert {row["true_answer"] for row in values["held_out"]} == {"red", "yes", "blue"}
    assert all(Path(path).is_file() for path in values["files"])


def test_evaluate_on_a_tiny_pipeline(capsys, tiny, tmp_path):
    folder, manifest = str(tiny / "pipeline"), ["--manifest", str(tiny / "squares.yaml")]
    given = [folder, *manifest, "--suite", "data", "--output", str(tmp_path)]
    values = succeed(capsys, "evaluate", *given, "--only", "vqa,tokenizer")
    assert values["metrics"]["vqa.squares.accuracy"]["n"] == 6
    assert "tokenizer.squares.psnr" in values["metrics"]
    assert values == json.loads((tmp_path / "report.json").read_text())
    assert "<svg" in (tmp_path / "report.html").read_text()
    wrong = fail(capsys, "evaluate", *given, "--only", "vqa.square")
    assert "Did you mean `vqa.squares`?" in wrong
    wrong = fail(capsys, "evaluate", folder, *manifest, "--suite", "quik")
    assert "Did you mean `quick`?" in wrong
    wrong = fail(capsys, "evaluate", folder, *manifest, "--suite", "quick")
    assert "source of `vqa.easy_vqa`" in wrong


def test_step_plan_of_a_tiny_pipeline(capsys, tiny, tmp_path):
    given = [
        str(tiny / "squares.yaml"), "--source", "squares", "--split", "test",
        "--pipeline", str(tiny / "pipeline"),
    ]  # fmt: skip
    values = succeed(
        capsys, "study", "step-plan", *given, "--points", "3",
        "--output", str(tmp_path / "profile.json"), "--save-scheduler", str(tmp_path / "planned"),
    )  # fmt: skip
    assert values == json.loads((tmp_path / "profile.json").read_text())
    assert set(values["predictions"]) == {"linear", "cosine", "geometric", "planned"}
    planned = ConfidenceScheduler.from_pretrained(tmp_path / "planned")
    assert planned.config.modalities["image"]["step_profile"] == values["values"]
    assert planned.config.modalities["text"]["step_profile"] is None
    checked = succeed(
        capsys, "study", "step-plan", *given, "--points", "3", "--limit", "1",
        "--check-split", "test",
    )  # fmt: skip
    assert {pair["against"] for pair in checked["check"]["comparisons"]} >= {"cosine 16"}
    wrong = fail(capsys, "study", "step-plan", *given, "--task", "captions")
    assert "Did you mean `caption`?" in wrong


def test_too_long_a_prompt_is_a_sentence(capsys, tiny, tmp_path):
    message = fail(
        capsys, "generate", "apple " * 60, "--pipeline", str(tiny / "pipeline"),
        "--output", str(tmp_path),
    )  # fmt: skip
    assert "20" in message
    assert not list(tmp_path.iterdir())


def test_unknown_device_is_a_sentence(capsys, tiny):
    message = fail(
        capsys, "generate", "a", "--pipeline", str(tiny / "pipeline"), "--device", "gpu0"
    )
    assert "`device` must be one that torch can use here; got `gpu0`" in message


def test_data_inspect(capsys, tiny):
    values = succeed(capsys, "data", "inspect", str(tiny / "squares.yaml"))
    source = values["sources"]["squares"]
    assert source["samples"] == {"train": 9, "test": 3}
    found = succeed(capsys, "data", "validate", str(tiny / "squares.yaml"))
    assert (found["is_valid"], found["good"]) == (True, 12)
    status, out, _ = run(capsys, "data", "inspect", str(tiny / "squares.yaml"))
    assert status == 0
    assert "samples: train 9, test 3" in out
    assert "a red square" in out


def test_from_a_folder_of_pictures_to_token_ids(capsys, tiny, tmp_path):
    """Both outputs of both commands; what was refused is named."""
    pets = tmp_path / "pets"
    pets.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (90 * number, 0, 0)).save(pets / f"{number}.png")
        (pets / f"{number}.txt").write_text("a red square")
    (pets / "bad.jpg").write_bytes(b"no picture")
    (pets / "bad.txt").write_text("bad")
    given = ("data", "from-folder", str(pets), "--output", str(tmp_path), "--name", "made")
    options = ("--image_size", "32", "--val", "0", "--test", "0")
    values = succeed(capsys, *given, *options)
    assert values["splits"] == {"train": 3}
    assert [(r["reason"], r["name"]) for r in values["refused"]] == [("picture", "bad.jpg")]
    status, out, _ = run(capsys, *given, *options, "--license", "CC0-1.0")
    assert (status, "refused: 1\n  bad.jpg: bad.jpg: a picture must be PNG" in out) == (0, True)
    given = ("data", "tokenize", values["manifest"], "--output", str(tmp_path / "ids"))
    given += ("--pipeline", str(tiny / "pipeline"))
    made = succeed(capsys, *given, "--workers", "1", "--splits", "[train]")
    assert made["sources"] == {"made": {"train": 3}}
    status, out, _ = run(capsys, *given)
    assert status == 0
    assert f"manifest: {tmp_path / 'ids' / 'made.yaml'}" in out
    status, out, _ = run(capsys, "data", "inspect", made["manifest"])
    assert "CC0-1.0  pre-tokenized" in out
    message = fail(capsys, *given, "--image_tokenizer", "none")
    assert "image tokenizer must be a folder; there is no `none`" in message


def test_dry_run_of_the_smoke_config(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    values = succeed(capsys, "train", "--config", "configs/smoke.yaml", "--dry-run", "--seed", "3")
    assert values["config"]["seed"] == 3
    assert values["num_parameters"] > 100_000
    assert values["tokens_per_step"] > 0


def test_train_with_sample_sheets(capsys, tiny, tmp_path):
    """Two steps of a tiny run: the sheets that the command line hands to the trainer are there."""
    config = {
        "output_dir": str(tmp_path / "run"),
        "num_train_steps": 2,
        "model": {"preset": "tiny", "max_text": 20, "unconditional_text": 4},
        "tokenizers": {
            "text": str(tiny / "pipeline" / "tokenizer"),
            "image": str(tiny / "pipeline" / "image_tokenizer"),
        },
        "data": {
            "manifest": str(tiny / "squares.yaml"),
            "batch_size": 4,
            "cache_dir": str(tmp_path / "cache"),
        },
        "mixed_precision": "no",
        "sample_every_steps": 1,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    values = succeed(capsys, "train", "--config", str(path), "--optimizer.lr", "1e-3")
    assert values["step"] == 2
    samples = tmp_path / "run" / "samples"
    assert sorted(each.name for each in samples.iterdir()) == [
        "captions.json", "step_0000001.png", "step_0000002.png",
    ]  # fmt: skip
