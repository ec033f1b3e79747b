"""Bytes that a run of PPO needs, of one process alone and of one among several."""

from dataclasses import dataclass, replace

import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tieback.cli.errors import UsageError, first_line


@dataclass
class Estimate:
    """Bytes of one process.

    Args:
        weights: by role.
        gradients: of all trained weights.
        optimizer: its states.
        layer: weights of the largest layer.
        phases: what each needs on top of weights and optimiser states (see `phases_of`).
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    layer: int
    phases: dict[str, int]

    @property
    def held(self) -> int:
        """Bytes that are there throughout the run."""
        return sum(self.weights.values()) + self.optimizer

    @property
    def peak(self) -> int:
        """Most bytes at a time."""
        return self.held + max(self.phases[name] for name in ("generate", "score", "logprobs", "update"))

    def figures(self) -> dict[str, int]:
        """All of it, by flat names."""
        return {
            **{f"weights/{role}": size for role, size in self.weights.items()},
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "kv_cache": self.phases["kv_cache"],
            **{f"peak/{name}": self.held + size for name, size in self.phases.items() if name != "kv_cache"},
            "peak": self.peak,
        }


@dataclass(frozen=True)
class Backend:
    """What divides a run among processes.

    Args:
        processes: how many.
        kind: NO, MULTI_CPU, MULTI_GPU, DEEPSPEED or FSDP.
        zero_stage: of DeepSpeed.
    """

    processes: int
    kind: str
    zero_stage: int

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds a part of each weight."""
        return self.processes > 1 and (
            self.kind == "FSDP" or (self.kind == "DEEPSPEED" and self.zero_stage == 3)
        )


def read_backend(path: str) -> Backend:
    """The backend of a file of `accelerate_configs/`.

    Raises:
        UsageError: the file cannot be read, or is of a backend that PPO does not run on.
    """
    try:
        config = load_config_from_file(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"accelerate_config: {path} cannot be read: {first_line(error)}") from error
    kind = str(config.distributed_type).removeprefix("DistributedType.")
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP"):
        raise UsageError(f"accelerate_config: {path} is for {kind}, which PPO does not run on.")
    stage = (getattr(config, "deepspeed_config", None) or {}).get("zero_stage", 3)
    return Backend(config.num_processes, kind, stage)


def shared_out(estimate: Estimate, backend: Backend, bf16: bool) -> Estimate:
    """What one of several processes needs, by what its backend divides among them.

    DDP keeps a second copy of the gradients in its buckets. ZeRO-2 divides gradients and optimiser states, of which DeepSpeed
    keeps fp32 copies of the weights as well; ZeRO-3 and FSDP divide the weights, too, gather two layers at a time, and the
    whole policy to generate. Weights are counted in the precision of one process, though DeepSpeed keeps all of them in
    bf16 under bf16.
    """
    weights, gradients, optimizer = estimate.weights, estimate.gradients, estimate.optimizer
    processes, phases = backend.processes, dict(estimate.phases)
    if processes == 1 or backend.kind not in ("DEEPSPEED", "FSDP"):
        phases["update"] += gradients if processes > 1 else 0
        return replace(estimate, phases=phases)
    if backend.kind == "DEEPSPEED":
        optimizer += gradients  # as many bytes as an fp32 copy of what is trained
    phases["update"] -= gradients - gradients // processes
    if backend.shards_weights:
        whole = weights["policy"] // (2 if bf16 else 1)
        weights = {role: size // processes for role, size in weights.items()}
        phases["generate"] += whole
        for name in ("score", "logprobs", "update"):
            phases[name] += 2 * estimate.layer
    return Estimate(weights, gradients // processes, optimizer // processes, estimate.layer, phases)
