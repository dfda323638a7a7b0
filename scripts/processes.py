"""A script's processes and temporary folders, so that nothing of them outlives it, however it ends.

What a process started may have a session of its own, and its parent may be gone: no group and no parent finds it. So
the script becomes the parent of all orphans below it (Linux's "child subreaper"), and `end_all` ends whatever descends
from it. A process is not asked to end when its parent dies (PR_SET_PDEATHSIG): that signal comes when the thread ends
that started it, and some scripts start programs from threads.
"""
import ctypes, os, signal, sys, tempfile, time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST = 80  # of a temporary folder's path: with a socket's name below it, it has to stay under 108


def adopt():
    """From now on this process is the parent of every orphan below it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


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
    """Kills every process below this one. False if some are there after so many seconds (in the kernel, uninterruptible).
    For when every `subprocess.Popen` that matters was waited for: whose exit code is asked later gets 0."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = descendants()
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if not found:
            return True
        time.sleep(0.02)
    return False


def temporary(prefix):
    """A new folder below TMPDIR, or below /tmp where a socket's path would become too long."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base if len(base) + len(prefix) + 9 <= LONGEST else "/tmp"))
