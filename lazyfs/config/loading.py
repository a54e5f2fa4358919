"""
Read the configuration: defaults, over them the file, over it the environment; say what is wrong with it, line by line.

Layer: config. Who calls: the command line, the processes of the node, through lazyfs.config. Nothing is cached.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lazyfs.config.kinds import Amount
from lazyfs.config.table import DEFAULT_FILE, SECTIONS, Config, RegistryHost, Verify, VerifyRule, all_keys, keys_of
from lazyfs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lazyfs.config.key import Key

_Table = TypeVar("_Table", RegistryHost, VerifyRule)
FILE_VARIABLE = "LAZYFS_CONFIG"
RUN_DIR_VARIABLE = "LAZYFS_RUN_DIR"
_FILE_BYTES_MAX = 1 << 20        # hundreds of registries are 50 KiB
_PROBLEM_COUNT_MAX = 50
_NAMED_COUNT_MAX = 100           # the configuration travels to the worker as one argument: 128 KiB (execve(2))
_HOST = r"[A-Za-z0-9.\-_]{1,253}(:[0-9]{1,5})?|\[[0-9a-fA-F:.]{2,45}\](:[0-9]{1,5})?"
_REPOSITORY = rf"({_HOST})(/[a-z0-9._/\-]{{1,255}})?"
# What kubelet puts into pods for a Service that happens to be called lazyfs-daemon, lazyfs-cache ...
_OF_SERVICES = r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
_USER_PART = re.compile(r"//[^/@\s]*@")
_SECRET_NAMES = frozenset({"password", "token", "secret", "identity_token", "auth"})


class Problem(NamedTuple):
    """One thing that is wrong. `where`: the file, or the environment."""

    where: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class _Names(NamedTuple):
    """Tables of one kind, each with a name: [path."NAME"]. `instead`: the next step of who has too many of them."""

    path: str
    what: str
    pattern: str
    expected: str
    example: str
    instead: str = ""

    def section(self, name: str) -> str:
        return f'{self.path}."{name:.100}"'


_HOSTS = _Names("registry.host", "host name", _HOST, "host or host:port", "registry.example:5000",
                "docker's configuration and hosts.toml hold any number")
_RULES = _Names("verify.rule", "repository", _REPOSITORY, "HOST or HOST/REPOSITORY", "registry.example/team",
                "a rule for a host, or for what its repositories' names begin with, stands for many")


def load(path: str | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """
    The configuration in force.

    Args:
        path: the file; None: the one LAZYFS_CONFIG names, else /etc/lazyfs/config.toml, which may be missing.
        environ: LAZYFS_<SECTION>_<KEY> override the file.

    Raises:
        ConfigError: the first problem, and how many others there are.

    """
    config, problems = check(path, environ)
    if problems:
        more = f" (and {len(problems) - 1} more: lazyfs config check)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}", hint=problems[0].hint)
    return config


def check(path: str | None = None, environ: Mapping[str, str] = os.environ) -> tuple[Config, list[Problem]]:
    """The same, with all problems (bounded in number); keys that have one are at their defaults."""
    problems: list[Problem] = []
    named = path or environ.get(FILE_VARIABLE) or ""
    file, document = _read(named, problems)
    found, origins = _Sections(file, problems).take(document)
    _take_environment(environ, found, origins, problems)
    config = Config(**{name: table(**found[name]) for name, table in SECTIONS.items()}, file=file, origins=origins)
    _check_relations(config, problems)
    return config, problems[:_PROBLEM_COUNT_MAX]


def to_plain(config: Config) -> dict[str, Any]:
    """As JSON values, for another process of ours."""
    plain: dict[str, Any] = {section: {} for section in SECTIONS}
    for key in all_keys():
        value = config.value(key)
        plain[key.section][key.name] = str(value) if isinstance(value, Amount) else value
    names = [key.name for key in keys_of("registry.host", RegistryHost)]
    plain["registry"]["host"] = {host: {name: getattr(entry, name) for name in names}
                                 for host, entry in config.registry.host.items()}
    plain["verify"]["rule"] = {name: dataclasses.asdict(rule) for name, rule in config.verify.rule.items()}
    return plain


def from_plain(plain: Mapping[str, Any]) -> Config:
    """What to_plain() wrote, also in another version: what is not understood stays at its default."""
    document = {section: dict(content) for section, content in plain.items() if isinstance(content, dict)}
    found, _ = _Sections("", []).take(document)
    return Config(**{name: table(**found[name]) for name, table in SECTIONS.items()})


def _read(named: str, problems: list[Problem]) -> tuple[str, dict[str, Any]]:
    """The file's name (empty: there is none) and its content."""
    file = named or DEFAULT_FILE
    try:
        with open(file, "rb") as stream:  # noqa: PTH123 - pathlib is one more import for every command
            data = stream.read(_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        if named:
            problems.append(Problem(file, "there is no such file", "leave it out to use the defaults"))
        return "", {}
    except OSError as error:
        problems.append(Problem(file, f"cannot be read: {error.strerror}"))
        return file, {}
    if len(data) > _FILE_BYTES_MAX:
        problems.append(Problem(file, f"expected at most {_FILE_BYTES_MAX} bytes, found more"))
        return file, {}
    import tomllib  # noqa: PLC0415 - most commands run without a file

    try:
        return file, tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:   # TOMLDecodeError, UnicodeDecodeError
        problems.append(Problem(file, f"is not TOML: {error}"))
        return file, {}


class _Sections:
    """Takes the sections of one file apart."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self._file = file
        self._problems = problems
        self._origins: dict[str, str] = {}

    def take(self, document: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Values by section and name, and where each comes from."""
        found: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for section, content in document.items():
            if section not in SECTIONS:
                self._unknown("section", section, SECTIONS)
            elif not isinstance(content, dict):
                self._wrong(section, "a table", content)
            else:
                known = {key.name: key for key in keys_of(section, SECTIONS[section])}
                hosts = content.pop("host", None) if section == "registry" else None
                rules = content.pop("rule", None) if section == "verify" else None
                found[section] = self._table(section, known, content)
                if hosts is not None:
                    found[section]["host"] = self._hosts(hosts)
                if rules is not None:
                    found[section]["rule"] = self._named(_RULES, VerifyRule, rules)
        return found, self._origins

    def _table(self, section: str, known: dict[str, Key], content: dict[str, Any]) -> dict[str, Any]:
        values = {}
        for name, value in content.items():
            path = f"{section}.{name}"
            if name not in known:
                self._unknown("key", path, [f"{section}.{one}" for one in known], name)
                continue
            try:
                values[name] = known[name].kind.accept(value)
                self._origins[path] = self._file
            except ValueError:
                self._wrong(path, known[name].kind.expected, value)
        return values

    def _hosts(self, hosts: object) -> dict[str, RegistryHost]:
        found = self._named(_HOSTS, RegistryHost, hosts)
        for host, entry in found.items():
            self._check_host(_HOSTS.section(host), entry)
        return found

    def _named(self, names: _Names, table: type[_Table], given: object) -> dict[str, _Table]:
        """Tables by a name that the user gives; those that are wrong are left out, and said."""
        found: dict[str, _Table] = {}
        if not isinstance(given, dict):
            self._wrong(names.path, f"tables by {names.what}", given)
            return found
        if len(given) > _NAMED_COUNT_MAX:
            text = f"{names.path}: expected at most {_NAMED_COUNT_MAX} tables by {names.what}, found {len(given)}"
            self._problems.append(Problem(self._file, text, names.instead))
            return found
        known = {key.name: key for key in keys_of(names.path, table)}
        for name, content in given.items():
            section = names.section(name)
            if re.fullmatch(names.pattern, name) is None:
                hint = f"write it as in image references, in quotes: [{names.section(names.example)}]"
                self._problems.append(Problem(self._file, f"{section}: expected {names.expected}", hint))
            elif not isinstance(content, dict):
                self._wrong(section, "a table", content)
            else:
                found[name] = table(**self._table(section, known, content))
        return found

    def _check_host(self, section: str, entry: RegistryHost) -> None:
        for one, other in (("username", "password_file"), ("client_cert", "client_key")):
            given, missing = (one, other) if getattr(entry, one) else (other, one)
            if getattr(entry, given) and not getattr(entry, missing):
                text = f"{section}.{given}: expected {missing} beside it, found none"
                self._problems.append(Problem(self._file, text))

    def _wrong(self, path: str, expected: str, value: object) -> None:
        self._problems.append(Problem(self._file, f"{path}: expected {expected}, found {describe(value)}"))

    def _unknown(self, what: str, path: str, known: Iterable[str], name: str = "") -> None:
        hint = nearest(path, known)
        if path == f"registry.{name}" and name in {key.name for key in keys_of("registry.host", RegistryHost)}:
            hint = f'{name} is of one registry: [registry.host."NAME"]'
        if name in _SECRET_NAMES:
            hint = 'secrets do not stand here: name a file with password_file in [registry.host."NAME"]'
        self._problems.append(Problem(self._file, f"unknown {what} {path!r:.140}", hint))


def _take_environment(environ: Mapping[str, str], found: dict[str, dict[str, Any]], origins: dict[str, str],
                      problems: list[Problem]) -> None:
    known = {key.variable: key for key in all_keys()}
    prefixes = tuple(f"LAZYFS_{section.upper()}_" for section in SECTIONS)
    given = {name: known.get(name) for name in sorted(environ) if name.startswith(prefixes)}
    if environ.get(RUN_DIR_VARIABLE):
        given[RUN_DIR_VARIABLE] = known["LAZYFS_DAEMON_RUN_DIR"]   # the older name, last: it wins
    for name, key in given.items():
        if key is None:
            if re.fullmatch(_OF_SERVICES, name):
                continue
            problems.append(Problem("environment", f"unknown variable {name!r:.140}", nearest(name, known)))
            continue
        try:
            found[key.section][key.name] = key.kind.from_text(environ[name])
            origins[key.path] = name
        except ValueError:
            text = f"{name}: expected {key.kind.expected}, found {describe(environ[name])}"
            problems.append(Problem("environment", text))


def _check_relations(config: Config, problems: list[Problem]) -> None:
    """What no key can see alone."""
    where = config.file or "environment"
    daemon = config.daemon
    if daemon.hang_s < 2 * daemon.heartbeat_s:
        text = (f"daemon.hang_s: expected at least twice daemon.heartbeat_s ({daemon.heartbeat_s:g}), "
                f"found {daemon.hang_s:g}")
        problems.append(Problem(where, text, "a busy worker would be killed"))
    if daemon.abort_s <= daemon.hang_s + daemon.start_timeout_s:
        text = (f"daemon.abort_s: expected more than daemon.hang_s and daemon.start_timeout_s together "
                f"({daemon.hang_s + daemon.start_timeout_s:g}), found {daemon.abort_s:g}")
        problems.append(Problem(where, text, "mounts would be lost before the next worker has loaded"))
    profile = config.profile
    for given, missing in (("collect", "token_file"), ("upload", "token_file"), ("cert_file", "key_file"),
                           ("key_file", "cert_file")):
        if getattr(profile, given) and not getattr(profile, missing):
            problems.append(Problem(where, f"profile.{given}: expected profile.{missing} beside it, found none"))
    problems += [Problem(where, text, hint) for text, hint in [*config.peers.problems(), *config.tracker.problems()]]
    rules: dict[str, Verify | VerifyRule] = {"verify": config.verify}
    rules |= {f'verify.rule."{name}"': rule for name, rule in config.verify.rule.items()}
    for section, rule in rules.items():
        if rule.policy != "off" and not rule.keys:
            text = f"{section}: policy {rule.policy} expects keys beside it, found none"
            problems.append(Problem(where, text, "name files of public keys, as cosign.pub; docs/signatures.md"))
    for one, other in ((daemon.cache_dir, config.snapshotter.root), (config.snapshotter.root, daemon.cache_dir)):
        if f"{one}/".startswith(f"{other}/"):
            text = (f"daemon.cache_dir and snapshotter.root: expected two directories beside each other, "
                    f"found {daemon.cache_dir} and {config.snapshotter.root}")
            problems.append(Problem(where, text))
            break


def describe(value: object) -> str:
    """A value in a message: short, on one line. No key takes a secret; the user part of a URL may hold one."""
    if isinstance(value, dict):
        return "a table"
    return f"{_USER_PART.sub('//***@', repr(value)):.60}"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the key that was probably meant, or where all are."""
    import difflib  # noqa: PLC0415 - for mistakes only

    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"did you mean {close[0]}?" if close else "all keys: lazyfs config show --defaults"
