"""The list of system calls that a sandboxed process may make, as a seccomp filter. Read `walls.py` afterwards.

Everything that is not listed fails with EPERM: sockets, new processes and programs, other processes, mounts,
namespaces, devices, shared memory, keys, io_uring. Sources: seccomp(2), linux/filter.h, linux/seccomp.h; the numbers
of system calls are those of the kernel's tables for x86-64 and arm64.
"""

import ctypes
import os
import platform
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
RET_ALLOW, RET_ERRNO, RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 38, 22, 2
CLONE_THREAD = 0x00010000
NR, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data
LOAD, JUMP_EQUAL, JUMP_GREATER, JUMP_SET, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
X32 = 0x3FFFFFFF  # the greatest number of a system call that is not of the x32 ABI

X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "exit": 60, "wait4": 61,
    "uname": 63,
    "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getcwd": 79, "chdir": 80,
    "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "unlink": 87, "readlink": 89, "umask": 95,
    "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111, "getgroups": 115, "getpgid": 121, "getsid": 124,
    "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "openat": 257, "mkdirat": 258, "newfstatat": 262,
    "unlinkat": 263, "renameat": 264, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271,
    "set_robust_list": 273, "get_robust_list": 274, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296,
    "getcpu": 309, "renameat2": 316, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
    "close_range": 436, "faccessat2": 439}
X86_64_CHECKED = {"clone": 56, "fcntl": 72, "ioctl": 16, "prlimit64": 302, "tgkill": 234, "clone3": 435}
AARCH64 = {
    "getcwd": 17, "dup": 23, "dup3": 24, "flock": 32, "unlinkat": 35, "renameat": 38, "mkdirat": 34, "statfs": 43,
    "fstatfs": 44, "truncate": 45, "ftruncate": 46, "faccessat": 48, "chdir": 49, "fchdir": 50, "openat": 56,
    "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66,
    "pread64": 67, "pwrite64": 68, "preadv": 69, "pwritev": 70, "pselect6": 72, "ppoll": 73, "readlinkat": 78,
    "newfstatat": 79, "fstat": 80, "fsync": 82, "fdatasync": 83, "exit": 93, "exit_group": 94, "set_tid_address": 96,
    "futex": 98, "set_robust_list": 99, "get_robust_list": 100, "nanosleep": 101, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128,
    "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "getpgid": 155,
    "getsid": 156, "getgroups": 158, "uname": 160, "getrlimit": 163, "getrusage": 165, "umask": 166, "getcpu": 168,
    "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177,
    "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
    "madvise": 233, "wait4": 260, "renameat2": 276, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
    "close_range": 436, "faccessat2": 439}
AARCH64_CHECKED = {"clone": 220, "fcntl": 25, "ioctl": 29, "prlimit64": 261, "tgkill": 131, "clone3": 435}
TABLES = {"x86_64": (X86_64, X86_64_CHECKED), "aarch64": (AARCH64, AARCH64_CHECKED)}
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # duplicates, flags and locks; not the owner of signals, leases or seals
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, bytes to read, blocking, close-on-exec


def is_supported() -> bool:
    return platform.machine() in TABLES


def build_filter(pid: int) -> bytes:
    """The program of the filter, as an array of struct sock_filter. `pid`: of the process that it is for."""
    allowed, checked = TABLES[platform.machine()]
    lines = [_line(LOAD, ARCH), _line(JUMP_EQUAL, ARCHITECTURES[platform.machine()], 1, 0), _line(RETURN, RET_KILL),
             _line(LOAD, NR), _line(JUMP_GREATER, X32, 0, 1), _line(RETURN, RET_ERRNO | EPERM)]
    for number in sorted(allowed.values()):
        lines += [_line(JUMP_EQUAL, number, 0, 1), _line(RETURN, RET_ALLOW)]
    # glibc starts threads by clone where clone3 is not known; the flags of clone3 lie where a filter cannot read them.
    lines += [_line(JUMP_EQUAL, checked["clone3"], 0, 1), _line(RETURN, RET_ERRNO | ENOSYS)]
    lines += _check(checked["clone"], 0, [_line(JUMP_SET, CLONE_THREAD, 0, 1), _line(RETURN, RET_ALLOW)])
    lines += _check(checked["fcntl"], 1, _one_of(FCNTL))
    lines += _check(checked["ioctl"], 1, _one_of(IOCTL))
    lines += _check(checked["prlimit64"], 2, _one_of((0,)), high=True)  # reads a limit, sets none
    lines += _check(checked["tgkill"], 0, _one_of((pid,)))
    lines.append(_line(RETURN, RET_ERRNO | EPERM))
    return b"".join(lines)


def _line(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, k)


def _one_of(values: "tuple[int, ...]") -> "list[bytes]":
    return [line for value in values for line in (_line(JUMP_EQUAL, value, 0, 1), _line(RETURN, RET_ALLOW))]


def _check(number: int, argument: int, lines: "list[bytes]", high: bool = False) -> "list[bytes]":
    """For the system call `number` the lines that check the low half of an argument, then a refusal. `high`: the high
    half must be 0 as well."""
    body = [_line(LOAD, ARGS + 8 * argument), *lines, _line(RETURN, RET_ERRNO | EPERM)]
    if high:
        body = [_line(LOAD, ARGS + 8 * argument + 4), _line(JUMP_EQUAL, 0, 1, 0), _line(RETURN, RET_ERRNO | EPERM),
                *body]
    return [_line(JUMP_EQUAL, number, 0, len(body)), *body]


def install(libc: ctypes.CDLL) -> None:
    """Put this process and its threads behind the filter, for good. Raises `OSError` where the kernel refuses."""
    program = build_filter(os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    described = Program(len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(described)):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
