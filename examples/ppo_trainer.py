"""PPOTrainer with a reward function of your own: a tiny Llama learns to count.

The prompt is a digit, and the reward of a completion is the share of eight words that count on by one: after "7"
come "8 9 0 1 2 3 4 5". Tokenizer and model are made here; `model` may also be the name or folder of a model, whose own
tokenizer is then loaded. `reward_funcs` also takes a reward model, by its name or folder, or a list of several.

    python examples/ppo_trainer.py     # fifteen seconds on one CPU core; no network

Left out: evaluation on prompts held out of training, checkpoints (`PPOConfig` takes all of Transformers'
`TrainingArguments`), and what the trainer does inside, which is `examples/ppo_loop.py`.
"""

import argparse
import itertools
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tieback import PPOConfig, PPOTrainer

LENGTH = 8  # words of a completion


def counting_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of `LENGTH` words that are one more than the word before, 0 after 9; one number a completion."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        words = [*prompt.split(), *completion.split()]
        right = sum((int(a) + 1) % 10 == int(b) for a, b in itertools.pairwise(words))
        rewards.append(right / LENGTH)
    return rewards


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Ten digits, each a word and a token, and two special tokens."""
    words = [*"0123456789", "<eos>", "<pad>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def main(
    output_dir: str = "runs/examples/ppo_trainer", max_steps: int = 40, seed: int = 0
) -> tuple[float, float]:
    """Train; returns the mean reward before and after."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = PPOTrainer(
        model=model,
        reward_funcs=counting_reward,
        args=PPOConfig(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=128,
            max_completion_length=LENGTH,
            missing_eos_penalty=0.0,  # here a completion is meant to fill its length
            num_ppo_epochs=2,
            num_minibatches=4,
            learning_rate=1e-3,
            kl_coef=0.01,
            vf_coef=0.5,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_dict({"prompt": list("0123456789") * 100}),
        eval_dataset=Dataset.from_dict({"prompt": list("0123456789") * 10}),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_reward/counting_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward/counting_reward"]
    trainer.save_model()
    prompt = tokenizer("7", return_tensors="pt")["input_ids"]
    print("7 ->", tokenizer.decode(model.generate(prompt, do_sample=False, max_new_tokens=LENGTH)[0, 1:]))
    print(f"reward: from {before:.2f} to {after:.2f}; the policy is in {output_dir}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="runs/examples/ppo_trainer")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
