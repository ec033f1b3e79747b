"""The end of a stage on the hub: its folder is uploaded once, when it is whole, without pickles and checkpoints."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import TrainingArguments

from tieback.cli.errors import UsageError, first_line
from tieback.pipeline.model_card import CARD, shown

# Weights, tokenizer, configuration, figures and card; so no pickle, and no file that names folders of this machine.
UPLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "calibration.png")
LEFT_OUT = ("checkpoint-*", "settings.json", "ppo_config.json", "*/README.md")


@dataclass(frozen=True)
class Repository:
    """Where the model of a stage goes.

    Args:
        name: owner and name on the hub.
        token: None for that of `hf auth login`.
        revision: branch; the main one where None.
        message: of the commit.
    """

    name: str
    token: str | None
    revision: str | None
    message: str = "Upload by Tieback"


def claim_repository(args: TrainingArguments, named: Collection[str]) -> Repository | None:
    """Make the repository that `push_to_hub` asks for, before any compute is spent; None where it does not.

    Trainer would upload each checkpoint, with a pickle of its arguments; it is told nothing of the hub. All processes must
    call.

    Args:
        args: of the stage; `push_to_hub` is False afterwards.
        named: settings that the recipe or the command line set.

    Raises:
        UsageError: a setting of Trainer's uploads would have no effect, or the repository cannot be made.
    """
    if not args.push_to_hub:
        return None
    if ("hub_strategy" in named and args.hub_strategy != "end") or args.hub_always_push:
        raise UsageError(
            "A stage is uploaded once, when it has come to its end: set hub_strategy to end, and leave hub_always_push out."
        )
    args.push_to_hub = False
    found = ["", ""]
    if PartialState().is_main_process:
        wanted = args.hub_model_id or "-".join(Path(str(args.output_dir)).resolve().parts[-2:])
        try:
            api = HfApi(token=args.hub_token)
            found[0] = api.create_repo(wanted, private=args.hub_private_repo, exist_ok=True).repo_id
        except Exception as error:  # of the network, of the hub, of the name, and of having no token
            found[1] = f"push_to_hub: the repository {wanted} cannot be made ({first_line(error)})."
    name, fault = broadcast_object_list(found)
    if fault:
        raise UsageError(f"{fault} Name one with --hub_model_id, and log in with `hf auth login`.")
    return Repository(name, args.hub_token, args.hub_revision)


def publish(repository: Repository | None, folder: str | Path) -> None:
    """Upload what is in the folder of a finished stage, on the main process; its card then calls it by the repository's name.

    Raises:
        UsageError: it cannot be uploaded. The model stays where it is.
    """
    if repository is None or not PartialState().is_main_process:
        return
    card = Path(folder, CARD)
    if card.is_file():  # a model of an earlier version has none
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(shown(str(folder)), repository.name), encoding="utf-8")
    try:
        commit = HfApi(token=repository.token).upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            commit_message=repository.message,
            revision=repository.revision,
            allow_patterns=list(UPLOADED),
            ignore_patterns=list(LEFT_OUT),
        )
    except Exception as error:  # of the network and of the hub
        raise UsageError(
            f"The model is finished and lies in {folder}, but could not be uploaded to {repository.name} "
            f"({first_line(error)}). Give the same command again: it uploads without training anew."
        ) from error
    print(f"{folder} → {getattr(commit, 'repo_url', repository.name)}")
