"""Who may import what: one table, read from the source files, so nothing needs to be installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNEL_LIBRARIES = {"flashinfer", "sglang", "sgl_kernel", "transformers", "vllm", "triton"}
OWN = {"refgrid", "refgrid_references", "refgrid_groundtruth", "refgrid_solutions"}

# The instrument's modules that run cases; everything else of it must start without torch.
TENSOR_MODULES = {
    "settings.py",
    "unwritten.py",
    "compare.py",
    "measure.py",
    "diagnosis.py",
    "determinism.py",
    "explanations.py",
    "routed.py",
    "rows.py",
    "precision.py",
    "referee.py",
    "distance.py",
    "chosen.py",
    "draws.py",
    "likelihood.py",
    "forms.py",
    "outputs.py",
    "workbench.py",
    "proof.py",
    "baseline.py",
    "judging.py",
    "scores.py",
    "samples.py",
    "sums.py",
    *(file.name for file in (ROOT / "src/refgrid/proving/inputs").glob("*.py")),
}


def imports(source: str, *, top_level_only: bool = False) -> Iterator[str]:
    """First part of every imported module's name; type-checking blocks do not run and do not count."""
    tree = ast.parse(source)
    for node in _running(tree) if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def _running(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node


def strays(source: str, may: set[str]) -> set[str]:
    """What a source imports beyond what it may."""
    return set(imports(source)) - may - {"__future__"}


def _files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no Python file: the rule would check nothing"
    return found


def _ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", _files("references/src"), ids=_ids)
def test_references_import_torch_and_math_only(file: Path) -> None:
    assert strays(file.read_text(), {"torch", "math", "typing", "collections", "refgrid_references"}) == set()


@pytest.mark.parametrize("file", _files("groundtruth/src"), ids=_ids)
def test_an_adapter_imports_torch_and_its_own_library_only(file: Path) -> None:
    used = set(imports(file.read_text()))
    folder = file.parent.name  # SGLang's kernels are a distribution of their own
    library = {"sglang", "sgl_kernel"} if folder == "sglang" else {folder}

    assert used & KERNEL_LIBRARIES <= library
    assert used & OWN <= {"refgrid_groundtruth"}


SOLUTIONS = ROOT / "solutions/src/refgrid_solutions"
# What one solution's file may import besides the standard library, torch and its own member, by a part of its path.
SOLUTIONS_MAY = {"backends/triton": {"triton", "numpy"}, "backends/fa3": {"fa3_fwd"}}


@pytest.mark.parametrize("file", _files("solutions/src"), ids=_ids)
def test_a_solution_imports_torch_and_its_backends_library_only(file: Path) -> None:
    path = file.relative_to(SOLUTIONS).as_posix()
    library = {name for part, names in SOLUTIONS_MAY.items() if part in path for name in names}

    assert strays(file.read_text(), {*sys.stdlib_module_names, "torch", "refgrid_solutions"} | library) == set()


@pytest.mark.parametrize("file", _files("solutions/src/refgrid_solutions/grouped_attention/backends"), ids=_ids)
def test_a_backend_knows_no_other_unless_its_row_says_so(file: Path) -> None:
    folder = SOLUTIONS / "grouped_attention/backends"
    others = {found.relative_to(folder).parts[0].removesuffix(".py") for found in folder.rglob("*.py")} - {"__init__"}
    own = file.relative_to(folder).parts[0].removesuffix(".py")
    says = {"fa3": {"aten"}}  # its backward pass is PyTorch's

    assert siblings(file.read_text()) & others - {own} <= says.get(own, set())


def siblings(source: str) -> set[str]:
    """The backends that a source imports."""
    modules = (node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    from_package = [
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(".backends")
        for alias in node.names
    ]
    return {name.split(".backends.")[1].split(".")[0] for name in modules if ".backends." in name} | set(from_package)


def test_the_rule_of_backends_sees_both_ways_to_import_one() -> None:
    package = "refgrid_solutions.grouped_attention.backends"

    assert siblings(f"from {package} import aten\nfrom {package}.triton.work import x") == {"aten", "triton"}


def test_the_table_of_sources_imports_no_library_and_no_torch() -> None:
    for name in ("__init__.py", "table.py"):
        text = (ROOT / "groundtruth/src/refgrid_groundtruth" / name).read_text()

        assert set(imports(text)) <= set(sys.stdlib_module_names) | {"packaging", "refgrid_groundtruth"}


@pytest.mark.parametrize("file", _files("src/refgrid"), ids=_ids)
def test_the_instrument_knows_no_kernel_library_and_neither_member(file: Path) -> None:
    assert set(imports(file.read_text())) & (KERNEL_LIBRARIES | OWN - {"refgrid"}) == set()


@pytest.mark.parametrize("file", _files("src/refgrid"), ids=_ids)
def test_the_instrument_starts_without_torch(file: Path) -> None:
    if file.name not in TENSOR_MODULES:
        assert "torch" not in set(imports(file.read_text(), top_level_only=True))


# Of the instrument's parts, what each may import; the commands, the plugin and the run bring all together.
PARTS: dict[str, set[str]] = {
    "dataset": set(),
    "proving": {"dataset", "records"},
    "records": {"dataset", "environments"},
    "report": {"dataset", "environments", "records"},
    "overlays": {"environments"},
    "calibration": {"dataset", "environments", "proving", "records", "running"},
    "warming": {"dataset"},
    "mutants": {"caching", "dataset", "proving", "records", "report"},
}


def parts(source: str) -> set[str]:
    """The parts of the instrument that a source imports, wherever in it."""
    named = (node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module)
    known = {folder.name for folder in (ROOT / "src/refgrid").iterdir() if (folder / "__init__.py").is_file()}
    return {name.split(".")[1] for name in named if name.startswith("refgrid.")} & known


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_those_below_it_only(part: str) -> None:
    used = {name for file in _files(f"src/refgrid/{part}") for name in parts(file.read_text())}

    assert used - {part} <= PARTS[part]


def test_the_rule_of_parts_sees_an_import_inside_a_function() -> None:
    assert parts("def f():\n    from refgrid.running.lease import take") == {"running"}


def test_the_noxfile_imports_neither_member_nor_torch() -> None:
    used = set(imports((ROOT / "noxfile.py").read_text()))

    assert used & (KERNEL_LIBRARIES | {"torch"} | OWN - {"refgrid"}) == set()


@pytest.mark.parametrize("folder", ["tests", "ci"])
def test_folders_with_common_names_are_no_packages(folder: str) -> None:
    """Below them only what has a name of its own may be one."""
    found = {file.parent.name for file in (ROOT / folder).rglob("__init__.py")}

    assert found <= {"grouped_bench"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        pytest.param("import flashinfer.norm", {"flashinfer"}, id="import"),
        pytest.param("from numpy import array", {"numpy"}, id="from"),
        pytest.param("def f():\n    import sglang", {"sglang"}, id="inside a function"),
        pytest.param("import torch, math", set(), id="allowed"),
    ],
)
def test_the_rule_notices_a_stray_import(source: str, found: set[str]) -> None:
    assert strays(source, {"torch", "math"}) == found


def test_the_torch_rule_sees_the_top_level_and_skips_type_checking() -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"

    assert "torch" not in set(imports(lazy, top_level_only=True))
    assert "torch" in set(imports("import torch", top_level_only=True))


def unexplained(source: str) -> list[str]:
    """The lines on which a type is ignored without a reason beside it."""
    return [line for line in source.splitlines() if re.search(r"# type: ignore(?!\[[^]]+\]  # \w)", line)]


@pytest.mark.parametrize("folder", ["src", "references/src", "groundtruth/src"])
def test_an_ignored_type_has_its_reason_beside_it(folder: str) -> None:
    found = {str(file): lines for file in _files(folder) if (lines := unexplained(file.read_text()))}

    assert found == {}


def test_the_rule_of_ignored_types_sees_the_bare_ones() -> None:
    bare, without_code = "a = b()  # type: ignore[index]", "a = b()  # type: ignore  # why"

    assert unexplained(f"{bare}\n{bare}  # b has no types\n{without_code}") == [bare, without_code]


def test_without_torch_the_files_that_need_none_are_collected_and_the_others_named() -> None:
    """They are told apart by their text: with torch out of reach, all that is left must be collected."""
    program = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    folders = ["--ignore=tests/references", "--ignore=tests/solutions"]

    done = subprocess.run(
        [sys.executable, "-c", program, "--collect-only", "-p", "no:cacheprovider", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-2000:]
    named = re.search(r"^without torch, so not here: (.*)$", done.stdout, re.MULTILINE)
    assert named, done.stdout[:2000]
    left_out = {"references", "solutions", "gpu"}
    files = {file.name for file in (ROOT / "tests").rglob("test_*.py") if file.parent.name not in left_out}
    collected = set(re.findall(r"<Module (test_\w+\.py)>", done.stdout))
    assert collected | set(named[1].split(", ")) == files
    assert "test_compare.py" not in collected
    assert len(collected) > 20
