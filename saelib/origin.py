"""Where a row comes from: the code, the machine, and the files that made it."""
import hashlib
import importlib.metadata
import inspect
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from saelib import native, subjects
from saelib.methods import METHODS

PACKAGE = Path(__file__).parent
DECIDING = ("auxk", "cache", "checks", "dense", "files", "graphs", "kernels", "losses", "methods", "metrics", "native", "origin", "pairs", "products", "runs", "sae", "selection",
            "sources", "subjects", "texts", "train", "triton_adam", "triton_kernels", "triton_select", "variants")


@cache
def code_hash() -> str:
    """A hash of what decides a row's numbers: the built-in model and the modules from activations to metrics."""
    digest = hashlib.sha256((subjects.PYGPT / "model.safetensors").read_bytes())
    for name in DECIDING:
        digest.update((PACKAGE / f"{name}.py").read_bytes())
    for path in native.SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def provenance(device: str) -> dict[str, str]:
    """What a row says of where it was made: package versions, hardware, commit, code."""
    try:
        version = importlib.metadata.version("saelib")
    except importlib.metadata.PackageNotFoundError:  # run from a clone, as on a machine without a network
        version = "not installed"
    return {"saelib": version, "torch": torch.__version__, "python": platform.python_version(),
            "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU {torch.backends.cpu.get_cpu_capability()}",
            "commit": commit(), "code": code_hash()}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())


def commit() -> str:
    """The commit of the clone that this package lies in, or "unknown": installed, or without git."""
    try:
        top, head = (subprocess.run(["git", "rev-parse", *what], cwd=PACKAGE, capture_output=True, text=True).stdout.strip()
                     for what in (["--show-toplevel"], ["--short=12", "HEAD"]))
    except OSError:
        return "unknown"
    return head if top and Path(top) == PACKAGE.parent else "unknown"


def inputs(config) -> str:
    """A hash of what decides a row's numbers and may change under the same name outside saelib: local files that are the subject or the
    text, the interpreter whose library is the text, a method that is defined elsewhere. Files count by name, size and time."""
    parts = [platform.python_version()]
    for name in filter(None, (config.subject, config.text)):
        files = sorted(p for p in (Path(name), *Path(name).rglob("*")) if p.is_file())
        parts += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    method = METHODS[config.method]
    if method.__module__.removeprefix("saelib.") not in DECIDING:
        parts += [(name, inspect.getsource(value) if inspect.isfunction(value) else repr(value)) for name, value in vars(method).items() if name[:2] != "__"]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
