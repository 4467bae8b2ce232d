"""The argument parser: jsonargparse, with errors that name the nearest match and the remedy."""

import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from multimodal_dlm.commands.reporting import USER_ERROR, print_error
from multimodal_dlm.errors import nearest_match

_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: (\S+)")
_UNKNOWN_CHOICE = re.compile(r"argument \w+: invalid choice: '([^']*)' \(choose from (.*)\)")
_WRONG_VALUE = re.compile(r'Parser key "([^"]+)":\s*(.*)', re.DOTALL)
_UNKNOWN_KEY = re.compile(r'(?:Key|Option) "?\'?([\w.]+)"?\'? is not (?:accepted|expected)')
_UNION = re.compile(r"Subtypes: \[(.*?)\].*Given value: (.*)$")
_FOREIGN_KEY = re.compile(r"Subcommand '([\w ]+)' does not accept option '([\w.]+)'")
_NO_COMMAND = re.compile(r"to be one of \{(.*?)\}, but it was not provided")
_OPTIONS = " [options]"
_MISSING = re.compile(r"arguments are required: (.*)")


class CommandParser(ArgumentParser):
    """A parser whose errors are one sentence with the nearest match, as text or as JSON.

    Args:
        output_format: `human` or `json`, for errors.
        kwargs: As for `jsonargparse.ArgumentParser`.
    """

    def __init__(self, *args: Any, output_format: str = "human", **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.output_format = output_format

    def add_level(self) -> Any:
        """Add a level of commands below this parser."""
        return self.add_subcommands(
            required=True, dest="command", metavar="COMMAND", title="commands", description=" "
        )

    def format_help(self) -> str:
        """The help without what says nothing to a reader."""
        text = re.sub(r"\n *Available subcommands:\n *\(required\)", "", super().format_help())
        usage, gap, rest = text.partition("\n\n")
        for _ in range(usage.count(_OPTIONS)):
            usage = usage.replace(_OPTIONS, "", 1).replace("\n" + " " * len(_OPTIONS), "\n")
        return usage + gap + rest

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and end with status 2."""
        del ex  # The message says all of it.
        print_error("UsageError", self.explain(message), self.output_format)
        sys.exit(USER_ERROR)

    def explain(self, message: str) -> str:
        """The parser's message as name, rule, value and remedy."""
        remedy = self._remedy()
        if found := _UNKNOWN_OPTION.search(message):
            name = found[1].partition("=")[0]
            return f"Unknown option `{name}`.{nearest_match(name, self._options())} {remedy}"
        if found := _UNKNOWN_CHOICE.search(message):
            options = re.findall(r"[\w-]+", found[2])
            near = nearest_match(found[1], options)
            return f"Unknown command `{found[1]}`.{near} Available: {', '.join(options)}. {remedy}"
        if found := _UNKNOWN_KEY.search(message):
            near = nearest_match(found[1], self._keys())
            return f"Unknown entry `{found[1]}`.{near} {remedy}"
        if found := _FOREIGN_KEY.search(message):
            near = nearest_match(found[2], self._keys(found[1]))
            return f"Unknown entry `{found[2]}`.{near} {self._remedy([found[1]])}"
        if found := _WRONG_VALUE.search(message):
            return f"`{found[1]}` has a wrong value. {_one_line(found[2])} {remedy}"
        if found := _MISSING.search(message):
            *path, _ = found[1].split(", ")[0].split(".")
            names = ", ".join(f"`{name.split('.')[-1]}`" for name in found[1].split(", "))
            is_command = bool(path) and path[0] in self._commands()
            return f"{names} must be given. {self._remedy(path if is_command else [])}"
        if found := _NO_COMMAND.search(message):
            names = set(found[1].split(","))
            group = [name for name in self._commands() if set(self._commands(name)) == names]
            return f"A command must be given. {self._remedy(group)}"
        return f"{_one_line(message)} {remedy}"

    def _remedy(self, path: Iterable[str] = ()) -> str:
        command = " ".join([self._command(), *path])
        return f"Run `{command} --help` for all options."

    def _commands(self, group: str | None = None) -> Iterable[str]:
        for action in self._actions:
            if action.dest == "command" and group is None:
                yield from action.choices or ()
            elif action.dest == "command":
                yield from action.choices[group]._commands()  # type: ignore[index]

    def _command(self) -> str:
        return self.prog.replace(_OPTIONS, "")

    def _options(self) -> Iterable[str]:
        for action in self._actions:
            yield from action.option_strings

    def _keys(self, command: str | None = None) -> Iterable[str]:
        for action in self._actions:
            if command is None:
                yield action.dest
            elif action.dest == "command":
                yield from action.choices[command]._keys()  # type: ignore[index]


def _one_line(message: str) -> str:
    text = re.sub(r"\s+", " ", message).strip()
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.", "")
    if found := _UNION.search(text):
        types = re.sub(r",? ?NoneType", " or null", found[1]).strip()
        text = f"Expected {types}. Got value: {found[2]}"
    return text if text.endswith(".") else text + "."


def hyphens_to_underscores(arguments: Iterable[str]) -> list[str]:
    """Spell option names with underscores: `--num-images-per-prompt 4` works too."""
    result = []
    is_option = True
    for argument in arguments:
        is_option = is_option and argument != "--"
        if is_option and argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            argument = "--" + name.replace("-", "_") + equals + value
        result.append(argument)
    return result
