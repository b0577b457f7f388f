"""The plan as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hybrid.plan.advice import Advice
from lightning_hybrid.plan.held import KINDS, Moment, gib
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.phases import PHASES, Plan
from lightning_hybrid.plan.servers import Server
from lightning_hybrid.plan.setup import Setup
from lightning_hybrid.plan.verdicts import of_engine
from lightning_hybrid.plan.vllm import NAME


def render(plan: Plan, advice: Sequence[Advice] = ()) -> str:
    """One table with each phase at its peak, the verdict and, where it does not fit, the advice."""
    lines = [_heading(plan), "", *_table(plan), "", *_verdict(plan)]
    if advice:
        lines += ["", "settings that would help, with what the worst phase then takes less:", *_settings(plan, advice)]
    return "\n".join(lines)


def _heading(plan: Plan) -> str:
    setup = plan.setup
    models = ", ".join(map(_model, [*setup.networks.values(), *setup.separate.values()]))
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
    """GiB per rank: a line for each owner, and one for each phase's total; then a line for each process beside them."""
    peaks = [*plan.peaks.values(), *(server.peak for server in plan.servers)]
    kinds = [kind for kind in KINDS if any(peak.bytes(kind=kind) for peak in peaks)]
    rows = [["GiB per rank", *kinds, "total", ""]]
    for phase in PHASES:
        peak = plan.peaks[phase]
        owners = [owner for owner in (*plan.setup.networks, NAME) if peak.bytes(owner=owner)]
        rows += [_line(f"  {owner}", peak, kinds, owner) for owner in owners]
        rows.append(_total(phase, peak, kinds, _judged(peak.bytes() - plan.device)))
    for server in plan.servers:
        judged = _judged(server.too_much(plan.device)) if server.devices else "of the host's memory"
        rows.append(_total(_process(server), server.peak, kinds, judged))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [_aligned(row, widths) for row in rows]


def _total(name: str, peak: Moment, kinds: Sequence[str], judged: str) -> list[str]:
    return [*_line(name, peak, kinds, None)[:-1], f"{judged}; peak: {peak.name}"]


def _judged(too_much: int) -> str:
    return f"{gib(too_much)} too much" if too_much > 0 else "fits"


def _process(server: Server) -> str:
    where = "on the CPU" if not server.devices else f"each of {server.devices} devices" if server.devices > 1 else ""
    return ", ".join(filter(None, [f"{server.name} apart", where]))


def _line(name: str, peak: Moment, kinds: Sequence[str], owner: str | None) -> list[str]:
    sizes = [peak.bytes(owner=owner, kind=kind) for kind in kinds]
    return [name, *(gib(size) if size else "-" for size in sizes), gib(peak.bytes(owner=owner)), ""]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
    return "  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip()


def _verdict(plan: Plan) -> list[str]:
    peaks = [plan.peak, *(server.peak.bytes() for server in plan.servers if server.devices)]
    most, device = gib(max(peaks)), gib(plan.device)
    verdict = "It fits" if plan.fits else "It does not fit"
    lines = [f"{verdict}: {most} GiB at most, and a device has {device} GiB.", *of_engine(plan)]
    if plan.host:
        node = gib(plan.host * plan.setup.ranks_per_node)
        lines.append(f"Host memory: {gib(plan.host)} GiB per rank, {node} GiB per node, beside the processes.")
    return lines


def _settings(plan: Plan, advice: Sequence[Advice]) -> list[str]:
    width = max(len(" ".join(item.overrides)) for item in advice)
    return [
        f"  {' '.join(item.overrides).ljust(width)}  -{gib(item.saved)} GiB"
        + ("  then it fits" if item.plan.fits else "")
        + (f"  but {'; '.join(item.costs)}" if item.costs else "")
        for item in advice
    ]
