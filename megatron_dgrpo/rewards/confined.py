"""Runs untrusted Python in the process that it is itself: a script that imports nothing of this project.

The order matters. First it dies with its parent, then it reads the request, sets limits, and confines itself; then it
says on the report pipe what confines it; only then does it run code that it was given. Nothing of it can be undone:

- rlimits: address space, CPU time, file size, open files, no core dumps;
- a user namespace where the kernel grants one: root in it is nobody outside, and processes outside can't be traced;
- Landlock: files can be written in the working folder alone, and read there, in Python's own folders and the system's;
- seccomp: no sockets, no new processes or programs, no signals to others, no tracing, no io_uring, no new namespaces.

The tests' verdict is a token that the parent made up, written after the last line of the test: code that ends the
process early, whatever its status, has not passed. Code that looks for the token in this process's memory can find it.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

_PDEATHSIG, _NO_NEW_PRIVS, _SECCOMP = 1, 38, 22
_CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)

# ---- seccomp ---------------------------------------------------------------------------------------------------------

# name -> number on x86_64 and aarch64 (None: it does not exist there)
_REFUSED: dict[str, tuple[int, int | None]] = {
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "io_uring_setup": (425, 425),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "bpf": (321, 280), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "setsid": (112, 157),
    "setpgid": (109, 154), "setrlimit": (160, 164), "setpriority": (141, 140),
}  # fmt: skip
_OWN_ONLY = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_CLONE_THREAD = 0x10000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_2 = 0, 4, 16, 32


def seccomp() -> bool:
    """Install the filter; False where the machine has none or is of another kind."""
    machines = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
    if platform.machine() not in machines:
        return False
    column, architecture = machines[platform.machine()]
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER),
    ]  # fmt: skip
    if column == 0:  # the same calls under other numbers
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    lines += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]  # libc then takes clone
    lines += [
        (_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _ARGUMENT_0), (_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]  # fmt: skip
    for numbers in _OWN_ONLY.values():
        lines += [
            (_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _ARGUMENT_0), (_EQUAL, 0, 1, os.getpid()),
            (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM),
        ]  # fmt: skip
    lines += [  # limits may be read; a pointer to new ones is a change
        (_EQUAL, 0, 6, _PRLIMIT[column]), (_LOAD, 0, 0, _ARGUMENT_2), (_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _ARGUMENT_2 + 4), (_EQUAL, 0, 1, 0), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]  # fmt: skip
    lines.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("<HBBI", *line) for line in lines)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HxxxxxxP", len(lines), ctypes.addressof(held))
    return _libc.prctl(_SECCOMP, ctypes.c_ulong(2), ctypes.create_string_buffer(program), 0, 0) == 0


# ---- Landlock --------------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR = 1, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")


def landlock(readable: list[str], writable: list[str]) -> bool:
    """Bar every file but those; False where the kernel has no Landlock."""
    _libc.syscall.restype = ctypes.c_long
    version = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = 0x1FFF | (0x2000 if version >= 2 else 0) | (0x4000 if version >= 3 else 0)
    attributes = ctypes.create_string_buffer(struct.pack("<Q", handled), 8)
    rules = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    for paths, rights in ((readable, _READ), (writable, handled)):
        for path in paths:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            allowed = rights if os.path.isdir(path) else rights & (_EXECUTE | _READ_FILE | 2 | 0x4000)
            rule = ctypes.create_string_buffer(struct.pack("<Qi", allowed, descriptor), 12)
            failed = _libc.syscall(_ADD_RULE, rules, 1, rule, 0)
            os.close(descriptor)
            if failed:
                return False
    done = _libc.syscall(_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return done


# ---- the run ---------------------------------------------------------------------------------------------------------


def main(request_fd: int, report_fd: int, parent: int) -> None:
    _libc.prctl(_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    with open(request_fd, encoding="utf-8", errors="surrogatepass") as file:
        request = json.load(file)
    barred = _confine(request["limits"])
    os.write(report_fd, (" ".join(barred) + "\n").encode())
    if request["required"] and not {"seccomp", "landlock"} <= set(barred):
        os._exit(0)
    token = request.pop("token")
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    sys.argv = ["response.py"]
    for name in ("code", "test"):
        exec(compile(request.get(name) or "", f"<{name}>", "exec"), scope)
    sys.stdout.flush()
    os.write(report_fd, token.encode())
    os._exit(0)


def _confine(limits: dict) -> list[str]:
    """Give up everything that is not needed; names of what does the barring."""
    seconds = int(limits["seconds"]) + 1
    for what, value in (
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_AS, limits["memory_bytes"]),
    ):  # fmt: skip
        resource.setrlimit(what, (value, value))
    python = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sys.path) if path}
    namespace = _libc.unshare(_CLONE_NEWUSER) == 0
    _libc.prctl(_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0)
    files = landlock([*sorted(python), *_SYSTEM], [os.getcwd(), "/dev/null"])
    calls = seccomp()
    return ["user_namespace"] * namespace + ["landlock"] * files + ["seccomp"] * calls


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
