"""Files that are there whole or not at all, and files that are not what they should be."""
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, UnpicklingError, EOFError, OSError, KeyError, TypeError, AttributeError, RuntimeError)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside its place, and move it there once it is whole. What was there before stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, about: dict) -> None:
    """The same for what is JSON-able."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(about, indent=1) + "\n"))


@contextmanager
def reading(name: str, value: str | Path, rule: str) -> Iterator[None]:
    """Turn what goes wrong when a file is not what it should be into one ValueError, which names the argument, its value and the rule."""
    try:
        yield
    except DAMAGE as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name} is {str(value)!r}: it must {rule} ({why})") from None
