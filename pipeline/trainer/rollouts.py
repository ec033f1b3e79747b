"""Rollouts within a Trainer: prompts sampled from, by the policy or by a rollout function, scored by judges and by the models."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tieback.pipeline.rollout.random_state import random_state
from tieback.pipeline.rollout.sampler import Completion, Sampler
from tieback.pipeline.rollout.texts import Rollout, encode_prompts, make_rollout
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.dynamic_sampling import fill_with_unlike
from tieback.pipeline.trainer.evaluation import EvaluatedTrainer, Row
from tieback.pipeline.trainer.failures import checkpoint_on_failure, failing_together
from tieback.pipeline.trainer.figures import rollout_figures, sequence_kl
from tieback.pipeline.trainer.judges import Judges
from tieback.pipeline.trainer.passes import in_passes
from tieback.pipeline.trainer.phase_times import PhaseTimes
from tieback.pipeline.trainer.ratio_checks import check_sampling
from tieback.pipeline.trainer.rewards import MomentsOfEach, RunningMoments, ScoredRollout
from tieback.pipeline.trainer.rollout_function import RolloutFunction, call_rollout_function
from tieback.pipeline.trainer.scoring import score_rollout
from tieback.pipeline.trainer.sharded_tensors import gathered
from tieback.pipeline.trainer.sharding import policy_for_generation
from tieback.pipeline.trainer.time_limit import time_limit


class RolloutTrainer(EvaluatedTrainer):
    """A Trainer that samples and scores; what is learnt of it is `PPOTrainer`'s.

    Attributes:
        sampler: of the completions.
        rollout_func: what samples in its place, if anything.
        reward_weights: one for each of `scorers`.
        reward_names: likewise.
        reward_moments: of the weighted sums of rewards so far.
        moments_of_each: of each reward function's.
        judges: of evaluations.
        reference: frozen policy; None where it is the policy's base or an adapter of it.
    """

    args: PPOConfig
    sampler: Sampler
    rollout_func: RolloutFunction | None
    reward_weights: Sequence[float]
    reward_names: list[str]
    reward_moments: RunningMoments
    moments_of_each: MomentsOfEach
    judges: Judges
    reference: nn.Module | None

    # What brings random numbers back to the end of the iteration before; None in the first one.
    _restore_random_state: Callable[[], None] | None = None

    def sample_and_score(
        self, inputs: list[Row], times: PhaseTimes
    ) -> tuple[ScoredRollout, dict[str, float]]:
        """Complete each row's prompt `num_generations` times and score that; again, as `dynamic_sampling_batches` says.

        Returns:
            The scored completions, and the figures of `fill_with_unlike`, where it was called.
        """

        def sample(rows: list[Row]) -> ScoredRollout:
            with times.phase("generate"):
                rollout = self.generate([row for row in rows for _ in range(self.args.num_generations)])
            times.tokens += sum(len(rollout.written(row)) for row in range(len(rollout)))
            with times.phase("score"):
                return self.score(rollout)

        scored = sample(inputs)
        if self.args.dynamic_sampling_batches == 1:
            return scored, {}
        return fill_with_unlike(
            scored, sample, self.train_dataset, self.state.global_step, self.accelerator, self.args
        )

    def generate(self, rows: list[Row]) -> Rollout:
        """Sample a completion for the prompt of each row, or let `rollout_func` do so."""
        with (
            self._generation_model() as actor_critic,
            failing_together(self.accelerator),
            self._sampler_answers(),
        ):
            self.sampler.sync(actor_critic)
            if self.rollout_func is not None:
                return call_rollout_function(self.rollout_func, rows, cast(Any, self))
            prompts = [row["prompt"] for row in rows]
            prompt_ids = encode_prompts(prompts, self.processing_class, self.args.template_arguments)
            return make_rollout(rows, prompt_ids, self.sample(prompt_ids), self.processing_class)

    def sample(self, prompt_ids: list[list[int]], max_length: int | None = None) -> list[Completion]:
        """Go on after token ids of any number of prompts, by the policy as it is now; for a `rollout_func`, while it runs.

        Each process must call at least once, as often as it likes.

        Args:
            prompt_ids: all that stands before, from the first prompt on; none empty.
            max_length: most tokens of each, where fewer than max_completion_length.
        """
        with_logprobs = self.args.importance_sampling is not None
        return self.sampler.sample(prompt_ids, with_logprobs=with_logprobs, max_length=max_length)

    def score(self, rollout: Rollout, training: bool = True) -> ScoredRollout:
        """Judge each completion: the weighted rewards, normalised and clipped where set, less the missing-EOS penalty.

        Args:
            rollout: B completions.
            training: whether the running reward statistics take these scores in.
        """
        return score_rollout(
            rollout,
            self.scorers,
            self.reward_weights,
            self.reward_moments,
            self.moments_of_each,
            self.accelerator,
            self.args,
            training,
        )

    def _pack(self, rollout: Rollout) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the models on the CPU, where trimming waits for no device; and the mask [B, T]."""
        pad_id = self.processing_class.pad_token_id
        inputs = pack_sequences(
            rollout.prompt_ids, rollout.completion_ids, pad_id, torch.device("cpu"), rollout.env_mask
        )
        return inputs, inputs.pop("mask").to(self.accelerator.device)

    @torch.no_grad()
    def _score_tokens(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [B, T], values [B, T + 1] and the reference's log-probabilities [B, T]."""

        def score(part: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            # Before train() has prepared the policy, its own forward is not under autocast, nor does it gather weights.
            unprepared = self.model.parameters() if self.model_wrapped is self.model else ()
            with self.accelerator.autocast(), gathered(unprepared):
                logprobs, values = self.model_wrapped(part)
                if self.reference is None:
                    (ref_logprobs,) = self.model_wrapped(part, task="reference")
                else:
                    ref_logprobs, _ = completion_logprobs(self.reference, part, self.args.temperature)
            return logprobs, values, ref_logprobs

        logprobs, values, ref_logprobs = in_passes(
            score, inputs, self.args.micro_batch_size, self.accelerator
        )
        return logprobs, values, ref_logprobs

    def _saved_on_failure(self) -> AbstractContextManager[None]:
        restore = self._restore_random_state or random_state(self.accelerator.device)
        return checkpoint_on_failure(self, restore)

    def _sampler_answers(self) -> AbstractContextManager[None]:
        what = f"The sampler ({self.args.sampler})" if self.rollout_func is None else "The rollout function"
        return time_limit(self.args.rollout_timeout, what, "rollout_timeout")

    @contextmanager
    def _generation_model(self) -> Iterator[ActorCritic]:
        with (
            policy_for_generation(
                self.model_wrapped, self.accelerator, self.args.gradient_checkpointing_kwargs
            ) as actor_critic,
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            yield actor_critic

    def _check_sampling(self, rows: list[Row]) -> None:
        prompts = [row["prompt"] for row in rows[:4]]
        prompt_ids = encode_prompts(prompts, self.processing_class, self.args.template_arguments)
        with self._generation_model() as actor_critic, self._sampler_answers():
            self.sampler.sync(actor_critic)
            corrected = self.args.importance_sampling is not None
            check_sampling(actor_critic, self.sampler, prompt_ids, self.accelerator, corrected)

    # Evaluation.

    def figures(self, rows: list[Row]) -> dict[str, Tensor]:
        """Complete and score B prompt rows; each figure [B], by its name in the log."""
        with self._saved_on_failure():
            scored = self.score(self.generate(rows), training=False)
            with (
                failing_together(self.accelerator),
                time_limit(self.args.rollout_timeout, "Judges", "rollout_timeout"),
            ):
                judged = self.judges.judge(scored.rollout, self.accelerator.device)
        inputs, mask = self._pack(scored.rollout)
        logprobs, _, ref_logprobs = self._score_tokens(inputs)
        kl = sequence_kl(logprobs, ref_logprobs, mask)
        return rollout_figures(scored, kl, self.reward_names) | judged
