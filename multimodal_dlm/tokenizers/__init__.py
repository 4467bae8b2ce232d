"""Text and image tokenizers, and the quantizers between pictures and codes."""
