"""The formats that people have, on real data, in ``examples/s3_formats.py`` as a Lambda function."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import asynclam
from asynclam import s3
from tests.end_to_end.test_examples import invoke

ROOT = Path(asynclam.__file__).parent.parent

# They are installed on one of the Pythons only (the group "formats").
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("pyarrow", "PIL", "matplotlib"))), reason="no readers of formats"
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    """The objects, and what is to be found out about each."""
    directory = tmp_path_factory.mktemp("formats")
    command = [sys.executable, "-m", "tests.parts.formats", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True)
    expected = json.loads((directory / "expected.json").read_text())
    return {name: (directory / name).read_bytes() for name in expected}, expected


async def test_formats(
    s3_environment: dict[str, str], s3_client: Any, bucket: str, objects: Any
) -> None:
    """What the workers read is what pandas reads."""
    data, expected = objects[0], dict(objects[1])
    for name, content in data.items():
        await s3.upload(s3_client, bucket, f"formats/{name}", content)
    event = {"bucket": bucket, "prefix": "formats/"}
    found: Any = invoke("s3_formats", event, **s3_environment)
    portrait = found.pop("formats/portrait.jpg")
    assert max(portrait["width"], portrait["height"]) == expected.pop("portrait.jpg")["side"]
    assert 1_000 < portrait["bytes"] < len(data["portrait.jpg"])
    assert found.keys() == {f"formats/{name}" for name in expected}
    for name, values in expected.items():
        assert found[f"formats/{name}"] == pytest.approx(values)
