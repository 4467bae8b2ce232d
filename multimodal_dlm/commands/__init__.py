"""The commands of `multimodal-dlm`: one module a group, nothing heavy imported before it runs."""
