"""The sequence-classification class of an architecture: Transformers' own, or one of its parts where it has none."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from tieback.cli.errors import UsageError


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Class of a reward model or critic with a config.

    Of a language model for which Transformers has none (OLMoE, Granite, LFM2, Mamba, Falcon-H1, ...) it is made as
    Transformers makes those that it has: the backbone with a linear `score` head. `AutoModelForSequenceClassification`
    does not know such a class; `load_reward_model` does.

    Raises:
        UsageError: it is of neither kind.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"Transformers has neither a sequence-classification model nor a language model for {kind.__name__}: no reward "
            "model or critic can be made of it."
        )
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    family = next(parent for parent in causal.__mro__[1:] if issubclass(parent, PreTrainedModel))
    name = kind.__name__.removesuffix("Config") + "ForSequenceClassification"
    attributes = {"__module__": causal.__module__, "base_model_prefix": causal.base_model_prefix}
    return type(name, (GenericForSequenceClassification, family), attributes)
