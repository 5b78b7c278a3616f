"""Run the notebooks with papermill.

    python tools/run.py PROFILE [NOTEBOOK ...]           into runs/PROFILE/, finished runs reused
    python tools/run.py --refresh-committed [NOTEBOOK ...]   `quick`, into the outputs kept in notebooks/

A run is finished when the copy in runs/PROFILE/ carries the hash of the code that would be run now: the code
cells of the notebook, saelib but for its plots, and the benchmark's rows if it shows them. `--refresh-committed` keeps
the output of a cell that measures time.
"""
import argparse
import contextlib
import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.launch import is_launch, put_launch_cell, repository_url  # noqa: E402

RECORD = "saelib_run"  # the key of a run's record in a notebook's metadata
# the tag of a cell that measures time: its committed output stays while its words do, for its numbers differ each run
MEASURED = "nbval-ignore-output"
PACKAGES = ("torch", "numpy", "transformers", "matplotlib")
QUIET = {  # what other libraries would write into the terminal, over the one progress line that is ours
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # `Loading weights`, for a model read in a blink
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, on a bar of widgets that nobody asked for
}


def code_cells(notebook):
    """The code cells that the author wrote: neither papermill's injected parameters nor the launch cell."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
            and not is_launch(cell)
    ]


def minor_version():
    """This Python, as "3.11". Its standard library is the text that `pygpt` and `minilm` read."""
    return ".".join(platform.python_version_tuple()[:2])


def code_hash(notebook):
    """Hash of all code that decides the numbers of this notebook."""
    from saelib import origin

    code = [cell.source for cell in code_cells(notebook)]
    digest = hashlib.sha256(origin.code_hash().encode())
    for module in sorted(ROOT.glob("saelib/*.py")):
        if module.stem not in ("marks", "plots", "speed_plots", *origin.DECIDING):
            digest.update(module.read_bytes())
    if any(name in source for source in code for name in ("speed_rows", "by_length")):
        for rows in sorted(ROOT.glob("saelib/rows/*.jsonl")):
            digest.update(rows.read_bytes())
    for source in code:
        digest.update(b"\0" + source.encode())
    return digest.hexdigest()[:16]


def run_record(notebook):
    """What is known about the run that made a notebook's outputs; {} when it was never run by this script."""
    return notebook.metadata.get(RECORD, {})


def without_stderr(outputs):
    """Outputs less the progress lines, which belong to the terminal; the pieces of stdout between them joined."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def execute(source, parameters, scratch):
    """Run `source` with papermill, its stderr going to the terminal. Returns the executed notebook."""
    import papermill

    papermill.execute_notebook(
        str(source),
        str(scratch),
        parameters,
        cwd=str(source.parent),
        kernel_name="python3",
        language="python",
        progress_bar=False,
        stderr_file=sys.stderr,
        extra_arguments=["--log-level=ERROR"],  # of the kernel itself: it warns of its local socket each time
    )
    executed = nbformat.read(scratch, 4)
    executed.metadata.pop("papermill", None)
    executed.metadata.pop("widgets", None)
    for cell in executed.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = without_stderr(cell.outputs)
    return executed


def replace_file(path, notebook):
    """Write whole or not at all."""
    from saelib.files import write_whole

    write_whole({path: lambda partial: nbformat.write(notebook, partial)})


def parameters_of(source):
    """Names and default values of a notebook's parameters, as papermill reads them."""
    from papermill.translators import PythonTranslator

    tagged = [cell for cell in nbformat.read(source, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    found = [parameter for cell in tagged for parameter in PythonTranslator.inspect(cell)]
    defaults = {parameter.name: parameter.default.strip("'\"") for parameter in found}
    if len(tagged) != 1 or defaults.get("profile") != "quick":
        raise SystemExit(f"{source.name}: one cell must be tagged 'parameters' and say: profile = \"quick\"")
    return defaults


def uncommitted_changes():
    """Whether the code differs from that of the commit; not where there is no git to ask."""
    try:
        asked = subprocess.run(["git", "status", "--porcelain", "saelib", "notebooks"], cwd=ROOT, capture_output=True,
                               text=True, check=False)
    except OSError:
        return False
    return bool(asked.stdout.strip())


def processor():
    """The processor's name and number of cores, and the GPU's name where torch sees one."""
    import torch

    from saelib import origin

    hardware = f"{os.cpu_count()} cores of {origin.processor()}"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    return hardware


def provenance(profile, defaults, seconds):
    from saelib import origin

    return {
        "profile": profile,
        "parameters": {**defaults, "profile": profile},
        "date": date.today().isoformat(),
        "seconds": round(seconds),
        "hardware": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": origin.commit(),
        "uncommitted_changes": uncommitted_changes(),
    }


def duration(seconds):
    seconds = round(seconds)
    return f"{seconds} s" if seconds < 100 else f"{seconds // 60} min {seconds % 60} s"


def quieten():
    """Set QUIET for this process and the kernels that it starts, but for what the reader has set."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def run_into_runs(source, profile):
    """Run one notebook at a profile into runs/, unless a finished run of the same code is there."""
    target = ROOT / "runs" / profile / source.name
    label = f"{source.stem} at {profile}"
    hash_now = code_hash(nbformat.read(source, 4))
    if target.exists():
        record = run_record(nbformat.read(target, 4))
        if record.get("code") == hash_now:
            say(f"{label}: reusing the run of {record['date']}")
            return
    defaults = parameters_of(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    say(f"{label}: started")
    start = time.monotonic()
    with scratch_beside(target) as scratch:
        executed = execute(source, {} if profile == "quick" else {"profile": profile}, scratch)
    seconds = time.monotonic() - start
    executed.metadata[RECORD] = {"code": hash_now, **provenance(profile, defaults, seconds)}
    replace_file(target, executed)
    say(f"{label}: finished in {duration(seconds)}")


def words(cell):
    """What a cell has put out but for the numbers in it."""
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return [re.sub(r"[-+\d.]+", "", text).split() for text in texts]


def stays(committed, executed):
    """Whether the outputs of a committed cell stay as they are."""
    return MEASURED in committed.metadata.get("tags", []) and words(committed) == words(executed)


def refresh_committed(source):
    """Run one notebook at `quick` and put the outputs, and nothing else that changes, into its committed copy."""
    parameters_of(source)
    notebook = nbformat.read(source, 4)
    put_launch_cell(notebook, repository_url())
    replace_file(source, notebook)
    say(f"{source.stem}: started")
    start = time.monotonic()
    with scratch_beside(source) as scratch:
        executed = execute(source, {}, scratch)
    for cell, done in zip(code_cells(notebook), code_cells(executed), strict=True):
        if not stays(cell, done):
            cell.outputs = done.outputs
        cell.execution_count = done.execution_count
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            RECORD: {"profile": "quick", "code": code_hash(notebook), "python": minor_version()},
        }
    )
    replace_file(source, notebook)
    say(f"{source.stem}: finished in {duration(time.monotonic() - start)}")


@contextlib.contextmanager
def scratch_beside(path):
    """The path of a file for papermill to write as it goes; gone afterwards, whatever happens."""
    scratch = path.with_name(f".{path.stem}.running.partial.ipynb")
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def chosen_notebooks(names):
    there = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[!.]*.ipynb"))}
    names = [Path(name).stem for name in names] or list(there)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise SystemExit(f"no notebook {unknown[0]!r}; there are: {', '.join(there)}")
    return [there[name] for name in names]


def main():
    from saelib.profiles import PROFILES

    profiles = list(dict.fromkeys(profile for chapter in PROFILES.values() for profile in chapter))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh-committed", action="store_true")
    parser.add_argument("words", nargs="*", metavar="[PROFILE] [NOTEBOOK ...]")
    arguments = parser.parse_args()
    words = arguments.words
    if arguments.refresh_committed:
        profile, names = "quick", words
    else:
        profile, names = (words or [""])[0], words[1:]
    if profile not in profiles:
        raise SystemExit(f"unknown profile {profile!r}; profiles are: {', '.join(profiles)}")
    quieten()
    if profile == "quick":  # its outputs are compared, and the number of threads moves the last digits
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    for source in chosen_notebooks(names):
        if arguments.refresh_committed:
            refresh_committed(source)
        else:
            run_into_runs(source, profile)


if __name__ == "__main__":
    from papermill.exceptions import PapermillExecutionError

    try:
        main()
    except PapermillExecutionError as error:
        raise SystemExit(f"{error}\nThe notebook stopped at the error above; finished runs are kept.") from None
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted: finished runs are kept, the one under way was dropped.") from None
