"""
A filter of system calls that a process has no use for, and whoever took it over would: they fail with EPERM.

Layer: fs; no state. Who calls: fs.confine. A deny list: the worker runs credential helpers, which are other people's
programs, and those must go on working. Sources: seccomp(2), linux/filter.h, linux/audit.h, asm/unistd.h. Constant
answers are cached by the kernel (5.11): a system call costs 0.1 us more (pread of 100 bytes 0.85 -> 0.95), of which a
read of a container makes four or five in the 20 to 50 us that it takes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# Name: numbers on x86_64 and aarch64 (None: not there).
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # mounts and namespaces: the mounter does that (fs.mounter)
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "setns": (308, 268), "unshare": (272, 97), "swapon": (167, 224), "swapoff": (168, 225),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89),
    # files past their directories' modes
    "open_by_handle_at": (304, 265),
    # the kernel itself
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "reboot": (169, 142),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "syslog": (103, 116),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # the machine's time and name
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
}
_CLONE = (56, 220)               # with CLONE_NEWUSER: a new user namespace has all capabilities inside
_CLONE3 = 435                    # its flags are in memory, where a filter cannot look: ENOSYS, and libc takes clone
_CLONE_NEWUSER = 0x10000000
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}    # column above, AUDIT_ARCH_*
_X32_BIT = 0x40000000            # x86_64: the same calls by other numbers
_SECCOMP_CALL = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER = 1
_FLAG_TSYNC, _FLAG_SPEC_ALLOW = 1, 4     # SPEC_ALLOW: old kernels would slow the whole process down otherwise
_RET_ALLOW, _RET_ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06     # BPF_LD|W|ABS, BPF_JMP|..., BPF_RET
_AT_NUMBER, _AT_ARCHITECTURE, _AT_ARGUMENT_0 = 0, 4, 16     # struct seccomp_data


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def deny_system_calls() -> str:
    """
    Have the calls of the list fail from now on, in all threads and in every program started. PR_SET_NO_NEW_PRIVS first.

    Returns: why that was not possible, or "".

    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        return f"no list of system calls for {machine}"
    code = program(machine)
    given = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _FLAG_TSYNC | _FLAG_SPEC_ALLOW
    if libc.syscall(_SECCOMP_CALL[machine], _SET_MODE_FILTER, flags, ctypes.byref(given)) == 0:
        return ""
    return f"seccomp: {os.strerror(ctypes.get_errno())}"


def program(machine: str) -> bytes:
    """The filter for a machine of _MACHINES: struct sock_filter, 8 bytes each."""
    column, architecture = _MACHINES[machine]
    refuse, missing = _RET_ERRNO | errno.EPERM, _RET_ERRNO | errno.ENOSYS
    lines = [
        _line(_LOAD, _AT_ARCHITECTURE), _line(_EQUAL, architecture, 1, 0), _line(_RETURN, refuse),
        _line(_LOAD, _AT_NUMBER),
    ]
    if machine == "x86_64":
        lines += [_line(_AT_LEAST, _X32_BIT, 0, 1), _line(_RETURN, refuse)]
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            lines += [_line(_EQUAL, number, 0, 1), _line(_RETURN, refuse)]
    lines += [
        _line(_EQUAL, _CLONE3, 0, 1), _line(_RETURN, missing),
        _line(_EQUAL, _CLONE[column], 0, 3), _line(_LOAD, _AT_ARGUMENT_0),
        _line(_ANY_BIT, _CLONE_NEWUSER, 0, 1), _line(_RETURN, refuse),
        _line(_RETURN, _RET_ALLOW),
    ]
    return b"".join(lines)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
