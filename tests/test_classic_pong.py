"""Pong: its network, its training loop, and runs of a few steps with all that they leave."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from tieback import ppo_core
from tieback.classic_rl import pong, pong_training, ppo
from tieback.classic_rl.networks import NatureActorCritic
from tieback.classic_rl.pong import PRESETS, load_policy, parse
from tieback.classic_rl.pong_environment import make_env
from tieback.classic_rl.pong_training import PongPPOArguments, environment_seed, train
from tieback.cli.errors import UsageError

# Two iterations of PPO at the least cost.
TINY = [
    *("--num_envs", "2", "--num_steps", "4", "--num_minibatches", "2", "--num_ppo_epochs", "1"),
    *("--selection_episodes", "1", "--use_cpu", "True"),
]


def natures_network(x, w):
    """Independent of classic_rl.networks: plain functions in plain memory order, on `x` float [N, 4, 84, 84]."""
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        weight = w[f"body.{layer}.weight"].contiguous()
        x = torch.relu(torch.nn.functional.conv2d(x, weight, w[f"body.{layer}.bias"], stride))
    x = torch.relu(x.flatten(1) @ w["body.7.weight"].T + w["body.7.bias"])
    return x @ w["actor.weight"].T + w["actor.bias"], (x @ w["critic.weight"].T + w["critic.bias"])[:, 0]


def test_the_network_is_natures_with_two_heads():
    network = NatureActorCritic(6)
    # Mnih et al. 2015: 8192 + 32, 32768 + 64, 36864 + 64, 3136 x 512 + 512, and the heads.
    assert sum(p.numel() for p in network.parameters()) == 8224 + 32832 + 36928 + 1606144 + 512 * 7 + 7
    observations = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    expected = natures_network(observations.float() / 255, network.state_dict())
    torch.testing.assert_close(network(observations), expected, atol=1e-5, rtol=1e-5)
    for layer in (network.body[0], network.body[7]):
        flat = layer.weight.flatten(1)
        small = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
        torch.testing.assert_close(small, 2 * torch.eye(len(small)), atol=1e-4, rtol=0)


def test_pixels_are_shown_as_deviations_from_all_frames_so_far():
    network = NatureActorCritic(6)
    torch.manual_seed(0)
    # Dark and bright parts, a still pixel, and pieces of different sizes.
    frames = (torch.rand(50, 84, 84) * torch.linspace(1, 255, 84)).to(torch.uint8)
    frames[:, 0, 0] = 87
    for piece in frames.split([7, 30, 1, 12]):
        network.observe_frames(piece)
    pixels = frames.numpy().astype(np.float64)
    mean, deviation = pixels.mean(axis=0), np.sqrt(pixels.var(axis=0) + 1)
    np.testing.assert_allclose(network.pixel_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(network.pixel_variance, pixels.var(axis=0), rtol=1e-4, atol=1e-5)
    assert network.num_frames == 50

    observations = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    observations[0, 0, 0, 0] = 100
    shown = np.clip((observations.numpy() - mean) / deviation, -5, 5)
    assert shown[0, 0, 0, 0] == 5, "a still pixel that changes stands out"
    kept = observations.clone()
    expected = natures_network(torch.from_numpy(shown).float(), network.state_dict())
    torch.testing.assert_close(network(observations), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(observations, kept)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_minibatch_sees_the_policy_that_played(bf16, tmp_path, monkeypatch):
    stats, layouts = [], []
    real = ppo_core.update

    def update(policy, optimizer, batch, *rest, **more):
        for part in (batch, batch[torch.tensor([3, 1])]):
            frames = part.inputs["observations"]
            layouts.append(frames.is_contiguous(memory_format=torch.channels_last))
        stats.append(real(policy, optimizer, batch, *rest, **more))
        return stats[-1]

    monkeypatch.setattr(ppo_core, "update", update)
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = PongPPOArguments(
        total_steps=16, num_envs=2, num_steps=8, num_minibatches=2, num_ppo_epochs=1, selection_episodes=1
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    train(settings, 0, tmp_path, accelerator, save_every=10**9)
    AcceleratorState._reset_state(reset_partial_state=True)
    # Else convolutions lay out each minibatch anew, in 7% of the time of its passes.
    assert layouts == [True, True]
    # Rows are put through in other numbers than in the rollout: rounding, and no more.
    assert stats[0].max_abs_log_ratio_first < (0.02 if bf16 else 1e-5)
    assert 0 < stats[0].entropy <= math.log(6) + 1e-6


@pytest.mark.parametrize("anneal", [False, True])
def test_learning_rate_and_entropy_bonus_fall_to_nothing(anneal, tmp_path, monkeypatch):
    used = []
    real = ppo_core.update

    def update(policy, optimizer, batch, hyper, *rest, **more):
        used.append((optimizer.param_groups[0]["lr"], hyper.ent_coef))
        return real(policy, optimizer, batch, hyper, *rest, **more)

    monkeypatch.setattr(ppo_core, "update", update)
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = PongPPOArguments(
        total_steps=16, num_envs=2, num_steps=2, num_minibatches=1, num_ppo_epochs=1,
        learning_rate=0.1, ent_coef=0.02, anneal_ent_coef=anneal, selection_episodes=1,
    )  # fmt: skip
    train(settings, 0, tmp_path, Accelerator(cpu=True), save_every=10**9)
    AcceleratorState._reset_state(reset_partial_state=True)
    shares = [1, 0.75, 0.5, 0.25]
    expected = [(0.1 * share, 0.02 * (share if anneal else 1)) for share in shares]
    np.testing.assert_allclose(used, expected, rtol=1e-12)


def test_the_best_policy_is_kept_and_of_equals_the_later_one(tmp_path, monkeypatch):
    seen = []

    def play(returns):
        def greedy_returns(policy, num_episodes, seed):
            seen.append({name: values.clone() for name, values in policy._network.state_dict().items()})
            return np.full(num_episodes, next(returns))

        monkeypatch.setattr(pong_training, "greedy_returns", greedy_returns)

    def stop(steps, policy):
        if steps == 32:
            raise RuntimeError("killed")

    settings = PongPPOArguments(
        total_steps=32, num_envs=2, num_steps=4, num_minibatches=1, num_ppo_epochs=1, selection_every=8
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    play(iter([1.0, 3.0, 3.0, 2.0]))
    with pytest.raises(RuntimeError, match="killed"):
        train(settings, 0, tmp_path, accelerator, save_every=8, on_iteration=stop)
    play(iter([2.0]))
    policy, status = train(settings, 0, tmp_path, accelerator, save_every=8, resume=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(seen) == 5
    assert status.best_return == 3.0
    kept = policy.state_dict()
    equal = [all(torch.equal(kept[name], weights[name]) for name in kept) for weights in seen]
    assert equal == [False, False, True, False, False]
    saved = load_file(tmp_path / "policy.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def command(folder, *more):
    return [
        sys.executable, "-m", "classic_rl.pong", "--output_dir", str(folder), "--report_to", "none", *TINY, *more,
    ]  # fmt: skip


def run(folder, *more):
    return subprocess.run(command(folder, *more), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_leaves_policy_video_pictures_and_figures_and_is_evaluated_again(tmp_path):
    done = run(tmp_path, "--total_steps", "16", "--eval_episodes", "2", "--video_every", "16")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["train/env_steps"] == 16
    assert metrics["eval/episodes"] == 2
    assert -21 <= metrics["eval/mean_return"] <= 21
    for name in ("action_probabilities.png", "values.png", "episode.mp4", "videos/000000000016.mp4"):
        assert (tmp_path / name).stat().st_size > 5_000, name
    policy = load_policy(tmp_path)
    observations = make_env(3).reset(seed=0)[0]
    torch.manual_seed(0)
    sampled = np.stack([policy.act(observations) for _ in range(400)])
    assert sampled.dtype == np.int64
    probabilities, values = policy.look(observations)
    shares = np.stack([(sampled == action).mean(axis=0) for action in range(6)], axis=1)
    assert (
        np.abs(shares - probabilities) < 4 * np.sqrt(probabilities * (1 - probabilities) / 400) + 0.01
    ).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(policy.act(observations, deterministic=True), probabilities.argmax(axis=1))
    assert values.shape == (3,)

    before = json.loads((tmp_path / "metrics.json").read_text())
    done = run(tmp_path, "--evaluate", str(tmp_path), "--eval_episodes", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text()) == before


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_very_weights_of_one_that_was_not(tmp_path):
    flags = ("--total_steps", "160", "--eval_episodes", "1", "--save_every", "8")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole, *flags).returncode == 0

    for number in (signal.SIGINT, signal.SIGKILL):
        resume = ["--resume"] if number == signal.SIGKILL else []
        process = subprocess.Popen(
            command(stopped, *flags, *resume), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        before = set((stopped / "checkpoints").glob("*"))
        deadline = time.monotonic() + 120
        while set((stopped / "checkpoints").glob("0*")) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=120)
        if number == signal.SIGINT:
            assert process.returncode == 0, err
            assert b"Go on with: --resume" in out
        assert not (stopped / "metrics.json").exists(), "it came to its end before it was stopped"

    again = run(stopped, "--total_steps", "160", "--resume", "--eval_episodes", "1")
    assert again.returncode == 0, again.stderr
    first, second = (load_file(folder / "policy.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_run_is_not_overwritten_and_a_resume_keeps_to_its_settings(tmp_path):
    assert run(tmp_path, "--total_steps", "8", "--eval_episodes", "1").returncode == 0
    weights = (tmp_path / "policy.safetensors").read_bytes()
    again = run(tmp_path, "--total_steps", "8")
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
    changed = run(tmp_path, "--total_steps", "8", "--resume", "--learning_rate", "0.1")
    assert changed.returncode == 2
    assert f"learning_rate {PongPPOArguments().learning_rate} (now 0.1)" in changed.stderr
    assert (tmp_path / "policy.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume"], "no run to resume"),
        (["--num_minibatches", "7"], "do not divide into num_minibatches 7"),
        (["--value_bins", "51"], "--value_bins"),
        (["--kl_loss_coef", "0.1"], "--kl_loss_coef"),
        (["--eval_episodes", "0"], "eval_episodes"),
        (["--num_envs", "0"], "num_envs must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(flags, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        pong.main(*parse(["--output_dir", str(tmp_path / "run"), *flags]))
    assert not (tmp_path / "run").exists()


def test_missing_and_torn_policies_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_policy(tmp_path)
    (tmp_path / "policy.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="torn"):
        load_policy(tmp_path)


def test_environments_keep_their_seeds_and_every_seed_gives_some_that_ale_takes():
    # As it was before larger seeds were taken.
    for seed, iteration in ((0, 0), (1, 0), (7, 400), (2146, 0), (2146, 10_000)):
        assert environment_seed(seed, iteration, 16) == 1_000_003 * seed + 101 * iteration
    env = make_env(3)
    for seed in (2147, 2**31, 2**32 - 1):
        for iteration in (0, 200, 10**6):
            first = environment_seed(seed, iteration, 3)
            assert 0 <= first <= 2**31 - 3
            env.reset(seed=first)
    # The largest that can be: the last environment's is 2³¹ − 1.
    env.reset(seed=2**31 - 3)


def test_the_largest_seed_trains_and_resumes_to_the_very_same_weights(tmp_path, monkeypatch):
    """With environments that begin anew between the checkpoint and the end."""
    monkeypatch.setattr(ppo, "_ITERATIONS_OF_MOVES", 3)
    monkeypatch.setattr(pong_training, "greedy_returns", lambda policy, count, seed: np.zeros(count))
    settings = PongPPOArguments(
        total_steps=40, num_envs=2, num_steps=4, num_minibatches=2, num_ppo_epochs=1, selection_every=8
    )

    def stop(steps, policy):
        if steps == 24:
            raise RuntimeError("killed")

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    expected, _ = train(settings, 2**32 - 1, whole, accelerator, save_every=8)
    with pytest.raises(RuntimeError, match="killed"):
        train(settings, 2**32 - 1, stopped, accelerator, save_every=8, on_iteration=stop)
    found, _ = train(settings, 2**32 - 1, stopped, accelerator, save_every=8, resume=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    last = "checkpoints/000000000040/environment.safetensors"
    assert (whole / last).read_bytes() == (stopped / last).read_bytes()


def test_presets_and_flags():
    _, tutorial = parse(["--preset", "tutorial"])
    expected = {
        "num_envs": 8, "num_steps": 128, "num_ppo_epochs": 4, "num_minibatches": 4, "clip_range": 0.1,
        "ent_coef": 0.01, "gae_lambda": 0.9, "gamma": 0.99, "learning_rate": 2.5e-4, "vf_coef": 0.5,
        "max_grad_norm": 0.5, "normalize_frames": False, "anneal_ent_coef": False,
    }  # fmt: skip
    assert {name: asdict(tutorial)[name] for name in expected} == expected
    _, overridden = parse(["--preset", "tutorial", "--num_envs", "4"])
    assert overridden.num_envs == 4
    assert overridden.gae_lambda == 0.9
    assert set(PRESETS) == {"fast", "tutorial"}
    assert parse([])[1] == PongPPOArguments()
