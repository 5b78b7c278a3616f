"""Where a row comes from: the code, the machine, and the files that made it."""
import hashlib
import importlib.metadata
import inspect
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import CodeType

import torch

from saelib import methods, native, subjects, texts

PACKAGE = Path(__file__).parent
DECIDING = ("auto", "auxk", "cache", "checkpoints", "checks", "files", "graphs", "kernels", "loop", "losses", "methods",
            "metrics", "modes", "native", "normalisation", "origin", "pairs", "products", "relu_path", "runs", "sae",
            "selection", "sources", "subjects", "texts", "train", "triton_adam", "triton_kernels", "triton_select",
            "variants")


@cache
def code_hash() -> str:
    """A hash of what decides a row's numbers: the built-in model and the modules from activations to metrics."""
    digest = hashlib.sha256((subjects.PYGPT / "model.safetensors").read_bytes())
    for name in DECIDING:
        digest.update((PACKAGE / f"{name}.py").read_bytes())
    for path in native.SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def hardware(device: str) -> str:
    """What computes there, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU {torch.backends.cpu.get_cpu_capability()}"


@cache
def provenance(device: str) -> dict[str, str]:
    """What a row says of where it was made: package versions, hardware, commit, code."""
    try:
        version = importlib.metadata.version("saelib")
    except importlib.metadata.PackageNotFoundError:  # run from a clone, as on a machine without a network
        version = "not installed"
    return {"saelib": version, "torch": torch.__version__, "python": platform.python_version(),
            "hardware": hardware(device),
            "commit": commit(), "code": code_hash()}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def commit() -> str:
    """The commit of the clone that this package lies in, or "unknown": installed, or without git."""
    def git(*what: str) -> str:
        return subprocess.run(["git", "rev-parse", *what], cwd=PACKAGE, capture_output=True, text=True).stdout.strip()

    try:
        top, head = git("--show-toplevel"), git("--short=12", "HEAD")
    except OSError:
        return "unknown"
    return head if top and Path(top) == PACKAGE.parent else "unknown"


def data_inputs(config) -> list:
    """What decides activations and may change under the same name outside saelib: local files that are the subject or
    the text, by name, size and time, and the interpreter whose library is the text."""
    parts = [platform.python_version()]
    for name in sorted({config.subject, config.text} - {None, *subjects.BUILT_IN, *texts.STDLIB_TEXTS}):
        files = [p for p in texts.files_of(Path(name)) if p.is_file()]
        parts += [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return parts


def inputs(config) -> str:
    """A hash of what decides a row's numbers and may change under the same name outside saelib: `data_inputs`, and a
    method that is defined elsewhere, its bases and their files."""
    parts = data_inputs(config)
    for kind in methods.find(config.method).__mro__:
        package, _, module = kind.__module__.partition(".")
        if package not in ("builtins", "torch") and not (package == "saelib" and module in DECIDING):
            parts += sources_of(kind)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def sources_of(kind: type) -> list[str]:
    """What a class consists of: the file that defines it, and, where that is no file or has changed since, its
    functions and plain values."""
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    parts = [Path(path).read_text("utf8")] if path and Path(path).is_file() else []
    for name, value in vars(kind).items():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if inspect.isfunction(function):
            try:
                parts.append(f"{name}: {inspect.getsource(function)}")
            except OSError:  # typed at a prompt
                parts.append(f"{name}: {instructions(function.__code__)}")
        elif isinstance(value, str | int | float | tuple) and name[:2] != "__":
            parts.append(f"{name}: {value!r}")
    return parts


def instructions(code: CodeType) -> tuple:
    """What a function does, as far as can be said without its source: its instructions, names and constants."""
    constants = [instructions(value) if isinstance(value, CodeType) else value for value in code.co_consts]
    return code.co_code.hex(), code.co_names, constants
