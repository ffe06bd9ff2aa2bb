"""Pictures and files: decode, encode, find, fit to a size, cut into tiles, lay on sheets. Free of PyTorch on import."""
