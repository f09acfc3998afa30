"""What was run, and files that are whole or not there."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from egjax.errors import EgjaxError
from egjax.evals import manifest
from egjax.evals.manifest import describe, revision, write_atomic


def test_names_the_machine_and_the_libraries():
    found = describe(seeds=[3, 4], command="make run")
    tree = json.loads(found.to_json())
    assert tree["command"] == "make run"
    assert tree["seeds"] == [3, 4]
    assert tree["versions"]["jax"]
    assert tree["hardware"]["cores"] >= 1
    assert tree["hardware"]["memory"] > 0
    assert tree["hardware"]["cpu"]
    assert tree["hardware"]["devices"]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@e", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    source = tmp_path / "code.py"
    monkeypatch.setattr(manifest, "__file__", str(source))
    manifest._code.cache_clear()
    assert describe(seeds=[]).commit is None
    assert describe(seeds=[]).dirty is None
    assert revision() == ""
    source.write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    manifest._code.cache_clear()
    clean, commit = describe(seeds=[]), git(tmp_path, "rev-parse", "HEAD")
    assert (clean.commit, clean.dirty) == (commit, False)
    assert revision() == commit
    source.write_text("2")
    assert describe(seeds=[]).dirty is False  # this process has loaded what was there before
    manifest._code.cache_clear()
    assert describe(seeds=[]).dirty is True
    assert revision() == f"{commit}+"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.json"
    write_atomic(path, "old ü")
    assert path.read_text(encoding="utf-8") == "old ü"

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(manifest.os, "fsync", full)
    with pytest.raises(EgjaxError, match="No space left on device") as caught:
        write_atomic(path, b"new")
    assert str(path) in str(caught.value)
    assert path.read_text(encoding="utf-8") == "old ü"
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
