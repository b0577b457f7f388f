"""Import packages one after another and say how it went: `imports.py NAME...`, a process of its own.

A line of JSON for each: ``{"name", "version", "error", "more"}``. A package that ends the process ends this one only.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any


def look(name: str) -> dict[str, Any]:
    """Import a package; also what it raises that is no ``Exception`` is an answer."""
    try:
        module = importlib.import_module(name)
        more = about_torch(module) if name == "torch" else {}
        return {"name": name, "version": str(getattr(module, "__version__", "")), "error": None, "more": more}
    except BaseException as error:
        said = (str(error).strip().splitlines() or [""])[0]
        return {"name": name, "version": "", "error": f"{type(error).__name__}: {said}"[:300], "more": {}}


def about_torch(torch: Any) -> dict[str, Any]:
    """Accelerators as torch sees them; memory in bytes."""
    about: dict[str, Any] = {"cuda": torch.version.cuda, "threads": torch.get_num_threads(), "devices": []}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                name = torch.cuda.get_device_name(index)
                about["devices"].append({"name": name, "free_bytes": free, "total_bytes": total})
    about["said"] = [str(warning.message).splitlines()[0] for warning in said]
    return about


def main(names: list[str]) -> None:
    """Keep what packages print apart from the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in names:
        answers.write(json.dumps(look(name)) + "\n")
        answers.flush()
    # Whatever the packages do when Python ends is of no interest, and may fail.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
