"""Training: configs, objectives, the loop, checkpoints and what a run leaves behind."""
