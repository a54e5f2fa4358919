"""What `lazyfs peers` and `lazyfs status` draw of peers: also where there are none, and of what is hostile."""

from __future__ import annotations

import copy
from typing import Any

from lazyfs.cli import peers, status
from lazyfs.cli.workers import Answer
from lazyfs.node.rundir import WorkerDir
from tests.unit.test_metrics import SNAPSHOT
from tests.unit.test_status_screen import TOLD


def told(**changes: object) -> dict[str, Any]:
    return {**copy.deepcopy(SNAPSHOT["peers"]), "from_peers_bytes": 22, "from_registry_bytes": 11, **changes}


def test_the_bad_ones_come_first_with_the_reason() -> None:
    lines = list(peers.lines_of(told(), None))
    assert "cluster prod: n1 at 10.0.0.1:9451 in zone a" in lines[0]
    assert lines[1] == "known by tracker: 8 members"
    rows = [line for line in lines if line.startswith("n")]
    assert rows[0].startswith("n2")
    assert "left alone for 590 s: lied: another digest" in rows[0]
    assert rows[1].endswith("ok")


def test_many_members_are_cut_short() -> None:
    many = [{**SNAPSHOT["peers"]["peers"][1], "id": f"m{number}"} for number in range(60)]
    assert list(peers.lines_of(told(peers=many), 50))[-1] == "and 10 more: --all"
    assert sum(line.startswith("m") for line in peers.lines_of(told(peers=many), None)) == 60


def test_a_tracker_that_is_lost_is_said() -> None:
    lost = {**SNAPSHOT["peers"]["membership"], "lost_s": 30.0, "why": "no tracker answers"}
    assert "lost for 30 s: no tracker answers" in "\n".join(peers.lines_of(told(membership=lost), None))


def test_why_there_are_no_tokens_is_said() -> None:
    tokens = {**SNAPSHOT["peers"]["tokens"], "last_failed": {"why": "the registry's password is not shown",
                                                             "seconds_ago": 3.2}, "last_refused": {}}
    lines = list(peers.lines_of(told(tokens=tokens), None))
    assert "  no token, 3 s ago: the registry's password is not shown" in lines
    assert not any("  refused, " in line for line in lines)


def test_what_is_shared_is_said() -> None:
    swarms = {f"device/sha256:{number:064x}": {"members": number, "complete": 1} for number in range(30)}
    lines = [line for line in peers.lines_of(told(swarms=swarms), 50) if line.startswith("  ")]
    assert lines[0] == "  device sha256:000000000000: 29 members, 1 have all of it"
    assert (len(lines), lines[-1]) == (11, "  and 20 more: --all")
    assert sum("have all of it" in line for line in peers.lines_of(told(swarms=swarms), None)) == 30


def test_the_network_of_a_node_is_said() -> None:
    membership = {**SNAPSHOT["peers"]["membership"], "network": "east"}
    assert "members of network east" in "\n".join(peers.lines_of(told(membership=membership), None))


def test_peers_that_could_not_begin_say_why() -> None:
    found = list(peers.lines_of({"cluster": "prod", "why": "peers.cert_file /x: not there", "given": {}}, None))
    assert found == ["cluster prod: without peers: peers.cert_file /x: not there"]


def test_the_status_screen_has_a_line_of_them() -> None:
    answer = Answer(WorkerDir.of_cache("/nowhere"), True, TOLD, "")
    line = next(line for line in status.lines_of([answer]) if line.startswith("  peers"))
    assert "8 members of prod" in line
    assert "1 left alone" in line
    without = {key: value for key, value in TOLD.items() if key != "peers"}
    assert not any(line.startswith("  peers") for line in status.lines_of([answer._replace(found=without)]))
