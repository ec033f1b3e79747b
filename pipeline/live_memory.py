"""Bytes of the tensors of a PPO iteration, counted while the trainer's own code runs on tensors without contents."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from transformers.utils import import_utils

from tieback.pipeline.rollout.adapters import using_adapter
from tieback.pipeline.rollout.token_scores import backbone, completion_logprobs
from tieback.pipeline.trainer.actor_critic import ActorCritic
from tieback.pipeline.trainer.critics import RewardRole
from tieback.ppo_core import Batch, PPOHyperparameters
from tieback.ppo_core.objective import policy_outputs, ppo_terms
from tieback.reward_model.head import apply_head


class LiveMemory(TorchDispatchMode):
    """Adds up the storages that are made while it is active, and takes each off when it is freed.

    Attributes:
        now: bytes that are alive.
        peak: most bytes that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size

    @contextmanager
    def above_now(self, phase: dict[str, int], name: str) -> Iterator[None]:
        """Keep the most bytes that come on top of those that are alive in `phase[name]`, if it has no greater number yet."""
        before = self.peak = self.now
        yield
        phase[name] = max(phase.get(name, 0), self.peak - before)


@dataclass(frozen=True)
class Sizes:
    """How many rows and tokens each phase takes at a time.

    Args:
        prompt_length: tokens of a prompt.
        completion_length: tokens of a completion.
        generated_rows: completions that are sampled at a time.
        scored_rows: texts that a reward model reads at a time.
        rows: completions in a pass of policy, critic and reference.
        micro_batches: passes of which a minibatch is made.
    """

    prompt_length: int
    completion_length: int
    generated_rows: int
    scored_rows: int
    rows: int
    micro_batches: int


def size_of(*modules: nn.Module | None) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {
        id(tensor): tensor
        for module in modules
        if module is not None
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def phases_of(
    actor_critic: ActorCritic,
    reference: nn.Module | None,
    reward_models: Sequence[Any],
    hyper: PPOHyperparameters,
    sizes: Sizes,
    bf16: bool,
) -> dict[str, int]:
    """Most bytes that each phase needs on top of weights and optimiser states.

    The models may be on the meta device; afterwards their tensors are FakeTensors, which nothing can be computed with.

    Args:
        actor_critic: what is trained.
        reference: None where it is an adapter, or the base, of the policy.
        reward_models: whole ones, or a `RewardRole` of the actor-critic.
        hyper: of the objective.
        sizes: of the batches.
        bf16: whether passes are under autocast.

    Returns:
        `generate`, and `kv_cache` of it; `score`; `logprobs`; and `update`, with the gradients.
    """
    found: dict[str, int] = {"score": 0}
    live = LiveMemory()
    with (
        # Transformers would take FakeTensors for a graph that is traced, and write out masks that it leaves out otherwise;
        # or else look into them for several texts in a row.
        patch.object(import_utils, "is_fake_tensor", lambda _: False),
        patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None),
        FakeTensorMode(allow_non_fake_inputs=True),
        live,
        # Autocast knows no device "meta": these tensors say that they are on the CPU.
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        for module in (actor_critic, reference, *reward_models):
            if isinstance(module, nn.Module):
                _without_contents(module)
        width = sizes.prompt_length + sizes.completion_length
        with torch.no_grad():
            with _without_checkpointing(actor_critic):
                _generate(actor_critic, sizes, live, found)
            for model in reward_models:
                with live.above_now(found, "score"):
                    _score(model, torch.zeros(sizes.scored_rows, width, dtype=torch.long))
            inputs = _inputs(sizes)
            with live.above_now(found, "logprobs"):
                actor_critic(inputs)
                if reference is None:
                    actor_critic(inputs, task="reference")
                else:
                    completion_logprobs(reference, inputs, actor_critic.temperature)
        with live.above_now(found, "update"):
            # The gradients of the first pass are there while the second one runs.
            for _ in range(min(sizes.micro_batches, 2)):
                _loss(actor_critic, inputs, hyper).backward()
    return found


@contextmanager
def _without_checkpointing(actor_critic: ActorCritic) -> Iterator[None]:
    """As a rollout generates: a model that recomputes activations keeps no cache."""
    recomputes = actor_critic.is_gradient_checkpointing
    if recomputes:
        actor_critic.gradient_checkpointing_disable()
    yield
    if recomputes:
        actor_critic.gradient_checkpointing_enable()


def _without_contents(model: nn.Module) -> None:
    """Put a FakeTensor into the place of every parameter and buffer."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
                tensors[name] = made[id(tensor)]


def _inputs(sizes: Sizes) -> dict[str, Tensor]:
    rows, prompt, completion = sizes.rows, sizes.prompt_length, sizes.completion_length
    return {
        "input_ids": torch.zeros(rows, prompt + completion, dtype=torch.long),
        "prompt_lengths": torch.full((rows,), prompt),
        "completion_ids": torch.zeros(rows, completion, dtype=torch.long),
    }


def _generate(actor_critic: ActorCritic, sizes: Sizes, live: LiveMemory, found: dict[str, int]) -> None:
    """The prompt's pass, and the last token's with the cache of all before it; the greater one counts."""
    policy, rows = actor_critic.policy, sizes.generated_rows

    def sample(ids: Tensor, **how: Any) -> None:
        logits = policy(ids, logits_to_keep=1, **how).logits[:, -1].float()
        torch.softmax(logits / actor_critic.temperature, dim=-1)

    width = sizes.prompt_length + sizes.completion_length
    steps: dict[str, int] = {}
    with live.above_now(steps, "prompt"):
        sample(torch.zeros(rows, sizes.prompt_length, dtype=torch.long))
    before = live.now
    # The pass that fills it here is one of the estimate alone: of it the cache counts, and not its peak.
    output = policy(torch.zeros(rows, width - 1, dtype=torch.long), logits_to_keep=1)
    cache, states = output.get("past_key_values"), output.get("cache_params")
    del output
    found["kv_cache"] = live.now - before
    with live.above_now(steps, "token"):
        # Mamba has states in the place of a cache; the pass of one token takes a few bytes with or without them.
        how = {"past_key_values": cache} if states is None else {"use_cache": False}
        sample(torch.zeros(rows, 1, dtype=torch.long), **how)
    found["generate"] = max(steps["prompt"], found["kv_cache"] + steps["token"])


def _score(model: Any, ids: Tensor) -> None:
    if isinstance(model, RewardRole):
        policy = model.actor_critic.policy
        with using_adapter(policy, model.name):
            backbone(policy)(input_ids=ids, use_cache=False)
    else:
        apply_head(model, model.base_model(input_ids=ids).last_hidden_state)


def _loss(actor_critic: ActorCritic, inputs: dict[str, Tensor], hyper: PPOHyperparameters) -> Tensor:
    shape = inputs["completion_ids"].shape
    figures = torch.zeros(shape)
    batch = Batch(inputs, figures, figures, figures, figures, torch.ones(shape, dtype=torch.bool), figures)
    terms = ppo_terms(batch, policy_outputs(*actor_critic.evaluate(batch), hyper), hyper)
    return sum((term.coefficient * term.elements.sum() for term in terms.values()), torch.zeros(()))
