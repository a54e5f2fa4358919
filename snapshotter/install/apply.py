"""
Put a changed configuration in place, and the old one back: atomically, with a backup and a record of what was changed.

Layer: snapshotter.install. State: the record (JSON, /var/lib/lazyfs/install.json), written before the file is replaced:
a crash between the two leaves a record of changes that are not there, which uninstalling passes over.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazyfs.config.atomic import write_atomically
from lazyfs.errors import ConfigError, FormatError, TargetError
from snapshotter.install.edit import FILE_BYTES_MAX, Done, take_back

_CHECK_S = 30.0
_RECORD_BYTES_MAX = 1 << 20


@dataclass
class Record:
    """
    What an installation did.

    Attributes:
        file: containerd's configuration, resolved. existed: whether there was one.
        backup: a copy of it as it was before the first change; empty: there was none.
        digest: SHA-256 of the file as we left it.
        units: files of systemd's that we wrote.

    """

    file: str
    existed: bool
    backup: str = ""
    digest: str = ""
    changes: list[Done] = field(default_factory=list)
    units: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """None: nothing was installed. Raises FormatError: the record is damaged."""
        try:
            data = json.loads(path.read_bytes()[:_RECORD_BYTES_MAX])
            changes = [Done.from_json(one) for one in data["changes"]]
            return cls(str(data["file"]), bool(data["existed"]), str(data["backup"]), str(data["digest"]), changes,
                       [str(one) for one in data["units"]])
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError) as error:
            hint = "take lazyfs out of containerd's configuration by hand, then remove this file"
            raise FormatError(f"{path}: malformed record of an installation: {error}", hint=hint) from error

    def write(self, path: Path) -> None:
        data: dict[str, Any] = {"file": self.file, "existed": self.existed, "backup": self.backup,
                                "digest": self.digest, "changes": [one.to_json() for one in self.changes],
                                "units": self.units}
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomically(path, json.dumps(data, indent=2).encode() + b"\n", 0o600)


def read_configuration(path: Path) -> str:
    """Empty: there is none. Raises ConfigError: too large, not text."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except IsADirectoryError:
        raise TargetError(f"{path} is a directory: expected containerd's configuration file") from None
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: expected at most {FILE_BYTES_MAX} bytes, found {len(data)}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not text: {error}") from error


def put_in_place(path: Path, text: str, changes: list[Done], state: Path, program: str | None) -> Record:
    """
    Replace containerd's configuration.

    Args:
        path: resolved.
        text: its new content.
        changes: what is new in it.
        state: where the record is.
        program: a containerd binary that has to accept the result first; None: there is none.

    Raises:
        ConfigError: containerd does not accept it; nothing is changed.

    """
    existed = path.exists()
    record = Record.read(state)
    if record is None or record.file != str(path):
        record = Record(str(path), existed)
        if existed:
            record.backup = _back_up(path)
    record.changes = [*record.changes, *changes]
    data = text.encode()
    record.digest = hashlib.sha256(data).hexdigest()
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if program is not None:
        check_by_containerd(program, path, data)
    record.write(state)
    write_atomically(path, data, 0o644)
    return record


def restore(record: Record, state: Path) -> list[str]:
    """
    Take an installation back. Returns the keys that somebody else has changed since, and which stay.

    The very bytes from before, if nobody has changed the file; else without our changes.

    """
    path = Path(record.file)
    left: list[str] = []
    if record.changes and path.exists():
        data = path.read_bytes()
        before = Path(record.backup).read_bytes() if record.backup and Path(record.backup).exists() else None
        if hashlib.sha256(data).hexdigest() == record.digest and not record.existed:
            path.unlink()
        elif hashlib.sha256(data).hexdigest() == record.digest and before is not None:
            write_atomically(path, before, 0o644)
        else:
            text, left = take_back(read_configuration(path), record.changes, str(path))
            write_atomically(path, text.encode(), 0o644)
    state.unlink(missing_ok=True)
    return left


def check_by_containerd(program: str, path: Path, data: bytes) -> None:
    """Raises ConfigError: `containerd config dump` refuses these bytes."""
    trial = path.with_name(f".{path.name}.lazyfs-trial")
    write_atomically(trial, data, 0o600)
    try:
        done = subprocess.run([program, "--config", str(trial), "config", "dump"], capture_output=True, text=True,
                              errors="replace", check=False, timeout=_CHECK_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{program} could not check the new configuration: {error}",
                          hint="name another one: --containerd") from error
    finally:
        trial.unlink(missing_ok=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-300:]
        raise ConfigError(f"containerd refuses the new configuration, which was not put in place: {said}",
                          hint="put in by hand what this prints: lazyfs snapshotter install --print")


def _back_up(path: Path) -> str:
    """A copy beside it, named by the time (UTC); its name."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    backup = path.with_name(f"{path.name}.lazyfs-{stamp}.bak")
    status = path.stat()
    write_atomically(backup, path.read_bytes(), status.st_mode & 0o7777)
    os.chown(backup, status.st_uid, status.st_gid)
    return str(backup)
