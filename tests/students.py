"""Students as if they had been distilled from another teacher."""

import copy
from typing import Any

from ibmd_cli.models.model import Student


def of_teacher(student: Student, **changes: Any) -> Student:
    config = copy.deepcopy(student.config)
    config["teacher"]["reference"] = changes.pop("reference")
    config["training"] |= changes.pop("training", {})
    return Student(student.predictor, {**config, **changes})
