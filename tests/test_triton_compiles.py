"""Every Triton kernel compiles for a GPU that is not there. The interpreter runs what a compiler would refuse."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it exists for Linux")

COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

CAPABILITY, LIMIT = int(sys.argv[1]), int(sys.argv[2])

class Absent:  # all that compiling asks a driver for
    def get_current_target(self): return GPUTarget("cuda", CAPABILITY, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Absent())
launch, compiled = jit.JITFunction.run, {}

def compile_only(kernel, *args, grid, warmup, **options):
    made = launch(kernel, *args, grid=grid, warmup=True, **options)
    compiled.setdefault(kernel.__name__, []).append(made.asm["ptx"])
    assert made.metadata.shared <= LIMIT, (kernel.__name__, made.metadata.shared)
    return made

jit.JITFunction.run = compile_only
from saelib import triton_adam, triton_kernels, triton_select
triton_select.n_cores, triton_select.is_large = (lambda device: 132), (lambda device: CAPABILITY == 90)
batch, d, n, k = 8, 768, 4096, 32
for dtype in (torch.float32, torch.bfloat16):
    x, W, b = torch.randn(batch, d).to(dtype), torch.randn(n, d).to(dtype), torch.zeros(n)
    for tma in (None, False):
        pre_acts, maxima = triton_select.scores(x, W, b, 16, tma=tma)
    triton_select.largest(maxima, k)
    triton_select.largest(pre_acts, k, torch.zeros(batch, k, dtype=torch.int32), 16)
    indices, values = torch.arange(batch * k, dtype=torch.int32).view(batch, k), torch.randn(batch, k)
    triton_kernels.centre(x.float(), torch.zeros(d), dtype)
    triton_kernels.decode(values, indices, W)
    triton_kernels.decode(values, indices, W, torch.zeros(d))
    triton_kernels.dot(x, indices, W)
    triton_kernels.gradients(*triton_kernels.group_by_latent(indices, n), values, x, values, x, n)
    triton_kernels.fired(values, indices, n)
rows, one = torch.randn(n, d), torch.ones(())
for unit in (True, False):
    triton_adam.square_norm(rows, rows, unit)
    for copy in (None, rows.bfloat16()):
        triton_adam.adam_rows(rows, rows, rows, rows, one, torch.ones(2), beta1=0.9, beta2=0.999, eps=1e-8, unit=unit,
                              copy=copy)
written = {name for module in (triton_adam, triton_kernels, triton_select) for name, value in vars(module).items()
           if isinstance(value, jit.JITFunction)}
entry = written - {"_keys", "_add_both", "_store_both", "_gradient"}  # those are called by others
assert entry == set(compiled), entry ^ set(compiled)
on_tensor_cores = "wgmma" if CAPABILITY == 90 else "mma.sync"
assert all(on_tensor_cores in ptx for ptx in compiled["_scores"]), "a product is not on the tensor cores"
"""


@pytest.mark.parametrize("capability, shared_memory", [(90, 232448), (80, 101376)],
                         ids=["Hopper", "Ampere, with the least memory of its kind"])
def test_every_kernel_compiles_and_fits(tmp_path, capability, shared_memory):
    environment = {name: value for name, value in os.environ.items()
                   if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability), str(shared_memory)], capture_output=True,
                          text=True, cwd=Path(__file__).parents[1], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
