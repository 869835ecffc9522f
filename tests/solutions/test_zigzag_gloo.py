"""Zigzag attention of processes that talk by Gloo, and what becomes of a test whose processes fail."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import process_ranks
import pytest
import torch
import zigzag_ranks
from process_ranks import run_processes


@pytest.fixture(scope="module", autouse=True)
def _torch_is_imported() -> None:
    """By the server that ranks are forked off: a rank's time limit is for the rank."""
    run_processes(1, zigzag_ranks.nothing)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_rank_gives_attention_on_one_device(world_size: int) -> None:
    run_processes(world_size, zigzag_ranks.attends)


def test_a_group_may_be_some_of_the_processes() -> None:
    run_processes(4, zigzag_ranks.attends_in_a_subgroup)


def test_a_gradient_that_is_off_is_named_with_its_rank() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 ended with exit code 1.*dk is off by .*, but should be"):
        run_processes(2, zigzag_ranks.is_wrong)


def test_a_process_that_dies_fails_the_test_with_its_words() -> None:
    with pytest.raises(
        AssertionError, match="rank 1 of 3 ended with exit code 7\nrank 1 of 3 said: the last words of one"
    ):
        run_processes(3, zigzag_ranks.dies)


def test_a_group_that_hangs_is_killed_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[BaseProcess] = []
    watch = process_ranks._watch

    def watched(told: Sequence[BaseProcess], *others: Any) -> None:
        ranks.extend(told)
        watch(told, *others)

    monkeypatch.setattr(process_ranks, "_watch", watched)
    with pytest.raises(AssertionError, match=re.escape("not ended within 5 s, so killed: rank 1 of 2\n")) as caught:
        run_processes(2, zigzag_ranks.hangs, limit=5)

    assert "zigzag_ranks.py" in str(caught.value)
    assert "in hangs" in str(caught.value)
    assert ranks[1].exitcode == -signal.SIGKILL


def test_the_program_that_tests_on_gpus_start_under_torchrun() -> None:
    """Here without torchrun, which test_solutions_readme.py tries: its processes would import torch three times."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)

    run_processes(2, zigzag_ranks.runs_the_program_of_gpus, store.port)
