"""
Credentials by registry: from the command line, docker's config.json or its credential helpers.

Layer: registry. Who calls: keychain.py. Formats: docker's config file (`auths`, `credHelpers`, `credsStore`), the same
file of containers-auth.json(5) with keys for parts of a registry (`host/namespace`), and the protocol of
docker-credential-* programs (`get`: the server on stdin, JSON on stdout). Nothing that these hold reaches a message.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lazyfs import shapes
from lazyfs.errors import AuthError, UsageError
from lazyfs.limits import MIB
from lazyfs.registry.options import RegistryOptions, Secret
from lazyfs.registry.program import ask_program

DOCKER_HUB = "docker.io"
# What docker login writes for Docker Hub, since 2013.
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_FILE_BYTES_MAX = 4 * MIB
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_TOKEN_USER = "<token>"  # noqa: S105 - the name by which a helper says that its secret is an identity token
_NOTHING = Secret("")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and password, or an identity (refresh) token."""

    username: str = ""
    password: Secret = _NOTHING
    identity_token: Secret = _NOTHING

    def basic(self) -> Secret:
        """The value of a Basic Authorization header (RFC 7617, UTF-8)."""
        pair = f"{self.username}:{self.password.reveal()}".encode()
        return Secret("Basic " + base64.b64encode(pair).decode())


class _AuthEntry(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""


class _ConfigFile(msgspec.Struct):
    auths: dict[str, _AuthEntry] = msgspec.field(default_factory=dict)
    credHelpers: dict[str, str] = msgspec.field(default_factory=dict)  # noqa: N815 - docker's key
    credsStore: str = ""  # noqa: N815 - docker's key


class _HelperAnswer(msgspec.Struct):
    Username: str = ""
    Secret: str = ""


def find_credentials(options: RegistryOptions, host: str, repository: str) -> Credentials | None:
    """
    What to show to registry `host` (docker.io for Docker Hub) for `repository`; None: nothing, be anonymous.

    Raises:
        UsageError: the config file cannot be read. AuthError: a credential helper failed.

    """
    if options.username:
        assert isinstance(options.password, Secret | None)
        return Credentials(options.username, options.password or Secret(""))
    path, is_demanded = _config_path(options)
    config = _read_config(path, is_demanded=is_demanded)
    if config is None:
        return None
    server = _DOCKER_HUB_KEY if host == DOCKER_HUB else host
    helper = config.credHelpers.get(host) or config.credHelpers.get(server)
    if helper:
        return ask_helper(helper, server)
    if config.credsStore:
        found = ask_helper(config.credsStore, server)
        if found is not None:
            return found
    return _from_auths(config.auths, host, repository, path)


def _config_path(options: RegistryOptions) -> tuple[Path, bool]:
    """The file, and whether its absence is an error."""
    if options.auth_file is not None:
        return options.auth_file, True
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        return Path(named), False
    if directory := os.environ.get("DOCKER_CONFIG"):
        return Path(directory) / "config.json", False
    home = os.environ.get("HOME") or "/root"
    return Path(home) / ".docker" / "config.json", False


def _read_config(path: Path, *, is_demanded: bool) -> _ConfigFile | None:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        if is_demanded:
            raise UsageError(f"{path}: no such file", hint="check --auth-file") from None
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot read credentials: {error.strerror}", hint="check its mode") from error
    if len(data) > _FILE_BYTES_MAX:
        raise UsageError(f"{path}: larger than {_FILE_BYTES_MAX} bytes, this is no credentials file")
    try:
        return shapes.from_json(data, _ConfigFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Without the decoder's words: they may quote a key of the file.
        raise UsageError(f"{path}: not the JSON that docker login writes",
                         hint="repair it, or name another file with --auth-file") from None


def _from_auths(auths: dict[str, _AuthEntry], host: str, repository: str, path: Path) -> Credentials | None:
    """The most specific key wins: host/a/b, host/a, host."""
    plain = {_plain_key(key): entry for key, entry in auths.items()}
    names = [host]
    for part in repository.split("/"):
        names.append(f"{names[-1]}/{part}")
    for name in reversed(names):
        entry = plain.get(name)
        if entry is not None and (found := _decode_entry(entry, path, name)) is not None:
            return found
    return None


def _plain_key(key: str) -> str:
    """`https://host/v1/` -> `host`; Docker Hub's old names -> docker.io."""
    bare = key.partition("://")[2] or key
    bare = re.sub(r"/v[12]/?\Z", "", bare.rstrip("/"))
    host, slash, rest = bare.partition("/")
    if host in {"index.docker.io", "registry-1.docker.io"}:
        host = DOCKER_HUB
    return host + slash + rest


def _decode_entry(entry: _AuthEntry, path: Path, name: str) -> Credentials | None:
    username, password = entry.username, entry.password
    if entry.auth:
        try:
            pair = base64.b64decode(entry.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError):
            raise UsageError(f"{path}: the entry of {name} is not base64", hint=f"run docker login {name}") from None
        username, _, password = pair.partition(":")
        password = password.rstrip("\0")  # some writers pad
    if entry.identitytoken:
        return Credentials(username, identity_token=Secret(entry.identitytoken))
    if not username:
        return None  # docker leaves an empty entry behind where a credsStore holds the secret
    return Credentials(username, Secret(password))


def ask_helper(name: str, server: str) -> Credentials | None:
    """
    Run `docker-credential-NAME get` for `server`; None: it has nothing.

    Raises:
        AuthError: there is no such program, it failed, hung, or said something else than its protocol.

    """
    if not _HELPER_NAME.match(name):
        raise AuthError(f"{name[:100]!r} is no name of a credential helper", hint="check credHelpers in config.json")
    program = f"docker-credential-{name}"
    code, output = ask_program([program, "get"], server.encode() + b"\n", name=program,
                               hint="install it, or remove it from config.json")
    if code != 0:
        if b"credentials not found" in output.lower():
            return None
        raise AuthError(f"{program}: failed for {server} (exit code {code})", hint=f"try: {program} get <<< {server}")
    try:
        answer = shapes.from_json(output, _HelperAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise AuthError(f"{program}: its answer is not the JSON expected") from None
    if answer.Username == _TOKEN_USER:
        return Credentials(identity_token=Secret(answer.Secret))
    return Credentials(answer.Username, Secret(answer.Secret))
