"""`multimodal-dlm <command>`: the only command line of the package.

Commands are functions in `multimodal_dlm.commands`; their signatures and docstrings are the options
and the help. `--help` imports neither torch nor diffusers.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from multimodal_dlm import __version__
from multimodal_dlm.commands.parser import CommandParser, hyphens_to_underscores
from multimodal_dlm.commands.reporting import (
    FORMATS,
    INTERNAL_ERROR,
    USER_ERROR,
    Report,
    find_format,
    print_error,
    print_report,
    print_traceback,
)
from multimodal_dlm.errors import MultimodalDLMError

DESCRIPTION = """One small model that draws pictures from text and reads text from pictures.

Begin with: multimodal-dlm demo"""


@dataclass(frozen=True)
class Command:
    """Where a command lives and what the list of commands says about it.

    Args:
        module: Module of `multimodal_dlm.commands`.
        summary: One line.
    """

    module: str
    summary: str


COMMANDS = {
    "generate": Command("pictures", "draw pictures from prompts"),
    "caption": Command("texts", "describe pictures"),
    "ask": Command("texts", "answer questions about a picture"),
    "rank": Command("texts", "sort captions by how well they fit a picture"),
    "inpaint": Command("pictures", "redraw a part of a picture"),
    "joint": Command("pictures", "invent pictures together with their captions"),
    "train": Command("train", "train a model or a tokenizer from a config file"),
    "plan": Command("plan", "say whether a run fits on some devices, and how long it takes"),
    "data build": Command("data", "build the shards and the manifest of a dataset"),
    "data from-folder": Command("data", "write a folder of pictures with captions as a dataset"),
    "data inspect": Command("data", "show counts, licences and examples of a manifest"),
    "data validate": Command("data", "check every byte of the shards of a manifest"),
    "data tokenize": Command("data", "write pictures and texts as token ids, ready to train on"),
    "evaluate": Command("evaluate", "measure a pipeline on held-out data and write a report"),
    "study step-plan": Command("study", "measure what a window is worth drawing in how many steps"),
    "study scorer": Command("study", "fit the image-text scorer that judges drawings"),
    "study noise-spectrum": Command("study", "measure what is decided at which noise level"),
    "app": Command("app", "serve a page that shows every task step by step"),
    "demo": Command("demo", "show every task on the released pipeline"),
    "card": Command("card", "write the model card of a saved pipeline"),
}
GROUPS = {
    "data": "build, inspect, validate or tokenize datasets",
    "study": "measure how a model denoises",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    That is 0, 2 for a user's mistake, 1 for ours and for a report without parts that failed.
    """
    arguments = hyphens_to_underscores(sys.argv[1:] if arguments is None else arguments)
    output_format = find_format(arguments)
    is_debug = "--debug" in arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command, options = _parse(arguments, output_format)
        report = command(**options)
        print_report(report, output_format)
    except MultimodalDLMError as error:
        if is_debug:
            print_traceback()
        print_error(type(error).__name__, str(error), output_format)
        return USER_ERROR
    except SystemExit as stop:  # The parser has spoken.
        return stop.code if isinstance(stop.code, int) else INTERNAL_ERROR
    except KeyboardInterrupt:
        print_error("KeyboardInterrupt", "Stopped.", output_format)
        return 130
    except Exception as error:  # noqa: BLE001 - the last resort before the user's eyes
        if is_debug:
            print_traceback()
        message = f"{type(error).__name__}: {error} Run again with --debug for the traceback."
        print_error(type(error).__name__, message, output_format)
        return INTERNAL_ERROR
    return report.status


def build_parser(output_format: str = "human") -> CommandParser:
    """The whole parser.

    Args:
        output_format: Of errors.
    """
    root = CommandParser(
        prog="multimodal-dlm",
        description=DESCRIPTION,
        version=__version__,
        output_format=output_format,
    )
    levels = {"": root.add_level()}
    for name, command in COMMANDS.items():
        group, _, leaf = name.rpartition(" ")
        if group not in levels:
            parser = CommandParser(
                description=_sentence(GROUPS[group]), output_format=output_format
            )
            levels[""].add_subcommand(group, parser, help=GROUPS[group])
            levels[group] = parser.add_level()
        parser = CommandParser(description=_sentence(command.summary), output_format=output_format)
        module = importlib.import_module(f"multimodal_dlm.commands.{command.module}")
        module.add_options(parser, leaf)
        parser.add_argument(
            "--format", choices=FORMATS, default="human", help="text for people or one JSON object"
        )
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        levels[group].add_subcommand(leaf, parser, help=command.summary)
    return root


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _parse(
    arguments: Sequence[str], output_format: str
) -> tuple[Callable[..., Report], dict[str, Any]]:
    """The function of the command and its arguments."""
    parser = build_parser(output_format)
    settings = parser.instantiate(parser.parse_args(list(arguments)))
    path = []
    while "command" in settings:
        path.append(settings.command)
        settings = settings[settings.command]
    options = {
        name: value for name, value in vars(settings).items() if name not in ("format", "debug")
    }
    module = importlib.import_module(f"multimodal_dlm.commands.{COMMANDS[' '.join(path)].module}")
    return getattr(module, f"run_{path[-1].replace('-', '_')}"), options


if __name__ == "__main__":
    sys.exit(main())
