"""Which containerd this is: its binary says, or its socket. Layer: snapshotter.install."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import NamedTuple

from lazyfs.errors import HostError, LazyfsError, UnsupportedError

_ANSWER_S = 5.0                  # a busy containerd takes milliseconds; a stopped one is told from it soon
_VERSION = re.compile(r"(?:^|\s)v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?=[^\d.]|\.|$)")


class Version(NamedTuple):
    """Compares as versions do."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def knows_exports(self) -> bool:
        """`exports` of proxy plugins: tells kubelet's image GC where the snapshots are."""
        if self[:2] == (1, 6):
            return self.patch >= 32
        return self >= (1, 7, 16)

    @property
    def knows_capabilities(self) -> bool:
        return self >= (1, 7, 0)

    @property
    def pulls_by_transfer(self) -> bool:
        """CRI pulls through the transfer service, which unpacks with configured snapshotters only."""
        return self >= (2, 1, 0)


def parse_version(text: str) -> Version:
    """
    Out of `containerd --version`, or of what its API says.

    Raises:
        UnsupportedError: there is none, or one before 1.6.

    """
    found = _VERSION.search(text)
    if found is None:
        raise UnsupportedError(f"expected a version of containerd, found {text!r:.100}")
    version = Version(int(found[1]), int(found[2]), int(found[3] or 0))
    if version < (1, 6, 0):
        raise UnsupportedError(f"containerd {version} is too old: expected 1.6 or newer", hint="upgrade containerd")
    return version


def find_program(named: str | None) -> str | None:
    """The containerd binary: `named`, or the one on PATH."""
    return named or shutil.which("containerd", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")


def find_version(program: str | None, address: str) -> Version:
    """
    Ask the binary, else the socket.

    Raises:
        HostError: neither is there. UnsupportedError: too old.

    """
    if program is not None:
        try:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True,
                                  timeout=_ANSWER_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
            raise HostError(f"{program} --version failed: {error}", hint="name another one: --containerd") from error
        if "containerd" not in done.stdout:
            raise HostError(f"{program} is not containerd: it says it is {done.stdout.strip()!r:.60}",
                            hint="name another one: --containerd")
        return parse_version(done.stdout)
    return _ask(address)


def running_version(address: str) -> Version:
    """
    Of the containerd that listens there; where none does, of the one on PATH, which is perhaps another.

    Raises:
        HostError, UnsupportedError: as find_version().

    """
    try:
        return _ask(address)
    except HostError:
        program = find_program(None)
        if program is None:
            raise
        return find_version(program, address)


def _ask(address: str) -> Version:
    try:
        from snapshotter.containerd import Containerd  # noqa: PLC0415 - gRPC is heavy, and seldom needed here

        with Containerd(address) as client:
            return parse_version(client.version(_ANSWER_S))
    except LazyfsError as error:
        hint = "install containerd, or name its binary: --containerd"
        raise HostError(f"no containerd was found: none on PATH, and {error}", hint=hint) from error
