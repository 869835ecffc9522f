"""How a worker of xdist ends: at once, when it has told all.

For seconds an interpreter takes apart what torch and the libraries have built, and the controller waits for it.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Generator

import pytest


class Ending:
    """The plugin of any process of pytest; one that is no worker ends as ever.

    Made before a conftest.py or a library is imported, so that what those do at exit is done first. A worker whose
    session ends with an error keeps its last words and its status, which are the controller's to tell.
    """

    def __init__(self) -> None:
        self._all_told = False
        atexit.register(self._end)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """In a worker xdist tells the controller here that all went well; pytest looks five times for garbage then."""
        yield
        self._all_told = hasattr(session.config, "workerinput")
        if self._all_told:
            gc.freeze()

    def _end(self) -> None:
        if self._all_told:
            os._exit(0)
