"""The accelerator of a classic task, and the tracker that its figures are logged to."""

from pathlib import Path

from accelerate import Accelerator


def tracking_accelerator(report_to: str, folder: Path, use_cpu: bool, bf16: bool = False) -> Accelerator:
    """An `Accelerator` that logs into `folder` by the tracker `report_to`, or nowhere for "none"."""
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if bf16 else "no",
        log_with=None if report_to == "none" else report_to,
        project_dir=str(folder),
    )
    accelerator.init_trackers("logs")
    return accelerator
