"""The scalar head of a reward model: built, loaded, computed in fp32, and calibrated by a bias kept in the config.

A reward model is a Transformers sequence-classification model with one label. The classes made here are the stock ones
with three faults mended: the score is read at the last position of the attention mask (Transformers looks for the last
id unlike the pad id, which loses a real EOS where pad == eos); the head is computed in fp32 whatever the backbone's
dtype; and the calibration bias of `config.reward_bias` is added (stock heads such as Llama's have no bias to hold it).
What `save_pretrained` writes is a stock model, which `AutoModelForSequenceClassification` loads too (without the bias),
where Transformers has a class for the architecture (see `architectures`).
"""

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from tieback.cli.errors import UsageError
from tieback.reward_model.architectures import classifier_class


def load_reward_model(path: str | Path, *, as_critic: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a trained reward model.

    Args:
        path: a folder or a hub name; a folder with an adapter gives its base with the adapter and head merged in.
        as_critic: whether a critic with `value_bins` will do, whose head has a label for each bin.
        kwargs: for `from_pretrained` (`dtype`, `device_map`, `revision`, ...).

    Returns:
        A sequence-classification model with one label, whose logits [B, 1] are fp32 and include the bias.

    Raises:
        UsageError: it is no reward model (a language model, two labels, or a head that is not in the file).
    """
    if (Path(path) / "adapter_config.json").is_file():
        return _load_adapted(path, as_critic, kwargs)
    config = AutoConfig.from_pretrained(path, **_hub_arguments(kwargs))
    check_bins(path, config, as_critic)
    if not _is_classifier(config):
        architecture = (config.architectures or ["model of unknown architecture"])[0]
        raise UsageError(
            f"{path} is a {architecture}, not a reward model. Train one from it with pipeline/reward.py, or name "
            "a sequence-classification model with one label."
        )
    if config.num_labels != 1 and not is_binned(config):
        raise UsageError(
            f"{path} has {config.num_labels} labels ({', '.join(map(str, config.id2label.values()))}); a reward model "
            "has one, its score. Choose a reward model, or train one with pipeline/reward.py."
        )
    return _from_pretrained(path, config, kwargs, new_head=False)


def is_binned(config: PreTrainedConfig) -> bool:
    """Whether a model's config is that of a critic with `value_bins`."""
    return getattr(config, "value_range", None) is not None


def check_bins(path: str | Path, config: PreTrainedConfig, as_critic: bool) -> None:
    """Refuse a critic with `value_bins` where a reward model is needed.

    Raises:
        UsageError: names it.
    """
    if is_binned(config) and not as_critic:
        raise UsageError(
            f"{path} is a critic with value_bins={config.num_labels}, not a reward model. Choose a reward model, or train one "
            "with pipeline/reward.py."
        )


def _load_adapted(folder: str | Path, as_critic: bool, kwargs: dict[str, Any]) -> PreTrainedModel:
    base = json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = AutoConfig.from_pretrained(base, **_hub_arguments(kwargs))
    config.num_labels = 1
    if (Path(folder) / "config.json").is_file():
        own = AutoConfig.from_pretrained(folder)
        config.reward_bias = getattr(own, "reward_bias", 0.0)
        check_bins(folder, own, as_critic)
        if is_binned(own):
            config.num_labels, config.value_range = own.num_labels, own.value_range
    model = _from_pretrained(base, config, kwargs, new_head=True)
    before = model.score.weight.detach().clone() if hasattr(model, "score") else None
    merged = merge_adapter(model, folder)
    if before is not None and before.equal(merged.score.weight.cpu()):
        raise UsageError(
            f"{folder} holds an adapter without a head for one score: it is no reward model. Train one with "
            "pipeline/reward.py."
        )
    return as_reward_model(merged)


def new_reward_model(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Make an untrained reward model of a language model or an encoder: its backbone, and a new head (see `init_head`).

    Args:
        path: a folder or a hub name; a folder with a LoRA adapter gives its base with the adapter merged in.
        kwargs: for `from_pretrained`.

    Raises:
        UsageError: no classifier can be made of the architecture, or an adapter is to be merged into a quantised base.
    """
    adapter = Path(path) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else path
    if adapter.is_file() and kwargs.get("quantization_config") is not None:
        raise UsageError(
            f"{path} holds a LoRA adapter, which cannot be merged into a quantised base without loss. Train the "
            "reward model without load_in_4bit / load_in_8bit, or from a merged model."
        )
    config = AutoConfig.from_pretrained(base, **_hub_arguments(kwargs))
    config.num_labels = 1
    model = _from_pretrained(base, config, kwargs, new_head=True)
    return merge_adapter(model, path) if adapter.is_file() else model


def new_adapted_reward_model(folder: str | Path, **kwargs: Any) -> Any:
    """Make an untrained reward model of a language model's adapter: its base, the adapter, and a new head.

    Args:
        folder: with the adapter.
        kwargs: for `from_pretrained` of the base.

    Returns:
        A `PeftModel`, of which adapter and head are trained.
    """
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    model_config = AutoConfig.from_pretrained(base, **_hub_arguments(kwargs))
    model_config.num_labels = 1
    model = _from_pretrained(base, model_config, kwargs, new_head=True)
    config.task_type, config.inference_mode = "SEQ_CLS", False
    config.modules_to_save = [*(config.modules_to_save or []), "score"]
    adapted = get_peft_model(model, config)
    head = {"base_model.model.score.weight": model.score.weight}
    set_peft_model_state_dict(adapted, load_peft_weights(str(folder)) | head)
    return adapted


def is_classifier(path: str | Path, **kwargs: Any) -> bool:
    """Whether a folder or hub name holds a sequence-classification model, rather than a language model."""
    if (Path(path) / "adapter_config.json").is_file():
        return False
    return _is_classifier(AutoConfig.from_pretrained(path, **_hub_arguments(kwargs)))


def init_head(model: PreTrainedModel, generator: torch.Generator | None = None) -> None:
    """Draw the head's weight [1, d] from N(0, 1/(d + 1)), and set its bias and the calibration bias to 0.

    Args:
        model: with a `score` head.
        generator: on the CPU; the global one where None.

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (detail 11), after Stiennon et al. 2020.
    """
    head = reward_head(model)
    drawn = torch.randn(head.weight.shape, generator=generator) * head_std(head.in_features)
    with torch.no_grad():
        head.weight.copy_(drawn)
        if head.bias is not None:
            head.bias.zero_()
    set_reward_bias(model, 0.0)


def head_std(hidden_size: int) -> float:
    """Standard deviation of a new head's weights: 1/√(d + 1)."""
    return (hidden_size + 1) ** -0.5


def reward_head(model: PreTrainedModel) -> nn.Linear:
    """Return the linear head of a decoder reward model.

    Raises:
        ValueError: the architecture has no such head (an encoder, whose classifier pools in a way of its own).
    """
    head = getattr(model, "score", None)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no linear `score` head on its last hidden state.")
    return head


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever autocast says and whatever its weights were cast to.

    TRL casts what QLoRA trains, and DeepSpeed whatever it is given. Both know nothing of a head.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., d] → [..., labels], fp32."""
        with torch.autocast(device_type=input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


def as_reward_model(model: PreTrainedModel) -> PreTrainedModel:
    """Mend a sequence-classification model with one label, in place (see the module's docstring).

    Its parameters stay the objects that they are, which an optimiser or ZeRO may know.
    """
    if not isinstance(model, _ScalarHead):
        model.__class__ = _reward_class(type(model))
    heads = [head for name in _HEADS if isinstance(head := getattr(model, name, None), nn.Module)]
    for part in (part for head in heads for part in head.modules()):  # PEFT puts trained copies into a head
        if type(part) is nn.Linear:
            part.__class__ = Fp32Linear
    return model


def apply_head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Head and bias on hidden states [..., d] → scores [...]; in fp32 for what `as_reward_model` has mended."""
    return reward_head(model)(hidden).squeeze(-1) + reward_bias(model)


def reward_bias(model: PreTrainedModel) -> float:
    """What is added to the head's output: `config.reward_bias`, 0 where it was never set."""
    return getattr(model.config, "reward_bias", 0.0)


def set_reward_bias(model: PreTrainedModel, value: float) -> None:
    """Set `config.reward_bias`; saved with the config, so it survives for any architecture."""
    model.config.reward_bias = float(value)


# What sequence-classification classes call what stands on their backbone.
_HEADS = ("score", "classifier", "classification_head", "logits_proj")
# Weights that a backbone's file does not have: of a head and, for an encoder, of what pools for it.
_NEW = rf"^({'|'.join(_HEADS)}|pre_classifier|sequence_summary|\w+\.pooler)\."


class _ScalarHead:
    """Mixed into a sequence-classification class: see the module's docstring."""

    _keep_in_fp32_modules_strict: ClassVar = {"score"}
    # The head of a language model, in the file that a new reward model is made of.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^lm_head\.", r"^embed_out\."]

    def _init_weights(self: Any, module: nn.Module) -> None:
        if module is getattr(self, "score", None):
            init.normal_(module.weight, std=head_std(module.in_features))
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def forward(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """input_ids and attention_mask [B, T], padded on the right → logits [B, 1], fp32."""
        if not hasattr(self, "score"):
            # An encoder: it pools its first position, which padding does not touch.
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
            return SequenceClassifierOutput(logits=output.logits.float() + reward_bias(self))
        scores = score_last(self, input_ids, attention_mask, **kwargs)
        return SequenceClassifierOutput(logits=scores.unsqueeze(-1))


def score_last(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """Scores [B] in fp32, bias included, at the last position of the mask; `model` may be of a stock class as well."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
    pooled = hidden[torch.arange(len(hidden), device=hidden.device), last_position(attention_mask)]
    return apply_head(model, pooled)


def last_position(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index [B] of the last 1 in each row of a mask [B, T]."""
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (positions * attention_mask.to(positions.dtype)).argmax(-1)


def _from_pretrained(
    path: str | Path, config: PreTrainedConfig, kwargs: dict[str, Any], new_head: bool
) -> PreTrainedModel:
    stock = classifier_class(config)
    expected = {"_keys_to_ignore_on_load_missing": [_NEW]} if new_head else {}
    reward_class = _reward_class(stock, **expected)
    model, info = reward_class.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    if hasattr(model, "score") and not hasattr(model.score.weight, "ds_id"):
        # A new head is made in the backbone's dtype. (ZeRO-3 has one dtype for all parameters of a model.)
        model.score.float()
    if info["missing_keys"]:
        raise UsageError(
            f"{path} lacks weights of {stock.__name__}: {', '.join(sorted(info['missing_keys']))}."
        )
    return as_reward_model(model)


def _reward_class(stock: type[PreTrainedModel], **attributes: Any) -> Any:
    # The stock name, because save_pretrained writes it into the config.
    return type(stock.__name__, (_ScalarHead, stock), {"__module__": stock.__module__, **attributes})


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or [])


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Merge the LoRA adapter in `folder` into a reward model, also one that was trained on the language model."""
    from peft import PeftConfig, PeftModel

    peft_config = copy.deepcopy(PeftConfig.from_pretrained(folder))
    # A language model's adapter on a backbone without a language-model head: the class for no task in particular.
    peft_config.task_type = None
    return PeftModel.from_pretrained(model, folder, config=peft_config).merge_and_unload()


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs
    }
