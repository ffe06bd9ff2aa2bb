"""ibmd: one-step image translation, distilled (Inverse Bridge Matching Distillation, arXiv:2502.01362)."""

__version__ = "0.1.0"
