"""
This machine's own Debian sources and apt options, for building a root file system with them.

Read at run time: classic `sources.list` lines and deb822 `.sources` files alike (sources.list(5)); a fresh Debian has
either. Only the release's own suites are kept: a third party's repository has no place in the image.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.kit.proc import ToolError, run

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPTION_FIELDS = {"arch": "Architectures", "signed-by": "Signed-By"}  # others: the same word in both syntaxes
_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)$")


def codename() -> str:
    """The release's code name, from /etc/os-release."""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return shlex.split(value)[0]
    raise ToolError("/etc/os-release has no VERSION_CODENAME: the images are built from Debian's packages")


def sources(release: str, etc: Path = Path("/etc/apt")) -> str:
    """
    deb822 stanzas of the release's own suites, as this machine has them.

    Raises:
        ToolError: no source for the release is configured.

    """
    wanted = {release, f"{release}-updates", f"{release}-security", f"{release}/updates"}
    stanzas: list[str] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.is_file():
            read = _deb822 if path.suffix == ".sources" else _classic if path.suffix == ".list" else _none
            stanzas += [_text(fields) for fields in read(path.read_text()) if _keep(fields, wanted)]
    if not stanzas:
        raise ToolError(f"no apt source for {release} with component main is configured in {etc}")
    return "\n".join(stanzas)


def options() -> str:
    """This machine's `Acquire::` options (proxies, date checks ...) in apt.conf syntax; may hold a proxy's secret."""
    dump = run(["apt-config", "dump"], timeout_s=30).stdout
    return "".join(f"{line}\n" for line in dump.splitlines() if line.startswith("Acquire::"))


def _none(_: str) -> Iterator[dict[str, str]]:
    return iter(())


def _deb822(text: str) -> Iterator[dict[str, str]]:
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0] in " \t":
                fields[name] = f"{fields.get(name, '')}\n{line}"
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            yield fields


def _classic(text: str) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        match = _LINE.match(line.split("#")[0].strip())
        if match is None:
            continue
        fields = {"Types": "deb", "URIs": match["uri"], "Suites": match["suite"], "Components": match["components"]}
        for option in (match["options"] or "").split():
            key, _, value = option.partition("=")
            fields[_OPTION_FIELDS.get(key.lower(), key)] = value.replace(",", " ")
        yield fields


def _keep(fields: dict[str, str], wanted: set[str]) -> bool:
    return (
        fields.get("Enabled", "yes").lower() not in ("no", "false", "0")
        and "deb" in fields.get("Types", "").split()
        and set(fields.get("Suites", "").split()) <= wanted
        and "main" in fields.get("Components", "").split()
    )


def _text(fields: dict[str, str]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in fields.items())
