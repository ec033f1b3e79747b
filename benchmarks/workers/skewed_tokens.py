"""Tokens that the policy computes in an iteration on a skewed batch, over the real ones: `skewed_tokens.py THREADS`.

64 rows of 10 to 60 and 10 to 60 tokens, but for one prompt of 900 and one completion of 512.
"""

import random
import sys
import tempfile
from typing import Any

import torch
from llm_world import EOS, FIRST_WORD, PPO_EPOCHS, WORLDS
from tieback_ppo import Timed, make_trainer
from torch import Tensor

from tieback.pipeline.rollout.sampler import Completion
from tieback.pipeline.rollout.texts import Rollout, make_rollout


class Skewed(Timed):
    """Has the skewed batch in the place of what it would sample."""

    def generate(self, rows: list[Any]) -> Rollout:
        dice = random.Random(0)

        def tokens(count: int) -> list[int]:
            return [dice.randrange(FIRST_WORD, WORLDS["skewed"].vocab_size) for _ in range(count)]

        prompts = [tokens(dice.randint(10, 60)) for _ in rows]
        completions = [[*tokens(dice.randint(9, 59)), EOS] for _ in rows]
        prompts[20], completions[40] = tokens(900), [*tokens(511), EOS]
        self.real = sum(map(len, prompts + completions))
        self.figures_of_turn["skewed_tokens"] = 0.0
        return make_rollout(
            rows, prompts, [Completion(ids, truncated=False) for ids in completions], self.processing_class
        )

    def count(self, _: Any, __: Any, inputs: dict[str, Tensor]) -> None:
        """Take in a pass of the policy; a real token needs one for the rollout and one in each epoch."""
        needed = self.real * (1 + PPO_EPOCHS)
        self.figures_of_turn["skewed_tokens"] += inputs["input_ids"].numel() / needed


def main() -> None:
    """Train for as many turns as there are."""
    torch.set_num_threads(int(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(WORLDS["skewed"], "fp32", "separate", folder, Skewed)
        trainer.args.check_sampling = False
        policy: Any = trainer.model
        policy.policy.model.register_forward_pre_hook(trainer.count, with_kwargs=True)
        trainer.train()


if __name__ == "__main__":
    main()
