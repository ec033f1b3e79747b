"""`accelerate launch` of the shipped configurations, on CPU processes of this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "accelerate_configs"
# Lets sharded configurations shard on the CPU (see its docstring).
SHIM = Path(__file__).parent / "cpu_backends"

BACKENDS = ("multi_gpu", "zero2", "zero3", "fsdp2")


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """A shipped configuration with two processes, in fp32 and on a free port, and what is changed besides."""
    shipped = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    defaults = {"num_processes": 2, "mixed_precision": "no", "main_process_port": free_port()}
    path = folder / f"{name}-{shipped.get('distributed_type')}.yaml"
    path.write_text(yaml.safe_dump(shipped | defaults | changes))
    return path


def environment(**changes: str) -> dict[str, str]:
    """The environment in which launched processes shard on the CPU."""
    path = os.pathsep.join([str(SHIM), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **changes,
    }


def command(config: Path, script: Path | str, *arguments: str) -> list[str]:
    """`accelerate launch --config_file <config> <script> <arguments>`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    return [*launcher, str(script), *arguments]


def launch(
    config: Path,
    script: Path | str,
    *arguments: str,
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script by `accelerate launch` to its end, sharded on CPU processes."""
    return subprocess.run(
        command(config, script, *arguments),
        env=dict(environment() if env is None else env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
    )
