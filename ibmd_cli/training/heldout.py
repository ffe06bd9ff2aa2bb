"""Held-out scores: how well a model that is in training does on pairs it does not see.

The same pairs and the same noise each time, so that two moments of a run are compared drawing by drawing.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ibmd_cli.data.facts import LOOK_AT, digests, warnings_of
from ibmd_cli.data.references import usual_fit
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.errors import UsageError
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import Streams, stream
from ibmd_cli.metrics.intervals import estimate
from ibmd_cli.metrics.scores import diversity, energy_score, mse
from ibmd_cli.models.model import StudentModel
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig
from ibmd_cli.training.run_folder import Run

SAMPLES = 2
"""Draws for each source: the fewest from which an energy score and a diversity are computed."""
MOST = 24
"""Pairs that are scored, if there are as many: more would take too long."""
FEWEST, KEPT = 8, 256
"""Pairs that are held out."""
SHARE = 0.05
"""Of a run's time that scoring may take."""
RISES, FALLS = 1.02, 1.03
"""A score that ends so many times above its least was made worse by what was learnt last; one that was so many times
above it before the last part of the steps, `LATE`, would fall on."""
LATE = 0.2


def hold_out(data: SourceImages, share: float, seed: int, reporter: Reporter) -> list[int]:
    """Choose pairs that are kept from training, and take them out of what `data` draws from, with all their copies.

    Args:
        data: pairs.
        share: of them, at most `KEPT`.
        seed: of the choice.
        reporter: told of copies.

    Returns:
        Their numbers.

    Raises:
        UsageError: there are too few pairs.
    """
    order = torch.randperm(len(data), generator=stream(seed, "held out")).tolist()
    count = max(FEWEST, min(KEPT, round(share * len(data))))
    if len(data) < 2 * FEWEST:
        raise UsageError(
            f"--data: {len(data)} pairs: expected at least {2 * FEWEST} to train a teacher and to hold some out "
            "(--validation 0 holds none out)"
        )
    held, training = order[:count], sorted(order[count:])
    if len(data.pixels):  # of larger sets, no copies are looked for
        sides = [digests(data.pixels[:, :3]), digests(data.pixels[:, -3:])]
        known = [{side[row] for row in held} for side in sides]
        copies = {row for row in training if any(side[row] in seen for side, seen in zip(sides, known, strict=True))}
        training = [row for row in training if row not in copies]
        if copies:
            reporter.note(f"{len(copies)} pairs have a picture in common with held-out ones and are left out")
    data.rows = torch.tensor(training)
    return held


class HeldOut:
    """Pairs that training does not see.

    Args:
        x_0: targets (N, C, H, W) in [-1, 1].
        sources: x_T with labels, masks and regions.
        seed: of the noise.
        at_once: images that fit into memory in one call.
    """

    def __init__(self, x_0: Tensor, sources: Sources, seed: int, at_once: int = MOST) -> None:
        self.x_0, self.sources, self.seed, self.at_once = x_0, sources, seed, at_once

    def __len__(self) -> int:
        return len(self.x_0)

    def draw(self, translate: Callable[[Sources, Streams], Tensor], samples: int = SAMPLES) -> Tensor:
        """Translate the sources.

        Args:
            translate: sources and random streams, one for each image → results.
            samples: draws for each source.

        Returns:
            (samples, N, C, H, W), with the same noise at each call.
        """
        return torch.stack([self._draw(translate, m) for m in range(samples)])

    def judge(self, draws: Tensor) -> dict[str, float]:
        """Return `energy_score`, its 95 % interval (`_low`, `_high`), `mse`, and `spread`, their diversity."""
        value, low, high = estimate(energy_score(draws, self.x_0))
        ends = {} if low is None or high is None else {"energy_score_low": low, "energy_score_high": high}
        return {
            "energy_score": value,
            **ends,
            "mse": float(mse(draws, self.x_0).mean()),
            "spread": float(diversity(draws).mean()),
        }

    def copying(self) -> float:
        """Return the squared error of the source itself as a result."""
        return float(mse(self.sources.x_T[None].to(self.x_0), self.x_0).mean())

    def _draw(self, translate: Callable[[Sources, Streams], Tensor], m: int) -> Tensor:
        results = []
        for rows in torch.arange(len(self)).split(self.at_once):
            part = Sources(*(None if v is None else v[rows] for v in self.sources))  # type: ignore[arg-type]
            rng = [stream(self.seed, "held out", m, row) for row in rows.tolist()]
            results.append(translate(part, rng).to(self.x_0))
        return torch.cat(results)


def choose_held_out(
    config: DistillConfig,
    teacher: Mapping[str, Any],
    data: SourceImages,
    reporter: Reporter,
    device: torch.device,
) -> HeldOut | None:
    """Hold out what `--validation` says: a share of the pairs, or those of another folder; None for none.

    Args:
        config: the settings.
        teacher: its `config.json`.
        data: the pairs of `--data`, of which training draws the others.
        reporter: told what spoils a teacher, if one is trained.
        device: where models are scored.

    Raises:
        UsageError: there are too few pairs.
        NotAvailable, IbmdError: see `SourceImages`.
    """
    share, folder = config.held_out_share, config.validation
    if share is None:
        other = SourceImages(
            [folder], teacher, reporter, data.degradation, data.masks, layout=config.layout, labels=config.labels,
            fit=config.fit or usual_fit(config.layout, data.degradation), targets=True,
        )  # fmt: skip
        data.inputs |= other.inputs
        rows = torch.linspace(0, len(other) - 1, min(MOST, len(other))).long().tolist()
    elif share:
        other, rows = data, hold_out(data, share, config.seed, reporter)[:MOST]
    if config.trains_teacher:
        some = data.rows[torch.linspace(0, len(data.rows) - 1, min(LOOK_AT, len(data.rows))).long()].tolist()
        looked, x_0 = data.take_pairs(some, stream(config.seed, "facts"))
        source, target = (((x + 1) * 127.5).round() for x in (looked.x_T, x_0))
        for text in warnings_of(source, target, len(data.rows)):
            reporter.warn(text)
    if share == 0:
        return None
    batch, x_0 = other.take_pairs(rows, [stream(config.seed, "held-out sources", row) for row in rows], device)
    return HeldOut(x_0, batch, config.seed)


def score_student(run: Run, held_out: HeldOut, step: int, log: list[dict[str, Any]]) -> dict[str, Any]:
    """Score the averages of a student; keep the best if none was better. Returns what belongs into the log.

    Args:
        run: of the second half.
        held_out: pairs.
        step: student updates so far.
        log: its lines so far.
    """
    candidates = [(decay, run.averaged(step, decay)) for decay in run.players["student"].averages]
    if not run.writes:
        return {}
    scored = []
    for decay, model in candidates:
        assert isinstance(model, StudentModel)
        scored.append(({**held_out.judge(held_out.draw(model.translate)), "ema": decay}, model))
    line, student = min(scored, key=lambda pair: pair[0]["energy_score"])
    least = best(log)
    if least is None or line["energy_score"] < least["energy_score"]:
        run.write(student, run.half.best)
    return line


def calls_of_student(config: DistillConfig, held_out: HeldOut | None) -> int:
    """Return the network calls on single images of one scoring of a student."""
    return len(held_out) * SAMPLES * config.nfe * len(config.ema) if held_out else 0


def spacing(calls: int, batch_size: int, steps: int, share: float = SHARE) -> int:
    """Return how many updates lie between two scorings, so that these take at most `share` of the time.

    Args:
        calls: network calls on single images of one scoring.
        batch_size: images of an update, each of which costs a call and its gradient: three calls.
        steps: updates of the run; there are at most 1/`share` scorings.
        share: of the time that they may take.
    """
    return max(1, round(share * steps), -(-calls // max(1, int(3 * batch_size * share))))


def best(lines: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the line of a log with the least held-out energy score, the first of equals; None if none has one."""
    return min((line for line in lines if "energy_score" in line), key=lambda line: line["energy_score"], default=None)


def verdict(lines: Iterable[Mapping[str, Any]], copying: float = math.inf) -> list[str]:
    """Say what the held-out scores of a run tell: over-trained, not converged, or worse than doing nothing.

    Args:
        lines: the log.
        copying: squared error of the sources themselves, see `HeldOut.copying`.
    """
    scored = [line for line in lines if "energy_score" in line]
    least = best(scored)
    if least is None:
        return []
    said, last = [], scored[-1]
    if last["energy_score"] > RISES * least["energy_score"]:
        said.append(
            f"the held-out energy score was least at step {least['step']} ({least['energy_score']:.2f}), and is "
            f"{last['energy_score']:.2f} at the end: over-trained; more pairs or fewer steps help"
        )
    before = best(line for line in scored if line["step"] <= (1 - LATE) * last["step"])
    if before is not None and before["energy_score"] > FALLS * least["energy_score"]:
        said.append(
            f"the held-out energy score fell from {before['energy_score']:.2f} to {least['energy_score']:.2f} in the "
            f"last {LATE:.0%} of the steps: not converged; more steps help"
        )
    if least.get("mse_1", least["mse"]) > copying:
        said.append(
            f"its squared error on held-out pairs ({least.get('mse_1', least['mse']):.4f}) is above that of the "
            f"sources themselves ({copying:.4f}): it has not learnt what the pairs have in common"
        )
    return said
