"""The student at the start of a run: the teacher's weights, or those of another student."""

import copy

from ibmd_cli import __version__
from ibmd_cli.errors import UsageError
from ibmd_cli.method.noise import stream
from ibmd_cli.models.folder import load_student
from ibmd_cli.models.model import StudentModel, TeacherModel, student_times
from ibmd_cli.settings import to_json
from ibmd_cli.training.config import DistillConfig


def new_student(config: DistillConfig, teacher: TeacherModel, reference: str = "") -> StudentModel:
    """Make a student of the weights of a teacher; those for z are zero or small (arXiv:2502.01362v2, App. B).

    Differs from the paper: with `init`, of the weights of a student, e.g. one of fewer steps.
    """
    bridge = teacher.predictor.bridge
    channels = config.noise_channels if config.noise else 0
    rng = stream(config.seed, "noise weights")
    predictor = copy.deepcopy(teacher.predictor)
    if channels:
        predictor = predictor.widen(channels, config.noise_init, rng)
    noise = {"channels": channels, "grid": config.noise_grid or teacher.image_size}
    if config.init and not config.trains_teacher:
        first = load_student(config.init)
        have, want = (
            {**model.to_dict(), "noise": settings}
            for model, settings in ((first.predictor, first.config["sampling"]["noise"]), (predictor, noise))
        )
        if wrong := [f"{key}: {have[key]} there, {want[key]} here" for key in want if have[key] != want[key]]:
            raise UsageError(f"--init {config.init}: another kind of student ({'; '.join(wrong)})")
        predictor = first.predictor
    chained = bridge.to_dict()["kind"] == "i2sb"
    shared = ("network", "bridge", "preconditioning", "conditional", "noise_channels")
    inherited = ("task", "image", "classes", "mask", "degradation", "licence")
    settings = {
        "format": "ibmd-student",
        "format_version": 1,
        "ibmd_version": __version__,
        "name": f"{teacher.name}-{config.nfe}step",
        **{key: predictor.to_dict()[key] for key in shared},
        **{key: teacher.config.get(key) for key in inherited},
        "sampling": {
            "timesteps": student_times(bridge, config.nfe, config.timesteps),
            "noise": noise,
            "rollout": "chain" if chained else "random-step",
            "transition": "posterior" if chained else "marginal",
        },
        "teacher": {"reference": reference or config.teacher, "sha256": teacher.digest()},
        "training": to_json(config),
    }
    return StudentModel(predictor, settings)
