"""Fine-tuning by low-rank adapters: W + (alpha / rank) B A, with W frozen (peft).

Hu et al. 2021, arXiv 2106.09685. A run trains, averages and exports the adapter; its checkpoints
hold the frozen weights too, so that they need no other folder to go on from.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from multimodal_dlm.errors import ConfigError
from multimodal_dlm.training.config import LoRAConfig

ADAPTER = "default"
COMPONENT = "transformer"


def add_lora(model: Any, config: LoRAConfig, *, seed: int) -> None:
    """Freeze a model and add an adapter that changes nothing yet: B is zero, A is drawn.

    Args:
        model: A Diffusers model with `add_adapter`.
        config: Rank, alpha and targets.
        seed: Of A.

    Raises:
        ConfigError: When peft is missing, no module has a target's name, or a target is the head.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            "`lora.rank` above 0 needs the package peft. Install it: pip install"
            " 'multimodal-dlm[lora]'."
        ) from error
    made = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else config.rank,
        target_modules=list(config.target_modules),
        lora_dropout=0.0,
        bias="none",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(made, ADAPTER)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"`lora.target_modules`: {error}") from error


def has_lora(model: Any) -> bool:
    """Whether a model carries an adapter."""
    return bool(getattr(model, "peft_config", None))


def empty_copy(model: Any) -> Any:
    """A new model of the same config with the same adapters, its weights to be loaded."""
    made = type(model).from_config(model.config)
    if has_lora(model):
        for name, config in model.peft_config.items():
            made.add_adapter(config, name)
    return made


def merged_copy(model: Any) -> Any:
    """A copy of a model with its adapters added into its weights; without any, a plain copy."""
    made = empty_copy(model)
    made.load_state_dict(model.state_dict())
    if has_lora(made):
        made.fuse_lora(safe_fusing=True)
        made.unload_lora()
    return made


def save_lora(model: Any, folder: Path) -> None:
    """Write the adapter as a Diffusers LoRA: `pytorch_lora_weights.safetensors`.

    `pipe.transformer.load_lora_adapter(folder)` loads it; rank, alpha and targets are in the file's
    metadata.
    """
    from peft.utils import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    LoraBaseMixin._save_lora_weights(
        save_directory=folder,
        lora_layers={COMPONENT: {name: tensor.contiguous() for name, tensor in weights.items()}},
        lora_metadata={COMPONENT: _plain(model.peft_config[ADAPTER].to_dict())},
        safe_serialization=True,
    )


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Sets as sorted lists, so that the same adapter is the same file."""
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.items()
    }
