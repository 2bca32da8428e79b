"""What a worker takes over from the loop process: its working directory may be gone."""

import os

from asynclam import _recipe


def test_a_working_directory_that_was_removed(tmp_path, monkeypatch):
    """A worker stays where it is then, and starts."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir(tmp_path / "gone")
    recipe = _recipe.Recipe.loads(_recipe.Recipe(0, b"", ()).dumps())
    os.chdir(tmp_path)
    recipe.apply()
    assert os.getcwd() == str(tmp_path)
