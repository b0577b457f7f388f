"""The plan as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hybrid.plan.advice import Advice
from lightning_hybrid.plan.held import KINDS, Moment
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.phases import PHASES, Plan
from lightning_hybrid.plan.setup import Setup


def render(plan: Plan, advice: Sequence[Advice] = ()) -> str:
    """One table with each phase at its peak, the verdict and, where it does not fit, the advice."""
    lines = [_heading(plan), "", *_table(plan), "", *_verdict(plan)]
    if advice:
        lines += ["", "settings that would help, with what the worst phase then takes less:", *_settings(plan, advice)]
    return "\n".join(lines)


def in_gib(size: float) -> str:
    """Bytes as GiB, with more digits the fewer there are."""
    gib = size / 2**30
    return f"{gib:,.1f}" if abs(gib) >= 10 else f"{gib:.2f}" if abs(gib) >= 0.1 else f"{gib:.3f}"


def _heading(plan: Plan) -> str:
    setup = plan.setup
    models = ", ".join(_model(network) for network in setup.networks.values())
    ranks = "1 rank" if setup.ranks == 1 else f"{setup.ranks} ranks"
    return (
        f"{models} ({str(setup.dtype).removeprefix('torch.')}); {ranks}, {_stages(setup)}; {_rows(setup)}, "
        f"{plan.cache.slots} generated at once, {setup.micro_batch} trained at once"
    )


def _model(network: Network) -> str:
    trained = f" ({network.trained / 1e9:.2g}B trained)" if network.adapter is not None else ""
    return f"{network.name} {network.numel / 1e9:.3g}B{trained}"


def _stages(setup: Setup) -> str:
    """The strategy's, and those of models that have another."""
    roles = {network.role: setup.engine(network).stage for network in setup.networks.values() if not network.replicated}
    others = [f"{role} {stage}" for role, stage in roles.items() if stage != setup.general.stage]
    return f"ZeRO-{setup.general.stage}" + (f" ({', '.join(others)})" if others else "")


def _rows(setup: Setup) -> str:
    size, new = setup.run.algorithm.group_size, setup.run.rollout.max_new_tokens
    rows = str(setup.rows) if size == 1 else f"{setup.rows // size} × {size}"
    return f"{rows} rows of {setup.prompt} + {new} tokens per rank"


def _table(plan: Plan) -> list[str]:
    """GiB per rank: a line for each owner, and one for each phase's total."""
    kinds = [kind for kind in KINDS if any(plan.peaks[phase].bytes(kind=kind) for phase in PHASES)]
    rows = [["GiB per rank", *kinds, "total", ""]]
    for phase in PHASES:
        peak = plan.peaks[phase]
        rows += [_line(f"  {owner}", peak, kinds, owner) for owner in plan.setup.networks if peak.bytes(owner=owner)]
        verdict = "fits" if peak.bytes() <= plan.device else f"{in_gib(peak.bytes() - plan.device)} too much"
        rows.append([*_line(phase, peak, kinds, None)[:-1], f"{verdict}; peak: {peak.name}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [_aligned(row, widths) for row in rows]


def _line(name: str, peak: Moment, kinds: Sequence[str], owner: str | None) -> list[str]:
    sizes = [peak.bytes(owner=owner, kind=kind) for kind in kinds]
    return [name, *(in_gib(size) if size else "-" for size in sizes), in_gib(peak.bytes(owner=owner)), ""]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip()


def _verdict(plan: Plan) -> list[str]:
    most, device = in_gib(plan.peak), in_gib(plan.device)
    verdict = "It fits" if plan.fits else "It does not fit"
    lines = [f"{verdict}: {most} GiB at most, and a device has {device} GiB."]
    if plan.host:
        node = in_gib(plan.host * plan.setup.ranks_per_node)
        lines.append(f"Host memory: {in_gib(plan.host)} GiB per rank, {node} GiB per node, beside the processes.")
    return lines


def _settings(plan: Plan, advice: Sequence[Advice]) -> list[str]:
    width = max(len(" ".join(item.overrides)) for item in advice)
    return [
        f"  {' '.join(item.overrides).ljust(width)}  -{in_gib(item.saved)} GiB"
        + ("  then it fits" if item.plan.fits else "")
        + (f"  but {'; '.join(item.costs)}" if item.costs else "")
        for item in advice
    ]
