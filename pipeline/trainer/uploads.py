"""Uploads of `PPOTrainer` itself, where no stage does it: without the pickle of arguments, in which a token may stand."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from tieback.pipeline.hub import Repository, publish
from tieback.pipeline.model_card import write_card
from tieback.pipeline.rollout.token_scores import base_model
from tieback.pipeline.trainer.checkpoints import CheckpointedTrainer


class UploadingTrainer(CheckpointedTrainer):
    """A Trainer whose `push_to_hub` uploads weights, tokenizer, figures and a card; its checkpoints stay here."""

    hub_model_id: str | None
    state: Any

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the policy and the critic into `output_dir`, with a card, and upload both. All processes must call.

        Args:
            commit_message: of the upload.
            blocking: True; it is waited for.
            token: in the place of `hub_token`.
            revision: in the place of `hub_revision`.
            private: in the place of `hub_private_repo`, where the repository is made.
            kwargs: not used; Trainer's card takes them.

        Raises:
            UsageError: it cannot be uploaded.
        """
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.save_state()
        last: dict[str, float] = next(
            (entry for entry in reversed(self.state.log_history) if "policy/loss" in entry), {}
        )
        values = self.args.to_dict()
        settings = {
            f.name: values[f.name]
            for f in fields(self.args)
            if f.init and not f.name.endswith("_token") and values[f.name] not in (f.default, None)
        }
        start = base_model(self.model.policy).name_or_path or None
        repository = Repository(
            str(self.hub_model_id), token, revision or self.args.hub_revision, commit_message or "Upload"
        )
        write_card("ppo", Path(str(self.args.output_dir)), last, settings, start)
        publish(repository, str(self.args.output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload nothing while training: Trainer's own way takes the pickle of arguments along."""
