"""
What an image's configuration says about the process to run. Pure; the bytes are hostile.

Layer: runner. Who calls: runner.session. The rules are those of the OCI image-spec (config.md) and of docker run: a
command given by the user replaces Cmd, and follows Entrypoint.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

import msgspec

from lazyfs import limits
from lazyfs.errors import FormatError, UsageError
from lazyfs.image.oci import decode_json

WORD_COUNT_MAX = 4096            # of arguments, and of variables; programs that want more than this are no container's
WORD_BYTES_MAX = 128 * limits.KIB - 1   # MAX_ARG_STRLEN of execve(2), with its NUL
WORDS_BYTES_MAX = 1 * limits.MIB        # of all together; half of what an 8 MiB stack lets execve take
_SIGNAL_MAX = 64


class _JsonProcess(msgspec.Struct, rename="pascal"):
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    user: str | None = None
    working_dir: str | None = None
    stop_signal: str | None = None


class _JsonConfig(msgspec.Struct):
    config: _JsonProcess | None = None


@dataclass(frozen=True, slots=True)
class ProcessConfig:
    """As the image has it. `env`: NAME=VALUE each; `user`: USER[:GROUP] or ""; `cwd`: absolute."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    cwd: str = "/"
    stop_signal: int = signal.SIGTERM

    def arguments(self, command: tuple[str, ...], entrypoint: tuple[str, ...] | None) -> tuple[str, ...]:
        """
        The words to execute.

        Args:
            command: the user's; none: the image's.
            entrypoint: the user's, instead of the image's (and of its command); None: the image's.

        Raises:
            UsageError: neither the image nor the user names a program.

        """
        words = (*self.entrypoint, *(command or self.command)) if entrypoint is None else (*entrypoint, *command)
        if not words or not words[0]:
            raise UsageError("the image names no program to run", hint="name one: lazyfs profile run IMAGE -- PROGRAM")
        return check_words(words, "command")


def parse_process(data: bytes) -> ProcessConfig:
    """
    Read an image config's process.

    Raises:
        FormatError: malformed, or beyond the limits.

    """
    raw = decode_json(data, _JsonConfig, "image config", limits.CONFIG_BYTES_MAX).config or _JsonProcess()
    entrypoint, command, env = (tuple(words or ()) for words in (raw.entrypoint, raw.cmd, raw.env))
    try:
        check_words((*entrypoint, *command), "command")
        check_environment(env)
        check_words((raw.user or "", raw.working_dir or ""), "user and working directory")
        stop_signal = parse_signal(raw.stop_signal or "SIGTERM")
    except UsageError as error:
        raise FormatError(f"image config: {error}") from error
    cwd = raw.working_dir or "/"
    if not cwd.startswith("/"):
        raise FormatError(f"image config: working directory {cwd!r:.100} is not absolute", hint="use --workdir")
    return ProcessConfig(entrypoint, command, env, raw.user or "", cwd, stop_signal)


def merge_environment(image: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """The image's variables, the user's over them; PATH if neither has it. NAME=VALUE each, names once."""
    default = {"PATH": "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    return tuple({**default, **{entry.partition("=")[0]: entry for entry in (*image, *own)}}.values())


def check_environment(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Raises UsageError: not NAME=VALUE, or beyond the limits."""
    for entry in entries:
        if entry.find("=") < 1:
            raise UsageError(f"variable {entry!r:.60}: expected NAME=VALUE")
    return check_words(entries, "environment")


def check_words(words: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Raises UsageError: more or longer ones than execve(2) takes, or with a NUL."""
    sizes = [len(word.encode("utf-8", "surrogateescape")) for word in words]
    if len(words) > WORD_COUNT_MAX or sum(sizes) > WORDS_BYTES_MAX or max(sizes, default=0) > WORD_BYTES_MAX:
        raise UsageError(f"{what}: {len(words)} words of {sum(sizes)} bytes, expected at most {WORD_COUNT_MAX} words "
                         f"of {WORDS_BYTES_MAX} bytes, each at most {WORD_BYTES_MAX}")
    if any("\0" in word for word in words):
        raise UsageError(f"{what}: NUL in a word")
    return words


def parse_signal(text: str) -> int:
    """SIGTERM, TERM, 15 or RTMIN+3 as a number. Raises UsageError: no such signal."""
    name, plus, offset = text.upper().removeprefix("SIG").partition("+")
    number = 0
    if name.isascii() and name.isdigit() and len(name) <= 2 and not plus:
        number = int(name)
    elif name == "RTMIN" and (not plus or (offset.isascii() and offset.isdigit() and len(offset) <= 2)):
        number = int(signal.SIGRTMIN) + int(offset or 0)
    elif not plus:
        number = int(getattr(signal, f"SIG{name}", 0)) if name.isascii() and name.isalnum() else 0
    if not 1 <= number <= _SIGNAL_MAX:
        raise UsageError(f"unknown signal {text!r:.40}")
    return number
