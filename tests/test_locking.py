"""Making locks with the real resolver against a small index of our own: dates, machine settings, sets that are gone."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from datetime import date
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from refgrid.environments.declared import EnvironmentSpec, EnvironmentTable, Instrument
from refgrid.environments.locking import MACHINE_SETTINGS, LockError, write_lock
from refgrid.environments.locks import faults_of, lock_faults

PROJECT = {"project": {"dependencies": ["tool>=2"]}, "dependency-groups": {"test": []}}
PYPROJECT = (
    '[project]\nname = "instrument"\nversion = "1"\ndependencies = ["tool>=2"]\n[dependency-groups]\ntest = []\n'
)


class Index:
    """A package index with upload times, as PyPI has them, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, dict[str, list[dict[str, Any]]]()
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Answer, self))
        self.url = f"http://127.0.0.1:{server.server_port}/simple"
        self.server = server
        threading.Thread(target=server.serve_forever, daemon=True).start()

    @property
    def options(self) -> list[str]:
        return ["--default-index", self.url]

    def add(self, name: str, version: str, day: str, *needs: str) -> None:
        file = self.folder / f"{name}-{version}-py3-none-any.whl"
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {n}" for n in needs),
        ]
        with zipfile.ZipFile(file, "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        entry = {"filename": file.name, "url": f"/files/{file.name}", "hashes": {"sha256": digest}}
        self.files.setdefault(name, []).append({**entry, "upload-time": f"{day}T12:00:00Z"})


class _Answer(BaseHTTPRequestHandler):
    def __init__(self, index: Index, *arguments: Any) -> None:
        self._index = index
        super().__init__(*arguments)

    def do_GET(self) -> None:
        kind, _, name = self.path.strip("/").partition("/")
        if kind == "files":
            self._send((self._index.folder / name).read_bytes(), "application/octet-stream")
        elif name in self._index.files:
            page = {"meta": {"api-version": "1.1"}, "name": name, "files": self._index.files[name]}
            self._send(json.dumps(page).encode(), "application/vnd.pypi.simple.v1+json")
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815 - http.server finds it by this name

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """The test's output is its own."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """torch needs `helper`, of which a later release exists; `tool` is the instrument's, and newer than both."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    made = Index(tmp_path / "wheels")
    made.add("torch", "2.8.0", "2025-08-01", "helper>=1")
    made.add("helper", "1.0", "2025-07-01")
    made.add("helper", "1.1", "2025-10-01")
    made.add("library", "0.5", "2025-08-20")
    made.add("tool", "2.0", "2026-05-05")
    yield made
    made.server.shutdown()
    made.server.server_close()


def table(**changes: Any) -> EnvironmentTable:
    entry = {
        "name": "cu128-made",
        "kind": "venv",
        "python": "3.12",
        "pins": ["torch==2.8.0", "library==0.5"],
        "cuda": "12.8",
        "origin": "made up",
        "exclude-newer": date(2025, 9, 1),
    }
    spec = EnvironmentSpec.model_validate({**entry, **changes})
    instrument = Instrument.model_validate({"exclude-newer": date(2026, 6, 1), "packages": ["tool"]})
    return EnvironmentTable(environment=(spec,), instrument=instrument)


def make(index: Index, declared: EnvironmentTable, *options: str) -> Path:
    root = index.folder.parent
    return write_lock(declared.environment[0], declared, root, root / "ci" / "locks", [*index.options, *options])


def test_a_lock_is_of_its_date_and_passes_its_check(index: Index) -> None:
    declared = table()
    file = make(index, declared)
    text = file.read_text()

    assert file.name == "cu128-made.txt"
    assert "helper==1.0 \\" in text
    assert "    # uploaded 2025-07-01" in text
    assert "tool==2.0 \\" in text
    assert list(faults_of(declared.environment[0], text, PROJECT, declared.instrument)) == []


def test_what_was_locked_before_does_not_stay(index: Index) -> None:
    """A later date takes what was there then: uv would keep the pins of an output that it finds."""
    make(index, table())

    assert "helper==1.1 \\" in make(index, table(**{"exclude-newer": date(2025, 11, 1)})).read_text()


def test_the_whole_day_counts(index: Index) -> None:
    assert "helper==1.1 \\" in make(index, table(**{"exclude-newer": date(2025, 10, 1)})).read_text()


def test_an_overlay_is_what_it_lists_and_nothing_else(index: Index) -> None:
    overlay = {"name": "made", "kind": "overlay", "machine": ["torch==2.8.0+cu128"], "pins": ["library==0.5"]}
    text = make(index, table(**overlay)).read_text()

    assert "library==0.5 \\" in text
    assert "tool" not in text
    assert "torch" not in text


def test_a_set_that_is_gone_keeps_the_resolvers_words_instead_of_a_lock(index: Index) -> None:
    lock = make(index, table())
    words = make(index, table(pins=["torch==2.8.0", "library==0.4"]))

    assert words.name == "cu128-made.unresolvable.txt"
    assert not lock.exists()
    assert "there is no version of library==0.4" in words.read_text()
    assert str(index.folder) not in words.read_text()


def test_a_set_that_can_be_had_again_gets_its_lock(index: Index) -> None:
    words = make(index, table(pins=["torch==2.8.0", "library==0.4"]))
    index.add("library", "0.4", "2025-08-02")
    lock = make(index, table(pins=["torch==2.8.0", "library==0.4"]), "--refresh")

    assert (lock.exists(), words.exists()) == (True, False)


def test_an_index_that_cannot_be_asked_is_no_evidence(index: Index) -> None:
    lock = make(index, table())
    before = lock.read_text()
    index.server.shutdown()
    index.server.server_close()

    with pytest.raises(LockError, match="cu128-made: the resolver failed with status 2"):
        make(index, table(), "--refresh")
    assert lock.read_text() == before
    assert not lock.with_name("cu128-made.unresolvable.txt").exists()


def test_a_resolver_without_network_is_no_evidence(index: Index) -> None:
    with pytest.raises(LockError, match="the resolver failed with status 1"):
        make(index, table(), "--offline")


@pytest.mark.parametrize("variable", ["UV_FIND_LINKS", "UV_INDEX_URL", "UV_EXCLUDE_NEWER", "UV_CONSTRAINT"])
def test_settings_of_the_machine_do_not_reach_a_lock(
    index: Index, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    expected = make(index, table()).read_text()
    bad = {"UV_EXCLUDE_NEWER": "2020-01-01", "UV_INDEX_URL": "http://127.0.0.1:9/simple"}
    monkeypatch.setenv(variable, bad.get(variable, "/nowhere"))

    assert variable in MACHINE_SETTINGS
    assert make(index, table()).read_text() == expected


def test_a_configuration_file_of_the_machine_does_not_reach_a_lock(index: Index) -> None:
    expected = make(index, table()).read_text()
    (index.folder.parent / "uv.toml").write_text('exclude-newer = "2020-01-01"\n')

    assert make(index, table()).read_text() == expected


def test_a_made_lock_is_found_beside_its_table(index: Index) -> None:
    root = index.folder.parent
    make(index, table())
    entry = table().environment[0]
    lines = [
        f"{name} = {json.dumps(getattr(entry, name))}" for name in ("name", "kind", "python", "pins", "cuda", "origin")
    ]
    file = root / "ci" / "environments.toml"
    head = '[instrument]\nexclude-newer = 2026-06-01\npackages = ["tool"]\n'
    file.write_text("\n".join([head, "[[environment]]", *lines, "exclude-newer = 2025-09-01\n"]))

    assert lock_faults(file, root / "pyproject.toml") == []
