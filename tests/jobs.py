"""Functions that the tests run in workers. Imports next to nothing."""

import os
import re
import sys
import threading
from time import perf_counter


def echo(value):
    return value


async def echo_later(value):
    return value


def add(a, b=0):
    return a + b


def type_name(value):
    return type(value).__name__


def spin(seconds):
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def pid():
    return os.getpid()


def parent_pid():
    return os.getppid()


def raise_(error):
    raise error


class OddError(Exception):
    """Its __init__ takes something else than its args, so calling the class again fails."""

    def __init__(self, first, *, second):
        super().__init__(f"{first} and {second}")
        self.second = second


def raise_odd(first, second):
    error = OddError(first, second=second)
    if hasattr(error, "add_note"):
        error.add_note("a note of the job")
    raise error


def raise_from_cause():
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("because of a key") from error


def raise_local():
    class LocalError(Exception):
        pass

    raise LocalError("nobody else knows this class", threading.Lock())


class Exits(Exception):
    def __reduce__(self):
        raise SystemExit("in __reduce__")


def raise_exits():
    raise Exits("reduce me")


def sys_exit(code):
    sys.exit(code)


def hard_exit(code):
    os._exit(code)


def kill_self(signal):
    os.kill(os.getpid(), signal)


def unpicklable():
    return threading.Lock()


class BreaksInParent:
    """Pickles, and does not unpickle."""

    def __reduce__(self):
        return raise_, (ValueError("in the unpickling"),)


def breaks_in_parent():
    return BreaksInParent()


def print_twice(text):
    print(text, end="")
    print(text, end="", file=sys.stderr)


def close_stdout():
    sys.stdout.close()
    return "closed"


def fork_and_return():
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return pid


def descriptors():
    """What this process has open, by number: names of the files."""
    return {
        int(name): os.readlink(f"/proc/self/fd/{name}")
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}") or os.path.islink(f"/proc/self/fd/{name}")
    }


def signal_state():
    import signal

    return {
        "handlers": {
            number: signal.getsignal(number) == signal.SIG_DFL
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
        },
        "interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "mask": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "wakeup": signal.set_wakeup_fd(-1),
    }


def takes_over():
    return list(sys.path), os.getcwd(), dict(os.environ)


def groups():
    return os.getpid(), os.getpgid(0), os.getsid(0)


def fill(buffer, byte):
    buffer.view[:] = bytes([byte]) * buffer.nbytes
    return buffer.nbytes


def total(buffer):
    return sum(buffer.view)


def make_buffer(data):
    from asynclam import SharedBuffer

    buffer = SharedBuffer(len(data))
    buffer.view[:] = data
    return buffer


def draw_random():
    import random

    return random.random()


def imported(*names):
    return [name for name in names if name in sys.modules]


def fail_on_odd(number):
    if number % 2:
        raise ValueError(number)
    return number


_initialized = []


def initialize(*values):
    _initialized.extend(values)


def initialized():
    return _initialized


def fail_to_initialize():
    raise RuntimeError("the initializer is wrong")


def lock_if(wanted):
    return threading.Lock() if wanted else None


def bad_notes():
    error = ValueError("text")
    error.__notes__ = "abc"
    raise error


class BadRepr:
    def __repr__(self):
        raise RuntimeError("in __repr__")


def bad_exit():
    raise SystemExit(BadRepr())


class FrozenError(Exception):
    """Nobody may set its attributes, as in a frozen dataclass."""

    def __setattr__(self, name, value):
        raise AttributeError(name)


def frozen():
    raise FrozenError(3)


class KillsWhoUnpickles:
    def __reduce__(self):
        return hard_exit, (3,)


def spawn_forever():
    import subprocess

    return subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL).pid


def leave_the_group(path):
    from tests.parts.gate import pass_through

    os.setpgid(0, os.getpgid(os.getppid()))
    return pass_through(path)


def describe(value):
    """What a job sees of an argument, and the argument itself."""
    return type(value).__name__, value


def halve(array):
    """Writes into its argument, and returns it."""
    array //= 2
    return array


def fill_from(buffer, array):
    buffer.view[:] = array
    return buffer, array


def blank_bytes(nbytes):
    return bytes(nbytes)


_kept = []


def keep(value):
    _kept.append(value)


def kept():
    return _kept


def mapped_segments():
    """How many maps of segments this process has."""
    with open("/proc/self/maps") as maps:
        return sum(bool(_SEGMENT.search(line)) for line in maps)


# A memfd, or a file that never had a name (O_TMPFILE) or has it no more.
_SEGMENT = re.compile(r"(/memfd:asynclam|/#\d+|/asynclam\S*) \(deleted\)$", re.MULTILINE)


def memory(_value=None):
    """Bytes that this process has for itself alone, and with what it shares."""
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":", 1) for line in status)
    return tuple(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))


def touch(buffer):
    """Writes to both ends and the middle of a buffer."""
    for index in (0, buffer.nbytes // 2, buffer.nbytes - 1):
        buffer.view[index] = 7


def note(path, number, deadly=None):
    """Appends a number to a file, then dies if it is the deadly one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    if number == deadly:
        os._exit(3)
    return number


def wait_if(path, number):
    """Returns at once, unless there is a gate to wait at."""
    if path is not None:
        from tests.parts.gate import pass_through

        pass_through(path)
    return number


_calls = {}


def count_calls():
    """Counts, from here on, what this process asks of its sockets."""
    import socket

    def counting(name, call):
        def counted(*args):
            _calls[name] = _calls.get(name, 0) + 1
            return call(*args)

        return counted

    for name in ("send", "sendall", "sendmsg", "recv", "recv_into", "recvmsg", "recvmsg_into"):
        setattr(socket.socket, name, counting(name, getattr(socket.socket, name)))


def calls():
    return dict(_calls)


def touched_memory(array):
    """The memory of this process, once it has read an array."""
    return memory(array.sum())


def ones(count):
    import numpy as np

    return np.ones(count, dtype=np.uint8)
