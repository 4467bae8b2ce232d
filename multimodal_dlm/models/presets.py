"""Named sizes of the backbone: shapes only."""

from typing import Any

from multimodal_dlm.errors import unknown_name

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "axes_dims_rope": (16, 8, 8),
    },
    "small": {
        "hidden_size": 384,
        "num_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1024,
        "axes_dims_rope": (16, 24, 24),
    },
    "base": {
        "hidden_size": 768,
        "num_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "axes_dims_rope": (16, 24, 24),
    },
    "large": {
        "hidden_size": 1024,
        "num_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
        "axes_dims_rope": (16, 24, 24),
    },
    "1b": {
        "hidden_size": 2048,
        "num_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 5632,
        "axes_dims_rope": (32, 48, 48),
    },
    "8b": {
        "hidden_size": 4096,
        "num_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 12288,
        "axes_dims_rope": (32, 48, 48),
    },
}


def get_preset(name: str) -> dict[str, Any]:
    """A copy of the keyword arguments of a named size."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return dict(PRESETS[name])
