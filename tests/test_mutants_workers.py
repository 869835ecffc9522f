"""The processes in which mutants run: each way to die is told, and what comes after runs in a fresh process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import dying
import pytest

from refgrid.mutants.workers import Died, Failed, Worker, spread
from refgrid.records.record import Verdict


@contextmanager
def worker_of(function: Any = dying.do, limit: int = 60) -> Iterator[Worker]:
    with closing(Worker(function, limit)) as worker:
        yield worker


@pytest.mark.parametrize(
    ("way", "verdict", "told"),
    [
        pytest.param("exit", "crash", "the process died: ended with status 3", id="exit"),
        pytest.param("SIGKILL", "oom", "the process died: killed by SIGKILL", id="SIGKILL"),
        pytest.param("SIGSEGV", "crash", "the process died: killed by SIGSEGV in string_at at ", id="SIGSEGV"),
        pytest.param("SIGABRT", "crash", "the process died: killed by SIGABRT in do at ", id="SIGABRT"),
        pytest.param("endless", "hang", "not done within 2 s (--timeout), then in _endless at ", id="endless"),
        pytest.param("lost", "crash", f"the CUDA context is lost after it: {dying.LOST}", id="lost"),
        pytest.param("lost late", "crash", f"the CUDA context is lost after it: {dying.LOST}", id="lost late"),
    ],
)
def test_a_death_is_told_and_the_next_call_has_a_fresh_process(way: str, verdict: str, told: str) -> None:
    with worker_of(limit=2 if way == "endless" else 60) as worker:
        first = worker.call("pid")

        with pytest.raises(Died) as death:
            worker.call(way)
        after = worker.call("pid")

    assert death.value.verdict is Verdict(verdict)
    assert death.value.reason.startswith(told)
    assert os.getpid() not in (first, after)
    assert first != after


def test_what_a_call_raises_comes_with_its_traceback_and_the_process_goes_on() -> None:
    with worker_of() as worker:
        first = worker.call("pid")

        with pytest.raises(Failed, match=r"in _raise\n(.|\n)*RuntimeError: CUDA error"):
            worker.call("raise")

        assert worker.call("pid") == first


def test_a_process_that_ends_after_its_answer_is_not_the_next_calls_fault() -> None:
    with worker_of() as worker:
        first = worker.call("pid")
        worker.call("later")
        assert worker._process
        worker._process.join()

        assert worker.call("pid") != first


def test_a_process_that_does_not_end_though_killed_is_left_behind() -> None:
    """As in a driver call that waits for an endless kernel."""
    stuck: Any = SimpleNamespace(kill=lambda: None, join=lambda _: None, exitcode=None)
    silent: Any = SimpleNamespace(send=lambda _: None, recv=lambda: (_ for _ in ()).throw(EOFError()))
    with worker_of() as worker:
        worker._process, worker._pipe, worker._main_thread = stuck, silent, 0
        worker._words.touch()

        with pytest.raises(Died, match="ended without a word"):
            worker.call("pid")

        assert worker.call("pid") != os.getpid()


class Unfit:
    """A function that ends the process that reads it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (5,)


def test_a_process_that_cannot_start_is_no_calls_death() -> None:
    with worker_of(Unfit()) as worker, pytest.raises(Failed, match="before its first call"):
        worker.call()


def test_a_call_that_is_cut_short_is_no_death_and_no_other_follows() -> None:
    with ThreadPoolExecutor(1) as pool, worker_of() as worker:
        worker.call("pid")
        cut = pool.submit(worker.call, "endless")
        worker.close()

        with pytest.raises(Failed):
            cut.result()
        with pytest.raises(Failed, match="no call comes after the end"):
            worker.call("pid")


def test_tasks_are_spread_over_workers_each_of_which_goes_on_after_its_deaths() -> None:
    def task(worker: Worker, ways: tuple[str, ...]) -> list[Any]:
        def done(way: str) -> Any:
            try:
                return worker.call(way)
            except Died as death:
                return death.verdict

        return [done(way) for way in ways]

    todo = [("pid", "pid"), ("pid", "exit", "pid"), ("exit", "pid"), ("pid",)]

    found = dict(spread(todo, task, [Worker(dying.do, 60), Worker(dying.do, 60)]))

    assert set(found) == set(todo)
    assert len(set(found["pid", "pid"])) == 1
    before, death, after = found["pid", "exit", "pid"]
    assert death is Verdict.CRASH
    assert before != after
    assert found["exit", "pid"][0] is Verdict.CRASH


def test_a_task_that_raises_ends_all_and_leaves_no_process() -> None:
    workers = [Worker(dying.do, 60), Worker(dying.do, 60)]

    with pytest.raises(Failed, match="CUDA error"):
        list(spread(["endless", "raise", "pid"], lambda worker, way: worker.call(way), workers))

    assert multiprocessing.active_children() == []
