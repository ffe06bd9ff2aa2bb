"""What is measured of models in turn: an order that favours none, and first calls that count for none."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ibmd_cli.data.pairs import Pairs, open_pairs
from ibmd_cli.errors import IbmdError
from ibmd_cli.evaluation.measure import Entry, Measurement, Parts, measure, turns
from ibmd_cli.models.folder import load_model
from ibmd_cli.reporting import Reporter

BUILTIN = "builtin:outline2emoji"


def embedded() -> Pairs:
    config = load_model(BUILTIN, "student").config
    return open_pairs(BUILTIN, config, degrade="", masks="", labels="", layout="", fit="none", seed=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_no_model_is_favoured_by_the_order(count: int):
    """Over a cycle each model is as often at each position, and as often right before each neighbour as after it."""
    rounds = [turns(count, number) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in rounds)
    for position in range(count):
        assert sorted(order[position] for order in rounds) == sorted([*range(count)] * 2)
    steps = [step for order in rounds for step in zip(order, order[1:], strict=False)]
    assert all(steps.count((a, b)) == steps.count((b, a)) for a, b in steps)


def test_every_model_is_called_before_any_is_measured_and_then_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, int, int]] = []
    translate = Measurement.translate

    def recorded(self: Measurement, entry: Entry, *arguments: object) -> Tensor:
        calls.append((entry.label, *arguments[-2:]))
        return translate(self, entry, *arguments)

    monkeypatch.setattr(Measurement, "translate", recorded)
    teacher, names = load_model(BUILTIN, "teacher"), ("student A", "student B", "student C")
    entries = [Entry(load_model(BUILTIN, "student"), name, name, "0", 1, 2) for name in names]
    entries += [Entry(teacher, "teacher 1", "t", "0", 1, 1), Entry(teacher, "teacher 2", "t", "0", 2, 2)]
    labels = [entry.label for entry in entries]
    pairs, rows = embedded(), [[0], [1], [2]]
    how, parts = Measurement(("psnr",), seeds=2), Parts(tmp_path / "parts", {}, 3)
    measure(entries, pairs, rows, {}, how, parts, torch.device("cpu"), Reporter(quiet=True), range(len(rows)))
    warm, timed = calls[: len(calls) - 3 * 2 * 9], calls[len(calls) - 3 * 2 * 9 :]
    assert [label for label, *_ in warm[:5]] == labels  # once each, before memory is measured
    memory = [label for label, *_ in warm[5:]]
    assert sorted(memory) == sorted([*names, "teacher 1"] * 2)  # each model as often
    assert memory == memory[::-1]  # and as early as late
    for number in range(3 * 2 * 2):  # rounds: batch, seed, draw
        _, draw = divmod(number, 2)
        order = [labels[k] for k in turns(5, number) if draw < entries[k].samples]
        found, timed = timed[: len(order)], timed[len(order) :]
        assert found == [(label, number // 2 % 2, draw) for label in order]
    assert timed == []
    counts = [len(parts.read(f"{k}.seconds")) for k in range(5)]
    assert counts == [3 * 2 * entry.samples for entry in entries]


def test_the_order_changes_no_sample(tmp_path: Path):
    """Noise depends on seed, name and draw: a model's scores are the same in whatever company."""
    student, pairs = load_model(BUILTIN, "student"), embedded()
    found = []
    for count in (1, 3):
        entries = [Entry(student, "student", "s", "0", 1, 2)] * count
        parts = Parts(tmp_path / str(count), {}, 2)
        how = Measurement(("psnr",))
        measure(entries, pairs, [[0, 1], [2]], {}, how, parts, torch.device("cpu"), Reporter(quiet=True), range(2))
        found += [parts.read(f"{k}.psnr") for k in range(count)]
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-3)


PLAN = {
    "--seed": 0,
    "--batch-size": 64,
    "--metric": ["psnr"],
    "--protocol": None,
    "files in --data": "a",
    "version": "1",
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--seed": 1}, "--seed 0 before, 1 now"),
        ({"--batch-size": 2}, "--batch-size 64 before, 2 now"),
        ({"--metric": ["psnr", "ssim"]}, "--metric psnr before, psnr, ssim now"),
        ({"--protocol": "i2sb-sr"}, "--protocol none before, i2sb-sr now"),
        ({"--seed": 1, "--batch-size": 2}, "--seed 0 before, 1 now; --batch-size 64 before, 2 now"),
        ({"--seed": 1, "files in --data": "b"}, "--seed 0 before, 1 now"),  # which may be why
        ({"files in --data": "b"}, "other files in --data"),
        ({"version": "2", "new": 3}, "other version, new"),
    ],
)
def test_what_is_continued_must_be_the_same_and_the_flag_is_named(tmp_path: Path, changes: dict, words: str):
    parts = Parts(tmp_path / "parts", PLAN, 1)
    parts.begin()
    parts.write(0, {"0.psnr": torch.zeros(1, 1)})
    Parts(tmp_path / "parts", dict(PLAN), 1).begin()
    with pytest.raises(IbmdError, match=f"holds a part of another evaluation: {words}: give the same"):
        Parts(tmp_path / "parts", PLAN | changes, 1).begin()
