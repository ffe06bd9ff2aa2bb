"""The paper: bridges, noise, and Algorithm 1. PyTorch alone; no file is read or written here."""
