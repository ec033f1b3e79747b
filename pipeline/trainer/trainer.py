"""PPOTrainer: Transformers' Trainer outside, the phases of PPO inside. One Trainer step is one PPO iteration."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from tieback.cli.errors import UsageError
from tieback.pipeline.interruption import InterruptCallback
from tieback.pipeline.rollout.responses import equal_share
from tieback.pipeline.rollout.sampler import end_token_ids, make_sampler
from tieback.pipeline.rollout.texts import Rollout, encode_prompts, make_rollout
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.scorers import (
    RewardSource,
    call_scorer,
    combine_rewards,
    make_scorers,
    unique_reward_names,
)
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.callbacks import PPOProgressCallback, show_completions
from tieback.pipeline.trainer.checkpoints import CheckpointedTrainer
from tieback.pipeline.trainer.config import PPOConfig
from tieback.pipeline.trainer.figures import mean_figures, rollout_figures, sequence_kl
from tieback.pipeline.trainer.input_checks import check_batch, check_dataset, check_devices
from tieback.pipeline.trainer.models import make_actor_critic
from tieback.pipeline.trainer.optimizer import optimizer_groups
from tieback.pipeline.trainer.ratio_checks import check_ratio, check_sampling
from tieback.pipeline.trainer.rewards import RunningMoments, ScoredRollout, token_rewards
from tieback.pipeline.trainer.sharded_tensors import gathered
from tieback.pipeline.trainer.sharding import (
    check_backend,
    place_reference,
    place_reward_model,
    place_trained,
    policy_for_generation,
)
from tieback.ppo_core import (
    AdaptiveKLController,
    Batch,
    FixedKLController,
    gae,
    kl_estimate,
    update,
)
from tieback.reward_model.scoring import RewardScorer

Row = dict[str, Any]


class PPOTrainer(CheckpointedTrainer):
    """PPO against reward functions and reward models, with a KL penalty to the model it starts from.

    Each step: sample a completion for each prompt (`generate`), score it (`score`), turn scores into advantages
    (`to_batch`), and take `num_ppo_epochs x num_minibatches` optimiser steps (`ppo_core.update`).

    Args:
        model: causal language model, its name or folder, or one with a PEFT adapter to train further.
        reward_funcs: one or several of: a function `f(prompts, completions, completion_ids, **columns)` that
            returns a number (or None, where it does not judge) for each completion; a sequence-classification
            model with one label; the name or folder of such a model; a `RewardScorer`.
        args: settings.
        train_dataset: rows with a `prompt`, plain or conversational; further columns go to reward functions.
        eval_dataset: likewise, for `evaluate`.
        processing_class: the policy's tokenizer; loaded from the model's name where not given.
        reward_processing_classes: tokenizers of the reward models, in the order of `reward_funcs`; loaded from
            their names where not given.
        value_model: the critic to start from; a new head on the policy's backbone where not given.
        callbacks: further callbacks.
        optimizers: an optimiser and a schedule of your own.
        peft_config: adapter to train; the reference is then the policy with the adapter off.
    """

    args: PPOConfig
    optimizer: Any
    control: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardSource | Sequence[RewardSource],
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase
        | Sequence[PreTrainedTokenizerBase | None]
        | None = None,
        value_model: PreTrainedModel | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = args or PPOConfig()
        check_devices(args.n_gpu)
        set_seed(args.seed)
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
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
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                check_dataset(name, dataset, tokenizer, model.config, args)

        self.scorers = make_scorers(reward_funcs, reward_processing_classes, args.per_device_eval_batch_size)
        self.reward_names = unique_reward_names(self.scorers)
        self.reward_weights = args.reward_weights or [1.0] * len(self.scorers)
        if len(self.reward_weights) != len(self.scorers):
            raise UsageError(
                f"reward_weights has {len(self.reward_weights)} entries for {len(self.scorers)} reward functions."
            )

        reward_models = [scorer for scorer in self.scorers if isinstance(scorer, RewardScorer)]
        trained, reference = make_actor_critic(model, value_model, reward_models, peft_config, args)
        self.interrupt = InterruptCallback()
        super().__init__(
            model=trained,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), self.interrupt],
            optimizers=optimizers,
        )
        # Processes sample differently; what they must agree on (prompt order, minibatches) has seeds of its own.
        set_seed((args.seed + self.accelerator.process_index) % 2**32)
        check_backend(self.accelerator)
        if self.is_world_process_zero() and not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PPOProgressCallback())
        self.remove_callback(PrinterCallback)

        replicate = args.replicate_frozen_models
        self.reference = (
            None if reference is None else place_reference(reference, self.accelerator, replicate)
        )
        for scorer in reward_models:
            place_reward_model(scorer.model, self.accelerator, replicate)
        place_trained(trained, self.accelerator)
        self.kl_controller = (
            FixedKLController(args.kl_coef)
            if args.kl_target is None
            else AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
        )
        self.reward_moments = RunningMoments()
        self.run_state = {"kl": self.kl_controller, "reward_moments": self.reward_moments}
        self._checked = False
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._last_rollout: ScoredRollout | None = None

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
        batch_size = self.args.per_device_train_batch_size
        check_batch(len(self.train_dataset), batch_size, self.accelerator.num_processes)
        with self.interrupt:
            return super().train(resume_from_checkpoint, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Leave gradients alone: `update` has clipped them, stepped, and set them to None."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Report none: `update` logs the norm that it clipped."""

    # One iteration.

    def training_step(self, model: nn.Module, inputs: list[Row], num_items_in_batch: Any = None) -> Tensor:
        """One PPO iteration on a list of prompt rows. Returns the policy loss, for Trainer's own average."""
        model.train()
        if not self._checked:
            self._check_sampling(inputs)
        scored = self.score(self.generate(inputs))
        batch = self.to_batch(scored)
        stats = update(
            model,
            self.optimizer,
            batch,
            self.args,
            self.accelerator,
            self.args.micro_batch_size or len(batch),
            generator=torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step),
            value_only=self.state.global_step < self.args.critic_warmup_iterations,
        )
        if not self._checked:
            check_ratio(stats.max_abs_log_ratio_first, self.model, self.accelerator.mixed_precision)
            self._checked = True
        assert batch.ref_logprobs is not None
        kl = sequence_kl(batch.old_logprobs, batch.ref_logprobs, batch.mask)
        figures = self.accelerator.gather(rollout_figures(scored, kl, self.reward_names))
        rollout_metrics = mean_figures(figures)
        for name, value in {
            **rollout_metrics,
            **stats.metrics(),
            "kl_coef": self.kl_controller.value,
        }.items():
            self._metrics[name].append(value)
        self.kl_controller.update(rollout_metrics["kl/ref"], len(batch) * self.accelerator.num_processes)
        self._last_rollout = scored
        return torch.tensor(stats.policy_loss, device=self.accelerator.device)

    def generate(self, rows: list[Row]) -> Rollout:
        """Sample a completion for the prompt of each row."""
        prompts = [row["prompt"] for row in rows]
        prompt_ids = encode_prompts(prompts, self.processing_class, self.args.template_arguments)
        with self._generation_model() as actor_critic:
            self.sampler.sync(actor_critic)
            completions = self.sampler.sample(prompt_ids)
        return make_rollout(rows, prompt_ids, completions, self.processing_class)

    def score(self, rollout: Rollout, training: bool = True) -> ScoredRollout:
        """Judge each completion: the weighted rewards, normalised and clipped where set, less the missing-EOS penalty.

        Args:
            rollout: B completions.
            training: whether the running reward statistics take these scores in.
        """
        device = self.accelerator.device
        rewards = torch.tensor([call_scorer(scorer, rollout) for scorer in self.scorers], device=device).T
        # The slowest judge is waited for here, up to ddp_timeout: DeepSpeed has process groups with a limit of their own.
        self.accelerator.wait_for_everyone()
        raw_scores = combine_rewards(rewards, self.reward_weights, rollout)
        scores = raw_scores
        if self.args.normalize_rewards:
            if training:
                self.reward_moments.update(self.accelerator.gather(scores))
            scores = scores / self.reward_moments.std
        if self.args.reward_clip is not None:
            scores = scores.clamp(-self.args.reward_clip, self.args.reward_clip)
        if self.args.truncation == "penalty":
            scores = scores - self.args.missing_eos_penalty * torch.tensor(rollout.truncated, device=device)
        return ScoredRollout(rollout, rewards, raw_scores, scores)

    def to_batch(self, scored: ScoredRollout) -> Batch:
        """What `update` learns from: log-probabilities and values of the rollout, and advantages of its rewards."""
        args, rollout = self.args, scored.rollout
        inputs, mask = self._pack(rollout)
        logprobs, values, ref_logprobs = self._score_tokens(inputs)
        kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
        bootstrap = None
        if args.truncation == "bootstrap":
            end_values = values.gather(1, mask.sum(1, keepdim=True)).squeeze(1)
            bootstrap = torch.where(torch.tensor(rollout.truncated, device=mask.device), end_values, 0.0)
        rewards, discounts = token_rewards(
            scored.scores, kl, self.kl_controller.value, mask, args.gamma, bootstrap
        )
        advantages = gae(rewards, discounts, values, args.gae_lambda, mask)
        return Batch(
            inputs=inputs,
            old_logprobs=logprobs,
            old_values=values[:, :-1],
            advantages=advantages,
            returns=advantages + values[:, :-1],
            mask=mask,
            ref_logprobs=ref_logprobs,
        )

    def _pack(self, rollout: Rollout) -> tuple[dict[str, Tensor], Tensor]:
        pad_id = self.processing_class.pad_token_id
        inputs = pack_sequences(rollout.prompt_ids, rollout.completion_ids, pad_id, self.accelerator.device)
        return inputs, inputs.pop("mask")

    @torch.no_grad()
    def _score_tokens(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [B, T], values [B, T + 1] and the reference's log-probabilities [B, T]."""
        rows = len(inputs["input_ids"])
        size = self.args.micro_batch_size or rows
        parts = []
        for start in range(0, rows, size):
            chunk = {name: tensor[start : start + size] for name, tensor in inputs.items()}
            # Before train() has prepared the policy, its own forward is not under autocast, nor does it gather weights.
            unprepared = self.model.parameters() if self.model_wrapped is self.model else ()
            with self.accelerator.autocast(), gathered(unprepared):
                logprobs, values = self.model_wrapped(chunk)
                if self.reference is None:
                    (ref_logprobs,) = self.model_wrapped(chunk, task="reference")
                else:
                    ref_logprobs, _ = completion_logprobs(self.reference, chunk, self.args.temperature)
            parts.append((logprobs, values, ref_logprobs))
        logprobs, values, ref_logprobs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return logprobs, values, ref_logprobs

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
        with self._generation_model() as actor_critic:
            self.sampler.sync(actor_critic)
            check_sampling(actor_critic, self.sampler, prompt_ids, self.accelerator)

    # Evaluation and logging.

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Complete and score the evaluation prompts with the policy as it is; training's random state is untouched.

        Returns:
            Means over all prompts, under the training metrics' names with `metric_key_prefix` before them.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        parts: list[dict[str, Tensor]] = []
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        own = equal_share(len(dataset), self.accelerator.process_index, self.accelerator.num_processes)
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            for start in range(0, len(own), size):
                scored = self.score(
                    self.generate([dataset[i] for i in own[start : start + size]]), training=False
                )
                inputs, mask = self._pack(scored.rollout)
                logprobs, _, ref_logprobs = self._score_tokens(inputs)
                kl = sequence_kl(logprobs, ref_logprobs, mask)
                parts.append(rollout_figures(scored, kl, self.reward_names))
        # The rows that `equal_share` repeats stand at the end.
        own_figures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        figures = {
            name: column[: len(dataset)].cpu()
            for name, column in self.accelerator.gather(own_figures).items()
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in mean_figures(figures).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the PPO metrics since the last log line in place of Trainer's own loss."""
        if "learning_rate" in logs:
            logs.pop("loss", None)
            logs.pop("grad_norm", None)
            for name, values in self._metrics.items():
                finite = [value for value in values if math.isfinite(value)]
                if finite:
                    logs[name] = sum(finite) / len(finite)
            self._metrics.clear()
            if self._last_rollout is not None and self.is_world_process_zero():
                show_completions(
                    self.callback_handler.callbacks,
                    self._last_rollout,
                    self.reward_names,
                    self.state.global_step,
                    self.args,
                )
        super().log(logs, start_time)
