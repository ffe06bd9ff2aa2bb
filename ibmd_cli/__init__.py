"""ibmd: one-step image translation, distilled (Inverse Bridge Matching Distillation, arXiv:2502.01362).

Rooms, from the command line down; each imports only from those below it:

    cli         the four commands
    sampling    `ibmd sample`: pictures in, pictures out; the class `Student`
    evaluation  `ibmd eval`: measuring, tables, the report
    export      `ibmd export`: single files, and running them without PyTorch
    training    `ibmd distill`: settings, the loop, run folders
    data        sources, pairs, data sets, degradations
    models      teachers and students: folders, references, published checkpoints, samplers
    metrics     functions of arrays, and the networks that metrics look through
    images      pictures and files
    networks    the U-Net, its layers, the predictor x̂_0
    method      the paper: bridges, noise, Algorithm 1
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Student": "ibmd_cli.sampling.student",
    "load_teacher": "ibmd_cli.models.references",
    "sample_teacher": "ibmd_cli.models.samplers",
}


def __getattr__(name: str) -> Any:
    """Import a public name, and PyTorch with it, only when it is asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ibmd_cli' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
