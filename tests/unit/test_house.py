"""The house rules that a machine can check: sizes, layers, documents that must agree with the code."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from lazyfs import errors

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES_MAX = 420
FUNCTION_LINES_MAX = 70
PRODUCT = [path for package in ("lazyfs", "converter", "snapshotter", "benchmarks")
           for path in sorted((ROOT / package).rglob("*.py")) if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    return [ROOT / name for name in listing.stdout.decode().splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= FILE_LINES_MAX
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source)), "module docstring is missing"


def test_test_files_have_different_names() -> None:
    """pytest imports them by their names alone: two of one name in one run are an error."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_exit_codes_are_unique_and_documented() -> None:
    found: dict[int, str] = {}
    pending: list[type[errors.LazyfsError]] = [errors.LazyfsError]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__ == "lazyfs.errors":
            assert kind.exit_code not in found, f"{kind.__name__} and {found[kind.exit_code]} share an exit code"
            found[kind.exit_code] = kind.__name__
    documented = set(map(int, re.findall(r"^\| (\d+) \|", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)))
    assert set(found) <= documented


def test_every_promise_has_a_test() -> None:
    promises = re.findall(r"^\| (S-\d+) \|.*\| `(tests/[^`:]+)(?:::([^`]+))?` \|$",
                          (ROOT / "docs/semantics.md").read_text(), re.MULTILINE)
    assert len(promises) >= 10
    assert len({promise for promise, _, _ in promises}) == len(promises)
    for promise, file, function in promises:
        path = ROOT / file
        assert path.is_file(), f"{promise}: no file {file}"
        assert not function or f"def {function}(" in path.read_text(), f"{promise}: no test {function} in {file}"


FAULT_ROWS = 44


def test_every_fault_has_a_test() -> None:
    rows = dict(re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", (ROOT / "docs/faults.md").read_text(), re.MULTILINE))
    assert set(rows) == {str(number) for number in range(1, FAULT_ROWS + 1)}
    for number, cell in rows.items():
        tests = re.findall(r"`(tests/[^`:]+)::([^`]+)`", cell)
        assert tests, f"row {number}"
        for file, function in tests:
            assert (ROOT / file).is_file(), f"row {number}: no file {file}"
            assert f"def {function}(" in (ROOT / file).read_text(), f"row {number}: no test {function} in {file}"


def test_every_fault_in_mid_transfer_has_a_test() -> None:
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| [^|]+ \| ((?:`tests/[^`]+`(?: |(?= \|)))+) ?\|$",
                      (ROOT / "docs/peers.md").read_text(), re.MULTILINE)
    assert len(rows) >= 20
    for file, function in re.findall(r"`(tests/[^`:]+)::([^`]+)`", "".join(rows)):
        assert f"def {function}(" in (ROOT / file).read_text(), f"no test {function} in {file}"


def test_no_package_registry_is_named() -> None:
    hosts = (rb"(pypi|pythonhosted|crates|npmjs|maven)\.(org|io|com)|deb\.debian\.org|"
             rb"(proxy|sum|pkg)\.golang\.org|(?<!google\.)golang\.org(?!/x/)")   # those are modules' names
    forbidden = re.compile(hosts, re.IGNORECASE)
    for path in tracked_files():
        if path != Path(__file__):
            hit = forbidden.search(path.read_bytes())
            assert hit is None, f"{path.relative_to(ROOT)} names {hit and hit.group().decode()}"


def test_documents_link_to_files_that_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


CAPABILITIES, GAPS = 63, 8           # of the systems that docs/p2p-parity.md compares


def test_every_capability_of_others_is_answered() -> None:
    text = (ROOT / "docs/p2p-parity.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| (here|better|part|later|no) \| ([^|]+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, CAPABILITIES + 1))
    gaps = re.findall(r"^\| G(\d) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in gaps] == list(range(1, GAPS + 1))
    for file in re.findall(r"`((?:lazyfs|tests|benchmarks|docs|packaging)/[^`\s]*)`", text):
        assert (ROOT / file).exists(), f"no {file}"


def test_every_threat_has_a_test() -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    threats = re.findall(r"^\| (T-\d+) \|.*\| `(tests/[^`:]+)::([^`]+)` \|$", text, re.MULTILINE)
    assert [threat for threat, _, _ in threats] == re.findall(r"^\| (T-\d+) \|", text, re.MULTILINE)
    assert len({threat for threat, _, _ in threats}) == len(threats) > 30
    for threat, file, function in threats:
        assert (ROOT / file).is_file(), f"{threat}: no file {file}"
        assert f"def {function}(" in (ROOT / file).read_text(), f"{threat}: no test {function} in {file}"
    packages = "fetch|registry|converter|image|node|fs|cache|snapshotter|peers|tracker|mirror"
    for file in re.findall(rf"`((?:{packages})/[a-z_/]+\.py)`", text):
        assert any((ROOT / top / file).is_file() for top in ("", "lazyfs")), f"no file {file}"
