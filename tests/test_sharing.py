"""Work shared by several processes: every task is done once, and a dead process blocks nobody."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
from filelock import Timeout

from scalewise.studies import work_queue
from scalewise.studies.work_queue import Task, run_tasks, try_lock


def quiet(what: str, total: int):
    return nullcontext(lambda done: None)


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(work_queue, "POLL_SECONDS", 0.01)


def test_two_workers_share_the_tasks_and_run_each_once(tmp_path):
    """Each finds a task locked by the other, and neither returns before all are done."""
    done, met = {}, threading.Barrier(2, timeout=20)

    def work(worker: str) -> None:
        def run(name: str) -> None:
            if name in done:
                return
            if worker not in done.values():
                met.wait()  # both have locked their first task
            done[name] = worker

        tasks = [Task(name, lambda name=name: run(name)) for name in "abcd"]
        run_tasks(tasks, tmp_path, progress=quiet)
        assert set(done) == set("abcd")
        finished.append(worker)

    finished: list[str] = []
    threads = [threading.Thread(target=work, args=(worker,)) for worker in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(finished) == ["one", "two"]
    assert set(done.values()) == {"one", "two"}


def test_it_waits_for_locked_tasks_and_reports_it(tmp_path):
    said, ran = [], []

    def progress(what: str, total: int):
        said.append(what)
        release.set()
        return nullcontext(lambda done: None)

    release, held = threading.Event(), threading.Event()

    def hold() -> None:
        with try_lock(Task("a", lambda: None), tmp_path) as locked:
            assert locked
            held.set()
            assert release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(20)
    run_tasks([Task(name, lambda name=name: ran.append(name)) for name in "ab"], tmp_path, progress=progress)
    thread.join(timeout=20)
    assert ran == ["b", "a"]
    assert said == ["waiting for 1 task of other processes"]


def test_the_task_of_a_killed_process_is_run_by_another(tmp_path):
    program = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "a.lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with try_lock(Task("a", lambda: None), tmp_path) as locked:
        assert not locked
    holder.kill()
    holder.wait()
    ran: list[str] = []
    run_tasks([Task("a", lambda: ran.append("a"))], tmp_path, progress=quiet)
    assert ran == ["a"]


def test_an_error_is_raised_and_releases_the_lock(tmp_path):
    """Even a Timeout, which could be mistaken for a locked task."""

    def fail() -> None:
        raise Timeout("elsewhere")

    with pytest.raises(Timeout, match="elsewhere"):
        run_tasks([Task("a", fail)], tmp_path, progress=quiet)
    with try_lock(Task("a", fail), tmp_path) as locked:
        assert locked
