"""`ibmd export`: students as single files, and exported students run without PyTorch."""
