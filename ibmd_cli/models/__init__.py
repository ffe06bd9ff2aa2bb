"""Teachers and students: their folders, references, published checkpoints, samplers and cards."""
