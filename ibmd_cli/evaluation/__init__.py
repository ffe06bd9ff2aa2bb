"""`ibmd eval`: students and teachers measured on held-out pairs, in tables and a report."""
