"""
The cluster that this node shares chunks with: its trackers, the way to this node, the way to others. Layer: doctor.

Nothing is looked at where [peers] is not configured. That others reach this node only others know: that its own
address answers is necessary, and that somebody has asked it is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from lazyfs.config import split_address
from lazyfs.doctor.results import failed, ok, warning
from lazyfs.errors import ConfigError, LazyfsError, NotFoundError, PeerRefusedError
from lazyfs.node.protocol import STATUS, ControlClient, WorkerGoneError
from lazyfs.node.rundir import WorkerDir
from lazyfs.peers.announce import PREFIX
from lazyfs.peers.reaching import why_not
from lazyfs.peers.tlsfiles import TlsFiles
from lazyfs.peers.tokenwire import KEYS_PATH
from lazyfs.peers.trackerclient import TrackerClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lazyfs import config
    from lazyfs.doctor.results import Result, Subject

_ANSWER_S, _CONNECT_S = 5.0, 2.0
_TRIED_MAX = 8                   # other members
_STORE = "it runs, and its store does not: start Redis there, look at tracker.redis; nodes go on with what they know"
_RULE = "let the other nodes reach that port (firewall, security group), or set peers.advertise"


def check_trackers(subject: Subject) -> Iterator[Result]:
    peers = subject.config.peers
    if not peers.enabled or not peers.tracker:
        return
    problems = trio.run(_ask_trackers, peers)
    for url, (problem, hint) in problems.items():
        if not problem:
            yield ok("tracker", f"{url} is ready")
        elif (hint and hint != _STORE) or all(text for text, _ in problems.values()):
            yield failed("tracker", problem, hint or "start lazyfs tracker there; nodes go on with the members they "
                                                     "know")
        else:
            yield warning("tracker", problem, "another one answers, and is asked instead")


async def _ask_trackers(peers: config.Peers) -> dict[str, tuple[str, str]]:
    """By URL: what is wrong with it, or nothing; and what to do, where it is not the tracker that is away."""
    found = dict.fromkeys(peers.tracker, ("", ""))

    async def ask(url: str) -> None:
        tls = TlsFiles("peers", peers.cert_file, peers.key_file, peers.ca_file) if peers.ca_file else None
        client = TrackerClient([url], tls, peers.tracker_token_file)
        try:
            await client.request("GET", "/readyz", seconds=_ANSWER_S)
            await client.request("GET", PREFIX.rstrip("/"), seconds=_ANSWER_S)      # whether it takes our word
            if peers.tokens != "off":
                await client.request("GET", KEYS_PATH, seconds=_ANSWER_S)
        except NotFoundError:
            found[url] = (f"{url} gives no tokens: tracker.tokens is off there, peers.tokens is {peers.tokens} here",
                          "set both alike; docs/tokens.md")
        except (PeerRefusedError, ConfigError) as error:
            found[url] = str(error), error.hint or "docs/tracker.md, Who may use it"
        except LazyfsError as error:
            found[url] = str(error), _STORE if "(status 503)" in str(error) else ""
        finally:
            await client.aclose()

    async with trio.open_nursery() as nursery:
        for url in peers.tracker:
            nursery.start_soon(ask, url)
    return found


def check_peers(subject: Subject) -> Iterator[Result]:
    if not subject.config.peers.enabled:
        return
    told = _daemon_says(subject)
    if told is None:
        yield warning("peers", "configured, and the daemon does not take part", "restart it: lazyfs daemon upgrade")
        return
    if told["why"]:
        yield failed("peers", told["why"], "correct it, then: lazyfs daemon upgrade")
        return
    membership = told["membership"]
    if membership["lost_s"]:
        yield warning("peers", f"{membership['kind']} lost for {membership['lost_s']:.0f} s: {membership['why']}",
                      "this node goes on with the members that it knows")
    elif membership["members"] < 2:
        yield warning("peers", f"cluster {told['cluster']} has no other member for what is mounted here",
                      "is peers.cluster the same on the other nodes?")
    else:
        yield ok("peers", f"cluster {told['cluster']}, {membership['members']} members")
    yield from _tokens(told.get("tokens", {}))
    yield from _reachable(told)


def _tokens(told: dict[str, Any]) -> Iterator[Result]:
    last = told.get("last_failed")
    if last and not told["held"]:
        yield warning("tokens", f"none to be had {last['seconds_ago']:.0f} s ago: {last['why']}",
                      "without them nothing comes from peers; docs/tokens.md")


def _daemon_says(subject: Subject) -> dict[str, Any] | None:
    directory = WorkerDir(Path(subject.config.daemon.run_dir) / "daemon")
    try:
        with ControlClient.connect(directory.socket, _ANSWER_S) as client:
            found: dict[str, Any] = client.request(STATUS, _ANSWER_S)
    except WorkerGoneError:
        return None
    return found.get("peers")


def _reachable(told: dict[str, Any]) -> Iterator[Result]:
    others = [one["address"] for one in told["peers"] if one["address"]][:_TRIED_MAX]
    problems = trio.run(_connect_all, [told["address"], *others])
    own = problems.pop(told["address"])
    if own:
        yield failed("peer server", f"{told['address']} does not answer: {own}", _RULE)
    elif told["uploads"]["requests"]:
        yield ok("peer server", f"{told['address']} has answered {told['uploads']['requests']} requests of others")
    else:
        yield ok("peer server", f"{told['address']} answers here; nobody else has asked it yet")
    lost = {place: problem for place, problem in problems.items() if problem}
    if lost:
        place, problem = next(iter(lost.items()))
        yield warning("other nodes", f"{len(lost)} of {len(problems)} do not answer, first {place}: {problem}",
                      "lazyfs peers; look at the network between the nodes")
    isolated = [one["id"] for one in told["peers"] if one["away"] == "lied"]
    if isolated:
        yield warning("other nodes", f"{', '.join(isolated[:_TRIED_MAX])} gave wrong bytes", "look at their disks")


async def _connect_all(places: Sequence[str]) -> dict[str, str]:
    """By host:port: why there is no connection, or nothing."""
    found = dict.fromkeys(places, "")

    async def connect(place: str) -> None:
        host, port = split_address(place)
        try:
            with trio.fail_after(_CONNECT_S):
                await (await trio.open_tcp_stream(host, port)).aclose()
        except trio.TooSlowError:
            found[place] = f"no connection within {_CONNECT_S:g} s"
        except OSError as error:
            found[place] = why_not(error)

    async with trio.open_nursery() as nursery:
        for place in found:
            nursery.start_soon(connect, place)
    return found
