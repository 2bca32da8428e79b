"""What no job should do, and objects that no pickle should meet. Imports next to nothing."""

import _pickle
import asyncio
import os
import signal
import sys
import threading

from tests.parts.gate import pass_through
from tests.parts.processes import leave_memory

ODD = {
    "StopIteration": StopIteration,
    "StopAsyncIteration": StopAsyncIteration,
    "CancelledError": asyncio.CancelledError,
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "BaseException": BaseException,
}


def odd(name):
    return ODD[name]("odd")


def raise_odd(name):
    raise odd(name)


# --- pickling and unpickling ---------------------------------------------------------------------


class Reduces:
    """Raises where it is pickled."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        raise odd(self.name)


class Unreduces:
    """Raises where it is unpickled."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return raise_odd, (self.name,)


class SetsState:
    """Raises in __setstate__."""

    def __init__(self, name):
        self.name = name

    def __getstate__(self):
        return self.name

    def __setstate__(self, name):
        raise odd(name)


class Returns:
    """Its __reduce__ returns what it is given."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return self.value


class HangsWhereUnpickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pass_through, (self.path,)


class HangsWherePickled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        pass_through(self.path)
        return int, ()


class EndsWherePickled:
    def __reduce__(self):
        os._exit(4)


class EndsInWorkers:
    """Unpickles here, and ends a worker."""

    def __reduce__(self):
        return end_in_worker, (os.getpid(),)


def end_in_worker(pid):
    if os.getpid() != pid:
        os._exit(5)


class LiesAboutItsClass:
    __class__ = int


class OddState:
    __slots__ = ("value",)

    def __getstate__(self):
        return object()


class NoAttributes:
    """Every look at it raises."""

    def __getattribute__(self, name):
        raise RuntimeError(name)


class Recursion:
    def __reduce__(self):
        return self.__reduce__()


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def make(kind, *args):
    """A result that is made in the worker."""
    return kind(*args)


def raise_made(kind, *args):
    raise kind(*args)


def generator():
    return (number for number in range(3))


def thread_lock():
    return threading.Lock()


def with_closure(value):
    return lambda: value


def frame():
    return sys._getframe()


# --- exceptions ------------------------------------------------------------------------------------


class WrongArguments(Exception):
    """Calling the class with its args fails."""

    def __init__(self, one, two):
        super().__init__("one text")
        self.one, self.two = one, two


class NeedsKeyword(Exception):
    def __init__(self, *, keyword):
        super().__init__(keyword)


class ReducesOddly(Exception):
    def __reduce__(self):
        raise odd(self.args[0])


class ReducesAndHangs(Exception):
    def __reduce__(self):
        pass_through(self.args[0])
        return Exception, ()


class ReducesAndEnds(Exception):
    def __reduce__(self):
        os._exit(4)


class SetsStateOddly(Exception):
    """Raises in its __setstate__, in whatever process that is."""

    def __reduce__(self):
        return SetsStateOddly, self.args, self.args

    def __setstate__(self, args):
        raise odd(*args)


class UnreducesOddly(Exception):
    def __reduce__(self):
        return raise_odd, self.args


class UnreducesOddlyElsewhere(Exception):
    """Survives in the worker, and raises in the loop process."""

    def __reduce__(self):
        return raise_unless_in, (os.getpid(), *self.args)


def raise_unless_in(pid, name):
    if os.getpid() != pid:
        raise odd(name)
    return UnreducesOddlyElsewhere(name)


class BecomesAnother(Exception):
    def __reduce__(self):
        return int, ()


class NewFails(Exception):
    def __new__(cls, *args):
        if os.getpid() != args[0]:
            raise RuntimeError("in __new__")
        return super().__new__(cls, *args)


class StrFails(Exception):
    def __str__(self):
        raise SystemExit("in __str__")


class Unhashable(Exception):
    __hash__ = None


class NeedsLock(Exception):
    def __init__(self):
        super().__init__("with a lock", threading.Lock())
        self.lock = threading.Lock()


def raise_new_fails():
    raise NewFails(os.getpid())


def raise_its_own_cause():
    error = ValueError("its own cause")
    error.__cause__ = error
    raise error


def raise_with_itself():
    error = ValueError("holds itself")
    error.args = (error,)
    raise error


def raise_endless_causes(count):
    error = None
    for number in range(count):
        new = ValueError(number)
        new.__cause__ = error
        error = new
    raise error


def raise_surrogates():
    raise ValueError("\udcff")


def raise_long(length):
    raise ValueError("x" * length)


def raise_deep(depth):
    if depth:
        raise_deep(depth - 1)
    raise ValueError("deep")


def recurse():
    return recurse()


def raise_with_broken_traceback():
    class Broken(Exception):
        __traceback__ = None

    raise Broken("broken")


def raise_with_bad_notes():
    error = ValueError("notes")
    error.__notes__ = [object(), BadStr()]
    raise error


class BadStr:
    def __str__(self):
        raise SystemExit("in __str__")

    __repr__ = __str__


def raise_bad_args():
    raise ValueError(BadStr())


# --- what a job does to its process ----------------------------------------------------------------


def own_socket():
    """The number of the worker's channel."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                return int(name)
        except OSError:
            continue
    raise AssertionError("a worker has a socket")


def write_to_channel(data):
    os.write(own_socket(), data)
    return "its own result"


def reply_with(body, flags=0):
    """Replies in the place of the worker, and ends it."""
    from asynclam import _wire

    above = sys._getframe()
    while above.f_code.co_name != "run" or "frame" not in above.f_locals:
        above = above.f_back
    number = above.f_locals["frame"].number
    os.write(own_socket(), b"".join(_wire.encode(_wire.RESULT, number, [body], flags=flags)))
    os._exit(0)


def channel_without_blocking():
    os.set_blocking(own_socket(), False)
    return "done"


def close_channel():
    os.close(own_socket())


def shut_channel_down(how):
    import socket

    sock = socket.socket(fileno=os.dup(own_socket()))
    sock.shutdown(how)
    sock.close()
    return "shut down"


def replace_channel():
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, own_socket())


def hard_exit(code):
    os._exit(code)


def kill_self(number):
    os.kill(os.getpid(), number)


def large(value):
    return [1] * 200_000 + [value]


def raise_needs_keyword():
    raise NeedsKeyword(keyword="text")


def exit_with_bad_repr():
    raise SystemExit(BadStr())


def change_directory(path):
    os.chdir(path)


def clear_environment():
    os.environ.clear()


def close_range(first):
    os.closerange(first, 1024)


def fork_and_raise():
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    raise ValueError(pid)


def fork_and_exit():
    if not os.fork():
        sys.exit(1)
    return "parent"


def raise_in_thread():
    def fail():
        raise ValueError("in a thread")

    threading.excepthook = lambda _: None
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    return "joined"


def exit_in_thread():
    import _thread

    _thread.start_new_thread(os._exit, (9,))
    threading.Event().wait()


def set_session():
    os.setsid()


def leave_group():
    os.setpgid(0, os.getpgid(os.getppid()))
    return "left"


def handle_signals():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, lambda *_: os._exit(6))
    return "handled"


def block_signals():
    return len(signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))


def alarm():
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    threading.Event().wait()


def replace_stdout(value):
    sys.stdout = sys.stderr = value


class OddStream:
    """A stream that fails whatever it is asked."""

    def __init__(self, name):
        self.name = name

    def flush(self):
        raise odd(self.name)

    write = flush


def delete_stdout():
    del sys.stdout, sys.stderr


def close_descriptor(number):
    os.close(number)


def set_recursion_limit(limit):
    sys.setrecursionlimit(limit)


def disable_gc():
    import gc

    gc.disable()
    gc.set_debug(0)


def set_umask():
    os.umask(0o777)


def kill_parent(number):
    os.kill(os.getppid(), number)
    return "done"


def kill_group():
    os.kill(0, signal.SIGKILL)


def use_up_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return bytearray(1 << 30)


def use_up_memory_in_small_pieces():
    """Nothing can be had any more while somebody holds what is kept here."""
    leave_memory(16 << 20)
    kept = []
    while True:
        kept.append(bytes(100))


def explain_used_up_memory():
    try:
        use_up_memory_in_small_pieces()
    except MemoryError as error:
        raise ValueError("too much") from error


def use_up_descriptors():
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))


def dereference_null():
    import ctypes

    ctypes.string_at(0)


def abort():
    os.abort()


def break_excepthook():
    sys.excepthook = None
    raise ValueError("without a hook")


def break_pickle():
    _pickle.dumps = None


def forget_modules():
    for name in [name for name in sys.modules if name.startswith("asynclam")]:
        del sys.modules[name]


def execute():
    os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(8)"])


async def coroutine():
    return 1


def make_coroutine():
    result = coroutine()
    result.close()
    return result


def only_here(directory, what):
    """A class of a module that the loop process cannot import."""
    with open(os.path.join(directory, "only_in_worker.py"), "w") as file:
        file.write("class Value: pass\nclass OddError(Exception): pass\n")
    sys.path.insert(0, directory)
    import only_in_worker

    value = getattr(only_in_worker, what)()
    if what == "OddError":
        raise value
    return value


def half_a_frame(data, path):
    """What comes next on the channel is taken for the other half."""
    write_to_channel(data)
    pass_through(path)


def state():
    return os.getcwd(), dict(os.environ), sys.stdout and "a stream"


def leave_thread(path):
    threading.Thread(target=pass_through, args=(path,)).start()


def fork_and_live_on(path):
    """Returns; its child waits at a gate."""
    pid = os.fork()
    if not pid:
        try:
            pass_through(path)
        finally:
            os._exit(0)
    return pid
