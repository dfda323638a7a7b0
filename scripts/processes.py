"""A script's processes and temporary folders, so that nothing of them outlives it, however it ends.

What a process started may have a session of its own, and its parent may be gone: no group and no parent finds it. So
the script becomes the parent of all orphans below it (Linux's "child subreaper"), and `end_all` ends whatever descends
from it. That a process gets a signal when its parent dies is used where a single thread starts processes: the signal
comes when that thread ends.
"""
import ctypes, os, signal, sys, tempfile, time
from pathlib import Path

SHORT = "s."
TOLD = 2  # seconds in which a daemon removes what it published
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of a temporary folder's path. A socket's address holds 107 bytes, and `spillway doctor` looks for one at
# /proc/PID/root/FOLDER/run/session/session.sock.
LONGEST = 64


def adopt():
    """From now on this process is the parent of every orphan below it."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def end_with_parent():
    """In a new process: SIGTERM when the thread that started it is gone, even if that was killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))


def on_endings(handler):
    """A handler for SIGINT, SIGTERM and SIGHUP; what the caller has ignored, as nohup does, stays so."""
    for each in ENDINGS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, handler)


def end_by_signal():
    """The first SIGINT, SIGTERM or SIGHUP ends the script by SystemExit, so that every `finally` is done; no later one
    disturbs that. For the main thread."""
    adopt()

    def ended(number, _):
        on_endings(lambda *_: None)
        sys.exit(128 + number)

    on_endings(ended)


def descendants():
    """The processes below this one, the dead among them left out."""
    children, dead = {}, set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # The name, in parentheses, may hold anything.
                state, parent = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            children.setdefault(int(parent), []).append(int(entry))
            if state in "ZX":
                dead.add(int(entry))
    found, look = [], [os.getpid()]
    while look:
        below = children.get(look.pop(), [])
        found += below
        look += below
    return [pid for pid in found if pid not in dead]


def end_all(seconds=10):
    """Ends every process below this one: SIGTERM, and after TOLD seconds SIGKILL. False if some are there after so many
    seconds (in the kernel, uninterruptible). For when every `subprocess.Popen` that matters was waited for: whose exit
    code is asked later gets 0."""
    began, told = time.monotonic(), set()
    while time.monotonic() < began + seconds:
        found = descendants()
        for pid in found:
            try:
                if time.monotonic() > began + TOLD:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in told:
                    os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
        told.update(found)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if not found:
            return True
        time.sleep(0.02)
    return False


def temporary(prefix, below=0):
    """A new folder below TMPDIR, with so many bytes left for the name of another below it. Where that would become too
    long for a socket, its name is short, or it is below /tmp."""
    base = tempfile.gettempdir()
    fits = lambda name: len(os.fsencode(base)) + 1 + len(name) + 8 + below <= LONGEST
    if not fits(prefix):
        base, prefix = (base, SHORT) if fits(SHORT) else ("/tmp", prefix)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base))
