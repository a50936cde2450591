"""Work that several processes share: everything is done once, and a dead process holds nobody up."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
from filelock import Timeout

from scalewise.studies import work_queue
from scalewise.studies.work_queue import Task, taken, work_off


def quiet(what: str, total: int):
    return nullcontext(lambda done: None)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(work_queue, "SECONDS_BETWEEN_LOOKS", 0.01)


def test_two_at_once_do_every_task_once_between_them(tmp_path):
    """Each comes upon a task that the other has in hand, and neither goes before all are done."""
    made, met = {}, threading.Barrier(2, timeout=20)

    def work(worker: str) -> None:
        def run(name: str) -> None:
            if name in made:
                return
            if worker not in made.values():
                met.wait()  # both have their first in hand now
            made[name] = worker

        tasks = [Task(name, lambda name=name: run(name)) for name in "abcd"]
        work_off(tasks, tmp_path, progress=quiet)
        assert set(made) == set("abcd")
        finished.append(worker)

    finished: list[str] = []
    threads = [threading.Thread(target=work, args=(worker,)) for worker in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(finished) == ["one", "two"]
    assert set(made.values()) == {"one", "two"}


def test_it_waits_for_what_is_in_hand_and_says_so(tmp_path):
    said, ran = [], []

    def progress(what: str, total: int):
        said.append(what)
        release.set()
        return nullcontext(lambda done: None)

    release, held = threading.Event(), threading.Event()

    def hold() -> None:
        with taken(Task("a", lambda: None), tmp_path) as mine:
            assert mine
            held.set()
            assert release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(20)
    work_off([Task(name, lambda name=name: ran.append(name)) for name in "ab"], tmp_path, progress=progress)
    thread.join(timeout=20)
    assert ran == ["b", "a"]
    assert said == ["1 left, in hand of other processes: waiting"]


def test_the_work_of_a_killed_process_is_taken_up(tmp_path):
    program = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with taken(Task("a", lambda: None), tmp_path) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    ran: list[str] = []
    work_off([Task("a", lambda: ran.append("a"))], tmp_path, progress=quiet)
    assert ran == ["a"]


def test_an_error_ends_it_and_lets_go(tmp_path):
    """Also one that looks like a lock in somebody's hand."""

    def fail() -> None:
        raise Timeout("elsewhere")

    with pytest.raises(Timeout, match="elsewhere"):
        work_off([Task("a", fail)], tmp_path, progress=quiet)
    with taken(Task("a", fail), tmp_path) as mine:
        assert mine
