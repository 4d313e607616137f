"""The program that ``sandbox.check`` starts: runs a row's check code where it can do no harm.

Two processes. The keeper (this program as started) reads the job, enters namespaces of its own
where the system allows, forks the runner, waits for its verdict or the end of its time, and kills
it. The runner gives up every right it can, and only then touches the row's code. With a process
namespace the runner is its first process, and with it the kernel ends whatever it has started.

No file can be opened and no socket or process made once the code runs, each by more than one means:
limits of 0 on descriptors, processes and file sizes; and, on Linux for x86-64 and ARM, a filter
that refuses every system call but those for memory, time and the verdict. On other systems the
limits alone would hold: code that gets past the screen could still make, rename or delete directory
entries that the user may. There nothing is run unless the job says ``unsafe``.

The verdict travels by a pipe of its own, each line after a number drawn for this one run; code that
digs the number out of the interpreter's frames could as well have said yes. Standard library only;
run as a file by an isolated interpreter, never imported by satune.
"""

# Each import costs every grade its time: only what is needed, re and collections only if asked for.
import builtins
import ctypes
import marshal
import math
import os
import resource
import select
import sys
import time

MODULES = ("itertools", "collections", "math", "re")
VERDICT_BYTES = 4096
KILL = 9  # the module signal takes longer to import than the rest together
NOBODY = 65534

NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38

# read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
# sched_yield mremap madvise nanosleep getpid exit gettid futex clock_gettime clock_nanosleep
# exit_group getrandom rseq sigaltstack
SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 28, 35, 39, 60, 186, 202, 228, 230,
         231, 318, 334, 131),
    ),
    "aarch64": (
        0xC00000B7,
        (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 124, 216, 233, 101, 172, 93, 178,
         98, 113, 115, 94, 278, 293, 132),
    ),
}  # fmt: skip


class Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("yes", ctypes.c_ubyte),
        ("no", ctypes.c_ubyte),
        ("value", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))


def enter_namespaces(libc):
    """Names of the guards that namespaces give: a process, a network and an IPC namespace."""
    flags = NEW_PID | NEW_NET | NEW_IPC
    # A user namespace is what allows the rest to those who are not root.
    for wanted in (flags, flags | NEW_USER) if os.geteuid() == 0 else (flags | NEW_USER,):
        if libc.unshare(wanted) == 0:
            return ["process namespace", "network namespace"]
    return []


def filter_calls(libc):
    """Refuse (EPERM) every system call that is not listed; True if the system took the filter."""
    machine = os.uname().machine
    if machine not in SYSTEM_CALLS:
        return False
    architecture, calls = SYSTEM_CALLS[machine]
    load, equal, answer = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    steps = [
        (load, 0, 0, 4),  # the architecture the call is made for: another numbers calls otherwise
        (equal, 1, 0, architecture),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        *((equal, len(calls) - i, 0, call) for i, call in enumerate(calls)),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    listed = (Instruction * len(steps))(*(Instruction(*step) for step in steps))
    program = Program(len(steps), ctypes.cast(listed, ctypes.POINTER(Instruction)))
    return libc.prctl(SECCOMP, 2, ctypes.byref(program), 0, 0) == 0


def give_up_rights(libc, job, guards):
    """Everything the runner may not do, in an order in which each step is still allowed. True if
    what is in force allows to run the job."""
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            guards.append("user nobody")
        except OSError:
            pass  # a user namespace without that user; what is left is judged at the end
    if libc is not None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
        libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(DUMPABLE, 0, 0, 0, 0)
        libc.prctl(PDEATHSIG, KILL, 0, 0, 0)  # after setuid, which clears it
    limits = {
        "CORE": 0,
        "FSIZE": 0,
        "CPU": math.ceil(job["seconds"]),
        "AS": job["memory"],
        "NPROC": 0,
        "NOFILE": 0,
    }
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
            guards.append(f"limit {name}")
        except (ValueError, OSError, AttributeError):
            pass  # a system without that limit; the guards that hold are reported
    if libc is not None and filter_calls(libc):
        guards.append("system calls")
    # The superuser is not bound by the limit on processes.
    limited = os.geteuid() != 0 and "limit NPROC" in guards
    return "system calls" in guards or (job["unsafe"] and limited)


def importer(wanted):
    """``import`` that knows the modules ``wanted``, each cut down to its public names."""
    known = {}
    kind = type(sys)
    for title in wanted:
        module = __import__(title)
        known[title] = cut = kind(title)
        for name in getattr(module, "__all__", None) or dir(module):
            value = getattr(module, name)
            if not name.startswith("_") and not isinstance(value, kind):
                setattr(cut, name, value)

    def load(name, globals=None, locals=None, fromlist=(), level=0):
        if level or name not in known:
            raise ImportError(f"no module {name!r} here")
        return known[name]

    return load


def run(code, literal, load):
    """What is said about the inputs: "holds", "format", "constraint N NAME" or "error ..."."""
    truth, spell, kind = bool, str, type  # the code may reach the worker's builtins
    try:
        # Builtins of the row's own: what the interpreter itself imports later is not its business.
        own = {**vars(builtins), "__import__": load, "open": None, "input": None}
        names = {"__name__": "__main__", "__builtins__": own}
        exec(compile(code, "row", "exec"), names)
        inputs = eval(literal, {"__builtins__": {"set": set, "frozenset": frozenset}})
        check, constraints = names["inputs_check"], names["constraint_list"]
        if not truth(check(inputs)):
            return "format"
        for index, constraint in enumerate(constraints, 1):
            if not truth(constraint(inputs)):
                name = getattr(constraint, "__name__", "")
                return f"constraint {index} {name if spell(name).isidentifier() else ''}"
        return "holds"
    except BaseException as error:
        said = spell(error)
        return f"error {kind(error).__name__}" + (f": {said}" if said else "")


def runner(job, verdicts, nonce, libc, guards):
    """Never returns. The process's only open descriptors are ``verdicts`` and three to nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    for start, end in ((3, verdicts), (verdicts + 1, 4096)):
        os.closerange(start, end)
    load = importer(job["modules"])
    if "collections" in job["modules"]:
        import heapq  # noqa: F401  Counter loads it when first needed, which then is too late
    if "\\N{" in job["code"]:
        import unicodedata  # noqa: F401  as before, for characters written by their names
    write, leave, leading = os.write, os._exit, f"{nonce} ".encode()
    sys.modules.pop("ctypes", None)
    if not give_up_rights(libc, job, guards):
        write(verdicts, leading + b"unsafe")
        leave(0)
    write(verdicts, leading + ",".join(guards).encode() + b"\n")
    said = run(job["code"], job["inputs"], load)
    line = " ".join("".join(c if c.isprintable() else " " for c in said[:600]).split())
    write(verdicts, leading + line.encode("utf-8", "replace") + b"\n")
    leave(0)


def keep(job):
    """One job from start to end: {"said": ..., "guards": [...]}."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    guards = enter_namespaces(libc) if libc is not None else []
    nonce = os.urandom(16).hex()
    reading, writing = os.pipe()
    deadline = time.monotonic() + job["seconds"]
    child = os.fork()
    if child == 0:
        try:
            runner(job, writing, nonce, libc, guards)
        finally:
            os._exit(1)
    os.close(writing)
    heard, late = b"", False
    while len(heard) < VERDICT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            late = True
            break
        piece = os.read(reading, VERDICT_BYTES)
        if not piece:
            break
        heard += piece
    os.kill(child, KILL)
    status = os.waitpid(child, 0)[1]
    lines = heard.decode("utf-8", "replace").splitlines()
    leading = f"{nonce} "
    # Exactly what the runner writes: anything more was written by the row's code.
    genuine = all(line.startswith(leading) for line in lines) and len(lines) <= 2
    told = [line[len(leading) :] for line in lines] if genuine else []
    held = told[0].split(",") if told else []
    if held == ["unsafe"]:
        return {"said": "unsafe", "guards": guards}
    if late:
        return {"said": "late", "guards": held}
    if len(told) == 2:
        return {"said": told[1], "guards": held}
    ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "an exit"
    return {"said": f"silent {ended}", "guards": held}


if __name__ == "__main__":
    outcome = keep(marshal.load(sys.stdin.buffer))
    os.write(1, marshal.dumps(outcome))
    os._exit(0)
