import json

import pytest
import torch
from safetensors.torch import save_file

from saelib import cache


def test_the_cache_gives_back_what_was_made_and_does_not_make_it_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "SHARD_ROWS", 25)
    x = torch.randn(60, 3)
    made = []

    def make(start):
        made.append(1)
        yield from x.split(10)

    for _ in range(2):
        shards = cache.cached({"a": 1}, make, "t")
        torch.testing.assert_close(torch.cat(shards), x.half())
    assert len(made) == 1 and [len(s) for s in shards] == [30, 30]
    cache.cached({"a": 2}, make, "t")
    assert len(made) == 2


def test_a_harvest_that_fails_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))

    def make(start):
        yield torch.zeros(5, 2)
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError):
        cache.cached({}, make, "t")
    assert not list(tmp_path.rglob("index.json")) and not list(tmp_path.rglob("*.partial"))


def test_a_truncated_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    cache.cached({}, lambda start: iter([torch.zeros(50, 20)]), "t")
    shard = next(tmp_path.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cache is '.*': it must hold whole shards: delete it") as error:
        cache.cached({}, lambda start: iter([]), "t")
    assert "\n" not in str(error.value)
    next(tmp_path.rglob("index.json")).write_text("{")
    with pytest.raises(ValueError, match="it must hold whole shards: delete it"):
        cache.cached({}, lambda start: iter([]), "t")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cache is '.*file': it must be a folder that can be written"):
        cache.cached({}, lambda start: iter([torch.zeros(5, 2)]), "t")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_index_names_what_determined_the_activations(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    cache.cached({"subject": "s", "layer": 3}, lambda start: iter([torch.zeros(5, 2)]), "s-train")
    assert json.loads(next(tmp_path.rglob("index.json")).read_text())["key"] == {"subject": "s", "layer": 3}


def test_an_interrupted_harvest_goes_on_after_the_last_whole_shard(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "SHARD_ROWS", 25)
    x, asked = torch.randn(70, 3), []

    def make(start, upto=70):
        asked.append(start)
        yield from x[start:upto].split(10)
        if upto < 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.cached({}, lambda start: make(start, 50), "t")
    torch.testing.assert_close(torch.cat(cache.cached({}, make, "t")), x.half())
    assert asked == [0, 30]


def test_a_damaged_shard_of_an_interrupted_harvest_is_made_again_with_those_after_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "SHARD_ROWS", 10)
    x, asked = torch.randn(30, 3), []

    def make(start):
        asked.append(start)
        return iter(x[start:].split(10))

    cache.cached({}, make, "t")
    next(tmp_path.rglob("index.json")).unlink()
    second = next(tmp_path.rglob("00001.safetensors"))
    second.write_bytes(second.read_bytes()[:-8])
    torch.testing.assert_close(torch.cat(cache.cached({}, make, "t")), x.half())
    assert asked == [0, 10]


def test_the_cache_may_lie_in_the_home_folder_and_needs_none_if_it_lies_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAELIB_CACHE", "~/here")
    assert cache.cache_folder() == tmp_path / "here"
    monkeypatch.setattr("pathlib.Path.home", lambda: pytest.fail("there may be none"))
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path


def test_a_shard_of_another_length_than_the_index_has_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path))
    cache.cached({}, lambda start: iter([torch.zeros(50, 20)]), "t")
    save_file({"x": torch.zeros(49, 20).half()}, next(tmp_path.rglob("*.safetensors")))
    with pytest.raises(ValueError, match="it must hold whole shards: delete it"):
        cache.cached({}, lambda start: iter([]), "t")
