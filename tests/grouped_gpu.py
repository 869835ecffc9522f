"""Which backends of grouped attention a test on a GPU has before it, and what they must be asked with."""

from __future__ import annotations

import os
from typing import Any

import pytest
from grouped_layouts import Layout, Subject, planned

from refgrid_solutions.grouped_attention import backends

# Those that must run here: GROUPED_BACKENDS=torch,triton,fa3. Without it, one that is not installed is skipped.
DEMANDED = [name for name in os.environ.get("GROUPED_BACKENDS", "").split(",") if name]
BACKENDS = DEMANDED or [name for name, row in backends.TABLE.items() if row.module]

# Memory is poisoned by a setting that makes PyTorch refuse cuBLAS without this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def subject_of(backend: str, **setting: Any) -> Subject:
    """The backend on the GPU; the test is skipped if it is not installed, and fails if it was demanded."""
    subject = Subject(backend, "cuda", **{"heads": (8, 2), "head_dim": 128, **setting})
    reason = backends.refusal(backend, planned(Layout([], 1, 1), subject))
    if reason.endswith("is not installed") and backend not in DEMANDED:
        pytest.skip(reason)
    assert not reason
    return subject
