"""How long a training step takes, beside the floors under it, the ordinary loop and other libraries.

    python -m saelib.bench                       every table, printed
    python -m saelib.bench --only steps memory   some of them
    python -m saelib.bench --out FILE            and kept, as JSON lines, in the place of the same tables' older rows

Each table is one interleaved run (see `saelib.timing`), written when it is done: interrupt at any time. On a GPU the
tables are those that fit into eight minutes. Other libraries take part where they are installed (see `saelib.peers`).
"""
import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

from saelib import data_bench, metrics, profiles, runs, subjects, sweeps, timing
from saelib.contestants import (
    CASES,
    RELU,
    Floor,
    Ours,
    Setting,
    auto,
    auto_name,
    chosen,
    fast_paths,
    floors,
    ours,
    plain,
)
from saelib.parts import large_copy, parts, predict
from saelib.peers import peers
from saelib.runs import RunConfig
from saelib.speed_rows import identity, store, text

FIRST, WIDE = Setting(256, 4096, 32, 2048), Setting(768, 12288, 32, 4096)
ON_GPU = [Setting(768, n, 32, batch, "cuda") for n in (32768, 131072) for batch in (8192, 65536)]
AXES = {"n_latents": [2**i for i in range(10, 17)], "k": [2**i for i in range(3, 9)],
        "batch_size": [2**i for i in range(8, 14)]}
FIT_STEPS = {"cpu": 40, "cuda": 400}  # a GPU's first steps are recorded
PROCESSES = 7
TARGET_MSE, TARGET_LR, TARGET_STEPS, TARGET_EVERY, TARGET_TOKENS = 0.2, 4e-3, 100, 5, 200_000
FRONTIER = ("topk", 32), ("topk", 64), ("relu", 0.04), ("relu", 0.11)  # of the profile "gpu", at each size for `pygpt`
GEMM = {"cpu": ("floor", "GEMM fp32"), "cuda": ("floor", "GEMM bf16")}


def steps(settings: list[Setting], cases: tuple[str, ...], seconds: float, table: str = "steps") -> Iterator[dict]:
    """Floors, our steps, the plain loop and the other libraries, for each setting."""
    for s in settings:
        makers = floors(s)
        for case in cases:
            paths = fast_paths(s.device) + ("dense",) * (case not in RELU)
            makers |= {**ours(s, case, paths=paths), **plain(s, case), **peers(s, case)}
        rows = timing.compare(makers, s.batches(2), GEMM[s.device], seconds / len(settings),
                              f"steps, n = {s.n_latents}, batch {s.batch_size}")
        yield from ({"table": table, "setting": asdict(s), "auto": auto_name(s), **row} for row in rows)


def whole_fit(s: Setting, case: str, seconds: float, table: str = "fit") -> Iterator[dict]:
    """`saelib.fit` as a user calls it: the time of its training loop, with loader and counters, over its steps; and on
    the paths that it would not choose. Here a step follows its like, so that memory is used as in training."""
    gemm, own = floors(s)[GEMM[s.device]](), Ours(s, case, *auto(s, case))
    method, n_steps = s.method(case), FIT_STEPS[s.device]
    batches, data = s.batches(), torch.cat(s.batches(8)).cpu()  # where a user has them
    paths = {"fit": "auto"} | {f"fit, {path}": path for path in fast_paths(s.device) if path != auto(s, case)[0]}
    times, n_dead = {name: [] for name in ("GEMM", "one step", *paths)}, {}
    for number in timing.rounds(seconds, "fit"):
        x = batches[number % len(batches)]
        times["GEMM"] += [statistics.median(timing.seconds_of(gemm.step, x, timing.repeats_on(x)) for _ in range(5))]
        times["one step"] += [statistics.median(timing.seconds_of(own.step, x, timing.repeats_on(x)) for _ in range(5))]
        for name, path in paths.items():
            fitted = runs.fit(data, method.key, method.sparsity, n_latents=s.n_latents,
                              n_tokens=n_steps * s.batch_size, batch_size=s.batch_size, device=s.device, path=path,
                              progress=False)
            times[name] += [fitted.metrics["seconds"] / n_steps]
            n_dead[name] = round(fitted.history[-1]["dead_fraction"] * s.n_latents)
    for name, values in times.items():
        yield {"table": table, "setting": asdict(s), "auto": auto_name(s, case), "case": case, "name": name,
               "ms": timing.quartiles(values, 1e3), "rounds": len(values),
               "ratio": timing.quartiles([value / gemm_value for value, gemm_value in zip(values, times["GEMM"])]),
               "differs": f"{n_steps} steps, {n_dead[name]} dead at the end" if name in paths else ""}


def curves(s: Setting, seconds: float) -> Iterator[dict]:
    """The cost of a step against one size at a time."""
    points = [(axis, replace(s, **{axis: value})) for axis, values in AXES.items() for value in values]
    work = [point.n_latents * point.batch_size for _, point in points]
    batches = replace(s, batch_size=max(s.batch_size, *AXES["batch_size"])).batches(2)
    for (axis, point), share in zip(points, work):
        makers = {GEMM[s.device]: floors(point)[GEMM[s.device]], **ours(point, "topk"), **chosen(point),
                  **plain(point, "topk")}
        rows = timing.compare(makers, [x[: point.batch_size] for x in batches], GEMM[s.device],
                              seconds * share / sum(work), f"{axis} = {getattr(point, axis)}", max_rounds=15)
        yield from ({"table": "curves", "axis": axis, "setting": asdict(point), "auto": auto_name(point), **row}
                    for row in rows)


def taken_apart(settings: list[Setting], seconds: float) -> Iterator[dict]:
    """The parts of a step, each alone, beside what its operations and bytes predict."""
    for s in settings:
        counted = parts(s) | {"large copy": large_copy(s.device)}
        makers = {("part", name): (lambda part=part: Floor(part.step)) for name, part in counted.items()}
        makers |= {GEMM[s.device]: floors(s)[GEMM[s.device]], **ours(s, "topk")}
        rows = timing.compare(makers, s.batches(), GEMM[s.device], seconds / len(settings), f"parts, n = {s.n_latents}")
        predict(rows, counted, "encoder product", "large copy")
        yield from ({"table": "parts", "setting": asdict(s), **row} for row in rows)


def memory(settings: list[Setting]) -> Iterator[dict]:
    """Peak resident memory of training in fresh processes, over what the formula says it must hold. Where the allocator
    finds room differs from process to process, and the peak with it."""
    if not Path("/proc/self/status").exists():
        return
    for s in settings:
        weights = 2 * s.n_latents * s.d_model + s.n_latents + s.d_model
        # parameters, gradients and two moments; a block; the batch
        needed = 4 * (4 * weights + 256 * s.n_latents + s.batch_size * s.d_model)
        peaks = [timing.peak_of_training(s.d_model, s.n_latents, s.k, s.batch_size, *auto(s)) for _ in range(PROCESSES)]
        yield {"table": "memory", "setting": asdict(s), "case": "topk", "name": auto_name(s), "rounds": PROCESSES,
               "peak_bytes": statistics.median(peaks), "needed_bytes": needed,
               "ratio": timing.quartiles([peak / needed for peak in peaks])}


def target(device: str) -> Iterator[dict]:
    """Seconds of training until the held-out normalized MSE on `pygpt` is below 0.2, and that MSE after equal tokens.

    All contestants step on the same batches, five steps in a row each, in turn. Evaluation is not timed.
    """
    source = subjects.open_source("pygpt", TARGET_TOKENS, device=device)
    s = replace(FIRST, d_model=source.d_model, device=device)
    makers = ours(s, "topk", TARGET_LR, fast_paths(device)) | plain(s, "topk", TARGET_LR) | peers(s, "topk", TARGET_LR)
    x = next(source.batches(s.batch_size, 1, 1)).to(device)
    warm, failed = timing.ready(makers, [x])
    made = {key: makers[key]() for key in warm}  # again, for `ready` has trained those
    spent, traces, keys = dict.fromkeys(made, 0.0), {key: [] for key in made}, list(made)
    batches = [x.to(device) for x in source.batches(s.batch_size, TARGET_STEPS, 0)]
    for at in tqdm(range(0, TARGET_STEPS, TARGET_EVERY), desc="seconds to a target", file=sys.stderr, leave=False):
        for i in range(len(keys)):
            key = keys[(i + at) % len(keys)]
            spent[key] += sum(timing.seconds_of(made[key].step, x) for x in batches[at: at + TARGET_EVERY])
            mse = metrics.evaluate(made[key].trained(), source.held_out[:8192], source.mean)["normalized_mse"]
            traces[key].append([float(f"{spent[key]:.4g}"), float(f"{mse:.4g}")])
    for (case, name), trace in traces.items():
        reached = next((time_spent for time_spent, mse in trace if mse < TARGET_MSE), None)
        yield {"table": "target", "setting": asdict(s), "auto": auto_name(s), "case": case, "name": name,
               "target": TARGET_MSE, "seconds": reached, "normalized_mse": trace[-1][1],
               "tokens": TARGET_STEPS * s.batch_size, "trace": trace}
    yield from ({"table": "target", "setting": asdict(s), "case": case, "name": name, "failed": why}
                for (case, name), why in failed.items())


def frontier(device: str) -> Iterator[dict]:
    """Twelve members of the frontier of profile "gpu" on `pygpt`, trained as `sweep` does: seconds on the clock, from
    the open source to the rows."""
    s = profiles.PROFILES["frontier"]["gpu"]
    configs = [RunConfig("pygpt", method, sparsity, n, s["n_tokens"], s["batch_size"],
                         profiles.lr_of("pygpt", method, "gpu"), 0, s["source_tokens"])
               for n in s["n_latents"]["pygpt"] for method, sparsity in FRONTIER]
    begin = time.monotonic()
    runs.open_source(configs[0], device)
    opened = time.monotonic()
    rows = sweeps.sweep(configs, device=device)
    members = [{name: row["config"][name] for name in ("method", "sparsity", "n_latents", "lr")}
               | {name: float(f"{row['metrics'][name]:.4g}")
                  for name in ("normalized_mse", "l0", "dead_fraction", "seconds")} for row in rows]
    setting = {"subject": "pygpt", "n_tokens": s["n_tokens"], "batch_size": s["batch_size"], "device": device}
    yield {"table": "frontier", "setting": setting, "case": "frontier", "name": f"{len(configs)} members",
           "seconds": time.monotonic() - opened, "seconds_to_open": opened - begin, "members": members}


def tables(device: str, seconds: float) -> dict[str, tuple]:
    """Name -> (what yields the table's rows, its arguments); the seconds are shared out."""
    if device == "cuda":
        return {"steps": (steps, ON_GPU[:1], ("topk", "auxk"), seconds * 0.1),
                "larger": (steps, ON_GPU[1:], ("topk",), seconds * 0.3),
                "fit": (whole_fit, ON_GPU[0], "topk", seconds * 0.05),
                "frontier": (frontier, device),
                "harvest": (data_bench.harvesting, device, seconds * 0.05),
                "load": (data_bench.loading, device, seconds * 0.03),
                "target": (target, device)}
    return {"steps": (steps, [FIRST], CASES[:3], seconds * 0.2),
            "few": (steps, [FIRST], CASES[3:], seconds * 0.05, "few"),
            "wide": (steps, [WIDE], ("topk",), seconds * 0.15),
            "fit": (whole_fit, FIRST, "topk", seconds * 0.05),
            "fit_relu": (whole_fit, FIRST, "relu", seconds * 0.05, "fit_relu"),
            "memory": (memory, [FIRST, WIDE]),
            "parts": (taken_apart, [FIRST, WIDE], seconds * 0.15),
            "harvest": (data_bench.harvesting, device, seconds * 0.05),
            "load": (data_bench.loading, device, seconds * 0.03),
            "target": (target, device),
            "curves": (curves, FIRST, seconds * 0.25)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tables; all by default")
    parser.add_argument("--seconds-limit", type=float, default=340.0, metavar="S",
                        help="about how long to measure in all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the rows there")
    chosen = parser.parse_args(arguments)
    device = subjects.pick_device(chosen.device)
    there = tables(device, chosen.seconds_limit)
    unknown = set(chosen.only or ()) - set(there)
    if unknown:
        parser.error(f"--only is {sorted(unknown)[0]!r}: it must be one of {', '.join(there)}")
    for name in chosen.only or there:
        make, *rest = there[name]
        for _, group in groupby(make(*rest), identity):
            rows = [row | {"provenance": timing.machine(device), "date": time.strftime("%Y-%m-%d")} for row in group]
            tqdm.write(text(rows))
            if chosen.out:
                store(rows, chosen.out)


if __name__ == "__main__":
    main()
