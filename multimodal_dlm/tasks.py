"""The tasks of the canonical row, and what a likelihood of each is made of."""

from collections.abc import Mapping
from typing import Any

from multimodal_dlm.errors import ConfigError, unknown_name

TASKS = (
    "text_to_image",
    "caption",
    "vqa",
    "joint",
    "unconditional_image",
    "unconditional_text",
    "text",
)

# What `score` takes for a task: True is needed, False refused, absent is either.
SCORE_INPUTS: dict[str, dict[str, bool]] = {
    "text_to_image": {"codes": True, "texts": True, "questions": False},
    "caption": {"codes": True, "texts": True, "questions": False},
    "vqa": {"codes": True, "texts": True, "questions": True},
    "joint": {"codes": True, "texts": True, "questions": False},
    "unconditional_image": {"codes": True, "texts": False, "questions": False},
    "unconditional_text": {"texts": True, "questions": False},
    "text": {"codes": False, "texts": True, "questions": True},
}


def check_score_inputs(task: str, inputs: Mapping[str, Any]) -> None:
    """Refuse a task that does not exist, or that lacks an input or has one too many.

    Args:
        task: Name of the task.
        inputs: `codes`, `texts` and `questions`; None where not given.

    Raises:
        ConfigError: Naming the task and what it takes.
    """
    if task not in SCORE_INPUTS:
        raise unknown_name("task", task, SCORE_INPUTS)
    for name, part in inputs.items():
        is_given = part is not None
        if SCORE_INPUTS[task].get(name, is_given) != is_given:
            raise ConfigError(
                f"Task `{task}` {'has no place for' if is_given else 'needs'} `{name}`; got"
                f" {'some' if is_given else 'none'}. It takes {_listed_inputs(task)}."
            )
        if is_given and name != "codes" and any(entry is None for entry in part or ()):
            raise ConfigError(f"`{name}` must be one string a row; got None among them.")


def _listed_inputs(task: str) -> str:
    return ", ".join(f"`{name}`" for name, is_needed in SCORE_INPUTS[task].items() if is_needed)
