"""What the kernel has. Layer: doctor. Versions: docs/operations.md."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from lazyfs.doctor.results import failed, ok, warning
from lazyfs.fs import mountapi
from lazyfs.fs.drivers import erofs_obstacle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.doctor.results import Result, Subject

_KERNEL_MIN = (5, 10)            # clone, pidfd and mount interfaces that the worker uses
_RESEND = (6, 9)                 # FUSE_NOTIFY_RESEND
_OVERLAY_IDMAP, _FUSE_IDMAP = (5, 19), (6, 12)


def check_kernel(_: Subject) -> Iterator[Result]:
    release, version = os.uname().release, mountapi.kernel_version()
    if version < _KERNEL_MIN:
        yield failed("kernel", f"Linux {release}: expected 5.10 or newer", "upgrade the kernel")
    elif version < _RESEND:
        yield warning("kernel", f"Linux {release}: before 6.9 reads that a dying worker had begun fail",
                      "upgrade to Linux 6.9 or newer, so that containers see no crash")
    else:
        yield ok("kernel", f"Linux {release}: unanswered requests outlive a worker")


def check_fuse(subject: Subject) -> Iterator[Result]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        yield ok("/dev/fuse", "can be opened")
    except OSError as error:
        hint = "run this as root" if error.errno in {errno.EACCES, errno.EPERM} else "load it with: modprobe fuse"
        yield failed("/dev/fuse", error.strerror or str(error), hint)
    obstacle = erofs_obstacle()
    wanted = subject.config.daemon.driver
    if not obstacle:
        yield ok("driver", f"erofs (configured: {wanted})")
    elif wanted == "erofs":
        yield failed("driver", obstacle, "set daemon.driver to auto, or upgrade the kernel")
    else:
        yield warning("driver", f"fuse: {obstacle}", "it works; with EROFS the kernel serves metadata itself, faster")


def check_file_systems(_: Subject) -> Iterator[Result]:
    if mountapi.kernel_knows("overlay"):
        yield ok("overlayfs", "known to the kernel")
    else:
        yield failed("overlayfs", "not known to the kernel", "load it with: modprobe overlay; containers need it")


def check_namespaces(_: Subject) -> Iterator[Result]:
    version = mountapi.kernel_version()
    limit = 0
    try:
        with open("/proc/sys/user/max_user_namespaces", encoding="ascii") as file:  # noqa: PTH123 - one line of /proc
            limit = int(file.read())
    except (OSError, ValueError):
        pass
    if not limit:
        yield warning("user namespaces", "switched off", "only pods with hostUsers: false need them: "
                      "sysctl user.max_user_namespaces")
    elif version < _OVERLAY_IDMAP:
        yield warning("user namespaces", "this kernel cannot id-map what is below overlayfs",
                      "pods with hostUsers: false need Linux 5.19 or newer")
    elif version < _FUSE_IDMAP and erofs_obstacle():
        yield warning("user namespaces", "this kernel cannot id-map FUSE", "lazy images in pods with hostUsers: false "
                      "need Linux 6.12 or newer")
    else:
        yield ok("user namespaces", "id-mapped mounts are possible")
