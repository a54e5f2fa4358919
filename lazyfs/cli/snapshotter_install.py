"""`lazyfs snapshotter install` and `uninstall`: thin; the work is in snapshotter.install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from lazyfs import config
from lazyfs.errors import HostError

DEFAULT_FILE = "/etc/containerd/config.toml"
SYSTEMD_RUNS = Path("/run/systemd/system")       # sd_booted(3)
_SYSTEMCTL_S = 120.0
_NO_SYSTEMD = "the files are written; where systemd does not run, start lazyfs daemon and lazyfs snapshotter yourself"
_EPILOG = """\b
Examples:
  lazyfs snapshotter install --print    what containerd needs, for configuration management
  lazyfs snapshotter install            write it (with a backup) and systemd's units; restart nothing
  lazyfs snapshotter install --restart  ... and start the units and restart containerd (containers go on)
"""
_STATE = click.option("--state", metavar="FILE", hidden=True, help="Where it is recorded what was done.")
_RESTART = click.option("--restart", is_flag=True, help="Also start or stop the units, and restart containerd.")


@click.command("install", epilog=_EPILOG)
@click.option("--config", "file", metavar="FILE", default=DEFAULT_FILE, show_default=True,
              help="containerd's configuration.")
@click.option("--containerd", metavar="FILE", help="containerd's binary, asked for its version.  [default: on PATH]")
@click.option("--print", "only_print", is_flag=True, help="Print what is needed; write nothing.")
@click.option("--no-cri", is_flag=True, help="Leave CRI (kubelet) with its snapshotter.")
@click.option("--no-units", is_flag=True, help="Do not write systemd's units.")
@click.option("--systemd-dir", metavar="DIR", default="/etc/systemd/system", hidden=True)
@_STATE
@_RESTART
def install_command(file: str, containerd: str | None, state: str | None, systemd_dir: str, *, only_print: bool,
                    no_cri: bool, no_units: bool, restart: bool) -> None:
    """Write lazyfs into containerd's configuration. Comments and other keys stay; doing it again changes nothing."""
    from snapshotter.install import apply, edit, units  # noqa: PLC0415 - start-up time of --help
    from snapshotter.install.settings import choose_file_version, settings_for  # noqa: PLC0415
    from snapshotter.install.version import find_program, find_version  # noqa: PLC0415

    found = config.load()
    program = find_program(containerd)
    version = find_version(program, found.snapshotter.containerd_address)
    path = Path(os.path.realpath(file))
    text = apply.read_configuration(path)
    file_version = choose_file_version(version, edit.read_toml(text, str(path)))
    settings = settings_for(version, file_version, address=found.snapshotter.address, root=found.snapshotter.root,
                            cri=not no_cri)
    if only_print:
        print(f"# for containerd {version}\n{edit.as_fragment(file_version, settings)}", end="")
        return
    if not no_units:
        units.check_units(Path(systemd_dir))   # before anything is written
    changed, changes = edit.set_values(text, file_version, settings, str(path))
    place = _state_path(state)
    if changes:
        record = apply.put_in_place(path, changed, changes, place, program)
        backup = f" (before: {record.backup})" if record.backup else ""
        print(f"containerd {version}: {path} has {len(changes)} new values{backup}")
    else:
        record = apply.Record.read(place) or apply.Record(str(path), existed=True)
        print(f"containerd {version}: {path} has all it needs")
    if not no_units:
        record.units = units.write_units(Path(systemd_dir), _own_program())
        record.write(place)
        print(f"systemd: {', '.join(record.units)}")
    if restart:
        _restart(with_units=not no_units)
    else:
        _tell_next("systemctl daemon-reload; systemctl enable --now lazyfs lazyfs-snapshotter; "
                   "systemctl restart containerd",
                   "start lazyfs daemon and lazyfs snapshotter, then restart containerd", with_units=not no_units)


@click.command("uninstall")
@_STATE
@_RESTART
def uninstall_command(state: str | None, *, restart: bool) -> None:
    """Put containerd's configuration back as it was, and remove the units. Images and caches stay."""
    from snapshotter.install import apply, units  # noqa: PLC0415 - start-up time of --help

    place = _state_path(state)
    record = apply.Record.read(place)
    if record is None:
        print("nothing is installed")
        return
    if restart and record.units:
        _systemctl("disable", "--now", "lazyfs-snapshotter.service", "lazyfs.service")
    units.remove_units(record.units)
    left = apply.restore(record, place)
    print(f"{record.file} is as it was" if not left else
          f"{record.file}: changed by somebody else since, and left alone: {', '.join(left)}")
    if restart:
        _systemctl("daemon-reload")
        _systemctl("restart", "containerd.service")
    else:
        _tell_next("systemctl stop lazyfs-snapshotter lazyfs; systemctl daemon-reload; systemctl restart containerd",
                   "restart containerd, then end lazyfs snapshotter and lazyfs daemon", with_units=bool(record.units))


def _tell_next(with_systemd: str, without: str, *, with_units: bool) -> None:
    """What is left to do, for who did not ask for it."""
    print(f"next: {with_systemd if with_units and SYSTEMD_RUNS.is_dir() else without}")


def _state_path(named: str | None) -> Path:
    return Path(named) if named else Path(config.load().snapshotter.root).parent / "install.json"


def _own_program() -> str:
    """The `lazyfs` command that runs, for ExecStart."""
    beside = Path(sys.executable).parent / "lazyfs"
    return str(beside) if beside.exists() else os.path.realpath(sys.argv[0])


def _restart(*, with_units: bool) -> None:
    _systemctl("daemon-reload")
    if with_units:
        _systemctl("enable", "--now", "lazyfs.service", "lazyfs-snapshotter.service")
    _systemctl("restart", "containerd.service")


def _systemctl(*words: str) -> None:
    try:
        subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True, errors="replace",
                       timeout=_SYSTEMCTL_S, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise HostError(f"systemctl {' '.join(words)} failed: {' '.join(error.stderr.split())[:300]}",
                        hint="systemctl status says more" if SYSTEMD_RUNS.is_dir() else _NO_SYSTEMD) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"systemctl {' '.join(words)} failed: {error}", hint=_NO_SYSTEMD) from error
