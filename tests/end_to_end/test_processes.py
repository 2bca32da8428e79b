"""What the processes are: their descriptors, signals, groups, state, and their end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import asynclam
from asynclam import Executor, _call, _forkserver, run_cpu, set_default_executor
from tests import jobs
from tests.parts.gate import Gate

ROOT = Path(asynclam.__file__).parent.parent


@pytest.fixture(params=["fork", "spawn"])
async def executor(request):
    async with Executor(2, start_method=request.param) as executor:
        yield executor


async def test_descriptors(executor, tmp_path):
    """A worker has stdout, stderr and its own; what it inherits is /dev/null under the same number."""
    with open(tmp_path / "secret", "w"), open(tmp_path / "other", "w"):
        files = await executor.run_cpu(jobs.descriptors)
    assert not [file for file in files.values() if str(tmp_path) in file]
    assert files[0] == "/dev/null"
    own = {number: file for number, file in files.items() if file.startswith("socket:")}
    assert len(own) == 1, "the channel"
    pages = [file for file in files.values() if "asynclam" in file and "(deleted)" in file]
    assert len(pages) == (sys.version_info < (3, 13)), "the map of the page"


async def test_no_sibling_holds_a_channel(executor, gate):
    """No worker holds a copy of another's channel: its end of file would not be seen."""
    tasks = [asyncio.ensure_future(executor.run_cpu(gate_job, gate.path)) for _ in range(2)]
    assert await gate.entered() != await gate.entered()
    gate.open(2)
    both = await asyncio.gather(*tasks)
    sockets = [{file for file in files.values() if file.startswith("socket:")} for files in both]
    assert len(sockets[0] | sockets[1]) == len(sockets[0]) + len(sockets[1])


async def test_signals(executor):
    """In a worker, handlers are the default ones, Ctrl-C is ignored, nothing is blocked."""
    state = await executor.run_cpu(jobs.signal_state)
    assert all(state["handlers"].values())
    assert state["interrupt"]
    assert state["mask"] == 0
    assert state["wakeup"] == -1


async def test_groups(executor):
    """Each worker leads its own process group, in the session of the fork server."""
    pid, group, session = await executor.run_cpu(jobs.groups)
    assert (pid, group) == (group, pid)
    assert session == await executor.run_cpu(jobs.parent_pid)
    assert session != os.getsid(0)


async def test_state_is_that_of_the_moment(tmp_path, monkeypatch):
    """A worker has the path, directory and environment of the moment it was started."""
    async with Executor(1) as executor:
        await executor.run_cpu(jobs.echo, 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SET_LATER", "yes")
    monkeypatch.delenv("PATH")
    monkeypatch.syspath_prepend(str(tmp_path))
    async with Executor(1) as executor:
        path, directory, environment = await executor.run_cpu(jobs.takes_over)
    assert path == sys.path
    assert directory == str(tmp_path)
    assert environment == {**environment, **os.environ}
    assert all(name.endswith("_THREADS") for name in environment.keys() - os.environ.keys())


async def test_random_numbers(executor):
    """Workers draw different random numbers."""
    drawn = await asyncio.gather(*(executor.run_cpu(jobs.draw_random) for _ in range(20)))
    assert len(set(drawn)) == 20


async def test_the_fork_server_dies(gate):
    """Killed, it is replaced; the workers that run go on to the end of their job."""
    async with Executor(1) as executor:
        server = await executor.run_cpu(jobs.parent_pid)
        job = asyncio.ensure_future(executor.run_cpu(gate_job, gate.path))
        await gate.entered()
        os.kill(server, signal.SIGKILL)
        while executor._pool._control is not None:
            await asyncio.sleep(0)
        assert not job.done()
        gate.open()
        assert await job
        assert gate.nobody_entered()  # a second time
        successor = await executor.run_cpu(jobs.parent_pid)
        assert [successor] == [server.pid for server in _forkserver._servers.values()]
        assert successor != server


def test_the_fork_server_dies_unnoticed():
    """If it dies while no loop runs, the next executor has another one."""
    server = _forkserver.ensure("spawn")
    os.kill(server.pid, signal.SIGKILL)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)

    async def use():
        async with Executor(1, start_method="spawn") as executor:
            return await executor.run_cpu(jobs.parent_pid)

    assert asyncio.run(use()) != server.pid


def test_a_stopped_fork_server_is_ended():
    """A fork server that does not answer is killed when it is to end: nothing hangs."""
    server = _forkserver.ensure("spawn")
    os.kill(server.pid, signal.SIGSTOP)
    _forkserver.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_one_loop_after_the_other():
    """The default executor's workers outlive ``asyncio.run()``, once an invocation."""
    pids = {asyncio.run(run_cpu(jobs.pid)) for _ in range(3)}
    assert len(pids) == 1


def test_jobs_of_a_closed_loop_are_killed(gate):
    """A job whose loop was closed does not keep its worker from the next loop."""

    async def leave():
        task = asyncio.ensure_future(run_cpu(gate_job, gate.path))
        pid = await gate.entered()
        asyncio.get_running_loop().call_soon(task.cancel)
        return pid

    loop = asyncio.new_event_loop()
    set_default_executor(Executor(1))
    executor = asynclam._default.default_executor()

    async def abandon():
        executor._pool_here().submit(_call.Call(gate_job, (gate.path,), {}))
        return await gate.entered()

    pid = loop.run_until_complete(abandon())
    loop.close()
    assert asyncio.run(run_cpu(jobs.pid)) != pid


def gate_job(path):
    from tests.parts.gate import pass_through

    return pass_through(path, jobs.descriptors())


def test_workers_of_a_closed_loop_do_not_count():
    """Workers whose loop was closed in another thread leave their places to the loop that lives."""
    import threading

    executor = Executor(2)
    set_default_executor(executor)

    async def both():
        await asyncio.gather(run_cpu(jobs.pid), run_cpu(jobs.pid))

    async def main(gate):
        await run_cpu(jobs.pid)
        thread = threading.Thread(target=lambda: asyncio.run(both()))
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0)
        tasks = [asyncio.ensure_future(run_cpu(gate_job, gate.path)) for _ in range(2)]
        assert await gate.entered() != await gate.entered()
        gate.open(2)
        await asyncio.gather(*tasks)

    with tempfile.TemporaryDirectory() as directory:
        gate = Gate(directory)
        asyncio.run(main(gate))
        gate.close()


def test_two_loops_in_two_threads():
    """Each live loop has workers of its own, out of the same ``max_workers``."""
    import threading

    found = {}
    first_done, second_done = threading.Event(), threading.Event()

    async def first():
        found["first"] = await run_cpu(jobs.pid)
        first_done.set()
        await asyncio.to_thread(second_done.wait)

    async def second():
        found["second"] = await run_cpu(jobs.pid)

    thread = threading.Thread(target=lambda: asyncio.run(first()))
    thread.start()
    first_done.wait()
    asyncio.run(second())
    second_done.set()
    thread.join()
    assert found["first"] != found["second"]


def test_a_forked_process_makes_executors_of_its_own():
    """A process that a user's code forks keeps none of our connections, and can start anew."""
    pid = asyncio.run(run_cpu(jobs.pid))
    executor = asynclam._default.default_executor()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            try:
                asyncio.run(executor.run_cpu(jobs.pid))
            except RuntimeError as error:
                os.write(write, f"{error}\n".encode())
            other = asyncio.run(run_cpu(jobs.pid))
            os.write(write, b"another\n" if other != pid else b"the same\n")
            _forkserver.stop()
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as file:
        refused, outcome = file.read().splitlines()
    assert "belongs to process" in refused
    assert outcome == "another"
    assert asyncio.run(run_cpu(jobs.pid)) == pid


# --- whole programs ------------------------------------------------------------------------------


def program(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script in a fresh interpreter; returns when everything that holds its output has ended."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", *args, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


def test_exit_with_jobs_running():
    """An interpreter that exits with jobs running leaves no process, and says nothing."""
    done = program(
        "import asyncio, time, asynclam\n"
        "async def main():\n"
        "    asyncio.get_running_loop().slow_callback_duration = 1000  # a busy machine's own\n"
        "    task = asyncio.ensure_future(asynclam.run_cpu(print, 'started', flush=True))\n"
        "    await task\n"
        "    asyncio.ensure_future(asynclam.run_cpu(time.sleep, 1000))\n"
        "    await asyncio.sleep(0)  # it is submitted\n"
        "asyncio.run(main())"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("started\n", "", 0)


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 9)", "os._exit(1)"])
def test_the_loop_process_dies(death):
    """However the loop process dies, its workers and fork server end: their output is closed."""
    done = program(
        "import asyncio, os, asynclam\n"
        "async def main():\n"
        "    await asynclam.run_cpu(print, 'worked', flush=True)\n"
        f"    {death}\n"
        "asyncio.run(main())"
    )
    assert done.stdout == "worked\n"


def test_functions_of_main(tmp_path):
    """Functions and classes of a script travel, with a forked server and with a spawned one."""
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, sys\n"
        "from dataclasses import dataclass\n"
        "from asynclam import Executor\n"
        "factor = 3\n"
        "@dataclass\n"
        "class Point:\n"
        "    x: int\n"
        "class OwnError(Exception): pass\n"
        "def double(point): return Point(point.x * 2 * factor)\n"
        "def fail(): raise OwnError('own')\n"
        "async def main(method):\n"
        "    async with Executor(1, start_method=method) as executor:\n"
        "        print(await executor.run_cpu(double, Point(1)) == Point(6))\n"
        "        print(await executor.run_cpu(lambda p: p.x, Point(4)))\n"
        "        try: await executor.run_cpu(fail)\n"
        "        except OwnError as error: print(error)\n"
        "        def later(x): return double(x)\n"
        "        globals()['later'] = later\n"
        "        print(await executor.run_cpu(later, Point(2)))\n"
        "asyncio.run(main(sys.argv[1]))\n"
    )
    for method in ("fork", "spawn"):
        done = subprocess.run(
            [sys.executable, str(script), method],
            capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stdout == "True\n4\nown\nPoint(x=12)\n", done.stderr


def test_a_module_that_starts_its_handler(tmp_path):
    """A fork server and workers that import a handler's module do not start that handler, too."""
    (tmp_path / "module.py").write_text(
        "import threading\n"
        "from contextlib import asynccontextmanager\n"
        "from asynclam import lambda_handler, run_cpu\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()  # so: spawn\n"
        "def double(x): return 2 * x\n"
        "@asynccontextmanager\n"
        "async def lifespan():\n"
        "    print('lifespan', flush=True)\n"
        "    yield await run_cpu(double, 1)\n"
        "@lambda_handler(lifespan=lifespan)\n"
        "async def handler(event, context): return await run_cpu(double, event)\n"
        "handler.start()\n"
    )
    done = program("import module; print(module.handler(4, None))", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stdout.split() == ["lifespan", "8"], done.stderr


def test_no_semaphore():
    """Nothing creates a semaphore, imported or run: there is no /dev/shm to hold one."""
    done = program(
        "import _multiprocessing\n"
        "def refuse(*args, **kwargs): raise OSError(38, 'Function not implemented')\n"
        "_multiprocessing.SemLock = refuse\n"
        "import asyncio, asynclam, asynclam._handler, time\n"
        "async def io(x): return x\n"
        "async def main():\n"
        "    print(await asynclam.run_cpu(abs, -1))\n"
        "    print(await asynclam.run_cpu(lambda: 2))\n"
        "    print(await asynclam.run_blocking(abs, -3))\n"
        "    print(await asynclam.map_cpu(abs, asynclam.map_io(io, [-4])))\n"
        "    async with asynclam.Executor(1, start_method='spawn') as executor:\n"
        "        print(await executor.run_cpu(abs, -5))\n"
        "    try: await asyncio.wait_for(asynclam.run_cpu(time.sleep, 1000), 0.05)\n"
        "    except asyncio.TimeoutError: print(6)\n"
        "asyncio.run(main())\n"
        "@asynclam.lambda_handler\n"
        "async def handler(event, context): return await asynclam.run_cpu(abs, event)\n"
        "print(handler(-7, None))\n",
        ASYNCLAM="1",
    )
    assert done.stdout.split() == ["1", "2", "3", "[4]", "5", "6", "7"], done.stderr


NO_INTERPRETER = (
    "import asyncio, sys\n"
    "from asynclam import Executor, WorkerStartError, _forkserver\n"
    "async def main(method):\n"
    "    async with Executor(1, start_method=method) as executor:\n"
    "        return await executor.run_cpu(abs, -1)\n"
    "{before}\n"
    "try: asyncio.run(main('spawn'))\n"
    "except WorkerStartError as error: print(error, '|', type(error.__cause__).__name__)\n"
    "print(asyncio.run(main('fork')))\n"
)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("sys.executable = ''", "[Errno 8] sys.executable is no Python interpreter"),
        ("sys.executable = None", "[Errno 8] sys.executable is no Python interpreter"),
        ("sys.frozen = True", f"must be forked, not spawned: '{sys.executable}'; if that is no"),
        ("sys.executable = '/no/such'", "[Errno 2] No such file or directory: '/no/such'; if that"),
    ],
    ids=["empty", "none", "frozen", "missing"],
)
def test_no_interpreter_to_spawn(before, said):
    """A program that is no Python interpreter is not started again, and what to do is said."""
    done = program(NO_INTERPRETER.format(before=before))
    error, works = done.stdout.splitlines()
    assert said in error, done.stderr
    assert "call asynclam.prepare() before there are threads" in error
    assert "Error" in error.split(" | ")[1]
    assert works == "1"


@pytest.mark.parametrize("end", ["sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_an_interpreter_that_is_none(tmp_path, end):
    """A program that ends where a fork server should be: its status is told, if it has one."""
    application = tmp_path / "application"
    application.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys\n"
        "master = int(sys.argv[sys.argv.index('-c') + 2])\n"
        f"socket.socket(fileno=master).recv(1)\n{end}\n"
    )
    application.chmod(0o700)
    done = program(NO_INTERPRETER.format(before=f"sys.executable = {str(application)!r}"))
    error, works = done.stdout.splitlines()
    if "exit" in end:
        assert "the spawned fork server has exited with status 3" in error
        assert (
            f"'{application}'; if that is no Python interpreter, call asynclam.prepare()" in error
        )
    else:
        assert "status" not in error
    assert works == "1"


@pytest.mark.alone
def test_a_worker_imports_next_to_nothing():
    """A spawned worker has loaded none of what it does not need."""
    heavy = ("asyncio", "anyio", "multiprocessing", "concurrent.futures", "uvloop", "inspect")
    done = program(
        "import asyncio, json, sys\n"
        "from asynclam import Executor\n"
        "from tests import jobs\n"
        "async def main():\n"
        "    async with Executor(1, start_method='spawn') as executor:\n"
        f"        print(json.dumps(await executor.run_cpu(jobs.imported, *{heavy})))\n"
        "asyncio.run(main())"
    )
    assert json.loads(done.stdout) == []
