"""What a profiling run makes of an image's configuration: process, user, bundle; and hostile values."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import FormatError, LazyfsError, UsageError
from lazyfs.runner.imageconfig import (
    WORD_BYTES_MAX,
    WORD_COUNT_MAX,
    ProcessConfig,
    check_environment,
    merge_environment,
    parse_process,
    parse_signal,
)
from lazyfs.runner.spec import ExtraMount, Network, Program, runtime_spec
from lazyfs.runner.users import ID_MAX, User, resolve_user

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# app:x:9:9::/:
daemon:x:1:1
app:x:1000:1001::/:/bin/sh
1000:x:7:7::/:/bin/sh
bad:x:many:1::/:
nogroup:x:5:::/:
huge:x:4294967295:1::/:
short:x
"""
GROUP = b"root:x:0:\napp:x:1001:\nvideo:x:44:daemon,app\naudio:x:29:app\nodd:x:zz:app\nown:x:1001:app\n"


def config(**process: Any) -> bytes:
    return json.dumps({"architecture": "amd64", "os": "linux", "config": process}).encode()


# --- the image's process --------------------------------------------------------------------------------------------


def test_a_config_is_read_as_it_stands() -> None:
    found = parse_process(config(Entrypoint=["/init"], Cmd=["a", "b"], Env=["A=1"], User="app:app", WorkingDir="/data",
                                 StopSignal="SIGQUIT", Labels={"x": "y"}, ExposedPorts={"80/tcp": {}}))
    assert found == ProcessConfig(("/init",), ("a", "b"), ("A=1",), "app:app", "/data", signal.SIGQUIT)


@pytest.mark.parametrize("data", [b'{"config":null}', b"{}", config(), config(
    Entrypoint=None, Cmd=None, Env=None, User=None, WorkingDir=None, StopSignal=None), config(WorkingDir="")])
def test_what_an_image_does_not_say_has_a_default(data: bytes) -> None:
    assert parse_process(data) == ProcessConfig()


@pytest.mark.parametrize("process", [
    {"Cmd": "sh -c x"}, {"Cmd": [1]}, {"Cmd": ["a\0b"]}, {"Cmd": ["a"] * (WORD_COUNT_MAX + 1)},
    {"Cmd": ["a" * (WORD_BYTES_MAX + 1)]}, {"Cmd": ["a" * 100_000] * 20}, {"Env": ["NOVALUE"]}, {"Env": ["=x"]},
    {"Env": ["A=\0"]}, {"WorkingDir": "data"}, {"WorkingDir": "/a\0b"}, {"User": "a\0"}, {"StopSignal": "SIGNOTHING"},
    {"StopSignal": "0"}, {"StopSignal": "65"}, {"StopSignal": "RTMIN+99"}, {"StopSignal": "-9"}, {"Entrypoint": {}},
])
def test_hostile_configs_are_refused(process: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        parse_process(config(**process))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["config", "Cmd", "Env", "User", "StopSignal"]), inner)))
def test_any_json_is_read_or_refused(value: Any) -> None:
    with contextlib.suppress(FormatError):
        parse_process(json.dumps(value).encode())


@pytest.mark.parametrize(("text", "number"), [
    ("SIGTERM", 15), ("TERM", 15), ("sigint", 2), ("9", 9), ("SIGRTMIN+3", int(signal.SIGRTMIN) + 3), ("RTMIN", 34)])
def test_signals_by_name_and_number(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize(("entrypoint", "command", "words"), [
    (None, (), ("/init", "a")), (None, ("b", "c"), ("/init", "b", "c")), (("/other",), (), ("/other",)),
    (("/other",), ("b",), ("/other", "b"))])
def test_the_users_command_follows_the_entrypoint(entrypoint: Any, command: Any, words: Any) -> None:
    assert ProcessConfig(("/init",), ("a",)).arguments(command, entrypoint) == words


def test_an_image_without_a_program_says_so() -> None:
    with pytest.raises(UsageError, match="names no program"):
        ProcessConfig().arguments((), None)


def test_the_users_variables_win_and_there_is_a_path() -> None:
    assert merge_environment(("A=1", "B=2", "A=3"), ("B=4=5",))[1:] == ("A=3", "B=4=5")
    assert merge_environment((), ())[0].startswith("PATH=/usr/local/sbin:")
    assert merge_environment(("PATH=/only",), ()) == ("PATH=/only",)
    with pytest.raises(UsageError, match="NAME=VALUE"):
        check_environment(("A",))


# --- users ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "user"), [
    ("", User()), ("root", User(0, 0)), ("app", User(1000, 1001, (29, 44))), ("app:video", User(1000, 44)),
    ("app:5", User(1000, 5)), ("daemon", User(1, 1, (44,))), ("1", User(1, 1, (44,))), ("4711", User(4711)),
    ("4711:audio", User(4711, 29)), ("1000", User(7, 7)), (":video", User(0, 44)), (str(ID_MAX), User(ID_MAX))])
def test_users_by_name_and_number(text: str, user: User) -> None:
    assert resolve_user(text, PASSWD, GROUP) == user


@pytest.mark.parametrize("text", [
    "nobody", "bad", "huge", "nogroup", "app:nogroup", "app:odd", "short", "-1", "2147483648", "99999999999999999999",
    "app:", "# app", "\N{ARABIC-INDIC DIGIT ONE}"])
def test_users_that_the_image_does_not_have(text: str) -> None:
    with pytest.raises(FormatError):
        resolve_user(text, PASSWD, GROUP)


@given(st.text(max_size=20), st.binary(max_size=200), st.binary(max_size=200))
def test_any_passwd_is_read_or_refused(text: str, passwd: bytes, group: bytes) -> None:
    try:
        found = resolve_user(text, passwd, group)
    except FormatError:
        return
    assert all(0 <= number <= ID_MAX for number in (found.uid, found.gid, *found.groups))


# --- the bundle -----------------------------------------------------------------------------------------------------


ROOT = User()


def spec(user: User = ROOT, network: Network = Network.NONE, *mounts: ExtraMount) -> dict[str, Any]:
    program = Program(("/bin/x", "y"), ("A=1",), "/data", user, 15)
    return runtime_spec(program, network, mounts, {"/etc/hosts": "/h"}, cgroup="name", cgroup_namespace=True)


def test_the_process_is_the_images() -> None:
    process = spec(User(1, 2, (3,)))["process"]
    assert process["args"] == ["/bin/x", "y"]
    assert process["env"] == ["A=1"]
    assert process["cwd"] == "/data"
    assert process["user"] == {"uid": 1, "gid": 2, "additionalGids": [3]}
    assert process["terminal"] is False


def test_root_has_the_default_capabilities_and_others_none() -> None:
    ours, others = spec()["process"]["capabilities"], spec(User(1, 1))["process"]["capabilities"]
    assert len(ours["effective"]) == 14
    assert "CAP_SYS_ADMIN" not in ours["bounding"]
    assert ours["effective"] == ours["permitted"] == ours["bounding"] == others["bounding"]
    assert others["effective"] == others["permitted"] == []
    assert "inheritable" not in ours


@pytest.mark.parametrize(("network", "own"), [(Network.NONE, True), (Network.HOST, False)])
def test_the_network_is_its_own_unless_asked_for(network: Network, own: bool) -> None:
    kinds = {entry["type"] for entry in spec(ROOT, network)["linux"]["namespaces"]}
    assert {"pid", "ipc", "uts", "mount", "cgroup"} <= kinds
    assert ("network" in kinds) is own
    assert "user" not in kinds


def test_mounts_come_after_the_systems() -> None:
    bound = ExtraMount("/data", "/", read_only=True)
    found = spec(ROOT, Network.NONE, bound, ExtraMount("/cache"))["mounts"]
    targets = [entry["destination"] for entry in found]
    assert targets[:2] == ["/proc", "/dev"]
    assert targets[-3:] == ["/etc/hosts", "/data", "/cache"]
    assert "ro" in found[-2]["options"]
    assert found[-1]["type"] == "tmpfs"


@pytest.mark.parametrize(("text", "mount"), [
    ("type=bind,src=/,dst=/data", ExtraMount("/data", "/")),
    ("source=/tmp,target=/data,readonly", ExtraMount("/data", "/tmp", read_only=True)),
    ("type=bind,src=/,destination=/d,ro=true", ExtraMount("/d", "/", read_only=True)),
    ("type=tmpfs,dst=/t", ExtraMount("/t"))])
def test_mount_options(text: str, mount: ExtraMount) -> None:
    assert ExtraMount.parse(text) == mount


@pytest.mark.parametrize("text", [
    "", "/a:/b", "type=volume,src=/a,dst=/b", "type=bind,dst=/b", "type=bind,src=a,dst=/b", "type=bind,src=/,dst=b",
    "type=tmpfs,src=/,dst=/b", "type=bind,src=/not/there,dst=/b", "type=bind,src=/,dst=/b,propagation=shared",
    "type=tmpfs,dst=/a\0"])
def test_other_mounts_are_refused(text: str) -> None:
    with pytest.raises(LazyfsError):
        ExtraMount.parse(text)
