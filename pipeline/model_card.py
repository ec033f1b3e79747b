"""The model card of a stage: what the model was made from, with which settings, how well it does, how it is loaded."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

CARD = "README.md"
# Owner and name.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_STAGES = {
    "sft": ("Supervised fine-tuning", "a language model fine-tuned on demonstrations"),
    "reward": ("A reward model", "a model whose score says how good a response is, trained on ranked pairs"),
    "ppo": (
        "PPO",
        "a language model tuned with PPO (RLHF) to score higher, held near the model that it started from",
    ),
}
# Settings that say where a run lay, or that the text names already.
_NOT_SHOWN = frozenset(
    ("config", "run_dir", "output_dir", "digests", "model", "processing_class", "train_dataset")
)

_USES = {
    "sft": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
    "ppo": "AutoModelForCausalLM",
}
_NO_LICENSE = "see the model that it started from and the data"
_TEXT = """\
# {heading}

{title}: {what}. Made with Tieback.

- Started from: {start}{whole}
- Data: {data}
- Licence: {license}

## How to load it

```python
{loading}
```

## Figures

| metric | value |
| --- | --- |
{figures}

## Settings

```yaml
{settings}
```
"""


def write_card(
    stage: str,
    folder: Path,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    start: str | None,
) -> None:
    """Write `README.md` into the folder of a model, on the main process.

    Licence, base model and data of the model that it started from are taken over from that one's card. No path of this
    machine is written, but for the last two parts of a folder's name.

    Args:
        stage: "sft", "reward" or "ppo".
        folder: of the model.
        metrics: of the stage.
        settings: what the recipe and the command line set.
        start: folder or hub name of the model that the stage started from; None for a new one.
    """
    if not PartialState().is_main_process:
        return
    before = _metadata(start)
    adapted = (folder / "adapter_config.json").is_file()
    data = str(settings["dataset_name"]) if settings.get("dataset_name") else None
    datasets = [*_listed(before.get("datasets")), *([data] if data is not None and is_hub_name(data) else [])]
    base = start if is_hub_name(start) else before.get("base_model")
    card_data = ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        library_name="peft" if adapted else "transformers",
        license=before.get("license"),
        pipeline_tag="text-classification" if stage == "reward" else "text-generation",
        tags=["tieback", "rlhf", {"reward": "reward-model"}.get(stage, stage)],
    )
    name = shown(str(folder))
    title, what = _STAGES[stage]
    license = before.get("license")
    kept = {key: _public(value) for key, value in settings.items() if key not in _NOT_SHOWN}
    text = _TEXT.format(
        heading=name,
        title=title,
        what=what,
        start="a new model" if start is None else f"`{shown(start)}`",
        whole=" (here is the adapter alone)" if adapted else "",
        data="that of earlier stages of the run" if data is None else f"`{shown(data)}`",
        license=f"`{license}`, as the model that it started from" if license else _NO_LICENSE,
        loading=_loading(stage, folder, name),
        figures="\n".join(f"| `{key}` | {value:.4g} |" for key, value in metrics.items()),
        settings=yaml.safe_dump(kept, sort_keys=True, allow_unicode=True).strip(),
    )
    (folder / CARD).write_text(f"---\n{card_data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def is_hub_name(name: str | None) -> bool:
    """Whether it is the name of a repository on the hub, and of no folder or file here."""
    return name is not None and _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def shown(name: str) -> str:
    """A name as a stranger may read it: of a path the last two parts."""
    return name if is_hub_name(name) or not Path(name).exists() else "/".join(Path(name).resolve().parts[-2:])


def _metadata(start: str | None) -> dict[str, Any]:
    """What the card of a model in a folder says at its head; nothing where there is no card, or one that is not YAML."""
    if start is None:
        return {}
    try:
        if is_hub_name(start):
            return ModelCard.load(start).data.to_dict()
        return metadata_load(Path(start) / CARD) or {}
    except Exception:
        # Of the network, of the hub, and of what others wrote: no reason to lose a finished run.
        return {}


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _loading(stage: str, folder: Path, name: str) -> str:
    """Python that loads the model and its tokenizer."""
    model_class, package, more = _USES[stage], "transformers", ""
    if (folder / "adapter_config.json").is_file():
        model_class, package = model_class.replace("Auto", "AutoPeft", 1), "peft"
        more = ", num_labels=1" if stage == "reward" else ""
    elif (
        stage == "reward"
        and type(AutoConfig.from_pretrained(folder)) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    ):
        model_class, package = "load_reward_model", "tieback.reward_model.head"
    call = model_class if model_class == "load_reward_model" else f"{model_class}.from_pretrained"
    lines = [
        f"from {package} import {model_class}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {call}("{name}"{more})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    if stage == "ppo":
        lines.append("# The critic that PPO trained beside it lies in the folder value_model.")
    return "\n".join(lines)


def _public(value: Any) -> Any:
    """A setting without the folders of this machine before its last two parts."""
    if isinstance(value, Mapping):
        return {str(key): _public(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_public(entry) for entry in value]
    if isinstance(value, str | Path):
        text = str(value)
        return "/".join(Path(text).parts[-2:]) if Path(text).is_absolute() else text
    return value if isinstance(value, bool | int | float) or value is None else str(value)
