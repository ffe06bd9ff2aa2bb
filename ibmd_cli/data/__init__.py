"""Training and evaluation data: folders, pairs, data sets, degradations, embedded pictures."""
