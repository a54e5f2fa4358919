"""
Kubelet's credential-provider plugins: the clouds' own programs that hand out short-lived registry passwords.

Layer: registry. Who calls: keychain.py. Formats: CredentialProviderConfig (kubelet.config.k8s.io, YAML or JSON) and the
plugins' protocol (credentialprovider.kubelet.k8s.io: CredentialProviderRequest on stdin, CredentialProviderResponse on
stdout). State: answers, kept as long and for as much (image, registry, everything) as the plugin says, bounded. One
thread at a time asks a plugin the same; the others take its answer. Nothing of an answer ever reaches a message.
"""

from __future__ import annotations

import fnmatch
import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from lazyfs import shapes
from lazyfs.errors import AuthError, UsageError
from lazyfs.limits import MIB
from lazyfs.registry.credentials import Credentials
from lazyfs.registry.hoststoml import duration_s
from lazyfs.registry.options import Secret
from lazyfs.registry.program import ask_program

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_GROUP: Final = "credentialprovider.kubelet.k8s.io/"
_VERSIONS: Final = {"v1", "v1beta1", "v1alpha1"}
_FILE_BYTES_MAX = 1 * MIB
_PROVIDER_COUNT_MAX = 64
_KEPT_COUNT_MAX = 1024
_LIFETIME_MAX_S = 24 * 3600.0


class _Variable(msgspec.Struct):
    name: str
    value: str = ""


class _Provider(msgspec.Struct):
    """`tokenAttributes`: it wants a pod's service account, which we have not."""

    name: str
    apiVersion: str  # noqa: N815 - the format's keys
    matchImages: list[str]  # noqa: N815
    defaultCacheDuration: str | None = None  # noqa: N815
    args: list[str] | None = None
    env: list[_Variable] | None = None
    tokenAttributes: Any = None  # noqa: N815


class _Config(msgspec.Struct):
    apiVersion: str  # noqa: N815
    kind: str
    providers: list[_Provider] = msgspec.field(default_factory=list)


class _Pair(msgspec.Struct):
    username: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return "_Pair(***)"


class _Answer(msgspec.Struct):
    apiVersion: str  # noqa: N815
    kind: str
    cacheKeyType: str  # noqa: N815
    cacheDuration: str | None = None  # noqa: N815
    auth: dict[str, _Pair] | None = None


@dataclass(slots=True)
class _Kept:
    auth: dict[str, _Pair] = field(repr=False)
    until: float


class _Answers:
    """What plugins said. One lock a question: two images of one registry do not make a plugin run twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, ...], _Kept] = {}
        self._asking: dict[tuple[str, ...], threading.Lock] = {}

    def get(self, keys: list[tuple[str, ...]]) -> dict[str, _Pair] | None:
        now = time.monotonic()
        with self._lock:
            for key in keys:
                kept = self._kept.get(key)
                if kept is not None and kept.until > now:
                    return kept.auth
        return None

    def put(self, key: tuple[str, ...], auth: dict[str, _Pair], lifetime_s: float) -> None:
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = _Kept(auth, time.monotonic() + min(lifetime_s, _LIFETIME_MAX_S))
            while len(self._kept) > _KEPT_COUNT_MAX:
                del self._kept[next(iter(self._kept))]

    def drop(self, keys: list[tuple[str, ...]]) -> None:
        with self._lock:
            for key in keys:
                self._kept.pop(key, None)

    def turn(self, question: tuple[str, ...]) -> threading.Lock:
        with self._lock:
            if len(self._asking) > _KEPT_COUNT_MAX:
                self._asking.clear()   # at worst a plugin runs twice
            return self._asking.setdefault(question, threading.Lock())


_answers = _Answers()


def find_provided(config: Path, bin_dir: Path | None, host: str, repository: str,
                  refused: Collection[Credentials]) -> Credentials | None:
    """
    What the first plugin that knows the image gives for it; None: none does.

    Raises:
        UsageError: the configuration is none. AuthError: a plugin failed.

    """
    image = f"{host}/{repository}"
    failure: AuthError | None = None
    for provider in read_providers(config):
        if provider.tokenAttributes is not None or not any(matches(one, image) for one in provider.matchImages):
            continue
        try:
            found = _ask(provider, config, bin_dir, image, refused)
        except AuthError as error:
            failure = failure or error
        else:
            if found is not None:
                return found
    if failure is not None:
        raise failure
    return None


def read_providers(path: Path) -> list[_Provider]:
    """Raises UsageError: it is no CredentialProviderConfig."""
    wrong = f"{path}: not a CredentialProviderConfig"
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
        content = _decode(data)
        config = shapes.from_plain(content, _Config)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}",
                         hint="check credential_provider_config in [registry]") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{wrong}: {str(error)[:200]}", hint="see docs/credentials.md") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{wrong}: neither YAML nor JSON, or too large", hint="see docs/credentials.md") from None
    group, _, version = config.apiVersion.partition("/")
    if group != "kubelet.config.k8s.io" or version not in _VERSIONS or config.kind != "CredentialProviderConfig":
        raise UsageError(f"{wrong}: it is {config.kind[:60]!r} of {config.apiVersion[:60]!r}")
    if len(config.providers) > _PROVIDER_COUNT_MAX:
        raise UsageError(f"{wrong}: more than {_PROVIDER_COUNT_MAX} providers")
    for one in config.providers:
        if one.name in {"", ".", ".."} or "/" in one.name or "\0" in one.name:
            raise UsageError(f"{wrong}: {one.name[:60]!r} is no name of a plugin")
        if one.apiVersion.removeprefix(_GROUP) not in _VERSIONS:
            raise UsageError(f"{wrong}: provider {one.name[:60]!r}: unknown apiVersion {one.apiVersion[:60]!r}")
    return config.providers


def _decode(data: bytes) -> Any:
    """Raises ValueError."""
    if len(data) > _FILE_BYTES_MAX:
        raise ValueError
    try:
        return json.loads(data)
    except ValueError:
        import yaml  # noqa: PLC0415 - rarely needed, and slow to import
        try:
            return yaml.safe_load(data)
        except yaml.YAMLError:
            raise ValueError from None


def matches(pattern: str, image: str) -> bool:
    """Kubelet's rule: HOST[:PORT][/PATH]; `*` in one label of the host, the same port, a prefix of the path."""
    bare = pattern.partition("://")[2] if "://" in pattern else pattern
    wanted, _, wanted_path = bare.partition("/")
    host, _, path = image.partition("/")
    wanted_name, _, wanted_port = wanted.partition(":")
    name, _, port = host.partition(":")
    wanted_labels, labels = wanted_name.lower().split("."), name.lower().split(".")
    if wanted_port != port or len(wanted_labels) != len(labels):
        return False
    if not all(fnmatch.fnmatchcase(label, one) for label, one in zip(labels, wanted_labels, strict=True)):
        return False
    return path.startswith(wanted_path)


def _ask(provider: _Provider, config: Path, bin_dir: Path | None, image: str,
         refused: Collection[Credentials]) -> Credentials | None:
    host = image.partition("/")[0]
    program = (str(config), str(bin_dir), provider.name)
    by_type = {"Image": (*program, "image", image), "Registry": (*program, "registry", host), "Global": program}
    keys = list(by_type.values())
    with _answers.turn((*program, "turn", host)):
        auth = _answers.get(keys)
        if auth is not None:
            found = _choose(auth, image)
            if found is None or found not in refused:
                return found
            _answers.drop(keys)   # it was good for less time than the plugin said
        answer = _run(provider, bin_dir, image)
        if answer.cacheKeyType not in by_type:
            raise AuthError(f"{provider.name}: unknown cacheKeyType in its answer")
        lifetime_s = duration_s(answer.cacheDuration or provider.defaultCacheDuration or "0") or 0.0
        if lifetime_s > 0:
            _answers.put(by_type[answer.cacheKeyType], answer.auth or {}, lifetime_s)
        return _choose(answer.auth or {}, image)


def _choose(auth: dict[str, _Pair], image: str) -> Credentials | None:
    """The most specific key that matches."""
    for key in sorted(auth, key=len, reverse=True):
        if matches(key, image) and auth[key].username:
            return Credentials(auth[key].username, Secret(auth[key].password))
    return None


def _run(provider: _Provider, bin_dir: Path | None, image: str) -> _Answer:
    if bin_dir is None:
        raise AuthError(f"{provider.name}: where the plugins are is not configured",
                        hint="set credential_provider_bin_dir in [registry]")
    request = {"apiVersion": provider.apiVersion, "kind": "CredentialProviderRequest", "image": image}
    environment = {**os.environ, **{one.name: one.value for one in provider.env or []}}
    code, output = ask_program(
        [str(bin_dir / provider.name), *(provider.args or [])], json.dumps(request).encode(), name=provider.name,
        hint="check credential_provider_bin_dir", environment=environment)
    if code != 0:
        raise AuthError(f"{provider.name}: failed for {image} (exit code {code})")
    try:
        answer = shapes.from_json(output, _Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise AuthError(f"{provider.name}: its answer is not a CredentialProviderResponse") from None
    if answer.kind != "CredentialProviderResponse" or answer.apiVersion != provider.apiVersion:
        raise AuthError(f"{provider.name}: its answer is of another kind or version")
    return answer
