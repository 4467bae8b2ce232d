"""The mathematics of discrete diffusion; imports torch and nothing else of weight."""
