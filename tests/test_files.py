"""One writer at a time, also where the file system has no locks, and no lock where nothing can be written."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import file_limit

from decur_core.running import files
from decur_core.running.files import locked


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def without_locks(monkeypatch, request):
    """A file system that has no `flock`."""
    number = getattr(errno, request.param)

    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    return os.strerror(number)


def test_without_locks_a_file_says_who_holds_a_folder(tmp_path, without_locks):
    owner = tmp_path / ".lock-owner"
    with locked(tmp_path):
        process, host, *_ = owner.read_text().splitlines()
        assert process == str(os.getpid()) and host.startswith(socket.gethostname())
        words = f"{tmp_path} is in use by another process; .*; if it has died, remove {owner} .{without_locks}."
        with pytest.raises(RuntimeError, match=words), locked(tmp_path):
            pass
        with locked(tmp_path, name=".lock-0001-of-0002"):  # of another part
            pass
    assert not owner.exists()
    with locked(tmp_path):
        pass


KILLED = """
import errno, fcntl, os, pathlib, signal, sys
from decur_core.running.files import locked

def flock(file, how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = flock
with locked(pathlib.Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("wait", [False, True])
def test_without_locks_the_file_of_a_dead_process_is_taken_over_and_that_of_another_machine_named(
    tmp_path, without_locks, wait
):
    owner = tmp_path / ".lock-owner"
    assert subprocess.run([sys.executable, "-c", KILLED, tmp_path]).returncode == -signal.SIGKILL
    dead = owner.read_text().splitlines()[0]
    assert dead != str(os.getpid())
    with locked(tmp_path, wait=wait):
        assert owner.read_text().startswith(f"{os.getpid()}\n")
    assert sorted(os.listdir(tmp_path)) == [".lock"]
    owner.write_text(theirs := f"{dead}\nanother-node\n")
    words = f"{tmp_path} is in use by another process; .*remove {owner} .*held by pid {dead} on another-node"
    with pytest.raises(RuntimeError, match=words), locked(tmp_path):
        pass
    assert owner.read_text() == theirs


def test_without_locks_a_turn_is_waited_for(tmp_path, without_locks):
    assert turns(tmp_path, wait=True) == ["first", "other"]


def test_among_chapters_side_by_side_each_has_its_turn(tmp_path, monkeypatch):
    monkeypatch.setenv(files.TURNS, "1")
    assert turns(tmp_path) == ["first", "other"]


def turns(tmp_path, **options) -> list[str]:
    """In which order two that want a folder have had it."""
    order = []

    def other():
        with locked(tmp_path, **options):
            order.append("other")

    thread = threading.Thread(target=other)
    with locked(tmp_path):
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(20)
    return order


def test_without_locks_one_that_waits_long_says_for_what(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with pytest.warns(UserWarning, match=f"waiting for another process.*remove {tmp_path / '.lock-owner'}"):
        assert turns(tmp_path, wait=True) == ["first", "other"]


def test_an_error_while_a_folder_is_held_gives_it_back(tmp_path, without_locks):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_another_failure_of_the_lock_is_not_called_use_by_another_process(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_where_nothing_can_be_written_nothing_is_held(tmp_path, monkeypatch, number):
    def refused(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "open", refused, raising=False)
    with locked(tmp_path), locked(tmp_path):
        pass
    monkeypatch.undo()
    with locked(tmp_path), pytest.raises(RuntimeError, match="in use by another process"), locked(tmp_path):
        pass


def test_a_file_that_finds_no_room_is_named_and_what_was_there_stays(tmp_path):
    files.write_text(tmp_path / "a.json", "before")
    with file_limit(4000), pytest.raises(OSError, match=f"File too large: '{tmp_path}/a.json'"):
        files.write_text(tmp_path / "a.json", "after" * 1000)
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "before"
