"""Precision: frozen matrices are cast once, trained weights are fp32, and the check before the first iteration is bounded."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer import PPOTrainer, passes, placement, ratio_checks, rollouts
from tieback.pipeline.trainer.ratio_checks import SelfCheckError

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


class Casts(TorchDispatchMode):
    """Elements of some matrices that are cast from fp32 to bf16; and the largest tensor that is made."""

    def __init__(self, matrices: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.places = {matrix.data_ptr() for matrix in matrices}
        self.elements = 0
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        cast = function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places
        if cast and result.dtype == torch.bfloat16:
            self.elements += result.numel()
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def make(folder: Path, **settings: Any) -> PPOTrainer:
    tok = toy.tokenizer()
    return toy.ppo_trainer(
        folder, [toy.id_reward, toy.reward_model(tok)], tok=tok, reward_processing_classes=[None, tok],
        max_steps=1, **{"bf16": True} | settings,
    )  # fmt: skip


def frozen_matrices(run: PPOTrainer) -> list[torch.Tensor]:
    modules = [run.model, *([run.reference] if run.reference is not None else []), run.scorers[1].model]
    parameters = [p for module in modules for p in module.parameters()]
    return [p for p in parameters if p.dim() == 2 and not p.requires_grad]


def test_no_frozen_matrix_is_cast_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(placement, "keep_frozen_in_bf16", lambda *_: None)
        run = make(tmp_path, peft_config=LORA)
        with Casts(frozen_matrices(run)) as casts:
            run.train()
        counts[kept] = casts.elements
    assert counts[True] == 0
    assert counts[False] > 100_000


@pytest.mark.parametrize("settings", [{"peft_config": LORA}, {}], ids=["adapter", "whole"])
def test_what_is_kept_in_bf16_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    results = []
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(placement, "keep_frozen_in_bf16", lambda *_: None)
        run = make(tmp_path, **settings)
        run.train()
        logged = toy.iteration_logs(run)[0]
        results.append(
            ({n: p for n, p in toy.weights(run.model).items() if p.dtype == torch.float32}, logged)
        )
    (kept_weights, kept_log), (weights, log) = results
    assert kept_log == log
    torch.testing.assert_close(kept_weights, {name: weights[name] for name in kept_weights}, rtol=0, atol=0)


def test_a_head_that_is_tied_to_frozen_embeddings_becomes_a_matrix_of_its_own(tmp_path: Path) -> None:
    model = toy.brief_policy(toy.tokenizer(), tie_word_embeddings=True)
    run = make(tmp_path, model=model, peft_config=LORA)
    base = run.model.policy.get_base_model()
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert base.model.embed_tokens.weight.dtype == base.model.norm.weight.dtype == torch.float32
    assert base.lm_head.weight.equal(base.model.embed_tokens.weight.bfloat16())


def test_weights_are_not_trained_in_bf16(tmp_path: Path) -> None:
    model = toy.brief_policy(toy.tokenizer()).bfloat16()
    with pytest.raises(
        UsageError, match=r"would be trained in bfloat16.*Load the model in float32.*use_peft"
    ):
        make(tmp_path, model=model)
    model = toy.brief_policy(toy.tokenizer()).bfloat16()
    run = make(tmp_path, model=model, peft_config=LORA)
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    run.train()


def test_models_attend_in_fp32_on_a_cpu_under_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused attention is slow backward in bf16 on a CPU. What is saved does not know of it."""
    attended: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    logs = {}
    attention = torch.nn.functional.scaled_dot_product_attention
    for in_fp32 in (True, False):
        if not in_fp32:
            monkeypatch.setattr(placement, "attend_in_fp32", lambda *_: None)

        def seen(
            query: torch.Tensor, *args: Any, dtypes: set = attended[in_fp32], **kwargs: Any
        ) -> torch.Tensor:
            cpu = torch.is_autocast_enabled("cpu")
            dtypes.add(torch.bfloat16 if cpu else query.dtype)
            return attention(query, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
        run = make(tmp_path / str(in_fp32))
        run.train()
        logs[in_fp32] = toy.iteration_logs(run)[0]
    assert attended == {True: {torch.float32}, False: {torch.bfloat16}}
    assert logs[True]["value/explained_variance"] == pytest.approx(
        logs[False]["value/explained_variance"], rel=0.05
    )
    run.model.save(str(tmp_path / "saved"))
    assert "attn_implementation" not in (tmp_path / "saved" / "config.json").read_text()


def test_an_attention_of_the_users_choice_stays(tmp_path: Path) -> None:
    model = toy.brief_policy(toy.tokenizer())
    model.set_attn_implementation("eager")
    run = make(tmp_path, model=model)
    assert run.model.policy.config._attn_implementation == "eager"


def test_fp32_is_left_alone(tmp_path: Path) -> None:
    run = make(tmp_path, bf16=False, peft_config=LORA)
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_the_check_needs_no_more_memory_than_an_iteration(tmp_path: Path) -> None:
    run = make(tmp_path, bf16=False, max_completion_length=50)
    rows = [run.train_dataset[row] for row in range(4)]
    with Casts() as check:
        run._check_sampling(rows)
    run._checked = True
    with Casts() as iteration:
        run.train()
    assert check.largest <= iteration.largest


def test_the_check_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "check_sampling", lambda *_: pytest.fail("it checked"))
    make(tmp_path, check_sampling=False).train()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fault", ["temperature", "most tokens", "one token"])
def test_faults_are_found_and_one_rounded_token_in_bf16_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, fault: str
) -> None:
    run = make(tmp_path, bf16=bf16, max_completion_length=40)
    own = ratio_checks.completion_logprobs

    def scored(model: nn.Module, inputs: Any, temperature: float) -> Any:
        logprobs, entropy = own(model, inputs, temperature * (0.5 if fault == "temperature" else 1))
        if fault == "most tokens":
            logprobs = logprobs + 0.3
        if fault == "one token":
            logprobs[0, 0] += 0.6
        return logprobs, entropy

    monkeypatch.setattr(ratio_checks, "completion_logprobs", scored)
    rows = [run.train_dataset[row] for row in range(4)]
    if fault == "one token" and bf16:
        run._check_sampling(rows)
    else:
        with pytest.raises(SelfCheckError, match="disagree"):
            run._check_sampling(rows)


def test_a_pass_has_a_bounded_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "TOKENS_AT_A_TIME_ON_CPU", 60)
    run = make(tmp_path, bf16=False)
    seen: list[int] = []
    run.model.critic.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run.train()
    assert len(seen) > 6
    assert 30 < max(seen) <= 60
