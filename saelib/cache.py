"""The cache that keeps activations on disk: shards of float16, written whole or not at all, mapped into memory when read."""
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saelib.files import reading, write_json, write_whole

SHARD_ROWS = 2**17


def cache_folder() -> Path:
    """Where activations are kept, and what `saelib.native` compiles: $SAELIB_CACHE, or ~/.cache/saelib."""
    return Path(os.environ.get("SAELIB_CACHE", Path.home() / ".cache" / "saelib"))


def cached(key: dict, make: Iterator[Tensor], name: str) -> list[Tensor]:
    """The tensors that `make` yields, kept on disk in shards under a name that `key` determines.

    Shards are float16 safetensors, mapped into memory when read. Each is written beside its place and moved
    there when whole; the list of shards, written last, makes the entry valid.

    Args:
        key: everything that determines the activations, JSON-able.
        make: yields activations [n, d_model]; asked only if the cache lacks them.
        name: the readable part of the folder's name.

    Raises:
        ValueError: the cache cannot be written, or a shard on disk is damaged.
    """
    text = json.dumps(key, sort_keys=True)
    folder = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    index = folder / "index.json"
    if not index.is_file():
        shards = []
        for i, shard in enumerate(_regroup(make)):
            with _writing():
                shards.append(_write_shard(folder / f"{i:05d}.safetensors", shard))
        with _writing():
            write_json(index, {"key": key, "shards": shards})
    with reading("cache", folder, "hold whole shards: delete it and it is made again"):
        return [_read_shard(folder / shard["file"], shard["rows"]) for shard in json.loads(index.read_text())["shards"]]


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cache is {str(cache_folder())!r}: it must be a folder that can be written ({error.strerror})") from None


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


def _write_shard(path: Path, rows: Tensor) -> dict:
    write_whole(path, lambda partial: save_file({"x": rows.contiguous()}, partial))
    return {"file": path.name, "rows": len(rows)}


def _read_shard(path: Path, n_rows: int) -> Tensor:
    with safe_open(path, "pt") as shard:
        rows = shard.get_tensor("x")
    if len(rows) != n_rows:
        raise RuntimeError(f"{path.name} has {len(rows)} rows, not {n_rows}")
    return rows
