"""Memory that a run of PPO will need, by role and by phase, without loading a model.

    python -m tieback.pipeline.memory --config lora --model_name_or_path Qwen/Qwen3-0.6B --max_prompt_length 512

Takes every setting of ppo.py. Of a model its config alone is read; the trainer's own code then runs on tensors without
contents, whose sizes are added up. No stage needs to have run: where that of SFT has not, the model is that of its recipe.
"""

if __name__ == "__main__":
    from tieback.pipeline.help import print_help_if_asked

    print_help_if_asked("memory", "ppo")  # before the imports of a run

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft import PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from trl import ModelConfig

from tieback.cli.errors import UsageError, first_line, run
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.live_memory import Sizes, phases_of, size_of
from tieback.pipeline.memory_of_processes import Estimate, read_backend, shared_out
from tieback.pipeline.model_loading import loading, new_adapter
from tieback.pipeline.planned_start import planned_start
from tieback.pipeline.pypi_models import folder_of
from tieback.pipeline.rollout.adapters import adapter_parameters
from tieback.pipeline.rollout.token_scores import base_model
from tieback.pipeline.settings.memory import DATACLASS_TYPES
from tieback.pipeline.settings.ppo import PPOArguments
from tieback.pipeline.stage import quiet_libraries
from tieback.pipeline.trainer import PPOConfig
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.critics import CRITIC
from tieback.pipeline.trainer.models import make_actor_critic
from tieback.pipeline.trainer.passes import TOKENS_AT_A_TIME, TOKENS_AT_A_TIME_ON_CPU
from tieback.pipeline.trainer.precision import keep_frozen_in_bf16
from tieback.reward_model.adapter import ScalarAdapter, base_of, same_model
from tieback.reward_model.architectures import classifier_class

# Bytes of optimiser states for each trained number; those of AdamW where the optimiser is none of these.
OPTIMIZER_BYTES = {"sgd": 0, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adamw_8bit": 2}
ADAMW_BYTES = 8
MIB = 2**20


def main() -> None:
    """Print the estimate of a run."""
    quiet_libraries()
    run_args, ppo_args, args, model_args, memory_args = parse_stage(
        "ppo", DATACLASS_TYPES, writes=False, program="memory"
    )
    sizes = sizes_of(args, memory_args.prompt_length)
    estimate = estimate_of(run_args, ppo_args, args, model_args, sizes, memory_args.accelerate_config)
    show(estimate, sizes)
    if memory_args.json is not None:
        Path(memory_args.json).write_text(json.dumps(estimate.figures(), indent=2) + "\n", encoding="utf-8")


def sizes_of(args: PPOConfig, prompt_length: int | None, on_cpu: bool = False) -> Sizes:
    """Rows and tokens of each phase, by the settings of the run.

    Args:
        args: of the run.
        prompt_length: tokens of a prompt; max_prompt_length where None.
        on_cpu: whether it will be on a CPU, whose passes are smaller, and not on an accelerator.

    Raises:
        UsageError: the length of prompts is nowhere to be read.
    """
    prompt = prompt_length or args.max_prompt_length
    if prompt is None:
        raise UsageError("Nothing says how long a prompt is: set max_prompt_length or prompt_length.")
    rows = args.per_device_train_batch_size
    minibatch = max(rows // args.num_minibatches, 1)
    width = prompt + args.max_completion_length
    tokens = TOKENS_AT_A_TIME_ON_CPU if on_cpu else TOKENS_AT_A_TIME
    at_a_time = args.micro_batch_size or max(tokens // width, 1)
    return Sizes(
        prompt_length=prompt,
        completion_length=args.max_completion_length,
        generated_rows=args.generation_batch_size or rows,
        scored_rows=min(args.per_device_eval_batch_size, rows),
        rows=min(at_a_time, minibatch),
        micro_batches=-(-minibatch // at_a_time),
    )


def estimate_of(
    run_args: RunArguments,
    ppo_args: PPOArguments,
    args: PPOConfig,
    model_args: ModelConfig,
    sizes: Sizes,
    accelerate_config: str | None = None,
) -> Estimate:
    """The estimate of one process.

    Args:
        run_args, ppo_args, args, model_args: settings of the run.
        sizes: of its batches.
        accelerate_config: file of accelerate_configs/ that it is launched with; one process, which holds every model
            whole, where None.

    Raises:
        UsageError: vLLM samples; the policy, or a reward model, cannot be found; or a model chooses by its numbers what it computes.
    """
    if args.sampler == "vllm":
        raise UsageError(
            "What vLLM takes beside PPO is not estimated (vllm_gpu_memory_utilization of a GPU, and never less than a copy of the "
            "policy): ask with --sampler transformers, and add that."
        )
    backend = None if accelerate_config is None else read_backend(accelerate_config)
    # Under bf16 in bf16, where autocast would keep a copy of all weights that are trained.
    gathers = backend is not None and backend.shards_weights
    planned = planned_start(run_args, model_args)
    config = planned.config
    with torch.device("meta"):
        policy: Any = _causal_model(config, model_args)
        peft_config = new_adapter(model_args, policy)
        if model_args.use_peft and planned.adapter is not None:
            policy, peft_config = get_peft_model(policy, planned.adapter(policy)), None
        adapter = peft_config or getattr(policy, "peft_config", {}).get("default")
        own = _Base(config, planned.name, adapter)
        scorers: Any = [SimpleNamespace(model=model) for model in _reward_models(ppo_args, run_args, own)]
        start = None if ppo_args.critic_init == "policy" or not scorers else scorers[0].model
        if ppo_args.value_model is not None:
            value_model = folder_of(ppo_args.value_model)
            start = _scalar_model("value_model", value_model, own, may_share=args.critic != "separate")
        actor_critic, reference = make_actor_critic(policy, start, scorers, peft_config, args)
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if args.bf16 else "no")
        whole = [
            scorer.model.requires_grad_(False) for scorer in scorers if isinstance(scorer.model, nn.Module)
        ]
        for module in filter(None, (actor_critic, reference, *whole)):
            keep_frozen_in_bf16(module, accelerator)
    actor_critic.train()
    if args.gradient_checkpointing:
        actor_critic.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    weights = _weights(actor_critic, reference, whole, model_args)
    trained = sum(p.numel() for p in actor_critic.parameters() if p.requires_grad)
    layer = _largest_layer(actor_critic)
    if gathers and args.bf16:
        actor_critic.to(torch.bfloat16)
    try:
        phases = phases_of(actor_critic, reference, [s.model for s in scorers], args, sizes, args.bf16)
    except RuntimeError as error:
        raise UsageError(
            f"The passes of {config.model_type} cannot be followed without their contents, as those of a mixture of experts "
            f"cannot ({first_line(error)})."
        ) from error
    if gathers and args.bf16:
        phases["update"] += 2 * trained  # gradients are summed in fp32
    states = OPTIMIZER_BYTES.get(args.optim.value, ADAMW_BYTES)
    estimate = Estimate(weights, 4 * trained, states * trained, layer, phases)
    return estimate if backend is None else shared_out(estimate, backend, args.bf16)


def _causal_model(config: PreTrainedConfig, model_args: ModelConfig) -> Any:
    dtype = model_args.dtype
    if _is_quantised(model_args):
        dtype = "bfloat16"  # which it is computed in; `_weights` counts what is kept
    chosen = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, str(dtype))
    return AutoModelForCausalLM.from_config(config, dtype=chosen or torch.float32)


@dataclass(frozen=True)
class _Base:
    """What the policy stands on: its config and its name; and the config of its adapter, if it has one."""

    config: PreTrainedConfig
    name: str
    adapter: Any


def _reward_models(ppo_args: PPOArguments, run_args: RunArguments, own: _Base) -> list[Any]:
    """The reward models that are named; this run's own, where it is not there yet, as one like the policy."""
    folder = run_args.stage_dir("reward")
    models: list[Any] = []
    for named in ppo_args.reward_funcs or [str(folder)]:
        name = folder_of(run_args.within(named))
        if name == str(folder) and not folder.exists():
            models.append(_untrained(own.config) if own.adapter is None else _adapter(own.adapter, own, name))
        elif ":" not in name or Path(name).exists():  # and no function
            models.append(_scalar_model("reward_funcs", name, own))
    return models


def _scalar_model(setting: str, name: str, own: _Base, may_share: bool = True) -> Any:
    """A reward model or critic: an adapter of the policy's base, which it may share, or a whole model."""
    base = base_of(name)
    with loading(setting, name):
        if may_share and own.adapter is not None and same_model(own.name, base):
            return _adapter(PeftConfig.from_pretrained(name), own, name)
        return _untrained(AutoConfig.from_pretrained(base or name))


def _adapter(config: Any, own: _Base, name: str) -> ScalarAdapter:
    return ScalarAdapter(config, {}, torch.zeros(1, own.config.get_text_config().hidden_size), 0.0, name)


def _untrained(config: PreTrainedConfig) -> Any:
    config = copy.deepcopy(config)
    config.num_labels = 1
    return cast(Any, classifier_class(config))._from_config(config, dtype=torch.float32)


def _weights(
    actor_critic: ActorCritic, reference: nn.Module | None, whole: list[nn.Module], model_args: ModelConfig
) -> dict[str, int]:
    policy = actor_critic.policy
    adapters = {
        "critic": [CRITIC],
        "reference": ["reference"],
        "reward": list(actor_critic.reward_heads),
    }
    own = {
        role: sum(
            parameter.numel() * parameter.element_size()
            for name in names
            for parameter in adapter_parameters(policy, name).values()
        )
        for role, names in adapters.items()
    }
    weights = {
        "policy": size_of(policy) - sum(own.values()),
        "critic": own["critic"] + size_of(actor_critic.critic),
        "reference": own["reference"] + size_of(reference),
        "reward": own["reward"] + size_of(*whole, actor_critic.reward_heads),
    }
    weights["policy"] -= _saved_by_quantising(policy, model_args)
    return weights


def _saved_by_quantising(policy: nn.Module, model_args: ModelConfig) -> int:
    """Bytes that bitsandbytes keeps a base's matrices in less than in bf16 (QLoRA, arXiv 2305.14314, section 3)."""
    if not _is_quantised(model_args):
        return 0
    head = base_model(policy).get_output_embeddings()
    numbers = sum(
        module.weight.numel()
        for module in policy.modules()
        if type(module) is nn.Linear and module is not head and not module.weight.requires_grad
    )
    if model_args.load_in_8bit:
        return numbers  # its scales, one a row, are nothing beside it
    # A scale for each 64 numbers: in fp32, or in 8 bits and an fp32 scale for each 256 of them.
    scales = numbers / 64 * (1 + 4 / 256 if model_args.use_bnb_nested_quant else 4)
    return int(numbers * (2 - 0.5) - scales)


def _is_quantised(model_args: ModelConfig) -> bool:
    return model_args.load_in_4bit or model_args.load_in_8bit


def _largest_layer(actor_critic: ActorCritic) -> int:
    layers = [m for m in actor_critic.modules() if type(m).__name__ in actor_critic._no_split_modules]
    return max(map(size_of, layers), default=0)


def show(estimate: Estimate, sizes: Sizes) -> None:
    """Print a table of what is held, and one of the phases."""
    held = Table(title="Held throughout", title_justify="left")
    held.add_column("")
    held.add_column("MiB", justify="right")
    for role, size in estimate.weights.items():
        held.add_row(f"weights: {role}", f"{size / MIB:,.0f}")
    held.add_row("optimiser states", f"{estimate.optimizer / MIB:,.0f}")
    phases = Table(title="On top of that, by phase", title_justify="left")
    for column in ("", "MiB", "of that"):
        phases.add_column(column, justify="right" if column == "MiB" else "left")
    rows = {
        "generate": f"KV cache {estimate.phases['kv_cache'] / MIB:,.0f}; {sizes.generated_rows} rows",
        "score": f"{sizes.scored_rows} rows",
        "logprobs": f"{sizes.rows} rows",
        "update": f"gradients {estimate.gradients / MIB:,.0f}; {sizes.rows} rows",
    }
    for name, note in rows.items():
        phases.add_row(name, f"{estimate.phases[name] / MIB:,.0f}", note)
    console = Console()
    console.print(held, phases)
    console.print(
        f"Peak of a process: {estimate.peak / MIB:,.0f} MiB, at prompts of {sizes.prompt_length} and completions of "
        f"{sizes.completion_length} tokens; the libraries themselves come on top."
    )


if __name__ == "__main__":
    run(main)
