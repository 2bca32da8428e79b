"""A plain handler under the real runtime client behind the real Runtime Interface Emulator."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

import tests.parts.emulator
from tests.parts.emulator import EmulatorError, FunctionError, emulator

pytestmark = pytest.mark.outside

_FUNCTIONS = Path(__file__).parent / "functions"


@pytest.fixture(params=[False, True], ids=["plain", "box"])
def box(request: pytest.FixtureRequest) -> bool:
    inside: bool = request.param
    return inside


def test_three_invocations_are_served_by_one_process(box: bool) -> None:
    """The first invocation starts the runtime; the second and the third find it warm."""
    with emulator("echo.handler", cwd=_FUNCTIONS, box=box) as function:
        results = [function.invoke({"number": number}) for number in range(3)]
    assert [result["event"]["number"] for result in results] == [0, 1, 2]
    assert len({result["pid"] for result in results}) == 1
    assert not box or results[0]["uid"] == 993


def test_an_error_of_the_handler_is_reported(box: bool) -> None:
    """What the handler raises is named, together with its log; the runtime lives on."""
    with emulator("echo.handler", cwd=_FUNCTIONS, box=box) as function:
        before = function.invoke({})["pid"]
        with pytest.raises(FunctionError, match="ValueError: told to") as caught:
            function.invoke({"raise": "told to"})
        assert (caught.value.kind, caught.value.text) == ("ValueError", "told to")
        assert "told to {'raise': 'told to'}" in str(caught.value)
        assert function.invoke({})["pid"] == before


def test_a_runtime_that_dies_is_replaced(box: bool) -> None:
    """A handler that ends the process fails its invocation, and the next one finds a new one."""
    with emulator("echo.handler", cwd=_FUNCTIONS, box=box) as function:
        before = function.invoke({})["pid"]
        with pytest.raises(FunctionError, match="exit status 3"):
            function.invoke({"exit": 3})
        assert function.invoke({})["pid"] != before


def test_a_function_runs_out_of_time(box: bool) -> None:
    """An invocation that takes longer than the function's timeout fails."""
    with (
        emulator("echo.handler", cwd=_FUNCTIONS, box=box, timeout=1) as function,
        pytest.raises(FunctionError, match=r"timed out after 1\.00 seconds"),
    ):
        function.invoke({"hang": True})


def test_a_handler_that_cannot_be_imported_is_reported() -> None:
    """The error of the import, which the runtime client reports, is that of the invocation."""
    with (
        emulator("missing.handler", cwd=_FUNCTIONS) as function,
        pytest.raises(FunctionError, match="No module named 'missing'"),
    ):
        function.invoke()


def test_settings_reach_the_function(box: bool) -> None:
    """Memory and variables are what was asked for."""
    with emulator(
        "echo.variables", cwd=_FUNCTIONS, box=box, memory=3008, env={"MINE": "1"}
    ) as function:
        variables = function.invoke(["AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "MINE"])
    assert variables == {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "3008", "MINE": "1"}


def test_no_process_is_left(box: bool) -> None:
    """Processes in sessions of their own, which a group's kill would miss, are ended as well."""
    with emulator("echo.handler", cwd=_FUNCTIONS, box=box) as function:
        function.invoke({"leave": True})
        # Popen returns when execve(2) has closed its pipe, which it does before it sets the new
        # command line.
        while not (left := marked()):
            pass
    assert not marked() & left


def marked() -> set[int]:
    """The processes that a function of echo.py has left."""
    return {
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if "asynclam-left" in _content(path)
    }


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_an_emulator_that_does_not_come_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulator that ends before it listens is an error that says so, with its log."""
    monkeypatch.setattr(tests.parts.emulator, "_binary", lambda: nullcontext("false"))
    with (
        pytest.raises(EmulatorError, match="ended with status 1 before it listened"),
        emulator("echo.handler", cwd=_FUNCTIONS),
    ):
        pytest.fail("it cannot have come up")
