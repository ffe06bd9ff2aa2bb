"""Memory: the estimate against what a process takes, and the search for the largest micro-batch."""

import subprocess
import sys

import pytest
import torch

from ibmd_cli.devices import tune
from ibmd_cli.errors import UsageError
from ibmd_cli.training.memory import largest_micro_batch

MEASURE = """
import copy, sys
import torch
from torch.optim.swa_utils import AveragedModel
from ibmd_cli.method.distillation import Sources, bridge_loss, rollout, student_gradient
from ibmd_cli.training.memory import estimate_memory
from ibmd_cli.devices import forget_peak, peak_memory
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.model import make_setup
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.method.noise import BatchStreams

recompute, checkpointing, mixed = (word in sys.argv for word in ("recompute", "checkpointing", "mixed"))
torch.set_num_threads(1)
teacher = load_model("builtin:outline2emoji", "teacher").predictor.requires_grad_(False)
student = teacher.widen(4).requires_grad_(True)
with torch.device("meta"):
    shapes = [make_predictor(network.to_dict()) for network in (teacher, student)]
options = {"calls": 1, "recompute": recompute, "checkpointing": checkpointing, "mixed": mixed}
expected = estimate_memory(*shapes, 32, **options)
cpu, images = torch.device("cpu"), 32
forget_peak(cpu)
start = peak_memory(cpu) - sum(p.nbytes for p in (*teacher.parameters(), *student.parameters()))
bridge_model = copy.deepcopy(teacher).requires_grad_(True)
for network in (teacher, bridge_model, student):
    network.backbone.gradient_checkpointing = checkpointing
sampling = {"timesteps": [1.0], "noise": {"channels": 4, "grid": 32}, "rollout": "chain", "transition": "marginal"}
setup, average = make_setup(student, sampling), AveragedModel(student)
optimizers = [torch.optim.AdamW(network.parameters(), 1e-5, fused=True) for network in (bridge_model, student)]
for step in range(2):
    batch, rng = Sources(torch.zeros(images, 3, 32, 32)), BatchStreams(range(images), step)
    for optimizer in optimizers:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if optimizer is optimizers[0]:
                with torch.no_grad():
                    x_0 = rollout(student, setup, batch, rng)
                bridge_loss(bridge_model, setup, x_0, batch, rng).backward()
            else:
                student_gradient(teacher, bridge_model, student, setup, batch, rng, recompute=recompute)
        optimizer.step()
        optimizer.zero_grad()
print((expected.fixed + images * expected.per_image) / (peak_memory(cpu) - start))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak before cannot be forgotten")
@pytest.mark.parametrize(
    "options", [[], ["recompute"], ["checkpointing"], ["mixed"]], ids=lambda options: "".join(options)
)
def test_estimate_is_within_a_quarter(options: list[str]):
    done = subprocess.run([sys.executable, "-c", MEASURE, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.75 < float(done.stdout) < 1.25


@pytest.mark.parametrize(("limit", "found"), [(129, 1), (200, 6), (459, 16), (460, 24), (10**6, 48)])
def test_largest_micro_batch(limit: int, found: int):
    """A step takes 100 bytes and 15 for each image; none is tried that would not fit, and divisors of 48 alone."""
    tried = []

    def attempt(images: int) -> int:
        tried.append(images)
        return 100 + 15 * images

    assert largest_micro_batch(48, limit, 100, attempt) == found
    assert all(100 + 15 * images <= limit and 48 % images == 0 for images in tried)


def test_gpu_that_runs_out_of_memory():
    def attempt(images: int) -> int:
        if images > 4:
            raise torch.OutOfMemoryError
        return 0

    assert largest_micro_batch(16, 10, 0, attempt) == 4
    with pytest.raises(UsageError, match="not even one image fits"):
        largest_micro_batch(16, 10, 0, lambda images: 11)


def test_flags_of_a_gpu():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.allow_tf32 = False
        tune(torch.device("cpu"))
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == (before[0], before[2])
        tune(torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system keeps no other count")
def test_peak_is_not_that_of_the_process_before():
    """A child begins with its parent's ru_maxrss, here 1.2 GB: what it takes itself must be seen all the same."""
    child = (
        "import torch\n"
        "from ibmd_cli.devices import forget_peak, peak_memory\n"
        "cpu = torch.device('cpu')\n"
        "forget_peak(cpu)\n"
        "before = peak_memory(cpu)\n"
        "x = torch.ones(50 << 20)\n"
        "print((peak_memory(cpu) - before) >> 20)\n"
    )
    parent = (
        "import subprocess, sys\n"
        "large = bytearray(1200 << 20)\n"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True, check=True).stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 190 <= int(done.stdout) <= 600  # MiB: 200, and what the libraries take at the first use
