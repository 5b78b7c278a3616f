"""Files that are written whole or not at all, however the writer ends."""
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

import saelib
from saelib import files


def killed_after(n_moves, folder, k):
    replace, moves = Path.replace, []

    def move(partial, path):
        replace(partial, path)
        moves.append(path)
        if len(moves) == n_moves:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = move
    saelib.SAE(4, 16, "topk", k).save(folder)


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_between_two_moves_leaves_nothing_that_loads_and_the_next_save_goes_on(tmp_path, before):
    if before:
        saelib.SAE(4, 16, "topk", 2).save(tmp_path)
    child = multiprocessing.get_context("spawn").Process(target=killed_after, args=(1, tmp_path, 8))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="it must hold the sae.json and sae.safetensors"):
        saelib.load(tmp_path)
    saelib.SAE(4, 16, "topk", 3).save(tmp_path)
    assert saelib.load(tmp_path).method.k == 3


def test_a_file_of_another_set_is_refused_and_left(tmp_path):
    (tmp_path / "sae.safetensors").write_text("of something else")
    with pytest.raises(ValueError, match="folder is .*: it must be another one: sae.safetensors lies there, and no "
                       "sae.json with it"):
        saelib.SAE(4, 16, "topk", 2).save(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of something else"]


def test_threads_that_write_the_same_file_do_not_take_each_others(tmp_path):
    failed, path = [], tmp_path / "one.txt"

    def write(text):
        try:
            for _ in range(50):
                files.write_whole({path: lambda partial: partial.write_text(text)})
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and path.read_text() in ("a" * 1000, "b" * 1000) and len(list(tmp_path.iterdir())) == 1


def test_a_single_file_is_replaced_in_one_move(tmp_path, monkeypatch):
    path, replace, there = tmp_path / "one.txt", Path.replace, []
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda partial, to: (there.append(to.exists()), replace(partial, to))[1])
    files.write_whole({path: lambda partial: partial.write_text("new")})
    assert there == [True] and path.read_text() == "new"


def test_a_write_that_fails_leaves_what_was_there_and_no_partial_file(tmp_path):
    first, last = tmp_path / "a", tmp_path / "b"
    files.write_whole({path: lambda partial: partial.write_text("old") for path in (first, last)})

    def fails(partial):
        partial.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        files.write_whole({first: lambda partial: partial.write_text("new"), last: fails})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_place_of_the_folder_is_named_and_left(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    with pytest.raises(ValueError, match="folder is .*file.*: it must be a folder that can be written"):
        files.write_whole({folder / name: lambda partial: partial.write_text("new") for name in ("a", "b")})
    assert (tmp_path / "file").read_text() == "mine"


def test_files_that_a_killed_process_left_are_removed_once_they_are_old(tmp_path):
    saelib.SAE(4, 16, "topk", 2).save(tmp_path)
    new, old = (tmp_path / f"sae.safetensors.{name}.partial" for name in ("new", "old"))
    for left in (new, old):
        left.touch()
    os.utime(old, (0, 0))
    saelib.SAE(4, 16, "topk", 3).save(tmp_path)
    assert new.exists() and not old.exists()


def test_a_write_of_another_process_that_ends_meanwhile_is_no_stranger(tmp_path, monkeypatch):
    saelib.SAE(4, 16, "topk", 2).save(tmp_path)
    description = (tmp_path / "sae.json").read_text()
    (tmp_path / "sae.json").unlink()
    monkeypatch.setattr(files.time, "sleep", lambda seconds: (tmp_path / "sae.json").write_text(description))
    saelib.SAE(4, 16, "topk", 3).save(tmp_path)
    assert saelib.load(tmp_path).method.k == 3
