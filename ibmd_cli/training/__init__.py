"""`ibmd distill`: settings, the training loop, run folders, checkpoints and the run's page."""
