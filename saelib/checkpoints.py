"""The state of a run on disk, from which an interrupted one goes on."""
import json
from collections.abc import Callable
from pathlib import Path

import torch

from saelib.checks import require
from saelib.files import plain, reading, write_whole


def describe(run: dict, **about) -> dict:
    """What a run is, as plain values: its own, and those of the loop. What a checkpoint would not give back as it was
    is refused, before any step."""
    require(isinstance(run, dict), "run", run, "a dict of plain values")
    require(not run.keys() & about.keys(), "run", run, f"a dict with other names than {', '.join(about)}")
    return json.loads(json.dumps(about | run, default=plain))


def save(path: Path, state: dict, about: dict) -> None:
    """Write the state whole, with what the run is, so that an interruption leaves the previous one."""
    write_whole({path: lambda partial: torch.save(state | {"about": about}, partial)})


def resume(path: Path, about: dict, device: torch.device, restore: Callable[[dict], None]) -> None:
    """Let `restore` take up what `save` wrote, if it is there. Raise ValueError if it is another run's or broken."""
    if not path.exists():
        return
    with reading("checkpoint", path, "be a file that `train` wrote"):
        state = torch.load(path, weights_only=True, map_location=device)
        for name in about | state["about"]:
            there, value = state["about"].get(name), about.get(name)
            require(there == value, "checkpoint", f"{path} of a run with {name} {there!r}",
                    f"of this run, with {value!r}")
        restore(state)
