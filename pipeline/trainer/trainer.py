"""PPOTrainer: Transformers' Trainer outside, the phases of PPO inside. One Trainer step is one PPO iteration."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from tieback.pipeline.interruption import InterruptCallback
from tieback.pipeline.model_loading import loading, named_tokenizer, refuse_classifier
from tieback.pipeline.rollout.random_state import random_state
from tieback.pipeline.rollout.sampler import end_token_ids, make_sampler
from tieback.pipeline.scorers import (
    RewardSource,
    check_call,
    import_function,
    make_scorers,
    read_weights,
    unique_reward_names,
)
from tieback.pipeline.trainer.callbacks import PPOProgressCallback, early_stopping
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.critic_warmup import CriticWarmup
from tieback.pipeline.trainer.evaluation import Row
from tieback.pipeline.trainer.figures import (
    figure_names,
    mean_figures,
    rollout_figures,
    sequence_kl,
    std_within_prompt,
)
from tieback.pipeline.trainer.imitation import PTXTexts, with_imitation
from tieback.pipeline.trainer.importance import compare_with_sampler
from tieback.pipeline.trainer.input_checks import (
    check_args,
    check_dataset,
    check_evaluation,
    check_policy,
    check_train_set,
)
from tieback.pipeline.trainer.judges import Judges
from tieback.pipeline.trainer.models import CriticSource, base_of_adapter, make_actor_critic
from tieback.pipeline.trainer.moving_reference import MovingReference
from tieback.pipeline.trainer.optimizer import optimizer_groups
from tieback.pipeline.trainer.passes import row_lengths
from tieback.pipeline.trainer.phase_times import PhaseTimes
from tieback.pipeline.trainer.placement import place_models
from tieback.pipeline.trainer.precision import check_trained
from tieback.pipeline.trainer.prompt_sets import PromptRows, by_name, read_eval_sets, read_set
from tieback.pipeline.trainer.ratio_checks import check_ratio
from tieback.pipeline.trainer.rewards import MomentsOfEach, RunningMoments, ScoredRollout
from tieback.pipeline.trainer.rollout_function import RolloutFunction
from tieback.pipeline.trainer.rollouts import RolloutTrainer
from tieback.pipeline.trainer.run_identity import input_digests
from tieback.pipeline.trainer.saved_rollouts import save_rollout
from tieback.pipeline.trainer.sharding import check_backend
from tieback.pipeline.trainer.targets import check_some_ended, make_batch, without_truncated
from tieback.pipeline.trainer.token_gains import check_gains
from tieback.ppo_core import AdaptiveKLController, Batch, FixedKLController, PPOStats, update
from tieback.reward_model.scoring import RewardScorer


class PPOTrainer(RolloutTrainer):
    """PPO against reward functions and reward models, with a KL penalty to the model it starts from.

    Each step: sample a completion for each prompt (`generate`), score it (`score`), turn scores into advantages
    (`to_batch`), and take `num_ppo_epochs x num_minibatches` optimiser steps (`ppo_core.update`).

    Args:
        model: causal language model, its name or folder, or one with a PEFT adapter to train further.
        reward_funcs: one or several of: a function `f(prompts, completions, completion_ids, **columns)` that
            returns a number (or None, where it does not judge) for each completion, asynchronous ones run together;
            a sequence-classification model with one label; the name or folder of such a model, or `module:function`;
            a `RewardScorer`.
        args: settings.
        train_dataset: rows with a `prompt`, plain or conversational, as a `Dataset` or a list of dictionaries; further
            columns go to reward functions.
        eval_dataset: likewise, for `evaluate`; or several such data sets by name, whose figures have that name before
            them (`eval_<name>_reward/mean`).
        processing_class: the policy's tokenizer; loaded from the model's name where not given.
        reward_processing_classes: tokenizers of the reward models, in the order of `reward_funcs`; loaded from
            their names where not given.
        value_model: the critic to start from; a new head on the policy's backbone where not given.
        callbacks: further callbacks.
        optimizers: an optimiser and a schedule of your own.
        peft_config: adapter to train; the reference is then the policy with the adapter off.
        judge_funcs: like `reward_funcs`: they score what `evaluate` samples, and take no part in training.
        ptx_dataset: demonstrations (`prompt` and `completion`, `messages`, or `text`) that the policy imitates beside PPO, with
            the weight `ptx_coef`.
        rollout_func: a function `f(prompts, trainer)`, or its name `module:function`, that samples in the trainer's place, in
            several turns perhaps (see `RolloutFunction` and `sample`); what an environment wrote is read, and not learnt.
    """

    args: PPOConfig
    optimizer: Any
    control: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardSource | Sequence[RewardSource],
        args: PPOConfig | None = None,
        train_dataset: PromptRows | None = None,
        eval_dataset: PromptRows | Mapping[str, PromptRows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase
        | Sequence[PreTrainedTokenizerBase | None]
        | None = None,
        value_model: CriticSource = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
        judge_funcs: RewardSource | Sequence[RewardSource] | None = None,
        ptx_dataset: PromptRows | None = None,
        rollout_func: RolloutFunction | str | None = None,
    ):
        args = PPOConfig() if args is None else args
        check_args(args)
        train_set, eval_sets = read_set("train_dataset", train_dataset), read_eval_sets(eval_dataset)
        ptx_set = read_set("ptx_dataset", ptx_dataset)
        set_seed(args.seed)
        if isinstance(model, str):
            with loading("model", model):
                refuse_classifier(model)
                model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = processing_class
        if tokenizer is None:
            tokenizer = named_tokenizer("processing_class", model)
        check_policy(model, tokenizer, peft_config)
        named_sets = by_name("train_dataset", train_set) | by_name("eval_dataset", eval_sets)
        for name, dataset in named_sets.items():
            check_dataset(name, dataset, tokenizer, model.config, args)
        if tokenizer.pad_token_id is None:
            # Harmless: every mask is made from lengths, so a pad that is also EOS hides no end.
            end_ids = end_token_ids(tokenizer, model.generation_config, args.stop_tokens)
            tokenizer.pad_token_id = end_ids[0]
        self.sampler = make_sampler(
            args,
            tokenizer,
            model.generation_config,
            args.device,
            args.generation_batch_size,
            args.generation_arguments,
        )
        self.scorers = make_scorers(
            reward_funcs,
            reward_processing_classes,
            args.per_device_eval_batch_size,
            base_of_adapter(model, peft_config),
        )
        self.rollout_func = (
            import_function("rollout_func", rollout_func) if isinstance(rollout_func, str) else rollout_func
        )
        for name, dataset in named_sets.items():
            check_call(self.scorers, name, dataset, more_columns=self.rollout_func is not None)
        if args.per_token_reward_model:
            check_gains(self.scorers, tokenizer)
        self.reward_names = unique_reward_names(self.scorers)
        self.reward_weights = read_weights(args.reward_weights, self.scorers)
        self.judges = Judges(judge_funcs, args.per_device_eval_batch_size)
        self.judges.check(by_name("eval_dataset", eval_sets), more_columns=self.rollout_func is not None)
        check_evaluation(args, eval_sets, [*figure_names(self.reward_names), *self.judges.figure_names])

        self.ptx = PTXTexts(ptx_set, tokenizer, args)
        self.inputs = input_digests(
            model, value_model, self.scorers, tokenizer, train_set, peft_config, ptx_set, self.rollout_func
        )
        reward_models = [scorer for scorer in self.scorers if isinstance(scorer, RewardScorer)]
        trained, reference = make_actor_critic(model, value_model, reward_models, peft_config, args)
        self.interrupt = InterruptCallback()
        super().__init__(
            model=trained,
            args=args,
            data_collator=list,
            train_dataset=train_set,
            eval_dataset=eval_sets,
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), *early_stopping(args), self.interrupt],
            optimizers=optimizers,
        )
        # Processes sample differently; what they must agree on (prompt order, minibatches) has seeds of its own.
        set_seed((args.seed + self.accelerator.process_index) % 2**32)
        check_backend(self.accelerator)
        check_trained(trained, self.accelerator)
        if self.is_world_process_zero() and not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PPOProgressCallback())
        self.remove_callback(PrinterCallback)

        self.reference = place_models(
            trained,
            reference,
            [*reward_models, *self.judges.models],
            self.accelerator,
            args.replicate_frozen_models,
            moving=args.ref_model_sync_steps is not None,
        )
        self.moving_reference = MovingReference(trained, self.reference, self.accelerator, args)
        self.kl_controller = (
            FixedKLController(args.kl_coef)
            if args.kl_target is None
            else AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
        )
        self.reward_moments = RunningMoments()
        self.moments_of_each = MomentsOfEach(len(self.scorers))
        self.critic_warmup = CriticWarmup(args.critic_warmup_iterations, args.critic_warmup_patience)
        self.run_state = {
            "kl": self.kl_controller,
            "reward_moments": self.reward_moments,
            **({"moments_of_each": self.moments_of_each} if args.normalize_each_reward else {}),
            "critic_warmup": self.critic_warmup,
        }
        self._checked = False

    # What Trainer asks for.

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the optimiser, with a learning rate of its own for the critic where one is set."""
        if self.optimizer is None:
            trained = self.accelerator.unwrap_model(self.model if model is None else model)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = optimizer_groups(trained, self.args, self.get_decay_parameter_names(trained))
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def train(self, resume_from_checkpoint: bool | str | None = None, **kwargs: Any) -> TrainOutput:
        """Train; with `resume_from_checkpoint` go on from that folder, or for True from the newest whole one."""
        check_train_set(self.train_dataset, self.args, self.accelerator.num_processes)
        with self.interrupt:
            return super().train(resume_from_checkpoint, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Leave gradients alone: `update` has clipped them, stepped, and set them to None."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Report none: `update` logs the norm that it clipped."""

    # One iteration.

    def training_step(self, model: nn.Module, inputs: list[Row], num_items_in_batch: Any = None) -> Tensor:
        """One PPO iteration on a list of prompt rows, each of which is completed `num_generations` times.

        Returns the policy loss, for Trainer's own average.
        """
        model.train()
        if not self._checked and self.args.check_sampling:
            self._check_sampling(inputs)
        num_generations = self.args.num_generations
        times = PhaseTimes(self.accelerator)
        with self._saved_on_failure():
            scored, of_the_sampling = self.sample_and_score(inputs, times)
            if self.args.truncation == "mask":
                check_some_ended(scored.rollout.truncated, self.accelerator)
        rollout = scored.rollout
        with times.phase("logprobs"):
            batch = self.to_batch(scored)
        batch, of_the_sampler = compare_with_sampler(batch, rollout, self.model, self.accelerator, self.args)
        if self.args.rollout_dir is not None:
            save_rollout(
                scored,
                batch,
                self.state.global_step + 1,
                self.accelerator.process_index,
                self.kl_controller.value,
                self.reward_names,
                self.processing_class,
                self.args,
            )
        learnt = batch
        if self.args.truncation == "mask":
            learnt = without_truncated(batch, rollout.truncated)
        with times.phase("update"):
            value_only = self.critic_warmup.active(self.state.global_step)
            imitating = learnt if value_only else self._with_imitation(learnt, scored)
            stats = self._update(imitating, self.args.num_ppo_epochs, 1_000_003, value_only)
            if self.args.extra_critic_epochs:
                self._update(learnt, self.args.extra_critic_epochs, 1_000_033, value_only=True)
        self.critic_warmup.update(stats.explained_variance)
        if not self._checked:
            check_ratio(stats.max_abs_log_ratio_first, self.model, self.accelerator.mixed_precision)
            self._checked = True
        assert batch.ref_logprobs is not None
        kl = sequence_kl(batch.old_logprobs, batch.ref_logprobs, batch.mask)
        figures = rollout_figures(scored, kl, self.reward_names)
        if num_generations > 1:
            figures["reward/std_within_prompt"] = std_within_prompt(scored.raw_scores, num_generations)
        figures = self.accelerator.gather(figures)
        rollout_metrics = mean_figures(figures)
        metrics = {
            **rollout_metrics,
            **of_the_sampling,
            **of_the_sampler,
            **stats.metrics(),
            **self._returns_outside(batch),
            "kl_coef": self.kl_controller.value,
            **times.figures(),
        }
        self.note(metrics, scored)
        self.moving_reference.follow(self.state.global_step + 1)
        self.kl_controller.update(rollout_metrics["kl/ref"], len(batch) * self.accelerator.num_processes)
        # Not later: a new epoch of the data draws a number before the next iteration.
        self._restore_random_state = random_state(self.accelerator.device)
        return torch.tensor(stats.policy_loss, device=self.accelerator.device)

    def _returns_outside(self, batch: Batch) -> dict[str, float]:
        if self.args.value_bins is None:
            return {}
        outside = (batch.returns.abs() > self.args.value_range) & batch.mask
        sums = torch.stack([outside.sum(), batch.mask.sum()])
        count, total = self.accelerator.reduce(sums, "sum").tolist()
        return {"value/outside_range_fraction": count / total}

    def _with_imitation(self, batch: Batch, scored: ScoredRollout) -> Batch:
        if not (self.args.ptx_coef or self.args.positive_nll_coef):
            return batch
        texts = self.ptx.draw(self.state.global_step, self.accelerator) if self.args.ptx_coef else []
        pad_id = self.processing_class.pad_token_id
        return with_imitation(batch, scored, texts, pad_id, self.accelerator, self.args)

    def _update(self, batch: Batch, epochs: int, factor: int, value_only: bool) -> PPOStats:
        """`update` with so many epochs, whose minibatches are drawn by the seed times `factor` and by the iteration."""
        hyper = copy.copy(self.args)
        hyper.num_ppo_epochs = epochs
        return update(
            self.model_wrapped,
            self.optimizer,
            batch,
            hyper,
            self.accelerator,
            self.args.micro_batch_size or len(batch),
            generator=torch.Generator().manual_seed(self.args.seed * factor + self.state.global_step),
            value_only=value_only,
            lengths=row_lengths(batch.inputs, self.args.micro_batch_size, self.accelerator.device),
        )

    def to_batch(self, scored: ScoredRollout) -> Batch:
        """What `update` learns from: log-probabilities and values of the rollout, and advantages of its rewards."""
        inputs, mask = self._pack(scored.rollout)
        kl_coef = self.kl_controller.value
        return make_batch(scored, inputs, mask, *self._score_tokens(inputs), kl_coef, self.args)
