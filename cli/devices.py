"""The device that this process computes on."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def choose_device(use_cpu: bool = False, ddp_timeout: float = 1800) -> PartialState:
    """This process among those that `accelerate launch` started; on the CPU where the machine has no accelerator.

    Makes the process group, which everything after it takes as it is. Accelerate 1.15 does not tell the processes of a
    `MULTI_GPU` configuration that `use_cpu` is set, and without that they do not find each other. Call it before
    anything else asks for the device.

    Args:
        use_cpu: leave an accelerator alone.
        ddp_timeout: seconds that a process waits for another before it gives the run up.
    """
    if use_cpu or not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(seconds=ddp_timeout))


def has_fast_bf16(use_cpu: bool = False) -> bool:
    """Whether the device that `choose_device` chooses computes faster in bfloat16 than in float32.

    A CPU does with AMX, and AMD's with AVX-512 BF16. Intel's multiplies matrices at half the rate of float32 by the latter
    alone (measured: 84 GFLOP/s of a core for 160), which is what a virtual machine may have of one with AMX.

    Args:
        use_cpu: leave an accelerator alone.
    """
    if torch.accelerator.is_available() and not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    intel = "Intel" in capabilities.get("cpu_name", "")
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not intel))
