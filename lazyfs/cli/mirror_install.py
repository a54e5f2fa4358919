"""`lazyfs mirror install` and `uninstall`: thin; the work is in mirror.installing."""

from __future__ import annotations

from pathlib import Path

import click

from lazyfs.errors import LazyfsError, UsageError

_EPILOG = """\b
Examples:
  lazyfs mirror install                         containerd, every registry
  lazyfs mirror install --registry docker.io --registry registry.example:5000
  lazyfs mirror install --docker                Docker: any registry with its containerd store, else Docker Hub
  lazyfs mirror install --podman --registry registry.example:5000
"""


@click.command("install", epilog=_EPILOG)
@click.option("--containerd", "containerd", is_flag=True, help="containerd's hosts.toml files (this is the default).")
@click.option("--docker", is_flag=True, help="Docker's hosts.toml files and registry-mirrors.")
@click.option("--podman", "--cri-o", "podman", is_flag=True, help="registries.conf of Podman and CRI-O.")
@click.option("--registry", "registries", metavar="HOST", multiple=True,
              help="Only images of this one; may be repeated.  [default: all; Podman: docker.io]")
@click.option("--address", metavar="HOST:PORT", help="The mirror's.  [default: configured, or 127.0.0.1:9453]")
@click.option("--config-path", metavar="DIR", help="Where hosts.toml files are.  [default: /etc/containerd/certs.d]")
@click.option("--docker-config", metavar="FILE", default="/etc/docker/daemon.json", hidden=True)
@click.option("--docker-certs", metavar="DIR", default="/etc/docker/certs.d", hidden=True)
@click.option("--containers-config", metavar="DIR", default="/etc/containers", hidden=True)
def install_command(*, registries: tuple[str, ...], address: str | None, config_path: str | None, docker_config: str,
                    docker_certs: str, containers_config: str, containerd: bool, docker: bool,
                    podman: bool) -> None:
    """
    Have a container runtime pull through the mirror, which must be running. Doing it again changes nothing.

    The registry is asked as before where the mirror has nothing, or is not there.
    """
    from lazyfs.mirror import installing  # noqa: PLC0415 - start-up time of --help

    names = [_checked(one) for one in registries]
    where = _address(address)
    installing.check_answers(where)
    record = installing.Installation(_record())
    is_first = not record.files
    passed: list[str] = []
    try:
        if containerd or not (docker or podman):
            directory = Path(config_path or installing.CONTAINERD_DIR)
            passed += installing.for_hosts_dir(record, directory, names, where)
        if docker:
            passed += installing.for_docker(record, Path(docker_config), Path(docker_certs), names, where)
        if podman:
            installing.for_podman(record, Path(containers_config), names, where)
    except LazyfsError:
        if is_first:
            record.take_back()
        raise
    for one in record.files:
        print(f"{one.path}{f' (before: {one.backup})' if one.backup else ''}")
    for text in passed:
        print(f"passed over: {text}")
    if containerd or not (docker or podman):
        print("containerd reads it at the next pull, if its configuration has config_path = "
              f'"{config_path or installing.CONTAINERD_DIR}"')
    if docker:
        print("next: systemctl reload docker")


@click.command("uninstall")
def uninstall_command() -> None:
    """Put every runtime's configuration back as it was."""
    from lazyfs.mirror.installing import Installation  # noqa: PLC0415 - start-up time of --help

    record = Installation(_record())
    if not record.files:
        print("nothing is installed")
        return
    count = len(record.files)
    left = record.take_back()
    print(f"{count - len(left)} files are as they were")
    for path in left:
        print(f"{path}: changed by somebody else since, and left alone")


def _record() -> Path:
    from lazyfs import config  # noqa: PLC0415 - as above

    return Path(config.load().mirror.dir) / "install.json"


def _address(given: str | None) -> str:
    from lazyfs import config  # noqa: PLC0415 - as above
    from lazyfs.config.kinds import Address  # noqa: PLC0415
    from lazyfs.mirror.serving import DEFAULT_ADDRESS  # noqa: PLC0415

    try:
        return str(Address().accept(given or config.load().mirror.address or DEFAULT_ADDRESS))
    except ValueError:
        raise UsageError(f"--address {given!r}: expected {Address().expected}") from None


def _checked(registry: str) -> str:
    """A registry's name, as in image references."""
    from lazyfs.registry.reference import parse_name  # noqa: PLC0415 - as above

    if "/" not in registry and parse_name(f"{registry}/any").host == registry:
        return registry
    raise UsageError(f"--registry {registry[:100]!r}: expected a host as in image references, with its port if any",
                     hint="for example: --registry docker.io --registry registry.example:5000")
