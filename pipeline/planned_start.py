"""The model that PPO will start from, known by its config alone: a named one, or what the run's SFT stage leaves.

Where that stage has not run, its settings, beside those of PPO, say what it will leave.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from peft import PeftConfig
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from trl import ModelConfig

from tieback.cli.errors import UsageError, first_line
from tieback.pipeline.arguments import RunArguments, parse_stage
from tieback.pipeline.model_loading import loading, new_adapter
from tieback.pipeline.pypi_models import folder_of
from tieback.pipeline.settings import sft
from tieback.reward_model.adapter import base_of


@dataclass(frozen=True)
class PlannedStart:
    """A model of which a config is read, and no weight.

    Args:
        config: of the model; of the base, where it has an adapter.
        name: folder or hub name of that base or model; "" for one that is made from its config.
        adapter: gives the config of the adapter that is on it; None where there is none.
    """

    config: PreTrainedConfig
    name: str
    adapter: Callable[[Any], PeftConfig | None] | None


def planned_start(run_args: RunArguments, model_args: ModelConfig) -> PlannedStart:
    """The model that these settings of PPO start from.

    Raises:
        UsageError: it is neither named nor there, and there is no `sft.yaml` beside the settings of PPO; or it cannot be found.
    """
    name = model_args.model_name_or_path
    folder = run_args.stage_dir("sft")
    if name is None and not (folder / "metrics.json").exists():
        return _as_sft_will_leave_it(run_args, model_args)
    name = folder_of(name or str(folder))
    base = base_of(name)
    adapter = None if base is None else lambda _: PeftConfig.from_pretrained(name)
    return PlannedStart(_config(base or name, model_args), base or name, adapter)


def _as_sft_will_leave_it(run_args: RunArguments, model_args: ModelConfig) -> PlannedStart:
    config_path = run_args.config_path
    recipe = None if config_path is None else config_path.with_name("sft.yaml")
    if recipe is None or not recipe.is_file():
        run_args.require("sft", "metrics.json")
    _, data_args, _, _, sft_args = parse_stage(
        "sft",
        sft.DATACLASS_TYPES,
        ["--config", str(recipe)],
        writes=False,
    )
    PartialState().print(
        f"{run_args.stage_dir('sft')} is not there yet: its model is taken to be that of {recipe}."
    )
    if sft_args.model_name_or_path is None:
        return PlannedStart(_new_config(data_args, str(recipe)), "", None)
    name = folder_of(sft_args.model_name_or_path)
    adapter = (lambda policy: new_adapter(sft_args, policy)) if sft_args.use_peft else None
    as_loaded = replace(model_args, model_revision=sft_args.model_revision)
    return PlannedStart(_config(base_of(name) or name, as_loaded), name, adapter)


def _new_config(data_args: sft.SFTArguments, recipe: str) -> LlamaConfig:
    """Config of a model that is made from it; a trained tokenizer has as many tokens as it may have."""
    fields: Any = data_args.model_config
    if not isinstance(fields, dict):
        raise UsageError(f"{recipe} names no model: set model_name_or_path.")
    try:
        return LlamaConfig(**{"vocab_size": data_args.tokenizer_vocab_size, **fields})
    except Exception as error:  # the config's own validation raises types of its own
        raise UsageError(f"model_config: {first_line(error)}") from error


def _config(name: str, model_args: ModelConfig) -> PreTrainedConfig:
    with loading("model_name_or_path", name):
        return AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, attn_implementation=model_args.attn_implementation
        )
