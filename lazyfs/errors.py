"""
The one tree of errors, and its edge maps (exit code, errno).

Split by who is at fault: the bytes (FormatError, IntegrityError), the place they come from (SourceError), this
machine (HostError, CacheError), the caller (UsageError, TargetError), or us (BugError). A message is one line: what,
where, expected, found; `hint` is the next step for the reader. Neither ever holds a secret or a query string.
Exit codes: docs/reference.md; a test keeps the two alike.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class LazyfsError(Exception):
    """Root of all errors that a user may see. `str(error)` is one line without the hint."""

    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = errno.EIO

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(LazyfsError):
    """The command's words are off (a malformed reference, an option out of range)."""

    exit_code = 2


class ConfigError(LazyfsError):
    """The configuration (file or environment) is off: an unknown key, a wrong type, a value out of range."""

    exit_code = 3


class FormatError(LazyfsError):
    """Bytes from outside do not follow their format: archive, manifest, bootstrap, table, blob."""

    exit_code = 10


class UnsupportedError(FormatError):
    """Well-formed, but of a kind or version that this lazyfs does not know."""

    exit_code = 11


class IntegrityError(LazyfsError):
    """Bytes do not have the digest or size that was promised for them."""

    exit_code = 12


class SignatureError(LazyfsError):
    """Nobody whom this node trusts has signed the image (docs/signatures.md)."""

    exit_code = 13
    errno = errno.EACCES


class SourceError(LazyfsError):
    """
    A registry or directory did not deliver.

    :transient: trying again may help.
    :elsewhere: it was one of several servers, and another will be asked: the source as a whole is not in doubt.
    """

    exit_code = 20

    def __init__(self, message: str, *, hint: str = "", transient: bool = True) -> None:
        super().__init__(message, hint=hint)
        self.transient = transient
        self.elsewhere = False


class NotFoundError(SourceError):
    """The image, manifest or blob is not there."""

    exit_code = 21

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, transient=False)


class AuthError(SourceError):
    """The registry wants credentials, or others than it was given."""

    exit_code = 22
    errno = errno.EACCES

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, transient=False)


class RateLimitedError(SourceError):
    """The registry asks us to slow down (429, 503 with Retry-After)."""

    exit_code = 23

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class DeadlineError(SourceError):
    """The deadline of the operation passed before the bytes were there."""

    exit_code = 24
    errno = errno.ETIMEDOUT


class ResourceError(SourceError):
    """This machine had no descriptor, thread or memory left to ask a source with; that may pass."""

    exit_code = 25


class PeerError(SourceError):
    """A peer did not deliver: not reached, silent, broken off, or against the protocol."""

    exit_code = 26


class PeerBusyError(PeerError):
    """
    A peer is at its limits.

    :retry_after_s: when it may have room again.
    :better: host:port of members that it names instead.
    """

    exit_code = 28

    def __init__(
        self, message: str, *, hint: str = "", retry_after_s: float = 0.0, better: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s
        self.better = better


class PeerLacksError(PeerError):
    """A peer has not what was asked for, and cannot get it."""

    exit_code = 29


class PeerRefusedError(PeerError):
    """A token is missing, expired, or for something else."""

    exit_code = 27
    errno = errno.EACCES

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint, transient=False)


class CacheError(LazyfsError):
    """The local cache cannot be used."""

    exit_code = 30


class DiskFullError(CacheError):
    """No space (or quota) left where lazyfs must write."""

    exit_code = 31
    errno = errno.ENOSPC


class CacheOwnedError(CacheError):
    """Another process owns this cache directory."""

    exit_code = 32


class HostError(LazyfsError):
    """This machine lacks what is needed: root, /dev/fuse, a kernel new enough."""

    exit_code = 40


class TargetError(LazyfsError):
    """The directory to mount on, or the file to write, cannot be used."""

    exit_code = 41


class BusyError(TargetError):
    """Something still uses the mount."""

    exit_code = 42
    errno = errno.EBUSY


class SnapshotError(LazyfsError):
    """containerd asked for what the snapshots do not allow; the kinds are in snapshotter.failures."""

    exit_code = 43


class CheckError(LazyfsError):
    """`lazyfs check` found a difference; the subclasses say of which kind."""

    exit_code = 50


class ChunkDamagedError(CheckError):
    """A stored chunk is missing, cannot be decoded, or has another digest."""

    exit_code = 51


class TreeDiffersError(CheckError):
    """Names or types are not those of the source image."""

    exit_code = 52


class MetadataDiffersError(CheckError):
    """Mode, owner, time, xattr, link target, device number or hard-link group differs."""

    exit_code = 53


class ContentDiffersError(CheckError):
    """Bytes of a file differ."""

    exit_code = 54


class ConfigDiffersError(CheckError):
    """The image's configuration (command, environment, platform ...) differs."""

    exit_code = 55


class ProfileDiffersError(CheckError):
    """`lazyfs profile`: two lists agree less, or an image has less of a list, than was asked for."""

    exit_code = 56


class ProgramError(LazyfsError):
    """The program that `lazyfs profile run` ran has failed, or could not be started."""

    exit_code = 60


class NotReadyError(ProgramError):
    """It did not come to the point that its stop rule names: it ended before, or its time was over."""

    exit_code = 61


class BugError(LazyfsError):
    """This should never happen; please report it."""

    exit_code = 70
