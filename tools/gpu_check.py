"""Check every kernel of the GPU path at real sizes, then time each beside what stock PyTorch offers and the hardware's
floor.

    python -m tools.gpu_check --out rows.jsonl      (a GPU; about two minutes)
    python -m tools.gpu_check --out rows.jsonl --tiny      (Triton's interpreter; the code, not the speed)

Checks compare with float64 by ‖out - exact‖ / ‖exact‖, on memory that holds NaN until it is written. Timings are
interleaved: in each round every contestant runs a few times in a row, in an order that rotates. A row of --out has the
form of `saelib.bench`'s: `bytes` and `operations` as the kernel's docstring counts them; `predicted_ms`, the time in
which this device moves `least_bytes` (everything once) or does the operations, by its own copy and its own product;
`ratio`, to the encoder's product in bfloat16.
"""
import argparse
import os
import statistics
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

TINY = "--tiny" in sys.argv
if TINY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from saelib import speed_rows, timing, triton_adam, triton_kernels, triton_select  # noqa: E402
from saelib.auxk import default_k_aux  # noqa: E402
from saelib.contestants import Setting  # noqa: E402
from saelib.loop import Loop  # noqa: E402
from saelib.pairs import Active  # noqa: E402
from saelib.sae import SAE  # noqa: E402

DEVICE = "cpu" if TINY else "cuda"
BATCH, D, N, K = (10, 16, 256, 4) if TINY else (8192, 768, 32768, 32)
GROUP = 16 if TINY else 32
ROUNDS, REPEATS = (1, 1) if TINY else (15, 4)
BUDGET = 120  # seconds of timing
# about 2 ms: the launches to be timed queue up meanwhile, so that the host's pace is not timed
QUEUE_CYCLES = 4_000_000
LR, ADAM = torch.tensor(1e-3, device=DEVICE), {"beta1": 0.9, "beta2": 0.999, "eps": 6.25e-10}
TILES = [(128, 128, 64, 4, 3, 2), (256, 128, 64, 8, 3, 1), (64, 256, 64, 4, 3, 1)]


def inputs():
    """Tokens, an SAE and gradients; 8 latents fire for about half of the tokens, others rarely or never."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    b_enc = 0.5 * normal(N)
    b_enc[:8] = 3.5
    return {"x": normal(BATCH, D), "W_enc": F.normalize(normal(N, D), dim=1), "W_dec": F.normalize(normal(N, D), dim=1),
            "b_enc": b_enc, "grad_out": normal(BATCH, D), "grad_rows": normal(N, D)}


def error(ours, exact):
    """‖ours - exact‖ / ‖exact‖; NaN where something was not written."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def check_selecting(t):
    """Errors of the selection, each with its limit."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, name = t["x"].to(dtype), t["W_enc"].to(dtype), str(dtype)[6:]
        # the interpreter cuts off where a GPU rounds
        own, limit = (1e-6, 1e-6) if dtype == torch.float32 else (4e-3 if TINY else 2.5e-3, 4e-3)
        exact = torch.addmm(t["b_enc"].double(), x.double(), weight.double().t())
        for tma in (True, False)[dtype == torch.float32:]:
            pre_acts, maxima = triton_select.scores(x, weight, t["b_enc"], GROUP, tma=tma)
            yield f"scores {name} tma={tma}", error(pre_acts, exact), own
            yield f"maxima {name} tma={tma}", error(maxima, pre_acts.view(BATCH, -1, GROUP).amax(2)), 0.0
        groups = triton_select.largest(maxima, min(K, maxima.shape[1]))[1]
        best = pre_acts.topk(K, 1)
        yield f"largest of groups {name}", error(triton_select.largest(pre_acts, K, groups, GROUP)[0].sort(1).values,
                                                 best.values.float().sort(1).values), 0.0
        yield f"largest of all {name}", error(triton_select.largest(pre_acts, K)[0].sort(1).values,
                                              best.values.float().sort(1).values), 0.0
        values, indices = triton_select.select(x, weight, t["b_enc"], K)
        yield f"select {name}: its own values", error(values, exact.gather(1, indices.long())), own
        yield f"select {name}: against the best", error(values.sort(1).values,
                                                        exact.topk(K, dim=1).values.sort(1).values), limit
        twice = (indices.long().sort(1).values[:, 1:] == indices.long().sort(1).values[:, :-1]).double().mean()
        yield f"select {name}: latents named twice", float(twice), 0.0
        if dtype == torch.float32:
            chosen = indices
    here, there = (torch.zeros(BATCH, N, dtype=torch.bool, device=DEVICE).scatter_(1, places.long(), True)
                   for places in (chosen, indices))
    print(f"   bfloat16 chooses another latent than float32 for {float((there & ~here).sum() / here.sum()):.2%} of the "
          f"active ones", flush=True)


def check_products(t):
    """Errors of the three products, each with its limit."""
    for dtype in (torch.float32, torch.bfloat16):
        name, rows, tokens = str(dtype)[6:], t["W_dec"].to(dtype), t["grad_out"].to(dtype)
        values, indices = triton_select.select(t["x"].to(dtype), t["W_enc"].to(dtype), t["b_enc"], K)
        grouped = triton_kernels.group_by_latent(indices, N)
        matrix = torch.zeros(BATCH, N, dtype=torch.float64,
                             device=DEVICE).scatter_add_(1, indices.long(), values.double())
        yield f"decode {name}", error(triton_kernels.decode(values, indices, rows), matrix @ rows.double()), 1e-6
        products = (tokens.double() @ rows.double().t()).gather(1, indices.long())
        yield f"dot {name}", error(triton_kernels.dot(tokens, indices, rows), products), 1e-6
        grad, centred = values.sin(), t["x"].to(dtype)
        slopes = torch.zeros_like(matrix).scatter_add_(1, indices.long(), grad.double())
        exact = slopes.t() @ centred.double(), slopes.sum(0), matrix.t() @ tokens.double()
        found, again = (triton_kernels.gradients(*grouped, grad, centred, values, tokens, N) for _ in range(2))
        for which, ours, right, repeated in zip(("W_enc", "b_enc", "W_dec"), found, exact, again):
            yield f"gradients {name}: of {which}", error(ours, right), 1e-6
            yield f"gradients {name}: of {which}, two runs differ", float(not torch.equal(ours, repeated)), 0.0
        yield f"fired {name}", float((triton_kernels.fired(values - 4, indices, N) != (matrix > 4).any(0)).sum()), 0.0
    share = (indices.long().flatten().bincount(minlength=N).max() / BATCH).item()
    print(f"   the most frequent latent fires for {share:.0%} of the tokens", flush=True)


def check_adam(t):
    """Errors of three steps of Adam, with unit rows and without, each with its limit."""
    for unit in (True, False):
        rows, m, v = t["W_dec"].clone(), torch.zeros(N, D, device=DEVICE), torch.zeros(N, D, device=DEVICE)
        exact = torch.nn.Parameter(rows.double())
        adam = torch.optim.Adam([exact], lr=float(LR), betas=(ADAM["beta1"], ADAM["beta2"]), eps=ADAM["eps"])
        for step in (1, 2, 3):
            grad, own = t["grad_rows"].double() * step, exact.detach()
            used = grad - unit * (grad * own).sum(1, keepdim=True) * own
            yield f"square_norm {step}, unit={unit}", error(triton_adam.square_norm(grad.float(), rows, unit),
                                                            used.square().sum()), 1e-5
            clip = (1 / (used.norm() + 1e-6)).clamp(max=1.0)
            exact.grad = used * clip
            adam.step()
            if unit:
                with torch.no_grad():
                    exact /= exact.norm(dim=1, keepdim=True)
            factors = triton_adam.adam_factors(LR, torch.tensor(float(step), device=DEVICE), ADAM["beta1"],
                                               ADAM["beta2"])
            triton_adam.adam_rows(rows, grad.float(), m, v, clip.float(), factors, **ADAM, unit=unit)
        yield f"adam_rows, unit={unit}", error(rows, exact.detach()), 1e-6
        yield f"adam_rows, unit={unit}: m", error(m, adam.state[exact]["exp_avg"]), 1e-5


def check_recorded(t):
    """How far recorded steps come from ordinary ones, with a learning rate that changes and latents that die: each with
    its limit."""
    for method, sparsity in (("topk", K), ("relu", 0.05)):
        histories = []
        for path in ("sparse", "graph"):
            loop = Loop(SAE(D, N, method, sparsity, seed=1).to(DEVICE), 1e-3, 3 * BATCH, 1 / 32, default_k_aux(D), 0.0)
            for step in range(8):
                loop.one(t["x"].roll(step, 1), 1 - step / 8, step / 8, path, "bf16", log=True)
            histories.append(torch.tensor([[row["squared_error"], row["auxk"], row["l0"]] for row in loop.history]))
        yield f"recorded steps, {method}: losses and L0", error(histories[1], histories[0]), 1e-4


def stock_adam(t):
    """The same step by stock operations: project, fused Adam, normalise."""
    rows = torch.nn.Parameter(t["W_dec"].clone())
    rows.grad, adam = t["grad_rows"].clone(), torch.optim.Adam([rows], lr=1e-3, fused=True)

    @torch.no_grad()
    def step():
        rows.grad.addcmul_((rows.grad * rows).sum(1, keepdim=True), rows, value=-1)
        torch.nn.utils.clip_grad_norm_([rows], 1.0)
        adam.step()
        rows.div_(rows.norm(dim=1, keepdim=True))
    return step


def contestants(t):
    """name -> (call, bytes as the docstrings count, least bytes, operations)."""
    x, W_enc, W_dec, b_enc, grad = (t[name] for name in ("x", "W_enc", "W_dec", "b_enc", "grad_out"))
    x16, W16, rows16, grad16, b16 = x.bfloat16(), W_enc.bfloat16(), W_dec.bfloat16(), grad.bfloat16(), b_enc.bfloat16()
    values, indices = triton_select.select(x16, W16, b_enc, K)
    grouped, active = triton_kernels.group_by_latent(indices, N), Active(indices, N)
    active.by_latent  # grouped once, outside the timing of what uses it
    scores, maxima = triton_select.scores(x16, W16, b_enc, GROUP)
    big = torch.empty(2**24 if TINY else 2**30, dtype=torch.uint8, device=DEVICE)
    groups = triton_select.largest(maxima, min(K, maxima.shape[1]))[1]
    square = torch.randn(64 if TINY else 8192, 64 if TINY else 8192, device=DEVICE).bfloat16()
    m, v = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    rows, clip, ops, out16 = W_dec.clone(), torch.ones(1, device=DEVICE), 2 * BATCH * N * D, torch.empty_like(scores)
    factors = torch.ones(2, device=DEVICE)
    product = 2 * (BATCH * D + N * D + BATCH * N)
    pairs, summed = 2 * BATCH * K * D, 4 * BATCH * K * D + 4 * (6 * BATCH * K + 2 * N * D)
    gathered, least = 2 * BATCH * K * D + 4 * BATCH * (D + 2 * K), 2 * N * D + 4 * (BATCH * D + 2 * BATCH * K)
    all_of = {
        "copy": (lambda: big.clone(), 2 * big.numel(), 2 * big.numel(), 0),
        "square product bf16": (lambda: square @ square, 6 * len(square) ** 2, 6 * len(square) ** 2,
                                2 * len(square) ** 3),
        "encoder product bf16 (stock)": (lambda: torch.addmm(b16, x16, W16.t(), out=out16), product, product, ops),
        "encoder product, with maxima": (lambda: triton_select.scores(x16, W16, b_enc, GROUP), product, product, ops),
        "maxima of the product (stock)": (lambda: scores.view(BATCH, -1, GROUP).amax(2), 2 * BATCH * N, 2 * BATCH * N,
                                          0),
        "k best groups": (lambda: triton_select.largest(maxima, K), 2 * maxima.numel(), 2 * maxima.numel(), 0),
        "k best groups (stock)": (lambda: maxima.topk(K, sorted=False), 2 * maxima.numel(), 2 * maxima.numel(), 0),
        "k largest in them": (lambda: triton_select.largest(scores, K, groups, GROUP), 64 * groups.numel(),
                              64 * groups.numel(), 0),
        "largest of all": (lambda: triton_select.largest(scores, K), 2 * BATCH * N, 2 * BATCH * N, 0),
        "largest of all (stock topk)": (lambda: scores.topk(K, sorted=False), 2 * BATCH * N, 2 * BATCH * N, 0),
        "cast W_enc": (lambda: W_enc.bfloat16(), 6 * N * D, 6 * N * D, 0),
        "select bf16": (lambda: triton_select.select(x16, W16, b_enc, K),
                        product + 2 * BATCH * (N // GROUP + GROUP * K), 2 * BATCH * D + 2 * N * D + 8 * BATCH * K, ops),
        "decode": (lambda: triton_kernels.decode(values, indices, rows16), gathered, least, pairs),
        "decode fp32 (stock)": (lambda: active.decode(values, W_dec), 2 * gathered, 2 * least, pairs),
        "gradient of the latents": (lambda: triton_kernels.dot(grad16, indices, rows16), gathered, least, pairs),
        "gradient of the latents fp32 (stock)": (lambda: active.dot(grad, W_dec), 2 * gathered, 2 * least, pairs),
        "group by latent": (lambda: triton_kernels.group_by_latent(indices, N), 40 * BATCH * K, 16 * BATCH * K, 0),
        "group by latent (stock)": (lambda: Active(indices, N).by_latent, 40 * BATCH * K, 16 * BATCH * K, 0),
        "both weight gradients": (lambda: triton_kernels.gradients(*grouped, values, x16, values, grad16, N), summed,
                                  4 * BATCH * D + 4 * (2 * N * D + 6 * BATCH * K), 2 * pairs),
        "both weight gradients fp32 (stock)": (lambda: active.gradients(values, x, values, grad), 2 * summed,
                                               8 * BATCH * D + 4 * (2 * N * D + 6 * BATCH * K), 2 * pairs),
        "what fired": (lambda: triton_kernels.fired(values, indices, N), 8 * BATCH * K + 2 * N, 8 * BATCH * K + 2 * N,
                       0),
        "norm of the decoder's gradient": (lambda: triton_adam.square_norm(t["grad_rows"], rows, True), 8 * N * D,
                                           8 * N * D, 0),
        "norm of the encoder's gradient": (lambda: triton_adam.square_norm(t["grad_rows"], rows, False), 4 * N * D,
                                           4 * N * D, 0),
        "Adam, decoder": (lambda: triton_adam.adam_rows(rows, t["grad_rows"], m, v, clip, factors, **ADAM, unit=True),
                          28 * N * D, 28 * N * D, 0),
        "Adam, encoder": (lambda: triton_adam.adam_rows(rows, t["grad_rows"], m, v, clip, factors, **ADAM, unit=False),
                          28 * N * D, 28 * N * D, 0),
        "norm and Adam, decoder (stock)": (stock_adam(t), 80 * N * D, 28 * N * D, 0),
        "select fp32": (lambda: triton_select.select(x, W_enc, b_enc, K), 2 * product, 4 * (BATCH * D + N * D), ops),
        "encoder product fp32 (stock)": (lambda: torch.addmm(b_enc, x, W_enc.t()), 2 * product, 2 * product, ops),
    }
    for down, across, inner, warps, stages, a_core in [] if TINY else TILES:
        config = {"BLOCK_M": down, "BLOCK_N": across, "BLOCK_K": inner, "num_warps": warps, "num_stages": stages,
                  "A_CORE": a_core}
        name = f"{down}x{across}x{inner}, {warps} warps, {stages} stages, {a_core} a core"
        all_of[f"encoder product, with maxima, {name}"] = (
            partial(triton_select.scores, x16, W16, b_enc, GROUP, **config), product, product, ops)
    return all_of


def milliseconds(call):
    """How long a few calls in a row take, each."""
    if TINY:
        before = time.perf_counter()
        call()
        taken = (time.perf_counter() - before) * 1e3
        return lambda: taken
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(QUEUE_CYCLES)
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    return lambda: begin.elapsed_time(end) / REPEATS


def interleave(calls):
    """name -> milliseconds of each round. One that cannot run is left out, and said."""
    deadline, times = time.monotonic() + BUDGET, {}
    for name, (call, *_) in calls.items():
        try:
            call()
            times[name] = []
        except Exception as problem:  # a stock operation, or a tile too large for this device: say so and go on
            print(f"   {name} does not run here: {type(problem).__name__}: {str(problem)[:200]}", flush=True)
    for r in range(ROUNDS):
        names = list(times)
        names, taken = names[r % len(names):] + names[:r % len(names)], {}
        for name in names:
            taken[name] = milliseconds(calls[name][0])
        if not TINY:
            torch.cuda.synchronize()
        for name in names:
            times[name].append(taken[name]())
        if time.monotonic() > deadline:
            break
    return times


def write_rows(calls, times, out):
    """Keep a row for each contestant, in the form of `saelib.bench`, and print them as a table."""
    median = {name: statistics.median(values) for name, values in times.items()}
    setting = Setting(D, N, K, BATCH, DEVICE)
    speed, rate = calls["copy"][2] / median["copy"], calls["square product bf16"][3] / median["square product bf16"]
    print(f"copies {speed / 1e6:.0f} GB/s, multiplies {rate / 1e9:.0f} TFLOP/s in bf16, {len(times['copy'])} rounds")
    print(f"{'':75} {'ms':>9} {'q1':>9} {'q3':>9} {'GB/s':>7} {'TFLOP/s':>8} {'/floor':>7} {'/gemm':>6}")
    rows = []
    for name, values in times.items():
        _, n_bytes, least, flops = calls[name]
        ms = timing.quartiles(values)
        by = {"bytes": least / speed, "operations": flops / rate if "fp32" not in name else 0}
        bound = max(by, key=by.get)
        ratio = timing.quartiles(values, 1 / median["encoder product bf16 (stock)"])
        rows.append({"table": "kernels", "setting": asdict(setting), "case": "kernel", "name": name, "ms": ms,
                     "ratio": ratio, "rounds": len(values), "differs": "",
                     "operations": flops, "bytes": n_bytes, "least_bytes": least, "predicted_ms": by[bound],
                     "bound": bound, "provenance": timing.machine(DEVICE), "date": time.strftime("%Y-%m-%d")})
        print(f"{name:75} {ms['median']:9.4f} {ms['q1']:9.4f} {ms['q3']:9.4f} {n_bytes / ms['median'] / 1e6:7.0f} "
              f"{flops / ms['median'] / 1e9:8.1f} "
              f"{ms['median'] / by[bound]:7.2f} {ratio['median']:6.2f}", flush=True)
    speed_rows.store(rows, Path(out))


def main():
    """Check, time, write; exit 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="file of JSON lines to keep the rows in")
    parser.add_argument("--tiny", action="store_true", help="small shapes in Triton's interpreter")
    out, begin, failed = parser.parse_args().out, time.monotonic(), 0
    t = inputs()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    # the interpreter has no graphs
    for check in (check_selecting, check_products, check_adam, *([] if TINY else [check_recorded])):
        try:
            for name, value, limit in check(t):
                holds = value <= limit  # NaN does not
                failed += not holds
                print(f"{'ok' if holds else 'WRONG':5} {name:40} {value:.2e} (limit {limit:.0e})", flush=True)
        except Exception:  # a minute on a GPU is dear: what follows is still worth knowing
            failed += 1
            traceback.print_exc(file=sys.stdout)
    torch.use_deterministic_algorithms(False)
    print(f"checks took {time.monotonic() - begin:.0f} s, {failed} failed", flush=True)
    calls = contestants(t)
    write_rows(calls, interleave(calls), out)
    print(f"{time.monotonic() - begin:.0f} s in all")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
