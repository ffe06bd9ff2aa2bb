"""Teachers and students: their folders, references, published checkpoints, samplers and cards."""

FORMAT_VERSION = 1
"""Of `config.json`, in folders and in exported files: the highest that this version reads."""
