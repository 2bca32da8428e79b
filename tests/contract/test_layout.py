"""The layout tells the architecture: arrows point down, and the door is lazy."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import asynclam

PACKAGE = Path(asynclam.__file__).parent

# Each room, and those it may import. A room that is not here fails the test.
ARROWS = {
    "_errors": set(),
    "_wire": set(),
    "_cgroup": set(),
    "_sizing": {"_cgroup"},
    "_memory": set(),
    "_environment": {"_memory", "_sizing"},
    "_descriptors": {"_wire"},
    "_segments": {"_wire", "_memory", "_sizing"},
    "_payload": {"_wire", "_memory"},
    "_steps": {"_payload", "_wire", "_memory"},
    "_call": {"_payload", "_steps", "_wire", "_errors"},
    "_raised": {"_errors"},
    "_guard": {"_errors"},
    "_limits": set(),
    "_context": {"_errors", "_payload"},
    "_records": {"_descriptors", "_raised", "_wire"},
    "_worker": {
        "_call", "_context", "_descriptors", "_guard", "_limits", "_payload", "_raised", "_records",
        "_segments", "_steps", "_wire", "_errors",
    },
    "_loops": set(),
    "_coroutines": {"_call", "_errors", "_loops", "_raised", "_records", "_wire", "_worker"},
    "_recipe": {"_limits", "_records"},
    "_life": {"_descriptors"},
    "_server": {
        "_coroutines", "_descriptors", "_guard", "_life", "_limits", "_memory", "_recipe", "_wire",
        "_worker",
    },
    "_forkserver": {"_descriptors", "_life", "_server", "_worker"},
    # ---- the asyncio line: nothing above this comment imports asyncio or anyio ----
    "_channel": {"_descriptors", "_wire", "_worker"},
    "_turns": set(),
    "_grace": set(),
    "_job": {"_call", "_grace", "_payload", "_raised", "_steps", "_wire", "_errors"},
    "_pool": {
        "_call", "_channel", "_errors", "_forkserver", "_grace", "_job", "_life", "_memory",
        "_payload", "_raised", "_recipe", "_records", "_segments", "_turns", "_wire", "_worker",
    },
    "_inline": {"_call", "_coroutines", "_errors", "_job", "_steps", "_turns", "_wire", "_worker"},
    "_pools": {"_inline", "_job", "_pool"},
    "_chunks": set(),
    "_sources": set(),
    "_streams": {"_call", "_chunks", "_errors", "_grace", "_sources"},
    "_threads": set(),
    "_statistics": set(),
    "_executor": {
        "_call", "_chunks", "_context", "_errors", "_forkserver", "_grace", "_inline", "_job",
        "_limits", "_payload", "_pool", "_pools", "_server", "_sizing", "_sources", "_statistics", "_steps",
        "_streams", "_threads", "_wire",
    },
    "_default": {"_executor", "_sources", "_streams"},
    "_snapstart": {"_default"},
    "_sandbox": {"_loops"},
    "_deadline": {"_context", "_errors", "_executor"},
    "_termination": {"_descriptors"},
    "_decorators": {"_call"},
    "_handler": {
        "_call", "_context", "_deadline", "_decorators", "_default", "_errors", "_executor", "_sandbox",
        "_server", "_snapstart", "_termination",
    },
    "testing": {"_decorators", "_default", "_executor", "_handler"},
    # The rooms of s3, of which those behind its door are lazy, too.
    "s3._connections": set(),
    "s3._session": set(),
    "s3._client": {"s3._connections", "s3._session"},
    "s3._places": set(),
    "s3._together": {"_grace"},
    "s3._checksums": {"_memory", "s3._together"},
    "s3._source": {"s3._client", "s3._places", "s3._together"},
    "s3._download": {
        "_memory", "s3._checksums", "s3._client", "s3._places", "s3._source", "s3._together",
    },
    "s3._parts": {"_memory"},
    "s3._multipart": {"s3._client", "s3._parts", "s3._together"},
    "s3._upload": {"_memory", "s3._client", "s3._multipart", "s3._parts", "s3._places"},
    "s3._listing": {"s3._client", "s3._places"},
    "s3._counted": {"_memory"},
    "s3._budget": {"_memory", "_sizing", "s3._counted"},
    "s3._many": {
        "_chunks", "_memory", "_streams", "s3._budget", "s3._client", "s3._download", "s3._listing",
    },
    "s3._remote": {
        "_call", "_errors", "_memory", "s3._client", "s3._download", "s3._session", "s3._together",
    },
    "s3._processing": {
        "_chunks", "_default", "_executor", "_memory", "_streams", "s3._listing", "s3._remote",
    },
    "s3": {
        "s3._client", "s3._download", "s3._listing", "s3._many", "s3._processing", "s3._upload",
    },
    "doctor": {"_environment", "_sizing"},
    "_cli": {"_box", "_demo", "doctor"},
    "__main__": {"_cli"},
    "__init__": {"_context", "_default", "_environment", "_errors", "_executor", "_handler", "_memory",
        "_statistics", "_streams", "doctor", "s3", "testing",
    },
}  # fmt: skip
BELOW_ASYNCIO = list(ARROWS)[: list(ARROWS).index("_channel")]
BELOW_ASYNCIO.remove("_loops")  # loaded in a worker by the first coroutine
ROOMS = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("s3/*.py")])


def room_of(path: Path) -> str:
    """Its name in the layout; that of a package is its door's."""
    inside = "" if path.parent == PACKAGE else path.parent.name
    return ".".join(filter(None, (inside, "" if inside and path.stem == "__init__" else path.stem)))


def own_imports(path: Path) -> set[str]:
    """The rooms that a module imports, wherever in it."""
    inside = "" if path.parent == PACKAGE else f"{path.parent.name}."
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = {node.module.split(".")[0]} if node.module else {n.name for n in node.names}
            found |= {f"{inside}{name}" for name in names} if node.level == 1 else names
    return found


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_arrows_point_down(path):
    """A module imports only the rooms that the layout gives it, and none above it."""
    room = room_of(path)
    allowed = ARROWS[room]
    assert own_imports(path) <= allowed
    order = list(ARROWS)
    if room != "__init__":
        assert all(order.index(below) < order.index(room) for below in allowed - {"_box", "_demo"})


@pytest.mark.alone
@pytest.mark.parametrize("room", BELOW_ASYNCIO)
def test_no_asyncio_below_the_line(room):
    """What a worker imports loads neither asyncio nor anyio."""
    loaded = run(f"import asynclam.{room}, sys; print(*sys.modules)")
    assert not {"asyncio", "anyio", "multiprocessing", "concurrent.futures"} & loaded


@pytest.mark.alone
def test_the_door_is_lazy():
    """``import asynclam`` loads none of its rooms, and nothing heavy."""
    loaded = run("import asynclam, sys; print(*sys.modules)")
    assert {name for name in loaded if name.startswith("asynclam")} == {"asynclam"}
    assert not {"asyncio", "typing", "socket", "pickle"} & loaded


@pytest.mark.alone
def test_a_job_does_not_load_anyio():
    """``run_cpu`` alone loads no anyio, cloudpickle, pickle.py or multiprocessing, and little of the rest."""
    loaded = run(
        "import asyncio, sys, asynclam\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(asynclam.run_cpu(abs, -1)); print(*sys.modules)"
    )
    assert (
        not {"anyio", "cloudpickle", "pickle", "multiprocessing", "aiobotocore", "uvloop"} & loaded
    )
    assert (
        not {"asynclam._streams", "asynclam._threads", "asynclam._segments", "dataclasses"} & loaded
    )


def run(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded, as ``code`` prints them."""
    command = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}",
    ]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_exports_agree():
    """``__all__``, the table of homes and what can be imported are the same names."""
    assert sorted(asynclam._HOMES) == asynclam.__all__
    for name in asynclam.__all__:
        value = getattr(asynclam, name)
        assert value.__doc__, f"{name} has no docstring"
    assert set(dir(asynclam)) == {*asynclam.__all__, "__version__", "doctor", "s3", "testing"}


def test_an_unknown_name():
    """A name that does not exist is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="no_such_name"):
        asynclam.no_such_name  # noqa: B018


def test_version():
    """The package has its version with it, whether or not it was installed, and nowhere else."""
    assert asynclam.__version__.count(".") >= 2
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert '\ndynamic = ["version"]' in project
    assert f'[tool.hatch.version]\npath = "{PACKAGE.name}/__init__.py"' in project


@pytest.mark.alone
def test_without_metadata(tmp_path):
    """A folder that was merely copied tells its version, and has what any module has."""
    (tmp_path / "asynclam").symlink_to(PACKAGE)
    loaded = run(
        f"sys.path[:] = [{str(tmp_path)!r}, *(p for p in sys.path if 'site-packages' not in p)]\n"
        "import asynclam, asynclam.doctor, inspect\n"
        "inspect.getmembers(asynclam); print(asynclam.__version__)"
    )
    assert loaded == {asynclam.__version__}


@pytest.mark.parametrize("name", ["doctor", "s3", "testing"])
def test_public_modules(name):
    """They are there once the package is imported."""
    loaded = run(f"import asynclam; print(asynclam.{name}.__name__)")
    assert loaded == {f"asynclam.{name}"}


@pytest.mark.parametrize("name", ["run_cpu", "Executor", "s3", "testing"])
def test_a_system_without_fork(monkeypatch, name):
    """What is wrong with it is said, and what to do, by whatever is imported first."""
    monkeypatch.delattr(os, "fork")
    monkeypatch.delitem(vars(asynclam), name, raising=False)
    with pytest.raises(ImportError, match=rf"needs os.fork\(\).* on {sys.platform}.*WSL"):
        exec(f"from asynclam import {name}")


def test_what_needs_no_fork(monkeypatch):
    """The version, the doctor and names that do not exist are what they are anywhere."""
    monkeypatch.delattr(os, "fork")
    monkeypatch.delitem(vars(asynclam), "doctor", raising=False)
    assert asynclam.__version__
    assert asynclam.doctor.handler
    assert not hasattr(asynclam, "no_such_name")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_multiprocessing(path):
    """Nothing imports multiprocessing, whose locks are semaphores, but what tries it out."""
    if path == PACKAGE / "_doctor" / "trials.py":
        return  # each in a process of its own
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )  # fmt: skip
        assert not [
            name for name in names if name.startswith(("multiprocessing", "_multiprocessing"))
        ]


def test_nothing_imports_the_box():
    """The box is a tool: nothing but the command line knows of it."""
    for path in PACKAGE.glob("*.py"):
        assert path.stem == "_cli" or "_box" not in path.read_text(), path
