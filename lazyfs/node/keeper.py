"""
The keeper: holds the FUSE connection and the control socket, and sees to it that a worker serves them.

It imports nothing heavy, does no work, and so has no reason to die. A worker that dies is followed by another one,
which takes the connection over (fs.session); requests of running containers wait meanwhile, and fail never. If the
keeper itself dies, the worker goes on; the next keeper gets the descriptors from systemd's store, or out of the worker.

Layer: node. `python -m lazyfs.node.keeper SETTINGS`; cli.daemon starts it. SETTINGS: JSON, see `Keeper`. State: all in
the one Keeper; on disk keeper.json (who keeps, under which numbers). Socket keeper.sock, one JSON line each way:
{"op": "status" | "upgrade" | "stop"} (cli.daemon has the client). The worker's side: node.daemonworker.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from lazyfs import stacks
from lazyfs.fs.confine import hide_memory
from lazyfs.node import notify
from lazyfs.node.keeperchild import Child, reap_orphans
from lazyfs.node.keeperclients import Clients, reply
from lazyfs.node.keepermirror import MirrorChild
from lazyfs.node.keeperstart import Kept, find_kept
from lazyfs.node.keeperwatch import Connection, Watch

_POLL_S = 0.5
_HANDOVER_S = 10.0               # for a worker to step aside; then it is killed
_LEAVE_S = 3.0
_FAILED_COUNT_MAX = 5            # workers in a row that died before they served: then readers get errors
_DELAY_S_MAX = 5.0               # between starts of workers that fail
_DEATHS_PERIOD_S, _DEATHS_COUNT_MAX = 60.0, 30   # of workers that did serve: more often, and starts are delayed too
_SPARE_S = 30.0                  # a spare worker goes when the one that serves has been well for so long
_ABORT_S = 120.0                 # if the settings are of a version that does not say


class Keeper:
    """
    See the module.

    Settings: `root` (the daemon's run directory, made), `cache_dir`, `hang_s` (a worker without a sign of life for
    that long is replaced), `abort_s` (see keeperwatch), `start_s` (for one to load), `worker` (fields of
    daemonworker.Place, not looked at); `resume`: what the process image before an upgrade held.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._resume = settings.pop("resume", None)
        self._settings = settings
        self._root = settings["root"]
        self._kept: Kept = find_kept(self._root, self._resume)
        self._current: Child | None = None
        self._next: Child | None = None            # its turn comes: after this one's end, or (upgrade) to end it
        self._is_spare = False                      # `_next` is for the worst: it ends nobody, and goes by then
        self._spare_until = 0.0
        self._trouble = ""                          # of the last worker that was replaced
        self._dismissed: list[Child] = []           # killed, to be collected
        self._retire_by = 0.0
        self._start_at = 0.0
        self._failed = 0
        self._deaths: list[float] = []
        self._turns, self._died, self._hung = (self._resume or {}).get("counts", (0, 0, 0))
        self._began = time.time()
        self._stopping = False
        self._told_to_stop = False
        self._clients = Clients(self._root)
        self._mirror = MirrorChild()
        self._waiting: list[socket.socket] = []     # clients of an upgrade under way
        self._before: dict[str, Any] = {}           # the settings before it, until it has worked
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watch = Watch(Connection(f"{self._root}/fuse"), float(settings["hang_s"]),
                            float(settings.get("abort_s", _ABORT_S)), time.monotonic())

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Until it is told to stop. Returns the exit code."""
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        stacks.install(lambda lines: stacks.tell_stderr([f"lazyfs keeper: {json.dumps(self._status())}", *lines]))
        self._adopt()
        while True:
            if self._told_to_stop:
                self._stop()
            if self._stopping and self._current is None:
                return 0
            self._turn()

    def _on_signal(self, number: int, _frame: object) -> None:
        """Between any two steps of a turn, which must not find its workers gone: the turn to come sees to it."""
        self._told_to_stop |= number != signal.SIGCHLD

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        for descriptor in self._clients.descriptors:
            poll.register(descriptor, select.POLLIN)
        for child in self._dismissed:
            poll.register(child.pidfd, select.POLLIN)
        children = [child for child in (self._current, self._next) if child is not None]
        for child in children:
            poll.register(child.pidfd, select.POLLIN)
            if child.channel is not None and not child.silent:
                poll.register(child.channel, select.POLLIN)
        wait_s = self._watch.next_s(self._current, time.monotonic(), _POLL_S)
        ready = {descriptor for descriptor, _ in poll.poll(wait_s * 1000)}
        if self._wake_r in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_r, 4096)
        for child in [one for one in self._dismissed if one.pidfd in ready]:
            self._dismissed.remove(child)
            child.collect()
        for child in children:
            if child.channel is not None and child.channel.fileno() in ready:
                self._hear(child)
            if child.pidfd in ready:
                self._ended(child)
        for client, request in self._clients.take(ready):
            self._serve(client, request)
        reap_orphans({child.pid for child in (self._current, self._next, *self._dismissed) if child is not None})
        self._on_time()

    def _on_time(self) -> None:
        now = time.monotonic()
        current, coming = self._current, self._next
        self._watch.look(current, now)
        self._mirror.look({} if self._stopping else self._settings["worker"], self._watch.hang_s, now)
        if coming is not None and not coming.imported and now - coming.began > self._settings["start_s"]:
            _say(f"worker {coming.pid} has not loaded in {self._settings['start_s']:g} s: killed")
            coming.kill()
            coming.began = now
        if current is None:
            if self._next is None and not self._stopping and now >= self._start_at:
                self._start_next()
        else:
            self._watch_current(current, now)
        if self._watch.has_hope(now):
            notify.watchdog(now)
        if self._kept.begun and not self._stopping and self._watch.is_given_up(now):
            self._give_up()

    def _watch_current(self, current: Child, now: float) -> None:
        if self._retire_by:
            if now > self._retire_by:
                _say(f"worker {current.pid} does not step aside: killed")
                current.kill()
                self._retire_by = now + _HANDOVER_S
        elif trouble := self._watch.trouble(current, now):
            _say(f"worker {current.pid} {trouble}: replaced")
            self._hung += 1
            self._trouble = trouble
            current.kill()
            current.last_sign = now
        elif self._watch.is_suspicious(current, now):
            self._spare_until = now + _SPARE_S
            if self._next is None and not self._stopping and now >= self._start_at:
                self._start_next()
                self._is_spare = True
                current.kill(stacks.HARD_SIGNAL)   # where it hangs, if it does, in the log
        elif self._is_spare and now > self._spare_until:
            self._dismiss_next()

    def _give_up(self) -> None:
        """The last line of defence: no worker has served for so long that readers are to get errors."""
        _say(f"no worker has served for {self._watch.abort_s:g} s, and requests wait: their connection is aborted; "
             "what is mounted answers with errors, until it is mounted again")
        self._watch.connection.abort()
        if self._current is not None:
            self._current.kill()     # the next one begins when it has ended
        else:
            self._renew_connection()

    def _renew_connection(self) -> None:
        self._kept.renew_fuse()
        if self._next is not None:
            self._dismiss_next()     # it was given the old one

    # --- workers -----------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Begin with what is there: a worker of a keeper before us, or nothing."""
        if self._resume:
            self._current = Child(self._resume["pid"], socket.socket(fileno=self._resume["channel"]))
            self._current.imported = self._current.ready = True
            self._announce()
        elif self._kept.worker_pid:
            _say(f"worker {self._kept.worker_pid} goes on without its keeper: taken over")
            self._current = Child(self._kept.worker_pid, None)
            self._current.ready = True
            self._start_next()
        self._kept.write_identity(self._settings["cache_dir"])

    def _start_next(self) -> None:
        self._next = Child.start(self._worker_settings(), self._kept.fuse, self._kept.listener)
        self._is_spare = False

    def _dismiss_next(self) -> None:
        assert self._next is not None
        self._next.kill()
        self._dismissed.append(self._next)
        self._next, self._is_spare = None, False

    def _hear(self, child: Child) -> None:
        for line in child.hear():
            if child is self._current:
                self._watch.hear(line)
            if line == b"imported":
                child.imported = True
                self._hand_over()
            elif line == b"ready" and child is self._current:
                child.ready = True
                self._failed = 0
                self._kept.begun = True
                self._watch.connection.find()
                self._announce()

    def _hand_over(self) -> None:
        """The next worker has imported: it is its turn as soon as there is no other."""
        if self._next is None or not self._next.imported:
            return
        if self._current is not None:
            if self._is_spare:
                return
            self._current.say(b"retire\n")
            self._retire_by = time.monotonic() + _HANDOVER_S
            return
        child, self._next = self._next, None
        self._current = child
        self._retire_by = 0.0
        self._turns += 1
        self._is_spare = False
        child.began = child.last_sign = time.monotonic()
        self._watch.begin(child.began)
        child.say(b"go-on\n" if self._kept.begun else b"go\n")

    def _ended(self, child: Child) -> None:
        how = child.collect()
        now = time.monotonic()
        if child is self._next:
            self._next = None
            _say(f"worker {child.pid} could not start: {how}")
            if self._is_spare:
                self._is_spare, self._start_at = False, now + _DELAY_S_MAX
                return
            self._undo_upgrade(f"the new worker could not start ({how}); the old one goes on")
            self._failed += 1
            self._delay(now)
            return
        self._current = None
        if self._stopping:
            return
        if not self._retire_by:
            _say(f"worker {child.pid} died: {how}")
            self._died += not child.killed
            if not child.ready:
                self._failed += 1
                self._undo_upgrade(f"the new worker could not serve ({how}); one with the old settings follows")
            self._delay(now)
        self._retire_by = 0.0
        if self._kept.is_aborted or (self._failed >= _FAILED_COUNT_MAX and self._kept.begun):
            _say("its connection is given up: what is mounted now answers with errors, until it is mounted again")
            self._renew_connection()
            self._failed = 0
        elif not self._kept.begun:
            self._renew_connection()
        self._hand_over()

    def _delay(self, now: float) -> None:
        """When the next one is started: at once, unless they die one after the other."""
        self._deaths = [one for one in self._deaths if now - one < _DEATHS_PERIOD_S] + [now]
        delay_s = min(_DELAY_S_MAX, 0.1 * 2 ** self._failed) if self._failed > 1 else 0.0
        if len(self._deaths) > _DEATHS_COUNT_MAX:
            delay_s = _DELAY_S_MAX
        self._start_at = now + delay_s

    def _announce(self) -> None:
        """The worker serves: tell systemd, keep the descriptors there too, answer who waits."""
        notify.store("fuse", self._kept.fuse)
        notify.store("control", self._kept.listener)
        notify.notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=worker {self._worker_pid()} serves")
        self._before = {}
        if self._waiting:
            self._reply_upgrade({"result": self._status()})
            self._become_new()

    def _worker_settings(self) -> dict[str, Any]:
        return {**self._settings["worker"], "root": self._root, "cache_dir": self._settings["cache_dir"]}

    def _worker_pid(self) -> int:
        return self._current.pid if self._current is not None else 0

    # --- requests ----------------------------------------------------------------------------------------------------

    def _serve(self, client: socket.socket, request: dict[str, Any]) -> None:
        operation = request["op"]
        if operation == "upgrade":
            self._upgrade(client, request.get("settings"))
        elif operation == "stop":
            self._stop()
            reply(client, {"result": self._status()})
        elif operation == "status":
            reply(client, {"result": self._status()})
        else:
            reply(client, {"error": f"unknown operation {operation!r:.40}"})

    def _status(self) -> dict[str, Any]:
        return {
            "keeper": os.getpid(), "worker": self._worker_pid(), "turns": self._turns, "since": self._began,
            "died": self._died, "hung": self._hung,
            "ready": bool(self._current is not None and self._current.ready), "stopping": self._stopping,
            "trouble": self._trouble, "waiting": self._watch.connection.waiting(),
        }

    def _upgrade(self, client: socket.socket, settings: object) -> None:
        if self._is_spare:
            self._dismiss_next()
        if self._next is not None or self._current is None or self._stopping:
            reply(client, {"error": "a worker is being started or stopped at this moment"})
            return
        if isinstance(settings, dict):
            if not _is_sound(settings):     # we must not die of them
                reply(client, {"error": "malformed settings"})
                return
            fixed = {name: self._settings[name] for name in ("root", "cache_dir")}   # of what is mounted
            asked = settings.pop("asked", {}).get("cache_dir", fixed["cache_dir"])
            if asked != fixed["cache_dir"]:
                reply(client, {"error": f"cache_dir is {fixed['cache_dir']}, and cannot become {asked} in an upgrade: "
                                         "unmount all, then stop and start the daemon"})
                return
            self._before = dict(self._settings)
            self._settings.update({**settings, **fixed})
            self._set_watch()
        self._waiting.append(client)
        self._start_next()

    def _undo_upgrade(self, reason: str) -> None:
        """Workers that come later must start with settings that are known to work."""
        if self._before:
            self._settings, self._before = self._before, {}
            self._set_watch()
        self._reply_upgrade({"error": reason})

    def _set_watch(self) -> None:
        self._watch.hang_s = float(self._settings["hang_s"])
        self._watch.abort_s = float(self._settings.get("abort_s", _ABORT_S))

    def _reply_upgrade(self, answer: dict[str, Any]) -> None:
        for client in self._waiting:
            reply(client, answer)
        self._waiting.clear()

    def _become_new(self) -> NoReturn:
        """Go on as the program that is installed now: same process, same descriptors, same worker."""
        child = self._current
        assert child is not None
        assert child.channel is not None
        self._mirror.end()     # the new one starts its own
        kept, channel = self._kept, child.channel.fileno()
        descriptors = {"fuse": kept.fuse, "listener": kept.listener, "lock": kept.lock, "channel": channel}
        for descriptor in descriptors.values():
            os.set_inheritable(descriptor, True)
        signal.set_wakeup_fd(-1)
        settings = {**self._settings, "resume": {**descriptors, "pid": child.pid, "begun": kept.begun,
                                                "counts": (self._turns, self._died, self._hung)}}
        stacks.ignore()
        os.execv(sys.executable, [sys.executable, "-m", "lazyfs.node.keeper", json.dumps(settings)])  # noqa: S606

    def _stop(self) -> None:
        """End; the worker too if it serves nothing, else it goes on by itself."""
        if self._stopping:
            return
        self._stopping = True
        notify.notify("STOPPING=1")
        self._mirror.end()
        if self._next is not None:
            self._next.kill()
        if self._current is not None:
            self._current.say(b"leave\n")
            self._wait_left(self._current)
        else:   # it ended a moment before
            self._kept.let_go()

    def _wait_left(self, child: Child) -> None:
        poll = select.poll()
        poll.register(child.pidfd, select.POLLIN)
        if poll.poll(_LEAVE_S * 1000):
            child.collect()
            self._kept.let_go()
        else:
            _say(f"worker {child.pid} still serves mounts, and goes on; the next start takes it over")
        self._current = None


def _is_sound(settings: dict[str, Any]) -> bool:
    """Whether what an upgrade asks for has the types that we count on."""
    numbers = (settings[name] for name in ("hang_s", "start_s", "abort_s") if name in settings)
    tables = (settings[name] for name in ("asked", "worker") if name in settings)
    return all(type(one) in (int, float) for one in numbers) and all(isinstance(one, dict) for one in tables)


def _say(text: str) -> None:
    print(f"lazyfs keeper: {text}", file=sys.stderr, flush=True)


def main() -> NoReturn:
    """Keep. Exit codes: 0, stopped; those of keeperstart."""
    stacks.ignore()
    hide_memory()   # what a worker was handed passes through here
    sys.exit(Keeper(json.loads(sys.argv[1])).run())


if __name__ == "__main__":
    main()
