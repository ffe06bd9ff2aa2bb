"""One network in training: optimiser, learning-rate schedule, gradient accumulation, EMA, guards.

The student, the bridge model and a teacher that is trained from data are all a `Player`: there is one training step
in this package. Accelerate supplies devices, mixed precision and several processes.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ibmd_cli.errors import IbmdError
from ibmd_cli.method.noise import BatchStreams, Streams, stream
from ibmd_cli.training import fsdp

PATIENCE = 5
"""This many skipped steps in a row stop the training."""
FP16_PATIENCE = 16
"""With fp16, this many more: the scale of the loss starts at 2^16, and each skipped step halves it until it fits."""


NO_MEMORY = ("out of memory", "can't allocate memory")
"""What PyTorch says if memory is not enough: of a GPU, of the machine."""


class Diverged(IbmdError):
    """Too many losses or gradients in a row that are not finite."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up, constant, then a descent ("linear", "cosine") over the whole run or none.

    Attributes:
        lr: peak.
        warmup: steps of linear warm-up.
        decay: "none", "linear" or "cosine".
        floor: final rate as a fraction of the peak.
    """

    lr: float
    warmup: int = 0
    decay: str = "none"
    floor: float = 0.05

    def __call__(self, step: int, steps: int) -> float:
        """Return the rate for step `step` (from 0) of `steps`."""
        progress = step / max(1, steps)
        fall = {
            "none": 1.0,
            "linear": 1 - (1 - self.floor) * progress,
            "cosine": self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)),
        }[self.decay]
        return self.lr * fall * min(1.0, (step + 1) / (self.warmup + 1))


class Player:
    """A network and everything that moves it.

    A step whose loss or gradient is not finite is skipped: weights, moments and average stay as they are.

    Args:
        name: "student", "bridge_model" or "teacher"; part of its random streams and of error messages.
        model: the network; trained in place.
        accelerator: device, precision, processes.
        schedule: learning rate.
        steps: optimiser steps of the whole run, for the schedule.
        seed: of the run.
        betas: of Adam.
        clip: largest gradient norm, or None.
        micro_batches: gradients of this many calls of the loss function are averaged in each step.
        micro_batch: images of such a call, each of which gets a random stream of its own; None: they share one.
        ema: decay of the averaged copy, or of each of several; None for no copy.
        weight_decay: decoupled (AdamW).
        split: whether the network, a `Predictor`, is split over the processes (`fsdp`). Then all of them must call
            `averaged` and `state_dict` together.
        halved: called with the new size of a micro-batch when memory was not enough for it, and it is cut in halves;
            None: that ends the training. Several processes do not do this: they would wait for each other.

    Attributes:
        skipped: steps skipped since the start.
        in_a_row: steps skipped since the last one that was made.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        accelerator: Accelerator,
        schedule: Schedule,
        *,
        steps: int,
        seed: int,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = None,
        micro_batches: int = 1,
        micro_batch: int | None = None,
        ema: float | Sequence[float] | None = None,
        weight_decay: float = 0.0,
        split: bool = False,
        halved: Callable[[int], None] | None = None,
    ) -> None:
        self.halved = halved if accelerator.num_processes == 1 else None
        self.name, self.steps, self.seed = name, steps, seed
        self.accelerator, self.schedule, self.clip, self.micro_batches = accelerator, schedule, clip, micro_batches
        self.micro_batch = micro_batch
        self.network = model
        self.skipped = self.in_a_row = 0
        # Before `prepare`, which changes the network's forward for mixed precision: the averages stay in float32.
        decays = () if ema is None else (ema,) if isinstance(ema, int | float) else ema
        self.averages = {float(decay): AveragedModel(model) for decay in decays}
        self.shape = copy.deepcopy(model).to("meta") if split else None  # without weights, which `averaged` fills in
        if split:
            for network in (model, *(average.module for average in self.averages.values())):
                fsdp.split(network)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(
            model.parameters(), schedule.lr, betas=betas, weight_decay=weight_decay, fused=True
        )
        # A network that is split averages its gradients itself: it is prepared as one that is not trained.
        self.model = accelerator.prepare_model(model, evaluation_mode=split)
        self.optimizer = accelerator.prepare_optimizer(optimizer)

    def update(self, step: int, compute: Callable[..., Tensor]) -> float:
        """Make one optimiser step and return the loss, averaged over micro-batches and processes.

        All processes see the same loss and gradient, so they skip a step together.

        Args:
            step: number of the step, from 0.
            compute: given a random stream and a `backward`, computes the loss, a tensor without a graph, and its
                gradient.

        Returns:
            The loss, not finite if the step was skipped for it.

        Raises:
            Diverged: loss or gradient were not finite `PATIENCE` times in a row.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step, self.steps)
        total = None
        while total is None:
            try:
                total = self._gradient(step, compute)
            except RuntimeError as error:  # of which torch.OutOfMemoryError is one
                if not any(words in str(error) for words in NO_MEMORY) or not self._halve():
                    raise
        total, norm = self.accelerator.reduce(total, "mean"), self._gradient_norm()
        # The one place of a step where the host waits for a GPU: whether to make the step is decided on the host.
        loss, size = torch.cat([total, norm.reshape(1).to(total)]).tolist()
        if math.isfinite(loss) and math.isfinite(size):
            self.optimizer.step()
            self._move_average()
            self.in_a_row = 0
        else:
            self._skip(step, loss, size)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradient(self, step: int, compute: Callable[..., Tensor]) -> Tensor:
        """Add up the gradient of all micro-batches; return their mean loss, (1,)."""
        total = torch.zeros(1, device=self.accelerator.device)
        for micro in range(self.micro_batches):
            rng = self.streams(step, micro)
            last = micro == self.micro_batches - 1
            with self.accelerator.no_sync(self.model) if not last else nullcontext():
                total = total + compute(rng, self._backward) / self.micro_batches
        return total

    def _halve(self) -> bool:
        """Cut the micro-batch in halves, whose images keep their random streams; tell whether that can be done."""
        if self.halved is None or not self.micro_batch or self.micro_batch % 2:
            return False
        self.micro_batch, self.micro_batches = self.micro_batch // 2, 2 * self.micro_batches
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        self.halved(self.micro_batch)
        return True

    def streams(self, step: int, micro: int) -> Streams:
        """Return the random streams of a call of the loss function; those of images know nothing of micro-batches."""
        if self.micro_batch is None:
            return stream(self.seed, self.name, step, micro, self.accelerator.process_index)
        first = (self.accelerator.process_index * self.micro_batches + micro) * self.micro_batch
        size = self.accelerator.num_processes * self.micro_batches * self.micro_batch
        return BatchStreams(range(first, first + self.micro_batch), self.seed, self.name, step, size=size)

    def averaged(self, decay: float | None = None) -> nn.Module:
        """Return the network with weights averaged by a decay, or by the first (the network itself without EMA).

        One that is split comes as a whole to the main process, without weights to the others.
        """
        average = self.averages[decay] if decay is not None else next(iter(self.averages.values()), None)
        network = average.module if average is not None else self.network
        if self.shape is None:
            return network
        main = self.accelerator.is_main_process
        state, copied = fsdp.gather(network.state_dict(), main), copy.deepcopy(self.shape)
        if main:
            copied.to_empty(device=self.accelerator.device).load_state_dict(state)
        return copied

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on; of a network that is split, as a whole to the main process."""
        state = {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"skipped": self.skipped, "in_a_row": self.in_a_row}
        state |= {_average(i): average.state_dict() for i, average in enumerate(self.averages.values())}
        return fsdp.gather(state, self.accelerator.is_main_process)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        _load(self.network, state["model"])
        parameters = list(self.network.parameters())
        moments = {
            i: {k: fsdp.split_as(v, parameters[i]) if v.shape == parameters[i].shape else v for k, v in tensors.items()}
            for i, tensors in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for i, average in enumerate(self.averages.values()):
            _load(average, state[_average(i)])

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.micro_batches)

    def _skip(self, step: int, loss: float, norm: float) -> None:
        """Count a step that is not made, and let the scaler of fp16 lower its scale."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.update()
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE + (FP16_PATIENCE if scaler is not None else 0):
            raise Diverged(
                f"{self.name} step {step + 1}: loss {loss:g}, gradient norm {norm:g}: "
                f"not finite {self.in_a_row} times in a row"
            )

    def _gradient_norm(self) -> Tensor:
        limit = self.clip if self.clip is not None else math.inf
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return fsdp.whole(norm)

    @torch.no_grad()
    def _move_average(self) -> None:
        """Move the exponential averages, whose decay warms up as min(ema, (1 + k)/(10 + k)): the start is forgotten."""
        for ema, average in self.averages.items():
            k = int(average.n_averaged)  # which is on the CPU
            decay = min(ema, (1 + k) / (10 + k)) if k else 0.0
            averages, weights = ([fsdp.part(p) for p in m.parameters()] for m in (average.module, self.network))
            torch._foreach_lerp_(averages, weights, 1 - decay)
            average.n_averaged += 1


def _average(number: int) -> str:
    """Name of an average in a checkpoint."""
    return f"average {number}" if number else "average"


def _load(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a network that may be split."""
    own = network.state_dict()
    network.load_state_dict({name: fsdp.split_as(x, own[name]) for name, x in state.items()})
