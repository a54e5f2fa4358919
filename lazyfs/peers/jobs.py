"""
Preheating, as trackers and nodes speak of it in beats, and the node's side of it: tasks come, their states go.

Layer: peers, on trio. Who calls: tracker.preheat (words); the mirror and the node's worker run an Agent each, and give
it what does the work. A task goes to both members of a node (`NAME` and `NAME.mirror`): each says whether it is its
affair. State: tasks under way and their last words, until the tracker says that it has them. Nothing is kept over a
restart: the tracker gives again what it has no last word of.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import trio

from lazyfs import shapes
from lazyfs.errors import FormatError, LazyfsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

WORD: Final = "preheat"
MIRROR: Final = ".mirror"                # ends the id of a node's mirror
TASK_COUNT_MAX: Final = 32               # of one node at a time; the tracker keeps the others back
STATE_COUNT_MAX: Final = 64
SOURCE_CHARS_MAX: Final = 8192
AUTHORIZATION_CHARS_MAX: Final = 8192    # a token of a registry has 1 to 4 KiB
ERROR_CHARS_MAX: Final = 300
_AT_ONCE: Final = 2                      # images at a time: each fills the link
_NEWS_S: Final = 2.0                     # of progress; a last word is said at once
RUNNING: Final = "running"
DONE: Final = "done"
FAILED: Final = "failed"
NOT_MINE: Final = "none"                 # a last word as well: another member of the node does it, or nobody
LAST_WORDS: Final = frozenset({DONE, FAILED, NOT_MINE})
_log = logging.getLogger("lazyfs.peers")

_Id = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_State = Annotated[str, msgspec.Meta(pattern=rf"^({RUNNING}|{DONE}|{FAILED}|{NOT_MINE})\Z")]


class Task(msgspec.Struct, omit_defaults=True):
    """
    Something that a node is to have.

    Attributes:
        kind: image, or file.
        source: HOST/REPOSITORY:TAG or @DIGEST; of a file its URL.
        platform: os/arch[/variant]; empty: the node's.
        authorization: what to show to its registry instead of the node's credentials; empty: nothing.

    """

    id: _Id
    kind: Annotated[str, msgspec.Meta(pattern=r"^(image|file)\Z")]
    source: Annotated[str, msgspec.Meta(max_length=SOURCE_CHARS_MAX)]
    platform: Annotated[str, msgspec.Meta(max_length=100)] = ""
    authorization: Annotated[str, msgspec.Meta(max_length=AUTHORIZATION_CHARS_MAX)] = ""

    def __repr__(self) -> str:
        """Without the credential."""
        return f"Task({self.id}, {self.kind})"

    __str__ = __repr__


class TaskState(msgspec.Struct, omit_defaults=True):
    """How far a member is; bytes."""

    id: _Id
    state: _State
    done: _Bytes = 0
    total: _Bytes = 0
    error: Annotated[str, msgspec.Meta(max_length=ERROR_CHARS_MAX)] = ""


class Said(msgspec.Struct, omit_defaults=True):
    """By a member, in each beat: by that the tracker knows that it takes tasks."""

    states: Annotated[list[TaskState], msgspec.Meta(max_length=STATE_COUNT_MAX)] = []


class Told(msgspec.Struct, omit_defaults=True):
    """By the tracker: `tasks` that it waits for, `heard`: whose last word it has."""

    tasks: Annotated[list[Task], msgspec.Meta(max_length=TASK_COUNT_MAX)] = []
    heard: Annotated[list[_Id], msgspec.Meta(max_length=STATE_COUNT_MAX)] = []


class Progress:
    """What does a task says to it how far it is."""

    def __init__(self, state: TaskState, changed: Callable[[], None]) -> None:
        self._state, self._changed = state, changed

    def show(self, done: int, total: int) -> None:
        self._state.done, self._state.total = done, total
        self._changed()


if TYPE_CHECKING:
    Doing = Callable[[Task, Progress], Awaitable[bool]]


class Agent:
    """
    A member's side. `do`: does a task, False if it is not its affair; may raise LazyfsError. `news`: has it said soon.

    Give `say` and `told` to TrackedMembership.on_word(WORD, ...), and run it.
    """

    def __init__(self, do: Doing, news: Callable[[], None]) -> None:
        self._do, self._news = do, news
        self._states: dict[int, TaskState] = {}
        self._send, self._receive = trio.open_memory_channel[Task](TASK_COUNT_MAX)
        self._said_at = 0.0

    def say(self) -> msgspec.Raw:
        return msgspec.Raw(msgspec.json.encode(Said(list(self._states.values())[:STATE_COUNT_MAX])))

    def told(self, raw: msgspec.Raw) -> None:
        """Raises FormatError: it is not what a tracker says."""
        try:
            told = shapes.from_json(raw, Told)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"these are no tasks: {error!s:.200}") from None
        for heard in told.heard:
            known = self._states.get(heard)
            if known is not None and known.state in LAST_WORDS:
                del self._states[heard]
        for task in told.tasks:
            if task.id not in self._states and len(self._states) < STATE_COUNT_MAX:
                try:
                    self._send.send_nowait(task)
                except trio.WouldBlock:
                    return    # it is told again
                self._states[task.id] = TaskState(task.id, RUNNING)

    async def run(self) -> None:
        """Do what comes, until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(_AT_ONCE):
                nursery.start_soon(self._work)

    async def _work(self) -> None:
        async for task in self._receive.clone():
            state = self._states.get(task.id)
            if state is None:
                continue
            _log.info("preheat begins", extra={"fields": {"task": task.id, "kind": task.kind}})
            try:
                mine = await self._do(task, Progress(state, self._moved))
            except LazyfsError as error:
                state.state, state.error = FAILED, f"{error}"[:ERROR_CHARS_MAX]
            except Exception as error:  # noqa: BLE001 - the next task is not to blame
                state.state, state.error = FAILED, f"unexpected {type(error).__name__}"
                _log.exception("a preheat failed")
            else:
                state.state = DONE if mine else NOT_MINE
            _log.info("preheat ends", extra={"fields": {"task": task.id, "state": state.state, "error": state.error}})
            self._news()

    def _moved(self) -> None:
        if trio.current_time() - self._said_at >= _NEWS_S:
            self._said_at = trio.current_time()
            self._news()
