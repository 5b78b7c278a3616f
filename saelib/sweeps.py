"""Many runs: side by side on the cores that are there, and their rows in a store that survives being killed."""
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
from tqdm import tqdm

from saelib.checks import require
from saelib.files import make_folder, reading
from saelib.origin import code_hash, inputs
from saelib.runs import RunConfig, run
from saelib.subjects import pick_device

WRITING = threading.Lock()  # to a store: sweeps in several threads may share one
STREAMS = 4  # members of a sweep at once on a GPU
BEGINS = '{"config": '  # each row of a store


def read_rows(store: Path | str) -> list[dict]:
    """The rows of a store, in the order in which they were written, but for torn lines that a kill left."""
    store = Path(store)
    if not store.exists():
        return []
    with reading("store", store, "hold one JSON object on each line"):
        rows = [json.loads(line) for line in whole_lines(store)]
        require(all(isinstance(row, dict) for row in rows), "store", str(store), "a file of rows that a sweep wrote")
        return rows


def whole_lines(store: Path) -> list[str]:
    """The lines of a file of JSON lines, but for those that began as a row and are not whole."""
    lines = store.read_text().split("\n")
    return [line for line in lines if not BEGINS.startswith(line[:len(BEGINS)]) or is_json(line)]


def is_json(line: str) -> bool:
    with suppress(json.JSONDecodeError):
        json.loads(line)
        return True
    return False


def check_writable(store: Path) -> None:
    """Raise ValueError if a store can't be written. Make it if it is not there."""
    with reading("store", store, "be a file that can be written"):
        store.parent.mkdir(parents=True, exist_ok=True)
        store.open("a").close()


def add_row(store: Path, row: dict) -> None:
    """Write one row after those of a store, on a line of its own, whatever a killed process left of the last one."""
    with WRITING, open(store, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        is_torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * is_torn + json.dumps(row).encode() + b"\n")


def side_by_side(task: Callable, items: Iterable, device: str = "cpu", stop: threading.Event | None = None) -> list:
    """[task(item) for item in items], a thread each: as many at once as there are cores, or a few on a GPU, each in a
    stream of its own.

    A small SAE gains little from a second core, and two of them gain all of it; nor does it fill a GPU.

    Args:
        task: called with one item.
        items: what to call it with.
        device: "cpu", "cuda", or "auto".
        stop: is set when a task fails or the user interrupts, for the tasks under way to look at.
    """
    n_threads, on_cpu = torch.get_num_threads(), pick_device(device) == "cpu"
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def alone(item):
        if on_cpu:
            torch.set_num_threads(1)
            return task(item)
        with torch.cuda.stream(torch.cuda.Stream()):
            return task(item)

    with ThreadPoolExecutor(n_cores if on_cpu else STREAMS) as pool:
        futures = [pool.submit(alone, item) for item in items]
        try:
            # a task that fails is heard of before those that started earlier have ended
            for future in as_completed(futures):
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            if stop:
                stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(n_threads)


def finished(store: Path | str, keep: Path | str | None) -> dict[tuple[str, str], dict]:
    """The rows of a store that count, by config and inputs: of this code, with their SAE if SAEs are to be kept."""
    rows = read_rows(store)
    require(all("config" in row and isinstance(row.get("provenance"), dict) and "code" in row["provenance"]
                for row in rows), "store", str(store), "a file of rows that a sweep wrote")
    return {(json.dumps(row["config"]), row["provenance"].get("inputs")): row for row in rows
            if row["provenance"]["code"] == code_hash()
            and (keep is None or is_below(row.get("sae"), keep))}


def is_below(sae: str | None, keep: Path | str) -> bool:
    """Whether an SAE that a row names is there, in the folder `keep`."""
    return sae is not None and Path(sae, "sae.json").is_file() and Path(sae).resolve().parent == Path(keep).resolve()


def whole_list(configs: Iterable[RunConfig]) -> list[RunConfig]:
    """The configs, or ValueError if they are something else."""
    require(not isinstance(configs, RunConfig), "configs", "a single RunConfig", "a list of them")
    configs = list(configs)
    for config in configs:
        require(isinstance(config, RunConfig), "configs", f"a list with a {type(config).__name__}",
                "a list of RunConfig")
    return configs


def places(config: RunConfig, name: str, store: Path | str | None,
           keep: Path | str | None) -> tuple[Path | None, Path | None]:
    """Where a member's checkpoint and its SAE go."""
    identity = sha256((name + code_hash()).encode()).hexdigest()[:16]
    return (store and Path(store).with_suffix(".checkpoints") / f"{identity}.pt",
            keep and Path(keep).resolve() / f"{config.method}_{config.sparsity:g}_seed{config.seed}_{identity}")


def sweep(configs: Iterable[RunConfig], store: Path | str | None = None, *, keep: Path | str | None = None,
          device: str = "auto", progress: bool = True) -> list[dict]:
    """The rows of `configs`, in their order: read from the store where it has them, run where it lacks them.

    A row counts only if it was made by the code that is here, from the files that are here (see `saelib.origin`).
    Members run side by side, a thread and a core or a stream each, and share the activations, so that a row does not
    depend on how many run at once. Each row is written when it is done, and a member that takes long leaves a
    checkpoint each minute: kill the sweep, and the next call goes on from there. A member that fails, as one whose rate
    is too high may, does not keep the others from their rows: its error is raised after them.

    Args:
        configs: what to run.
        store: a file of JSON lines; None keeps nothing.
        keep: a folder for the SAEs, each in a folder of its own below it, which its row names as `sae`, by its whole
            path; None keeps none. A row whose SAE is not there is run again.
        device: "cpu", "cuda", or "auto".
        progress: show a progress bar on stderr.

    Returns:
        One row (see `run`) for each config.
    """
    configs, device = whole_list(configs), pick_device(device)
    if keep:  # before the first SAE is trained
        make_folder("keep", keep)
    kept = finished(store, keep) if store else {}
    names = {config: (json.dumps(asdict(config)), inputs(config)) for config in configs}
    done = {config: kept[name] for config, name in names.items() if name in kept}
    todo = [config for config in names if config not in done]
    if store and todo:
        check_writable(Path(store))
    stop, failed = threading.Event(), {}
    bar = tqdm(total=sum(c.n_tokens for c in todo), unit="tok", unit_scale=True, disable=not (progress and todo),
               mininterval=2, desc=f"{len(todo)} runs", file=sys.stderr)

    def count(n: int) -> None:
        bar.update(n)
        if stop.is_set():
            raise KeyboardInterrupt

    def member(config: RunConfig) -> None:
        checkpoint, folder = places(config, "".join(names[config]), store, keep)
        try:
            row = run(config, device, count, checkpoint, folder)
        except Exception as error:
            error.add_note(f"in {config}")
            if failed.setdefault(f"{type(error).__name__}: {error}", error) is error:
                bar.write(f"a run failed, the others go on: {error}", file=sys.stderr)
            return
        done[config] = row
        if store:
            add_row(Path(store), row)
            checkpoint.unlink(missing_ok=True)

    with bar:
        side_by_side(member, todo, device, stop)
    if store:
        with suppress(OSError):  # not there, or another sweep's are in it
            Path(store).with_suffix(".checkpoints").rmdir()
    for error in failed.values():
        raise error
    return [done[config] for config in configs]
