"""Zigzag attention of processes that talk by Gloo, and what becomes of a test whose processes fail."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import zigzag_ranks
from process_ranks import run_processes, torchrun


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


def test_a_group_that_hangs_is_killed_and_says_where() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=re.escape("not ended within 5 s, so killed: rank 1 of 2\n")) as caught:
        run_processes(2, zigzag_ranks.hangs, limit=5)

    assert "zigzag_ranks.py" in str(caught.value)
    assert "in hangs" in str(caught.value)
    assert time.monotonic() - began < 30


def test_the_program_that_tests_on_gpus_start_under_torchrun() -> None:
    program = Path(zigzag_ranks.__file__).with_name("zigzag_torchrun.py")
    sizes = ("--tokens", "64", "96", "--heads", "4", "2", "--head-dim", "16")

    said = torchrun(program, 2, "--device", "cpu", *sizes)

    lines = [line for line in said.splitlines() if line.startswith("ok on 2 ranks of cpu: ")]
    assert [line.split()[6] for line in lines] == ["64", "96"]
