"""Measure steps side by side: in each round every contestant takes one step, in an order that rotates.

A machine's speed drifts by tens of per cent within minutes. Steps of one round are neighbours in time, so a contestant
is compared with the floor in the same round, and the median is taken of these ratios.
"""
import importlib.metadata
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from saelib import origin

MIN_ROUNDS, MAX_ROUNDS = 3, 25


@cache
def machine(device: str) -> dict:
    """What a row of the benchmark says of where it was made: `origin.provenance`, the processor, its cores and the
    threads used."""
    return origin.provenance(device) | {"processor": origin.processor(), "cores": os.cpu_count(),
                                        "threads": torch.get_num_threads()}


def seconds_of(step: Callable[[Tensor], object], x: Tensor, repeats: int = 1) -> float:
    """How long one step takes, as the mean of `repeats` in a row."""
    if x.is_cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            step(x)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        step(x)
    return (time.perf_counter() - begin) / repeats


def repeats_on(x: Tensor) -> int:
    """Steps that are timed as one: several on a GPU, where the wait for a first launch would be measured otherwise."""
    return 5 if x.is_cuda else 1


def quartiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, first and third quartile, to four digits."""
    values = [value * scale for value in values]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: float(f"{value:.4g}") for name, value in (("median", median), ("q1", q1), ("q3", q3))}


def ready(makers: dict, batches: Sequence[Tensor]) -> tuple[dict, dict]:
    """Make every contestant and let it take two steps untimed.

    Returns:
        Those that can, and for the others why they cannot: a GPU's memory is full, or a library's calls have changed.
    """
    made, failed = {}, {}
    for key, make in makers.items():
        try:
            contestant = make()
            for x in (batches[0], batches[-1]):
                contestant.step(x)
            made[key] = contestant
        except (RuntimeError, TypeError, AttributeError, ImportError, AssertionError) as error:
            failed[key] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            contestant = None
            if batches[0].is_cuda:
                torch.cuda.empty_cache()
    return made, failed


def rounds(seconds: float, title: str, max_rounds: int = MAX_ROUNDS) -> Iterator[int]:
    """Numbers of rounds: at least three, then more while time is left for one."""
    begin = time.monotonic()
    with tqdm(desc=title, unit="round", file=sys.stderr, leave=False) as bar:
        for number in range(max_rounds):
            yield number
            bar.update()
            spent = time.monotonic() - begin
            if number + 1 >= MIN_ROUNDS and spent * (number + 2) / (number + 1) > seconds:
                return


def interleave(contestants: dict, batches: Sequence[Tensor], reference: tuple, seconds: float, title: str,
               max_rounds: int = MAX_ROUNDS) -> dict[tuple, list[float]]:
    """Seconds of each contestant's step in each round. `reference` steps before, between and after the others, and its
    time is the median of these: all ratios rest on it."""
    times = {key: [] for key in contestants}
    others = [key for key in contestants if key != reference]
    for number in rounds(seconds, title, max_rounds):
        x, first = batches[number % len(batches)], number % max(1, len(others))
        order, step_by = others[first:] + others[:first], max(1, len(others) // 4)
        floor = []
        for place in range(0, len(order), step_by):
            floor.append(seconds_of(contestants[reference].step, x, repeats_on(x)))
            for key in order[place: place + step_by]:
                times[key].append(seconds_of(contestants[key].step, x, repeats_on(x)))
        floor.append(seconds_of(contestants[reference].step, x, repeats_on(x)))
        times[reference].append(statistics.median(floor))
    return times


def workspace(step: Callable[[Tensor], object], x: Tensor) -> int:
    """Bytes that one step needs on a GPU beyond what is there before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compare(makers: dict, batches: Sequence[Tensor], reference: tuple, seconds: float, title: str,
            max_rounds: int = MAX_ROUNDS) -> list[dict]:
    """One row for each contestant: its time, and its time over that of `reference` in the same rounds.

    Args:
        makers: (case, name) -> what makes the contestant.
        batches: what they step on, in turn.
        reference: the key that ratios are relative to.
        seconds: about how long to measure, after everything is made and warm.
        title: of the progress bar.
        max_rounds: of measurement.

    Returns:
        {"case", "name", "ms", "ratio", "rounds", "differs", "n_dead", "version" of another library}; ms and ratio hold
        median, q1 and q3. A contestant that cannot run leaves {"case", "name", "failed"}.
    """
    made, failed = ready(makers, batches)
    if reference not in made:
        raise RuntimeError(f"{reference[1]} is what all else is compared with, and it failed: {failed[reference]}")
    extra = {key: {"workspace_bytes": workspace(contestant.step, batches[0])} if batches[0].is_cuda else {}
             for key, contestant in made.items()}
    times = interleave(made, batches, reference, seconds, title, max_rounds)
    rows = []
    for key, values in times.items():
        about = {"differs": getattr(made[key], "differs", ""),
                 **({"n_dead": made[key].n_dead()} if hasattr(made[key], "n_dead") else {})}
        if hasattr(made[key], "distribution"):
            about["version"] = f"{made[key].distribution} {importlib.metadata.version(made[key].distribution)}"
        rows.append({"case": key[0], "name": key[1], "ms": quartiles(values, 1e3), "rounds": len(values), **about,
                     **extra[key],
                     "ratio": quartiles([value / floor for value, floor in zip(values, times[reference])])})
    return rows + [{"case": case, "name": name, "failed": why} for (case, name), why in failed.items()]


PEAK = """
import json, sys
import torch
from saelib import contestants, timing
torch.set_num_threads(int(sys.argv[7]))
small = contestants.Setting(16, 64, 2, 8)  # loads what is loaded at first use
contestants.Ours(small, "topk", *sys.argv[5:7]).step(torch.randn(8, 16))
timing.forget_peak()
before = timing.peak_resident()
setting = contestants.Setting(*map(int, sys.argv[1:5]))
x = contestants.setting_batch(setting)
own = contestants.Ours(setting, "topk", *sys.argv[5:7])
for _ in range(3):
    own.step(x)
sys.stdout.write(json.dumps(timing.peak_resident() - before))
"""


def forget_peak() -> None:
    """Let the peak of resident memory begin anew from what is resident now: importing may have needed more."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most memory this process has had resident, in bytes. Linux keeps it for each program; elsewhere there is none
    to read."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_of_training(d_model: int, n_latents: int, k: int, batch_size: int, path: str, precision: str) -> int:
    """Bytes by which the peak of three training steps in a fresh process lies above what was resident before them."""
    arguments = [str(value) for value in (d_model, n_latents, k, batch_size, path, precision, torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    return int(done.stdout)
