"""A reward model that is an adapter: its weights and its head without the base, which may be in memory already.

Its folder is one of PEFT: `AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)` loads it. Beside
the adapter stands the `config.json` of the whole model, which holds the calibration bias.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from tieback.cli.errors import UsageError
from tieback.reward_model.head import Fp32Linear, check_bins

ADAPTER_CONFIG = "adapter_config.json"
_HEAD = "base_model.model.score.weight"


class ScalarHead(nn.Module):
    """One number of each hidden state, in fp32; of a critic with `value_bins`, a logit for each bin.

    Args:
        weight: [1, d], or [K, d].
        bias: constant that is added; not trained.
    """

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.score = Fp32Linear(weight.shape[1], weight.shape[0], bias=False)
        self.score.weight = nn.Parameter(weight.float().clone())
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] → [...], or [..., K], fp32."""
        scores: Tensor = self.score(hidden).squeeze(-1)
        return scores + self.bias


@dataclass(frozen=True)
class ScalarAdapter:
    """A reward model, or a critic, on a base that is somewhere else.

    Args:
        config: of the adapter.
        weights: of the adapter, as PEFT saves them.
        head: weight [1, d] of the head; [K, d] of a critic with `value_bins`.
        bias: added to what the head gives.
        source: where it was read.
        value_range: of such a critic.
    """

    config: PeftConfig
    weights: dict[str, Tensor]
    head: Tensor
    bias: float
    source: str
    value_range: float | None = None


def base_of(folder: str | Path) -> str | None:
    """Name of the model that the adapter in a folder belongs to; None where the folder holds no adapter."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    name: str = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return name


def same_model(one: str | Path | None, other: str | Path | None) -> bool:
    """Whether two names mean the same folder, or the same model of the hub."""
    if not one or not other:
        return False
    paths = Path(one), Path(other)
    return paths[0].resolve() == paths[1].resolve() if all(path.exists() for path in paths) else one == other


def read_scalar_adapter(folder: str | Path, *, as_critic: bool = False) -> ScalarAdapter:
    """Read a reward model or a critic that is an adapter.

    Args:
        folder: of the adapter.
        as_critic: whether a critic with `value_bins` will do, whose head has a logit for each bin.

    Raises:
        UsageError: the adapter has no trained head, such as that of a language model; or it is no reward model.
    """
    weights = load_peft_weights(str(folder), device="cpu")
    head = weights.pop(_HEAD, None)
    if head is None:
        raise UsageError(
            f"{folder} holds an adapter without a head for one score: it is no reward model. Train one with "
            "pipeline/reward.py."
        )
    has_config = (Path(folder) / "config.json").is_file()
    whole = AutoConfig.from_pretrained(folder) if has_config else None
    config = PeftConfig.from_pretrained(str(folder))
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = [name for name in config.modules_to_save or [] if name != "score"] or None
    if whole is not None:
        check_bins(folder, whole, as_critic)
    bias, value_range = getattr(whole, "reward_bias", 0.0), getattr(whole, "value_range", None)
    return ScalarAdapter(config, weights, head, bias, str(folder), value_range)


def write_scalar_adapter(
    folder: str | Path,
    config: PeftConfig,
    weights: dict[str, Tensor],
    head: Tensor,
    base_config: PreTrainedConfig,
    bias: float,
    value_range: float | None = None,
) -> None:
    """Write a critic that is an adapter, in the form of PEFT (see the module's docstring).

    Args:
        folder: made where missing.
        config: of the adapter.
        weights: of the adapter, as PEFT saves them.
        head: weight [1, d] of the critic's head, or [K, d].
        base_config: of the base.
        bias: added to what the head gives.
        value_range: of a critic with `value_bins`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {**weights, _HEAD: head}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        Path(folder) / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    saved = type(config)(
        **{
            **config.to_dict(),
            "task_type": "SEQ_CLS",
            "modules_to_save": [*(config.modules_to_save or []), "score"],
            "inference_mode": True,
        }
    )
    saved.save_pretrained(str(folder))
    whole = copy.deepcopy(base_config)
    whole.num_labels, whole.reward_bias = len(head), bias
    if value_range is not None:
        whole.value_range = value_range
    whole.save_pretrained(folder)
