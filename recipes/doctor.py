"""What of this machine and this environment would stop a run, and what to do about it.

``lightning-hybrid doctor`` prints versions, accelerators, compilers, caches, environment variables, and what was found;
``--json`` the same for programs. It ends with code 1 if something would stop a run. Nothing that may be broken is
imported into this process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from checkup.facts import Facts, gather
from checkup.findings import GIB, Finding, judge

_MARKS = {"stop": ("✗", "\033[31m"), "warn": ("!", "\033[33m"), "note": ("·", "\033[36m")}
_PLAIN = "\033[0m"


def doctor(arguments: Sequence[str]) -> int:
    """Look, print, and return the exit code."""
    parser = argparse.ArgumentParser("lightning-hybrid doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="facts and findings as one JSON object")
    options = parser.parse_args(arguments)
    facts = gather()
    findings = judge(facts)
    stopped = any(finding.level == "stop" for finding in findings)
    if options.json:
        print(
            json.dumps({"ok": not stopped, "findings": list(map(asdict, findings)), "facts": asdict(facts)}, indent=2)
        )
    else:
        for line in render(facts, findings, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ):
            print(line)
    return int(stopped)


def render(facts: Facts, findings: Sequence[Finding], *, color: bool) -> Iterator[str]:
    """The lines of the table, then those of the findings."""
    for title, rows in _tables(facts).items():
        if rows:
            yield title
            yield from (f"  {name:<22} {value}" for name, value in rows)
            yield ""
    for finding in findings:
        mark, code = _MARKS[finding.level]
        yield f"{code if color else ''}{mark} {finding.problem}{_PLAIN if color else ''}"
        yield from textwrap.wrap(f"→ {finding.remedy}", 110, initial_indent="  ", subsequent_indent="    ")
    stops = sum(finding.level == "stop" for finding in findings)
    yield "" if findings else "nothing found"
    yield f"{stops} of these would stop a run" if stops else "all is well: nothing here would stop a run"


def _tables(facts: Facts) -> dict[str, list[tuple[str, str]]]:
    versions = [(n, f"{p.version}  fails: {p.error}" if p.error else p.version) for n, p in facts.packages.items()]
    return {
        "versions": [("python", f"{facts.python}, {facts.platform}"), *((n, v) for n, v in versions if v)],
        "not installed": [("", ", ".join(name for name, version in versions if not version))],
        "machine": list(_machine(facts)),
        "compilers": [(name, said or "none") for name, said in facts.compilers.items()],
        "compiled ops": list(_extensions(facts)),
        "environment": list(facts.variables.items()),
        "free space": [(name, f"{free / GIB:,.1f} GiB") for name, free in facts.free.items()],
    }


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    for device in facts.torch.get("devices", []):
        yield "GPU", f"{device['name']}, {device['free_bytes'] / GIB:.1f} of {device['total_bytes'] / GIB:.1f} GiB free"
    if not facts.torch.get("devices"):
        yield "accelerator", "none: runs use the CPU"
    yield "cores", str(facts.cores)
    if facts.memory:
        yield "memory", f"{facts.memory['free'] / GIB:.1f} of {facts.memory['total'] / GIB:.1f} GiB free"
    if facts.network:
        yield "host", f"{facts.network['hostname']} ({facts.network['address'] or 'does not resolve'})"


def _extensions(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.extensions:
        yield "folder", facts.extensions["folder"]
        yield "built", ", ".join(facts.extensions["built"]) or "none; none is needed"


if __name__ == "__main__":
    sys.exit(doctor(sys.argv[1:]))
