"""The log of a run, `metrics.jsonl`: a line for each student update, and the signs of trouble that are seen in it.

The student's loss is the teacher's error less the bridge model's, on the student's images. At the bridge model's
optimum it cannot be negative (arXiv:2502.01362v2, Eq. 10). So its average, negated and in units of the bridge model's
error, tells by how much at least the bridge model lags behind. (A bridge model that does not move at all shows no lag:
it is the teacher.) A student that follows a lagging one may lose its diversity, which previews measure.
"""

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WINDOW = 50
"""Student updates that the lag is averaged over."""
LAG = 0.15
"""Warn above this lag. On runs of the embedded teachers that went well it stayed below 0.14."""
COLLAPSE = 0.25
"""Warn if diversity falls below this part of the greatest so far, or of the teacher's when it had time to grow."""
GROWN = 100
"""Student updates, and half of a run, after which it had."""


def read_log(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the lines of a log in a run folder, up to one that was cut off as it was written."""
    lines: list[dict[str, Any]] = []
    try:
        for line in (out / name).read_text(encoding="utf-8", errors="replace").splitlines():
            lines.append(json.loads(line))
    except (FileNotFoundError, ValueError):
        pass
    return lines


class Watch:
    """Follows a run from line to line and tells when trouble begins.

    Args:
        steps: student updates of the whole run.
        lines: the log so far, of a run that is continued.
    """

    def __init__(self, steps: int, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        self.steps = steps
        self.recent: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self.peak = 0.0
        self.lagging = self.collapsed = self.skipping = False
        for line in lines:
            self.look(line)

    def look(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Take in the next line of the log.

        Args:
            line: with step, bridge_loss, student_loss (None if not finite), skipped (steps so far), and perhaps
                diversity and teacher_diversity.

        Returns:
            What belongs into the line, too: "bridge_lag" (None before there are `WINDOW` lines) and, if trouble begins
            here, "warnings".
        """
        before = self.recent[-1]["skipped"] if self.recent else 0
        self.recent.append(line)
        lag = self._lag()
        warnings = []
        skipping, lagging = line["skipped"] > before, lag is not None and lag > (0 if self.lagging else LAG)
        if skipping and not self.skipping:
            warnings.append("a loss or gradient is not finite, the step is skipped; if it goes on, lower --lr")
        if lagging and not self.lagging:
            warnings.append(
                f"the bridge model lags behind the student: over {WINDOW} steps the teacher's error on its images was "
                f"{lag:.0%} smaller; more --bridge-steps or a higher --bridge-lr helps"
            )
        self.skipping, self.lagging = skipping, lagging
        if "diversity" in line:
            warnings += self._look_at_diversity(line)
        found = {"warnings": [f"step {line['step']}: {warning}" for warning in warnings]} if warnings else {}
        return {"bridge_lag": lag, **found}

    def _lag(self) -> float | None:
        pairs = [(line["student_loss"], line["bridge_loss"]) for line in self.recent]
        finite = [pair for pair in pairs if None not in pair]
        if len(pairs) < WINDOW or not finite:
            return None
        student, bridge = (math.fsum(losses) for losses in zip(*finite, strict=True))
        return -student / bridge

    def _look_at_diversity(self, line: Mapping[str, Any]) -> list[str]:
        diversity, teacher = line["diversity"], line["teacher_diversity"]
        self.peak = max(self.peak, diversity)
        due = max(self.peak, teacher if line["step"] >= max(GROWN, self.steps / 2) else 0.0)
        before, self.collapsed = self.collapsed, diversity < COLLAPSE * due
        if before or not self.collapsed:
            return []
        return [
            f"the student's diversity over z is {diversity:.3f}, after {self.peak:.3f} at most; the teacher's is "
            f"{teacher:.3f}: it collapses; more --bridge-steps or a higher --bridge-lr helps"
        ]
