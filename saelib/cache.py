"""The cache that keeps activations on disk: shards of float16, written whole or not at all, and read by memory map."""
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saelib.files import json_of, plain, reading, write_whole

SHARD_ROWS = 2**17


def cache_folder() -> Path:
    """Where activations are kept, and what `saelib.native` compiles: $SAELIB_CACHE, or ~/.cache/saelib."""
    return Path(os.environ.get("SAELIB_CACHE") or "~/.cache/saelib").expanduser()


def cached(key: dict, make: Callable[[int], Iterator[Tensor]], name: str) -> list[Tensor]:
    """The tensors that `make` yields, kept on disk in shards under a name that `key` determines.

    Shards are float16 safetensors, mapped into memory when read. Each is written beside its place and moved
    there when whole; the list of shards, written last, makes the entry valid. Interrupted, it goes on after the last
    whole shard.

    Args:
        key: everything that determines the activations, JSON-able.
        make: given a number of rows to leave out, yields activations [n, d_model] after those; asked only if the cache
            lacks them.
        name: the readable part of the folder's name.

    Raises:
        ValueError: the cache cannot be written, or a shard on disk is damaged.
    """
    text = json.dumps(key, sort_keys=True, default=plain)
    folder = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    index = folder / "index.json"
    if not index.is_file():
        shards = _whole_shards(folder)
        for shard in _regroup(make(sum(about["rows"] for about in shards))):
            with _writing():
                shards.append(_write_shard(folder / f"{len(shards):05d}.safetensors", shard))
        with _writing():
            write_whole({index: json_of({"key": key, "shards": shards})})
    with reading("cache", folder, "hold whole shards: delete it and it is made again"):
        return [_read_shard(folder / shard["file"], shard["rows"]) for shard in json.loads(index.read_text())["shards"]]


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"cache is {str(cache_folder())!r}: it must be a folder that can be written "
                         f"({error})") from None


def _regroup(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    held, n = [], 0
    for piece in pieces:
        held.append(piece.to(torch.float16))
        n += len(piece)
        if n >= SHARD_ROWS:
            yield torch.cat(held)
            held, n = [], 0
    if held:
        yield torch.cat(held)


def _whole_shards(folder: Path) -> list[dict]:
    """What an interrupted harvest left: whole shards of full size, one after another, up to the first that is not."""
    shards = []
    while (path := folder / f"{len(shards):05d}.safetensors").is_file():
        try:
            n_rows = len(_open_shard(path))
        except SafetensorError:  # damaged
            break
        if n_rows < SHARD_ROWS:  # the last of a harvest
            break
        shards.append({"file": path.name, "rows": n_rows})
    return shards


def _write_shard(path: Path, rows: Tensor) -> dict:
    write_whole({path: lambda partial: save_file({"x": rows.contiguous()}, partial)})
    return {"file": path.name, "rows": len(rows)}


def _open_shard(path: Path) -> Tensor:
    with safe_open(path, "pt") as shard:
        return shard.get_tensor("x")


def _read_shard(path: Path, n_rows: int) -> Tensor:
    rows = _open_shard(path)
    if len(rows) != n_rows:
        raise RuntimeError(f"{path.name} has {len(rows)} rows, not {n_rows}")
    return rows
