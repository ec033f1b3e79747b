"""The device that this process computes on."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def choose_device(use_cpu: bool = False) -> PartialState:
    """This process among those that `accelerate launch` started; on the CPU where the machine has no accelerator.

    Accelerate 1.15 does not tell the processes of a `MULTI_GPU` configuration that `use_cpu` is set, and without that
    they do not find each other. Call it before anything else asks for the device.

    Args:
        use_cpu: leave an accelerator alone.
    """
    if use_cpu or not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
