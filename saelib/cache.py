"""The cache that keeps activations on disk: shards of float16, written whole or not at all, mapped into memory when read."""
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_ROWS = 2**17


def cache_folder() -> Path:
    """Where activations are kept: $SAELIB_CACHE, or ~/.cache/saelib."""
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shards = [_write_shard(folder / f"{i:05d}.safetensors", shard) for i, shard in enumerate(_regroup(make))]
            _replace(index, lambda path: path.write_text(json.dumps({"key": key, "shards": shards}, indent=1)))
        except OSError as error:
            raise ValueError(f"cache is {str(cache_folder())!r}: it must be a folder that can be written ({error.strerror})") from None
    return [_read_shard(folder / shard["file"], shard["rows"]) for shard in json.loads(index.read_text())["shards"]]


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


def _replace(path: Path, write) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_shard(path: Path, rows: Tensor) -> dict:
    _replace(path, lambda partial: save_file({"x": rows.contiguous()}, partial))
    return {"file": path.name, "rows": len(rows)}


def _read_shard(path: Path, n_rows: int) -> Tensor:
    rule = f"cache shard {str(path)!r} is damaged: delete its folder and it is made again"
    try:
        with safe_open(path, "pt") as shard:
            rows = shard.get_tensor("x")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{rule} ({error})") from None
    if len(rows) != n_rows:
        raise ValueError(f"{rule} (it has {len(rows)} rows, not {n_rows})")
    return rows
