"""
All tests, in three pytest processes at once: half of their time they wait for containers, not for a processor.

    python -m tests.everything           # scripts/test without words calls it

A part is a pytest process of its own over some of the files, in a mount namespace of its own: what `ip netns exec` or
a container of another part copies of its mounts would keep them alive. Mounts are shared below it, as systemd has them.
What it starts and leaves is told from the others' by tests/leaks.py. What a part prints appears in one piece when it
ends. Exit code: the first of a part that is not 0 (pytest's own, so 5 where a part had no test at all).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# The longest start first, the rest fills up; none takes more than a quarter of the whole, so that no last one is alone.
LONGEST = ("fault/test_[ms]*", "node/test_[a-c]*", "snapshotter/test_[l-o]*", "node/test_d*", "node/test_p*",
           "fault/test_[n-r]*", "snapshotter/test_[p-z]*", "fault/test_[a-l]*", "snapshotter/test_[a-k]*",
           "mount/test_[a-e]*", "node/test_[e-o]*", "node/test_[q-z]*")
AT_ONCE = 3                      # with two processors; a part alone would use half of one
PART_S = 3600.0
_SUMMARY = re.compile(r"^\d+ .* in \d[\d.]*s.*$", re.MULTILINE)      # pytest's last line
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed|warnings?)\b")


@dataclass
class Part:
    """`name`: for people; `files`: of one pytest process; `code`: how it ended."""

    name: str
    files: list[Path]
    code: int = -1
    seconds: float = 0.0
    output: str = ""
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def run(self) -> Part:
        began = time.monotonic()
        words = [*_apart(), sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, self.files)]
        with tempfile.TemporaryFile("w+") as file:
            self.process = subprocess.Popen(words, cwd=TESTS.parent, stdin=subprocess.DEVNULL, stdout=file,
                                            stderr=subprocess.STDOUT, text=True)
            try:
                self.code = self.process.wait(PART_S)
            except subprocess.TimeoutExpired:
                self.end()
                self.code = self.process.wait()
            file.seek(0)
            self.output = file.read()
        self.seconds = time.monotonic() - began
        return self

    def end(self) -> None:
        """As ^C does: its fixtures clean up."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)


def _apart() -> list[str]:
    """The words before a command that give it mounts of its own; none where that cannot be had."""
    words = ["unshare", "--mount", "--propagation", "shared", "--"]
    can = shutil.which(words[0]) and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if can else []


def parts() -> list[Part]:
    """Every file of tests in exactly one part."""
    left = set(TESTS.rglob("test_*.py"))
    found = []
    for pattern in LONGEST:
        files = sorted(left & set(TESTS.glob(f"{pattern}.py")))
        left -= set(files)
        found.append(Part(pattern, files))
    folders = Counter(path.parent for path in left)
    found += [Part(folder.name, sorted(path for path in left if path.parent == folder))
              for folder in sorted(folders, key=lambda path: (path.name in ("unit", "fuzz"), path.name))]  # quick: last
    return [part for part in found if part.files]


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)       # a background job begins with ignoring it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began, counts, code = time.monotonic(), Counter[str](), 0
    todo = parts()
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for future in as_completed([pool.submit(part.run) for part in todo]):
            part = future.result()
            print(f"=== {part.name}: {part.seconds:.0f} s\n{part.output}", flush=True)
            for last in _SUMMARY.findall(part.output)[-1:]:
                counts.update({kind.rstrip("s"): int(number) for number, kind in _COUNT.findall(last)})
            code = code or part.code
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for part in todo:
            part.end()
        pool.shutdown()
    told = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
    print(f"=== {told} in {time.monotonic() - began:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    os.environ.pop("LAZYFS_TEST_MARK", None)       # each part has its own
    sys.exit(main())
