"""Reports of what runs here say where it ran."""

from gpu_report import pytest_sessionstart

__all__ = ["pytest_sessionstart"]
