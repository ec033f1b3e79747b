"""The memory that a run will need: counted without contents as with them, by closed forms, and divided by backends."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from tieback.cli.errors import UsageError
from tieback.pipeline import memory
from tieback.pipeline.live_memory import LiveMemory, Sizes, _inputs, _loss, phases_of
from tieback.pipeline.trainer import PPOConfig
from tieback.pipeline.trainer.models import make_actor_critic

ROOT = Path(__file__).parents[1]
SHAPE = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
SIZES = Sizes(
    prompt_length=20, completion_length=12, generated_rows=6, scored_rows=5, rows=4, micro_batches=3
)


def models(settings: PPOConfig, lora: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    policy = LlamaForCausalLM(toy.config(**SHAPE))
    adapter = LoraConfig(r=4, target_modules="all-linear") if lora else None
    return make_actor_critic(policy, None, [], adapter, settings)


@pytest.mark.parametrize("lora", [False, True])
def test_tensors_without_contents_need_what_real_ones_do(tmp_path: Path, lora: bool) -> None:
    settings = PPOConfig(output_dir=str(tmp_path), use_cpu=True)
    real, _ = models(settings, lora)
    found: dict[str, int] = {}
    live = LiveMemory()
    with live:
        for tensor in (*real.parameters(), *real.buffers()):
            live._count(tensor.untyped_storage())
        inputs = _inputs(SIZES)
        with live.above_now(found, "update"):
            for _ in range(2):
                _loss(real, inputs, settings).backward()
    estimated = phases_of(*models(settings, lora), [], settings, SIZES, bf16=False)
    assert estimated["update"] == pytest.approx(found["update"], rel=0.001)
    gradients = 4 * sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert sum(p.grad.nbytes for p in real.parameters() if p.grad is not None) == gradients
    assert estimated["update"] > gradients


def estimate(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, int]:
    """What the command writes of a model of which there is a config alone."""
    toy.config(**SHAPE).save_pretrained(folder / "model")
    config = AutoConfig.from_pretrained(folder / "model")
    config.num_labels = 1
    config.save_pretrained(folder / "reward")
    settings = {
        "model_name_or_path": folder / "model", "reward_funcs": folder / "reward", "run_dir": folder / "run",
        "max_prompt_length": 20, "max_completion_length": 12, "per_device_train_batch_size": 8, "num_minibatches": 1,
        "json": folder / "memory.json",
    }  # fmt: skip
    argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    (folder / "ppo.yaml").write_text("critic_init: policy\n")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", ["memory", "--config", str(folder / "ppo.yaml"), *argv, *flags])
    memory.main()
    figures: dict[str, int] = json.loads((folder / "memory.json").read_text())
    return figures


def test_four_whole_models_and_a_cache_of_their_closed_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = estimate(tmp_path, monkeypatch)
    policy = LlamaForCausalLM(toy.config(**SHAPE))
    numbers, head = policy.num_parameters(), SHAPE["hidden_size"]
    rotary = 2 * 4 * SHAPE["hidden_size"] // SHAPE["num_attention_heads"] // 2
    assert figures["weights/policy"] == figures["weights/reference"] == 4 * numbers + rotary
    assert figures["weights/critic"] == figures["weights/reward"] == 4 * (numbers + head) + rotary
    assert figures["gradients"] == 4 * (2 * numbers + head)
    assert figures["optimizer"] == 8 * (2 * numbers + head)
    # Keys and values: layers x rows x key-value heads x head size x all tokens but the last, in fp32.
    assert figures["kv_cache"] == 2 * 3 * 8 * 2 * 16 * 31 * 4
    assert figures["peak"] == max(value for name, value in figures.items() if name.startswith("peak/"))


def test_an_estimate_speaks_of_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.config(**SHAPE).save_pretrained(tmp_path / "model")
    model = [
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--reward_funcs",
        "tieback.reward_functions.vader:compound",
    ]
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", ["memory", "--config", "sentiment", *model])
    memory.main()
    printed = capsys.readouterr().out
    assert "weights: policy" in printed
    assert "is kept in" not in printed


def test_a_policy_that_recomputes_activations_keeps_its_cache_while_it_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, recomputed = (
        estimate(tmp_path, monkeypatch, "--gradient_checkpointing", value) for value in ("false", "true")
    )
    assert recomputed["kv_cache"] == whole["kv_cache"] > 0
    assert recomputed["peak/update"] < whole["peak/update"]


@pytest.mark.slow
def test_lora_trains_adapters_and_bf16_halves_what_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = ["--use_peft", "--lora_r", "4", "--critic", "adapter"]
    full, half = (estimate(tmp_path, monkeypatch, *lora, "--bf16", value) for value in ("false", "true"))
    # r x (inputs + outputs) of each of the seven matrices of three layers.
    adapter = 4 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))
    assert full["gradients"] == 4 * (2 * adapter + 64)
    assert full["weights/reference"] == 0
    # Rotary positions are in fp32, and with them what is cached.
    assert full["kv_cache"] == half["kv_cache"]
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    # The head, which is tied to the embeddings, becomes a matrix of its own.
    assert full["weights/policy"] - half["weights/policy"] == 2 * matrices - 2 * 500 * 64
    four_bits = estimate(tmp_path, monkeypatch, *lora, "--bf16", "true", "--load_in_4bit")
    # Embeddings, with the head that is tied to them, and norms are in bf16 with it: 2 bytes less, or (the head) 4.
    others = 2 * (500 * 64 + 7 * 64) + 2 * 500 * 64
    saved = half["weights/policy"] - four_bits["weights/policy"]
    assert saved == pytest.approx(matrices * (2 - 0.5 - 4 / 64) + others, abs=64)


def test_a_reward_model_of_its_own_is_frozen_and_under_bf16_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, half = (
        estimate(tmp_path, monkeypatch, "--critic_init", "reward", "--bf16", value)
        for value in ("false", "true")
    )
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert full["weights/reward"] - half["weights/reward"] == pytest.approx(2 * matrices, abs=2 * 64)
    # The critic is a copy of it that is trained, in fp32.
    assert half["weights/critic"] == full["weights/critic"]
    assert half["gradients"] == full["gradients"]


@pytest.mark.slow
def test_four_roles_on_a_base_of_135_million_weigh_little_more_than_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward model's adapter and head are as large as the critic's."""
    shape = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setitem(globals(), "SHAPE", shape)
    figures = estimate(tmp_path, monkeypatch, "--use_peft", "--lora_r", "16", "--critic", "adapter")
    base = 4 * 134_515_008
    roles = {name: figures[f"weights/{name}"] for name in ("policy", "reference", "critic")}
    assert roles["reference"] == 0
    assert base < sum(roles.values()) + roles["critic"] + figures["optimizer"] < 1.3 * base


def test_a_critic_may_start_from_a_model_of_its_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = toy.config(**(SHAPE | {"hidden_size": 128}))
    wide.save_pretrained(tmp_path / "wide")
    figures = estimate(tmp_path, monkeypatch, "--value_model", str(tmp_path / "wide"))
    assert figures["weights/critic"] == pytest.approx(4 * LlamaForCausalLM(wide).num_parameters(), rel=0.01)
    assert figures["weights/reward"] < figures["weights/critic"] / 2


@pytest.mark.slow
def test_eight_bits_a_number_are_half_of_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = ["--use_peft", "--lora_r", "4", "--critic", "adapter", "--bf16", "true"]
    eight, four = (
        estimate(tmp_path, monkeypatch, *lora, flag)["weights/policy"]
        for flag in ("--load_in_8bit", "--load_in_4bit")
    )
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert eight - four == matrices // 2 - 4 * matrices // 64


@pytest.mark.slow
def test_backends_divide_what_they_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = estimate(tmp_path, monkeypatch)
    configs = ROOT / "accelerate_configs"
    by_name = {
        name: estimate(tmp_path, monkeypatch, "--accelerate_config", str(configs / f"{name}.yaml"))
        for name in ("single_gpu", "multi_gpu", "zero2", "zero3", "fsdp2")
    }
    assert by_name["single_gpu"] == alone
    assert by_name["multi_gpu"]["peak/update"] == alone["peak/update"] + alone["gradients"]
    for name in ("zero3", "fsdp2"):
        assert by_name[name]["weights/policy"] == alone["weights/policy"] // 8
        assert by_name[name]["gradients"] == alone["gradients"] // 8
        assert by_name[name]["peak/generate"] > alone["weights/policy"]
    assert by_name["fsdp2"]["optimizer"] == alone["optimizer"] // 8
    assert by_name["zero2"]["weights/policy"] == alone["weights/policy"]
    assert by_name["zero2"]["optimizer"] == (alone["optimizer"] + alone["gradients"]) // 8


def test_what_is_gathered_is_gathered_in_bf16_and_no_other_copy_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast, of a process that holds all weights, keeps the copies of those that are trained until the pass is over."""
    fsdp2 = ["--accelerate_config", str(ROOT / "accelerate_configs" / "fsdp2.yaml")]
    alone = estimate(tmp_path, monkeypatch, "--bf16", "true")
    shared = estimate(tmp_path, monkeypatch, "--bf16", "true", *fsdp2)
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)

    def above(figures: dict[str, int]) -> int:
        held = figures["optimizer"] + sum(
            size for name, size in figures.items() if name.startswith("weights")
        )
        return figures["peak/update"] - held - figures["gradients"]

    largest = 2 * (matrices // 3 + 2 * 64) * 4
    assert above(shared) - largest < above(alone) - 2 * matrices


def test_what_is_no_accelerate_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.yaml"
    for content in (None, "num_processes: [", "learning_rate: 1.0e-3"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UsageError, match=r"accelerate_config: .*cluster\.yaml cannot be read: "):
            estimate(tmp_path, monkeypatch, "--accelerate_config", str(path))


def test_a_mixture_of_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2}
    AutoConfig.for_model("olmoe", pad_token_id=0, **experts).save_pretrained(tmp_path / "experts")
    with pytest.raises(UsageError, match="passes of olmoe cannot be followed"):
        estimate(
            tmp_path,
            monkeypatch,
            "--model_name_or_path",
            str(tmp_path / "experts"),
            "--reward_funcs",
            "math:sqrt",
        )


def test_a_length_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    args = PPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UsageError, match="how long a prompt is: set max_prompt_length or prompt_length"):
        memory.sizes_of(args, None)
    assert memory.sizes_of(args, 100).prompt_length == 100


def figures_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, int]:
    """What the command writes of the recipe in a folder, whose run is beside it."""
    fixed = ["--run_dir", str(folder / "run"), "--json", str(folder / "memory.json")]
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", ["memory", "--config", str(folder / "ppo.yaml"), *fixed, *flags])
    memory.main()
    figures: dict[str, int] = json.loads((folder / "memory.json").read_text())
    return figures


PPO_BEFORE_SFT = (
    "max_prompt_length: 20\nmax_completion_length: 12\nper_device_train_batch_size: 8\nnum_minibatches: 1\n"
)


@pytest.mark.parametrize("peft", ["sft and ppo", "sft", "ppo"])
def test_before_sft_has_run_its_recipe_says_what_it_will_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: str
) -> None:
    LlamaForCausalLM(toy.config(**SHAPE)).save_pretrained(tmp_path / "model")
    lora = "use_peft: true\nlora_r: 4\nlora_target_modules: all-linear\n"
    (tmp_path / "ppo.yaml").write_text(PPO_BEFORE_SFT + ("use_peft: true\n" if "ppo" in peft else ""))
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'model'}\n" + (lora if "sft" in peft else "")
    )
    before = figures_of(tmp_path, monkeypatch)
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    if "sft" in peft:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "run" / "sft")
    (tmp_path / "run" / "sft" / "metrics.json").write_text("{}")
    (tmp_path / "sft.yaml").unlink()
    assert figures_of(tmp_path, monkeypatch) == before


def test_a_model_that_sft_will_make_is_as_large_as_its_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ppo.yaml").write_text(PPO_BEFORE_SFT)
    shape = {name: size for name, size in SHAPE.items() if name != "vocab_size"}
    (tmp_path / "sft.yaml").write_text(f"tokenizer_vocab_size: 500\nmodel_config: {json.dumps(shape)}\n")
    numbers = LlamaForCausalLM(LlamaConfig(**SHAPE)).num_parameters()
    rotary = 2 * 4 * SHAPE["hidden_size"] // SHAPE["num_attention_heads"] // 2
    assert figures_of(tmp_path, monkeypatch)["weights/policy"] == 4 * numbers + rotary


def test_where_neither_sft_nor_its_recipe_is_there_the_command_that_makes_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ppo.yaml").write_text(PPO_BEFORE_SFT)
    with pytest.raises(UsageError, match="make sft RUN="):
        figures_of(tmp_path, monkeypatch)
