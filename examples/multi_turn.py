"""PPO with an environment between turns: a tiny Llama learns to find a number by asking, in the fewest questions.

The environment thinks of a number from 1 to 7. The policy guesses, is told "higher" or "lower", and guesses again, three times
at most; the reward is 1 where it has found the number. Asking for 4 first, and then for the middle of what is left, finds it always;
an untrained model, which also says words that are no numbers, finds it in about one game of five. A completion is the whole game, such as "4 higher 6 lower 5 right": `env_mask` says
which of its tokens the policy wrote, and what the environment said is read and not learnt.

    python examples/multi_turn.py     # a minute on one CPU core; no network
"""

import argparse
import random
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tieback import PPOConfig, PPOTrainer

NUMBERS, GUESSES = 7, 3
WORDS = [*map(str, range(1, NUMBERS + 1)), "guess", "higher", "lower", "right", "what", "<eos>", "<pad>"]
TOKENS = {word: token for token, word in enumerate(WORDS)}


def answer(guess: str, number: int) -> str:
    """What the environment says to a guess."""
    if not guess.isdigit():
        return "what"
    return "right" if int(guess) == number else "higher" if int(guess) < number else "lower"


def play(prompts: list[str], trainer: PPOTrainer) -> dict[str, Any]:
    """A game for each prompt: all of them take a turn together, so that the policy samples for many at a time."""
    prompt_ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    numbers = [random.randint(1, NUMBERS) for _ in prompts]
    games: list[list[int]] = [[] for _ in prompts]
    env_mask: list[list[int]] = [[] for _ in prompts]
    found = [0.0] * len(prompts)
    for _ in range(GUESSES):
        playing = [game for game in range(len(prompts)) if not found[game]]
        if not playing:
            break
        turns = trainer.sample([prompt_ids[game] + games[game] for game in playing], max_length=1)
        for game, turn in zip(playing, turns, strict=True):
            said = answer(WORDS[turn.ids[0]], numbers[game])
            games[game] += [*turn.ids, TOKENS[said]]
            env_mask[game] += [1, 0]
            found[game] = float(said == "right")
    # A game that ends has not been cut off, whatever its last guess was.
    truncated = [False] * len(prompts)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": games,
        "env_mask": env_mask,
        "truncated": truncated,
        "found": found,
    }


def found_it(found: list[float], **columns: Any) -> list[float]:
    """The reward: what `play` has handed on."""
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Each of `WORDS` is a token."""
    tokenizer = Tokenizer(models.WordLevel(TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def main(
    output_dir: str = "runs/examples/multi_turn", max_steps: int = 120, seed: int = 0
) -> tuple[float, float]:
    """Train; returns the share of games won before and after."""
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
        reward_funcs=found_it,
        rollout_func=play,
        args=PPOConfig(
            output_dir=output_dir,
            max_steps=max_steps,
            per_device_train_batch_size=256,
            max_completion_length=2 * GUESSES,
            num_ppo_epochs=4,
            num_minibatches=2,
            learning_rate=1e-3,
            kl_coef=0.0,
            ent_coef=0.01,
            vf_coef=0.5,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["guess"] * 1024}),
        eval_dataset=Dataset.from_dict({"prompt": ["guess"] * 512}),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_reward/found_it"]
    trainer.train()
    after = trainer.evaluate()["eval_reward/found_it"]
    trainer.save_model()
    rollout = trainer.generate([{"prompt": "guess"}] * 4)
    print("\n".join(f"  {game}" for game in rollout.completions))
    print(f"games won: from {before:.2f} to {after:.2f}; the policy is in {output_dir}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", default="runs/examples/multi_turn")
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
