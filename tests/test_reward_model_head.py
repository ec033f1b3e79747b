"""The scalar head: its initialisation, precision, pooling, and what survives a save."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tieback.reward_model.head import (
    apply_head,
    init_head,
    is_classifier,
    load_reward_model,
    new_reward_model,
    reward_bias,
    set_reward_bias,
)

VOCABULARY = 40


def llama(hidden_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@pytest.fixture
def policy(tmp_path):
    llama().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def tokens():
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


def test_new_head_has_variance_one_over_d_plus_one_and_the_backbone_is_the_policys(tmp_path):
    d = 1536
    llama(d).save_pretrained(tmp_path)
    torch.manual_seed(3)
    model = new_reward_model(tmp_path)
    weight = model.score.weight
    assert weight.shape == (1, d)
    # The sample variance of d normal draws has the relative standard deviation √(2/d) = 3.6%.
    assert weight.var().item() * (d + 1) == pytest.approx(1, abs=0.15)
    assert abs(weight.mean().item()) < 4 / math.sqrt(d * (d + 1))
    assert model.score.bias is None
    assert reward_bias(model) == 0
    policy = llama(d)
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name


def test_init_head_draws_anew_and_clears_the_bias(policy):
    model = new_reward_model(policy)
    before = model.score.weight.clone()
    set_reward_bias(model, 3.0)
    init_head(model)
    assert reward_bias(model) == 0
    assert not torch.equal(before, model.score.weight)


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox])
def test_scores_and_bias_survive_save_and_load(make, tmp_path, tokens):
    make().save_pretrained(tmp_path / "policy")
    model = new_reward_model(tmp_path / "policy").eval()
    set_reward_bias(model, -1.25)
    model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward").eval()
    assert reward_bias(again) == -1.25
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    torch.testing.assert_close(model(tokens).logits, again(tokens).logits, atol=1e-6, rtol=0)


def test_the_saved_folder_is_a_stock_model_without_the_bias(policy, tmp_path, tokens):
    model = new_reward_model(policy).eval()
    set_reward_bias(model, 2.0)
    model.save_pretrained(tmp_path / "reward")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    torch.testing.assert_close(stock(tokens).logits + 2.0, model(tokens).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox])
def test_padding_changes_no_score_whatever_stands_in_it(make, tmp_path, tokens):
    make().save_pretrained(tmp_path)
    model = new_reward_model(tmp_path).eval()
    alone = [model(row[:length][None]).logits.item() for row, length in zip(tokens, (9, 4, 6), strict=True)]
    for filling in (0, 2, 17):  # the pad id, EOS, a word
        ids = torch.full((3, 14), filling)
        mask = torch.zeros_like(ids)
        for row, length in enumerate((9, 4, 6)):
            ids[row, :length] = tokens[row, :length]
            mask[row, :length] = 1
        scores = model(ids, attention_mask=mask).logits.squeeze(-1)
        torch.testing.assert_close(scores, torch.tensor(alone), atol=1e-5, rtol=0)


def test_the_last_token_counts_even_where_it_is_the_pad_token(policy, tokens):
    model = new_reward_model(policy).eval()
    model.config.pad_token_id = 2  # pad == eos
    ended = tokens[:1].clone()
    ended[0, -1] = 2
    hidden = model.model(input_ids=ended).last_hidden_state[0]
    expected = (hidden[-1].double() @ model.score.weight[0].double()).item()
    assert model(ended, attention_mask=torch.ones_like(ended)).logits.item() == pytest.approx(
        expected, abs=1e-6
    )
    stock = (hidden[-2].double() @ model.score.weight[0].double()).item()
    assert abs(stock - expected) > 1e-3  # what comparing ids would have scored


def test_head_is_fp32_on_a_bf16_backbone_and_stays_so(policy, tmp_path, tokens):
    model = new_reward_model(policy, dtype=torch.bfloat16).eval()
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32
    hidden = model.model(input_ids=tokens).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    logits = model(tokens).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits.double(), hidden[:, -1].double() @ model.score.weight.double().T, atol=1e-6, rtol=0
    )
    model.save_pretrained(tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", dtype=torch.bfloat16).eval()
    assert torch.equal(again.score.weight, model.score.weight)
    assert torch.equal(again(tokens).logits, logits)


def test_head_is_fp32_under_autocast(policy):
    model = new_reward_model(policy)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = apply_head(model, hidden)
    assert scores.shape == (2, 5)
    torch.testing.assert_close(scores, hidden @ model.score.weight[0], atol=1e-6, rtol=0)


def test_a_lora_folder_gives_the_backbone_with_the_adapter_merged(policy, tmp_path, tokens):
    base = LlamaForCausalLM.from_pretrained(policy)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = adapted(tokens, output_hidden_states=True).hidden_states[-1]
    plain = LlamaForCausalLM.from_pretrained(policy)(tokens, output_hidden_states=True).hidden_states[-1]
    merged = new_reward_model(tmp_path / "adapter").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged.model(input_ids=tokens).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert (plain - expected).abs().max() > 1e-2


def test_two_labels_are_refused_by_name(tmp_path):
    BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            id2label={0: "bad", 1: "good"},
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2 labels \(bad, good\); a reward model has one"):
        load_reward_model(tmp_path)


def test_an_encoder_with_one_label_scores_with_its_own_pooling(tmp_path, tokens):
    stock = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
        )
    ).eval()
    stock.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path).eval()
    set_reward_bias(model, 0.5)
    mask = torch.ones_like(tokens)
    torch.testing.assert_close(
        model(tokens, attention_mask=mask).logits, stock(tokens, attention_mask=mask).logits + 0.5
    )


def test_a_language_model_or_a_missing_head_is_no_reward_model(policy):
    assert not is_classifier(policy)
    with pytest.raises(ValueError, match="LlamaForCausalLM, not a reward model"):
        load_reward_model(policy)
    config = json.loads((policy / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
    (policy / "config.json").write_text(json.dumps(config))
    assert is_classifier(policy)
    with pytest.raises(ValueError, match=r"lacks weights .*score\.weight"):
        load_reward_model(policy)
