"""ibmd: one-step image translation, distilled (Inverse Bridge Matching Distillation, arXiv:2502.01362)."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Give `ibmd_cli.Student`, which imports PyTorch, only when it is asked for."""
    if name == "Student":
        from ibmd_cli.student import Student

        return Student
    raise AttributeError(f"module 'ibmd_cli' has no attribute {name!r}")
