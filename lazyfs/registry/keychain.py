"""
Where credentials come from, in order: the one chain that every request asks.

    1. the command line's name and password (then nothing else counts)
    2. what kubelet pulls with (pushed.py: the snapshotter's image-service proxy hands it over)
    3. docker's configuration and its helpers (credentials.py)
    4. kubelet's credential-provider plugins (kubelet.py)
    5. the registry's own settings, [registry.host."NAME"]: a name and a file with the password

Layer: registry. Who calls: auth.py, in the thread of a request that the registry refused; never before. State: none of
its own. A source that fails is passed over; its error is shown if no other has anything.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from lazyfs.errors import LazyfsError, UsageError
from lazyfs.limits import KIB
from lazyfs.registry.credentials import Credentials, find_credentials
from lazyfs.registry.options import Secret
from lazyfs.registry.pushed import PUSHED

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from lazyfs.registry.options import RegistryOptions

    # host, repository, those that were refused -> something else, if there is
    CredentialSource = Callable[[str, str, Collection[Credentials]], Credentials | None]

_PASSWORD_BYTES_MAX = 64 * KIB
_log: Final = logging.getLogger("lazyfs.registry")


class Keychain:
    """The sources that some options name. Thread-safe."""

    def __init__(self, options: RegistryOptions) -> None:
        self._options = options
        self._sources: list[CredentialSource] = [PUSHED.find, self._docker, self._kubelet, self._settings]
        if options.username:
            self._sources = [self._docker]   # it begins with the command line's
        if options.shown is not None:
            self._sources = []

    def find(self, host: str, repository: str, refused: Collection[Credentials] = ()) -> Credentials | None:
        """
        What to show to registry `host` (docker.io for Docker Hub) for `repository`; None: nothing, be anonymous.

        `refused`: those that the registry did not take; every source is asked anew, and they are passed over.

        Raises:
            LazyfsError: there is nothing, but a source could not be asked: its error.

        """
        failure: LazyfsError | None = None
        for source in self._sources:
            try:
                found = source(host, repository, refused)
            except LazyfsError as error:
                _log.info("%s: no credentials out of one source: %s", host, str(error))
                failure = failure or error
            else:
                if found is not None and found not in refused:
                    return found
        if failure is not None:
            raise failure
        return None

    def _docker(self, host: str, repository: str, refused: Collection[Credentials]) -> Credentials | None:  # noqa: ARG002 - read anew each time
        return find_credentials(self._options, host, repository)

    def _kubelet(self, host: str, repository: str, refused: Collection[Credentials]) -> Credentials | None:
        options = self._options
        if options.provider_config is None:
            return None
        from lazyfs.registry.kubelet import find_provided  # noqa: PLC0415 - yaml is for those that use it

        return find_provided(options.provider_config, options.provider_bin_dir, host, repository, refused)

    def _settings(self, host: str, repository: str, refused: Collection[Credentials]) -> Credentials | None:  # noqa: ARG002 - read anew each time
        own = self._options.hosts.get(host)
        if own is None or not own.username or own.password_file is None:
            return None
        return Credentials(own.username, Secret(_read_password(own.password_file)))


def _read_password(path: Path) -> str:
    """The first line of a file. Raises UsageError, without a word of its content."""
    try:
        with path.open("rb") as file:
            data = file.read(_PASSWORD_BYTES_MAX + 1)
        text = data.decode()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the password: {error.strerror}", hint="check its mode") from error
    except UnicodeDecodeError:
        raise UsageError(f"{path}: the password is not UTF-8") from None
    line = text.split("\n", 1)[0].rstrip("\r")
    if not line or len(data) > _PASSWORD_BYTES_MAX:
        raise UsageError(f"{path}: expected a password on the first line")
    return line
