"""Policies and tokenizers for the stages: by name, from a folder, or a new small Llama from the recipe."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations import unset_hf_deepspeed_config
from trl import ModelConfig, get_peft_config, get_quantization_config, is_conversational

from tieback.cli.errors import UsageError, first_line
from tieback.pipeline.rollout.sampler import own_end_ids
from tieback.reward_model.adapter import base_of
from tieback.reward_model.head import is_classifier

# Reserved tokens that well-known vocabularies hold and no text contains, in order of preference.
_PADDING_TOKENS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|padding|>",
    "<|reserved_special_token_0|>",
)
# Families whose kernels read the weight of `out_proj` by themselves, so that PEFT refuses an adapter on it.
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
# Settings of LoRA in TRL's `ModelConfig`, and what PEFT calls them.
_ADAPTER_SETTINGS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def load_whole() -> None:
    """Load models whole on each process from now on, for stages and parts of them in which nothing is sharded.

    Otherwise `from_pretrained` returns parts (ZeRO-3) or, on all processes but one, no weights at all (FSDP with
    `cpu_ram_efficient_loading`), wherever Accelerate is set up so.
    """
    unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def reason_not_loaded(name: str | Path, error: Exception) -> str:
    """What kept a library from loading the model of that name; of one that is no folder here, it speaks of the hub alone."""
    elsewhere = "" if Path(name).exists() else "there is no such folder here, and on the hub: "
    return elsewhere + first_line(error)


def load_tokenizer(path: str | Path, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad (see `ensure_pad_token`).

    Raises:
        UsageError: there is none at `path`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"No tokenizer can be loaded from {path}: {reason_not_loaded(path, error)}"
        ) from error
    return ensure_pad_token(tokenizer)


def refuse_classifier(path: str | Path, **hub: Any) -> None:
    """Refuse a model of which Transformers would make a language model with an untrained head.

    Raises:
        ValueError: it is one; for whoever loads it to say where it was named.
    """
    if is_classifier(path, **hub):
        raise ValueError("it is a classifier, such as a reward model, and not a language model.")


@contextmanager
def loading(setting: str, name: str) -> Iterator[None]:
    """Name the setting and the model where a library says only that it cannot load.

    Raises:
        UsageError: nothing can be loaded from `name`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{setting}: no model can be loaded from {name}: {reason_not_loaded(name, error)}"
        ) from error


def named_tokenizer(setting: str, model: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer from where a model was loaded.

    Raises:
        UsageError: there is none, or the model was made from its config; `setting` is where to give it.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if path:
            return load_tokenizer(path)
    except UsageError as error:
        raise UsageError(f"{setting} is not given. {error}") from error
    raise UsageError(
        f"{setting} is not given, and this {type(model).__name__} was not loaded by a name. Give it."
    )


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a pad token one of its own tokens, so that no embedding is resized.

    A reserved padding token is preferred, then `unk` where it is none of the other special tokens, then EOS: padding is
    told by masks everywhere here, never by its id, so pad == eos hides no real EOS.

    Raises:
        UsageError: it has neither a pad token nor any of those.
    """
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        reserved = [token for token in _PADDING_TOKENS if token in vocabulary]
        unknown = (
            [tokenizer.unk_token]
            if tokenizer.unk_token not in (tokenizer.eos_token, tokenizer.bos_token)
            else []
        )
        choices = [token for token in (*reserved, *unknown, tokenizer.eos_token) if token is not None]
        if not choices:
            raise UsageError(
                f"The tokenizer of {tokenizer.name_or_path} has no pad, unk or EOS token to pad with."
            )
        tokenizer.pad_token = choices[0]
    return tokenizer


def check_chat_template(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template_path: str | None
) -> None:
    """Make sure that a tokenizer can write conversations where the rows are conversations.

    Args:
        tokenizer: takes the template at `template_path` over, if one is given.
        row: any row of the data.
        template_path: a Jinja file, or a folder or hub name whose tokenizer has a template.

    Raises:
        UsageError: there is no template.
    """
    if template_path is not None:
        path = Path(template_path)
        tokenizer.chat_template = (
            path.read_text(encoding="utf-8")
            if path.is_file()
            else load_tokenizer(template_path).chat_template
        )
    if is_conversational(row) and tokenizer.chat_template is None:
        raise UsageError(
            f"The rows are conversations, and the tokenizer of {tokenizer.name_or_path} has no chat template. Name one "
            "for sft.py or reward.py with --chat_template_path (a .jinja file, or a model whose template to use)."
        )


def load_policy(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, model_args: ModelConfig | None = None
) -> PreTrainedModel:
    """Load a causal language model; a folder with a LoRA adapter gives its base with the adapter merged in.

    Args:
        path: folder or hub name.
        tokenizer: its tokenizer; the model's pad id and end ids are set to match it.
        model_args: dtype, attention, quantisation; the defaults of TRL's `ModelConfig` (fp32) when None.

    Raises:
        UsageError: there is no such model, it is a classifier, or a quantised base is to take an adapter in.
    """
    kwargs = model_kwargs(model_args or ModelConfig())
    if base_of(path) is not None and "quantization_config" in kwargs:
        raise UsageError(
            f"{path} holds a LoRA adapter, which cannot be merged into a quantised base without loss. Leave out "
            "load_in_4bit / load_in_8bit."
        )
    model = _load(path, kwargs)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return match_tokenizer(model, tokenizer)


def load_adapted_policy(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, model_args: ModelConfig, named: Collection[str]
) -> PeftModel:
    """Load a base with the adapter in a folder on it, to be trained further.

    Args:
        folder: with an adapter.
        tokenizer: as for `load_policy`.
        model_args: dtype, attention, quantisation of the base.
        named: settings that the recipe or the command line sets.

    Raises:
        UsageError: it cannot be loaded, or a named setting of LoRA differs from the adapter's.
    """
    model = _load(folder, model_kwargs(model_args), is_trainable=True)
    check_adapter_settings(folder, model.peft_config["default"], model_args, named)
    match_tokenizer(model.get_base_model(), tokenizer)
    return model


def check_adapter_settings(
    folder: str | Path, config: PeftConfig, model_args: ModelConfig, named: Collection[str]
) -> None:
    """Refuse settings of LoRA that differ from those of the adapter that goes on being trained.

    Args:
        folder: of the adapter.
        config: of the adapter.
        model_args: settings of this run.
        named: those that the recipe or the command line sets.

    Raises:
        UsageError: names the setting and both values.
    """
    for setting, attribute in _ADAPTER_SETTINGS.items():
        asked, own = getattr(model_args, setting), getattr(config, attribute)
        if isinstance(asked, list) and isinstance(own, set | list):
            asked, own = sorted(asked), sorted(own)
        # PEFT writes out what all-linear came to.
        if setting in named and asked != own and asked not in ("all-linear", ["all-linear"]):
            raise UsageError(
                f"{setting}: {asked} is asked for, but the adapter in {folder}, which goes on being trained, has {own}. Leave "
                "it out, or start from a whole model."
            )


def new_adapter(model_args: ModelConfig, model: PreTrainedModel) -> PeftConfig | None:
    """The adapter to train on a model, of the settings of LoRA; None without use_peft.

    It goes into all linear layers but the head where lora_target_modules names none: PEFT has defaults for some
    architectures alone. What experts that are one tensor get is PEFT's choice (OLMoE's an adapter, which takes no dropout;
    GPT-OSS's none): lora_target_parameters names them.
    """
    named: Any = model_args.lora_target_modules
    config: Any = get_peft_config(replace(model_args, lora_target_modules=named or "all-linear"))
    if config is None:
        return None
    if named is None and model.config.model_type in _MAMBA:
        config.exclude_modules = ["out_proj"]
    if isinstance(named, str) and named.isidentifier():
        config.target_modules = {
            named
        }  # TRL hands a single name on as a regular expression, which nothing matches
    return config


def _load(path: str | Path, kwargs: dict[str, Any], **adapter: Any) -> Any:
    try:
        refuse_classifier(path, revision=kwargs["revision"])
        if base_of(path) is not None:
            return AutoPeftModelForCausalLM.from_pretrained(path, **kwargs, **adapter)
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"No language model can be loaded from {path}: {reason_not_loaded(path, error)}"
        ) from error


def new_policy(
    model_config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """Make an untrained Llama.

    Args:
        model_config: fields of `LlamaConfig`; the vocabulary's size and the special ids come from the tokenizer.
        tokenizer: its tokenizer.
        seed: of the initial weights.

    Raises:
        UsageError: a key that `LlamaConfig` does not have, or sizes that do not fit together.
    """
    unknown = set(model_config) - set(LlamaConfig.__dataclass_fields__)
    if unknown:
        raise UsageError(f"model_config: LlamaConfig has no field {', '.join(sorted(unknown))}.")
    set_seed(seed)
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        model = LlamaForCausalLM(LlamaConfig(**{**special, **model_config}))
    except Exception as error:  # the config's own validation raises types of its own
        raise UsageError(f"model_config: {first_line(error)}") from error
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return match_tokenizer(model, tokenizer)


def match_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Set the model's pad id and end ids, so that a saved model stops where its chat template ends a turn.

    Sampling settings of the model's own (top-p, top-k, ...) are removed: stages state theirs.
    """
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=sorted(own_end_ids(tokenizer, model.generation_config)),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def context_length(model: PreTrainedModel) -> int | None:
    """Longest sequence the model takes, or None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def model_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` in a `ModelConfig`. Code from the hub is never run.

    Raises:
        UsageError: quantisation without LoRA.
    """
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None and not model_args.use_peft:
        raise UsageError(
            "load_in_4bit / load_in_8bit freeze the weights: set use_peft as well, to train an adapter."
        )
    return {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(
            {"quantization_config": quantization_config, "device_map": {"": PartialState().device}}
            if quantization_config is not None
            else {}
        ),
    }
