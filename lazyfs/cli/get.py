"""`lazyfs get`: a file behind a URL, by this node's mirror and its peers if there is one. Thin; see mirror.geturl."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from lazyfs import config
from lazyfs.cli.output import format_bytes, make_progress, note, print_json
from lazyfs.errors import FormatError, UsageError

if TYPE_CHECKING:
    from lazyfs.cli.output import Progress
    from lazyfs.image.digest import Digest
    from lazyfs.mirror.geturl import Got

_HEADER_COUNT_MAX = 100
_EPILOG = """\b
Examples:
  lazyfs get https://files.example/model.bin -o model.bin --digest sha256:...
  lazyfs get https://files.example/big.tar -o - | tar x
  lazyfs get https://files.example/private -o private -H "Authorization: Bearer $TOKEN"

\b
A get that was interrupted goes on where it was when it is run again.
"""


@click.command("get", epilog=_EPILOG, short_help="Get a file behind a URL, through this cluster's nodes.")
@click.argument("url")
@click.option("-o", "--output", metavar="FILE", help="Write there; - for standard output.  [default: the URL's name]")
@click.option("--digest", metavar="sha256:HEX", help="What its bytes must have; with it peers can always help.")
@click.option("-H", "--header", "headers", multiple=True, metavar="'NAME: VALUE'",
              help="Send this too; @FILE instead: lines of a file. May be repeated.")
@click.option("--limit-rate", metavar="SIZE", default="", help="No more than this a second, as 10MiB.")
@click.option("--mirror", metavar="HOST:PORT", help="The mirror to ask, or 'off'.  [default: configured]")
@click.option("--insecure", is_flag=True, help="Allow certificates nobody vouches for.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def get_command(url: str, *, output: str | None, digest: str | None, headers: tuple[str, ...], limit_rate: str,
                mirror: str | None, insecure: bool, quiet: bool, as_json: bool) -> None:
    """
    Get a file behind an http or https URL.

    If this node runs a mirror, that fetches it: from this node, from peers, from the server. What comes is the file
    with the digest given, or the one that the server says, or an error; FILE is replaced only by a whole one.
    """
    from dataclasses import replace  # noqa: PLC0415 - start-up time of --help

    from lazyfs.mirror.geturl import Getter, Wanted  # noqa: PLC0415
    from lazyfs.mirror.urls import Urls, check_url  # noqa: PLC0415
    from lazyfs.registry.fields import from_config  # noqa: PLC0415

    settings = config.load()
    url, pipe = check_url(url), output == "-"
    if pipe and as_json:
        raise UsageError("--json and the file would both go to standard output")
    path = None if pipe else _path(output, url)
    wanted = Wanted(url, _headers(headers), _digest(digest), _rate(limit_rate))
    options = from_config(settings.registry)
    urls = Urls(replace(options, insecure=True) if insecure else options)
    place = _mirror(mirror, settings.mirror.address)
    try:
        with make_progress(quiet=quiet or as_json) as progress:
            getter = Getter(urls, wanted, place, begun=lambda size, done: _begun(progress, url, size, done),
                            progress=lambda size: progress.advance("get", size))
            got = getter.get(path, sys.stdout.buffer if pipe else None)
            sys.stdout.flush()
    finally:
        urls.close()
    _tell(got, path, quiet=quiet, as_json=as_json)


def _begun(progress: Progress, url: str, size: int | None, done: int) -> None:
    progress.start("get", _name_of(url), size or 0)
    progress.advance("get", done)


def _tell(got: Got, path: Path | None, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        print_json({"file": str(path), "bytes": got.size, "digest": str(got.digest), "by": got.by,
                    "resumed_bytes": got.resumed_bytes})
    elif not quiet:
        rest = f", {format_bytes(got.resumed_bytes)} were there" if got.resumed_bytes else ""
        note(f"{path or 'standard output'}: {format_bytes(got.size)} by the {got.by}{rest}, {got.digest}")


def _name_of(url: str) -> str:
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    if name in {"", ".", ".."} or not name.isprintable():
        raise UsageError("the URL ends without a file's name", hint="say where to with -o FILE")
    return name


def _path(output: str | None, url: str) -> Path:
    """Raises UsageError."""
    if output is None:
        return Path(_name_of(url))
    if not output or (output.endswith("/") and not Path(output).is_dir()):
        raise UsageError(f"-o {output!r:.200}: expected the name of a file", hint="or -, for standard output")
    return Path(output)


def _mirror(given: str | None, configured: str) -> str:
    """host:port; empty: none is to be asked. Raises UsageError."""
    from lazyfs.config.kinds import Address  # noqa: PLC0415

    if given is None or given == "off":
        return "" if given else configured
    try:
        if place := str(Address().accept(given)):
            return place
    except ValueError:
        pass
    raise UsageError(f"--mirror {given!r:.100}: expected host:port, or 'off'")


def _digest(text: str | None) -> Digest | None:
    from lazyfs.image.digest import Digest  # noqa: PLC0415

    try:
        return Digest(text) if text else None
    except FormatError:
        raise UsageError(f"--digest {text!r:.100}: expected sha256: and 64 hexadecimal digits") from None


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    """Raises UsageError. What stands on a command line everybody can see (/proc): hence @FILE."""
    lines: list[str] = []
    for one in given:
        if one.startswith("@"):
            try:
                lines += [line for line in Path(one[1:]).read_text().splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{one[1:]}: its headers cannot be read: {error}") from None
        else:
            lines.append(one)
    found: dict[str, str] = {}
    if len(lines) > _HEADER_COUNT_MAX:
        raise UsageError(f"{len(lines)} headers: expected at most {_HEADER_COUNT_MAX}")
    for line in lines:
        name, colon, value = line.partition(":")
        is_token = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        if not colon or not is_token or not value.strip().isprintable() or not value.isascii():
            raise UsageError("a header: expected 'NAME: VALUE'")
        found[name.lower()] = value.strip()
    return found


def _rate(text: str) -> int:
    from lazyfs.config.kinds import Size  # noqa: PLC0415

    try:
        value = Size().from_text(text) if text else 0
    except ValueError:
        raise UsageError(f"--limit-rate {text!r:.50}: expected a size, as 10MiB") from None
    return value if isinstance(value, int) else 0
