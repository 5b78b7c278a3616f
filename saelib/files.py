"""Files that are there whole or not at all, and files that are not what they should be."""
import glob
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from pickle import UnpicklingError
from tempfile import TemporaryFile
from uuid import uuid4

import numpy
from safetensors import SafetensorError

from saelib.checks import require

DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, UnpicklingError, EOFError, OSError, LookupError,
          TypeError, AttributeError, RuntimeError)


Writer = Callable[[Path], object]  # writes the file at a path
PATIENCE = 0.1  # seconds
ABANDONED = 3600  # seconds after which a partial file is what a killed process left


def partials_of(path: Path) -> list[Path]:
    """What processes at work, or killed ones, have written of a file."""
    return list(path.parent.glob(f"{glob.escape(path.name)}.*.partial"))


def strangers(files: dict[Path, Writer]) -> list[Path]:
    """Those of a set of files that are there without the others, and not because of a write that did not end."""
    *_, last = files
    at_work, there = partials_of(last), [path for path in files if path.exists()]
    return there if 0 < len(there) < len(files) and not at_work and not partials_of(last) else []


def write_whole(files: dict[Path, Writer]) -> None:
    """Let each function write its file beside its place, and move them there once all are whole. What was there before
    stays until then.

    The last file describes the others. It is deleted before any is replaced, and put in place after all: so a kill in
    between leaves a set without its description, and never one that looks whole. The next call knows of it by the
    partial file that is left over, and writes them all again. It removes such files once they are old.

    Raises:
        ValueError: some of them are there and some are not: those belong to something else. Or their folder can't be
            written.
    """
    *_, last = files
    if strangers(files):
        time.sleep(PATIENCE)  # another process may be between two of its moves
        there = strangers(files)
        require(not there, "folder", str(last.parent), f"another one: {' and '.join(p.name for p in there)} lies there,"
                f" and no {' and '.join(p.name for p in files if p not in there)} with it")
    left_over = [old for path in files for old in partials_of(path)]
    partials = {path: path.with_name(f"{path.name}.{uuid4().hex[:12]}.partial") for path in files}
    for folder in {path.parent for path in files}:
        make_folder("folder", folder)
    try:
        for path, write in files.items():
            write(partials[path])
        if len(files) > 1:
            last.unlink(missing_ok=True)
        for path, partial in partials.items():
            partial.replace(path)
        for old in left_over:
            with suppress(OSError):  # what was to be written is there
                if time.time() - old.stat().st_mtime > ABANDONED:
                    old.unlink()
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def make_folder(name: str, folder: str | Path) -> None:
    """Make a folder if it is not there. Raise ValueError, with the argument's name, if no file can be written into it.
    """
    with reading(name, folder, "be a folder that can be written, or the name of one that can be made"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()


def json_of(about: dict) -> Callable[[Path], object]:
    """What writes a dict. Raise ValueError, here and now, if it holds what JSON can't."""
    text = json.dumps(about, indent=1, default=plain) + "\n"
    return lambda partial: partial.write_text(text)


def plain(value) -> object:
    """What JSON has for a number of numpy's, or for a path."""
    require(isinstance(value, (numpy.generic, PurePath)), "value", value, "text, a number, a list or a dict")
    return value.item() if isinstance(value, numpy.generic) else str(value)


@contextmanager
def reading(name: str, value: str | Path, rule: str, *also: type[Exception]) -> Iterator[None]:
    """Turn what goes wrong when a file is not what it should be into one ValueError, which names the argument, its
    value and the rule. `also` are errors that a library raises for this kind of file."""
    try:
        yield
    except (*DAMAGE, *also) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name} is {str(value)!r}: it must {rule} ({why})") from None
