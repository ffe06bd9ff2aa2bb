"""`ibmd sample`: what is read, translated and written, and the Python class `Student`."""
