"""Puts the present process behind the kernel's walls. Read `seccomp.py` first; `child.py` calls this.

    namespaces   user, mount, network, pid, ipc, uts: an empty file system with Python and the system's libraries,
                 read-only, and a small /work; no network; no other process
    Landlock     only those places may be read, and only /work be written, also where there are no namespaces
    seccomp      only harmless system calls
    rlimits      memory, CPU time, files, bytes of a file, threads

Sources: namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), capabilities(7).
"""

import ctypes
import os
import platform
import resource
import select
import signal
import struct
import sys
from typing import Any

from . import seccomp

CLONE_NEW = {"user": 0x10000000, "mount": 0x00020000, "network": 0x40000000, "pid": 0x20000000, "ipc": 0x08000000,
             "uts": 0x04000000}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MS_REMOUNT = 1, 2, 4, 4096, 16384, 1 << 18, 32
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_DUMPABLE = 1, 24, 4
WORK = "/work"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
READ_RIGHTS = 1 << 2 | 1 << 3 | 1 << 0  # READ_FILE, READ_DIR, EXECUTE
# WRITE_FILE, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE
WRITE_RIGHTS = READ_RIGHTS | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14

libc = ctypes.CDLL(None, use_errno=True)


class NoWalls(Exception):
    """The kernel refuses a wall; the text names it."""


def _call(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise NoWalls(f"{what}: {os.strerror(number)}")
    return result


def end_with_parent(parent: int) -> None:
    """Be killed by the kernel when the process that started this one ends."""
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def list_readable() -> "list[str]":
    """What Python needs: its own library and program, and the system's libraries; no packages and nothing of a user."""
    library = os.path.dirname(os.__file__)
    found = [library, os.path.realpath(sys.executable), "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    shared = os.path.join(sys.base_prefix, "lib", f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0")
    return [path for path in dict.fromkeys([*found, shared]) if os.path.exists(path)]


# ---------------------------------------------------------------- namespaces


def enter_namespaces(root: str, work_bytes: int) -> None:
    """Enter new namespaces and an empty file system at `root`, and continue as its first process. The former process
    waits for it and ends with its exit code. Raises `NoWalls`."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", libc.unshare(sum(CLONE_NEW.values())))
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    _build_root(root, work_bytes)
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(read)
        for handle in range(3, 256):  # what the program needs is its own process's
            if handle != write:
                try:
                    os.close(handle)
                except OSError:
                    continue
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(write)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([read], [], [], 0)[0]:  # the former process ended before the line above
        os._exit(1)
    os.close(read)
    _change_root(root)
    _drop_capabilities()


def _build_root(root: str, work_bytes: int) -> None:
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=755")
    for path in (*list_readable(), *DEVICES):
        target = root + path
        if os.path.islink(path):  # /lib -> usr/lib
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
            continue
        if os.path.lexists(target):
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        _mount(path, target, None, MS_BIND | MS_REC)
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
                                 | (0 if path in DEVICES else MOUNT_ATTR_NODEV), 0, 0, 0)
        _call(f"mount_setattr {path}", libc.syscall(MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes,
                                                    len(attributes)))
    packages = root + os.path.join(os.path.dirname(os.__file__), "site-packages")
    if os.path.isdir(packages):  # packages of the user
        _mount("tmpfs", packages, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,nr_inodes=2")
    os.mkdir(root + WORK)
    _mount("tmpfs", root + WORK, "tmpfs", MS_NOSUID | MS_NODEV, f"size={work_bytes},nr_inodes=512,mode=700")
    _mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _mount(source: "str | None", target: str, kind: "str | None", flags: int, data: str = "") -> None:
    _call(f"mount {target}", libc.mount(source and source.encode(), target.encode(), kind and kind.encode(), flags,
                                        data.encode()))


def _change_root(root: str) -> None:
    os.chdir(root)
    _call("pivot_root", libc.syscall(PIVOT_ROOT[platform.machine()], b".", b"."))
    _call("umount", libc.umount2(b".", MNT_DETACH))  # the old root, which lies over the new one
    os.chdir(WORK)


def _drop_capabilities() -> None:
    for number in range(64):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)  # fails beyond the last one
    header = struct.pack("=Ii", 0x20080522, 0)
    _call("capset", libc.capset(header, struct.pack("=6I", 0, 0, 0, 0, 0, 0)))


# ---------------------------------------------------------------- Landlock and limits


def restrict_files(work: str) -> None:
    """Allow this process to read what Python needs and to write below `work`, and no TCP. Raises `NoWalls`."""
    version = _call("landlock", libc.syscall(LANDLOCK_CREATE, None, 0, 1))
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    rules = struct.pack("=QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)  # TCP; sockets and signals
    rules = rules[:24 if version >= 6 else 16 if version >= 4 else 8]
    handle = _call("landlock", libc.syscall(LANDLOCK_CREATE, rules, len(rules), 0))
    for path, rights in (*((path, READ_RIGHTS) for path in list_readable()), *((d, 1 << 2 | 1 << 1) for d in DEVICES),
                         (work, WRITE_RIGHTS)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            rights &= 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14
        rule = struct.pack("=Qi", rights & files, place)
        _call(f"landlock {path}", libc.syscall(LANDLOCK_ADD, handle, 1, rule, 0))
        os.close(place)
    libc.prctl(seccomp.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("landlock", libc.syscall(LANDLOCK_RESTRICT, handle, 0))
    os.close(handle)


def set_limits(limits: "dict[str, int]") -> None:
    """Set limits by their names in `resource`, hard ones: they cannot be raised again."""
    for name, most in limits.items():
        kind = vars(resource)[f"RLIMIT_{name}"]
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def enter(config: "dict[str, Any]", work: str) -> None:
    """Everything above, as far as `config["walls"]` says: `namespaces`, `landlock`, or `none`. Raises `NoWalls`."""
    walls = config["walls"]
    if walls == "namespaces":
        try:
            enter_namespaces(config["root"], config["work_bytes"])
        except OSError as error:
            raise NoWalls(f"namespaces: {error}") from None
        work = WORK
    os.chdir(work)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    set_limits(config["limits"])
    if walls == "none":
        return
    if walls == "landlock" or libc.syscall(LANDLOCK_CREATE, None, 0, 1) > 0:
        restrict_files(work)
    try:
        seccomp.install(libc)
    except (OSError, KeyError) as error:
        raise NoWalls(str(error)) from None
