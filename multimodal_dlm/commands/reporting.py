"""What a command says: one readable text or one JSON object, and an exit status."""

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("human", "json")
USER_ERROR = 2  # Exit status of a mistake that the user can repair.
INTERNAL_ERROR = 1
INCOMPLETE = 1  # Exit status of a result without the parts that failed.


@dataclass(frozen=True)
class Report:
    """Result of a command.

    Args:
        values: JSON values, printed by `--format json`.
        text: What `--format human` prints.
        status: Exit status.
    """

    values: dict[str, Any]
    text: str
    status: int = 0


def find_format(arguments: Sequence[str]) -> str:
    """The output format asked for, read before parsing so that parse errors obey it."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--format":
            continue
        if not equals:
            value = arguments[place + 1] if place + 1 < len(arguments) else ""
        return value if value in FORMATS else "human"
    return "human"


def print_report(report: Report, output_format: str) -> None:
    """Write a report to standard output."""
    if output_format == "json":
        text = json.dumps(report.values, ensure_ascii=False, indent=2)
    else:
        text = report.text
    sys.stdout.write(text.rstrip("\n") + "\n")


def print_error(kind: str, message: str, output_format: str) -> None:
    """Write an error: one JSON object on standard output, or one sentence on standard error."""
    if output_format == "json":
        values = {"error": {"type": kind, "message": message}}
        sys.stdout.write(json.dumps(values, ensure_ascii=False, indent=2) + "\n")
    else:
        sys.stderr.write(f"error: {message}\n")


def print_traceback() -> None:
    """Write the traceback of the exception being handled to standard error."""
    sys.stderr.write(traceback.format_exc())


def say(message: str) -> None:
    """Tell on standard error what takes time; standard output stays for the result."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
