"""Protocols: how published figures were measured (`protocols.toml`), and what keeps a figure from being compared."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ibmd_cli.errors import UsageError, nearest
from ibmd_cli.metrics.scores import METRICS
from ibmd_cli.reporting import counted


@dataclass(frozen=True)
class Protocol:
    """How the figures of a paper were measured; the keys of `protocols.toml`, which says what they mean."""

    name: str
    images: int
    size: int
    data: str
    split: str
    layout: str
    degrade: str
    uint8: str
    inception: str
    reference: str
    reference_about: str
    enlarge: int | None
    metrics: tuple[str, ...]


def protocols() -> dict[str, Protocol]:
    """Return the protocols by their names."""
    table = tomllib.loads((Path(__file__).parent / "protocols.toml").read_text(encoding="utf-8"))
    found = {}
    for name, row in table.items():
        found[name] = Protocol(name=name, **row | {"metrics": tuple(row["metrics"]), "enlarge": row["enlarge"] or None})
    return found


def find_protocol(name: str | None) -> Protocol | None:
    """Return the protocol of a name, or None for None.

    Raises:
        UsageError: there is none of that name.
    """
    table = protocols()
    if name is not None and name not in table:
        raise UsageError(f"--protocol {name}: no such protocol: {nearest(name, table)}")
    return table[name] if name else None


def cautions(
    names: Sequence[str], protocol: Protocol | None, *, images: int, size: int, samples: int, reference: Path | None
) -> dict[str, str | None]:
    """Say of each score why it does not compare with published figures; None if nothing is known to speak against it.

    Args:
        names: keys of `metrics.METRICS`.
        protocol: that was followed.
        images: how many were translated.
        size: their height and width.
        samples: draws for each.
        reference: file or folder of the FID's reference, if it was not the targets.
    """
    if protocol is None:
        none = "no --protocol: published figures have images and settings of their own"
        return {name: METRICS[name].caution or none for name in names}
    reasons = []
    if images != protocol.images:
        reasons.append(f"{counted(images, 'image')}, {protocol.name} has {protocol.images:,}")
    if size != protocol.size:
        reasons.append(f"{size} pixels, {protocol.name} has {protocol.size}")
    if samples > 1:
        reasons.append(f"{samples} samples of each source, {protocol.name} has 1")
    found: dict[str, str | None] = {}
    for name in names:
        own = METRICS[name].caution or ("" if name in protocol.metrics else f"{protocol.name} does not measure it")
        other = name == "fid" and (reference is None or reference.name != protocol.reference)
        more = [f"reference {reference or 'these targets'}, expected {protocol.reference}"] if other else []
        found[name] = own or "; ".join(reasons + more) or None
    return found
