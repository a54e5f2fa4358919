"""
The table of keys as people read it: a commented TOML file, and the tables of docs/configuration.md.

Layer: config. Who calls: cli.config; `python -m lazyfs.config.document docs/configuration.md` writes the tables anew
(between the two marks), and a test fails as long as it was forgotten.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.config.kinds import Amount
from lazyfs.config.table import SECTIONS, Config, RegistryHost, VerifyRule, keys_of

if TYPE_CHECKING:
    from lazyfs.config.key import Key

BEGIN, END = "<!-- generated: python -m lazyfs.config.document -->", "<!-- end of generated -->"
HOST_SECTION = 'registry.host."NAME"'
RULE_SECTION = 'verify.rule."NAME"'
_NAMED: dict[str, type[Any]] = {HOST_SECTION: RegistryHost, RULE_SECTION: VerifyRule}
_WIDTH = 100


def as_toml(value: Any) -> str:
    """One value as TOML; JSON's strings, numbers and booleans are TOML's."""
    if isinstance(value, Amount):
        return as_toml(str(value)) if value.bytes is None else str(value.bytes)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)


def sample() -> str:
    """Every key with its default, as a file to begin from: commented out, so that later defaults apply."""
    lines = ["# /etc/lazyfs/config.toml: every key, at its default. LAZYFS_<SECTION>_<KEY> overrides the file.", ""]
    for section, table in SECTIONS.items():
        lines += [f"[{section}]", *_sample_keys(section, table)]
    for section, table in _NAMED.items():
        lines += [f"# [{section}]", *_sample_keys(section, table)]
    return "\n".join(lines)


def effective(config: Config) -> str:
    """The values in force, as TOML; behind each that is no default, where it comes from."""
    lines = []
    for section, table in SECTIONS.items():
        lines.append(f"[{section}]")
        for key in keys_of(section, table):
            origin = config.origins.get(key.path)
            line = f"{key.name} = {as_toml(config.value(key))}"
            lines.append(line if origin is None else f"{line}   # {origin}")
        lines.append("")
    for host, entry in config.registry.host.items():
        lines.append(f"[registry.host.{json.dumps(host)}]   # {config.file}")
        lines += [f"{key.name} = {as_toml(getattr(entry, key.name))}" for key in keys_of(HOST_SECTION, RegistryHost)]
        lines.append("")
    for name, rule in config.verify.rule.items():
        lines.append(f"[verify.rule.{json.dumps(name)}]   # {config.file}")
        lines += [f"{key.name} = {as_toml(getattr(rule, key.name))}" for key in keys_of(RULE_SECTION, VerifyRule)]
        lines.append("")
    return "\n".join(lines).rstrip()


def effective_json(config: Config) -> dict[str, Any]:
    """The same for programs: {"file": ..., "keys": {path: {"value", "default", "origin", "unit"}}, "hosts", "rules"}"""
    keys = {
        key.path: {"value": _plain(config.value(key)), "default": _plain(key.default),
                   "origin": config.origins.get(key.path, "default"), "unit": key.unit}
        for section, table in SECTIONS.items() for key in keys_of(section, table)
    }
    hosts = {host: {key.name: getattr(entry, key.name) for key in keys_of(HOST_SECTION, RegistryHost)}
             for host, entry in config.registry.host.items()}
    rules = {name: {key.name: _plain(getattr(rule, key.name)) for key in keys_of(RULE_SECTION, VerifyRule)}
             for name, rule in config.verify.rule.items()}
    return {"file": config.file, "keys": keys, "hosts": hosts, "rules": rules}


def tables() -> str:
    """The generated part of docs/configuration.md."""
    parts = []
    for section, table in {**SECTIONS, **_NAMED}.items():
        parts.append(f"### [{section}]\n\n| key | default | is | description |\n|---|---|---|---|")
        parts += [_row(key) for key in keys_of(section, table)]
        parts.append("")
    return "\n".join(parts).rstrip()


def renew(document: str) -> str:
    """A document with its generated part made anew."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin
    assert end
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def _row(key: Key) -> str:
    kind = key.kind.expected.replace("|", "\\|") + (f"; unit: {key.unit}" if key.unit else "")
    restart = " **Needs a restart.**" if key.restart else ""
    return f"| `{key.name}` | `{as_toml(key.default)}` | {kind} | {key.text}{restart} |"


def _sample_keys(section: str, table: type[Any]) -> list[str]:
    lines: list[str] = []
    for key in keys_of(section, table):
        unit = f" Unit: {key.unit}." if key.unit else ""
        text = f"{key.text} Expected: {key.kind.expected}.{unit}"
        lines += textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        lines += [f"# {key.name} = {as_toml(key.default)}", ""]
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Amount) else value


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")
