"""Pong: the environment that others play in, its network, and runs of a few steps with all that they leave."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ale_py.vector_env import AtariVectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from safetensors.torch import load_file

import ppo_core
from classic_rl import pong
from classic_rl.networks import NatureActorCritic
from classic_rl.output import UsageError
from classic_rl.pong import PRESETS, load_policy, parse
from classic_rl.pong_environment import ACTION_NAMES, make_env, play_in_colour
from classic_rl.pong_training import PongPPOArguments, train

# Two iterations of PPO at the least cost.
TINY = [
    "--num_envs",
    "2",
    "--num_steps",
    "4",
    "--num_minibatches",
    "2",
    "--num_ppo_epochs",
    "1",
    "--selection_episodes",
    "1",
    "--use_cpu",
    "True",
]


def reference_env():
    gym.register_envs(ale_py)
    env = gym.make("PongNoFrameskip-v4")
    return FrameStackObservation(AtariPreprocessing(env, noop_max=0, frame_skip=4, screen_size=84), 4)


def test_the_actions_are_those_of_the_game():
    assert list(ACTION_NAMES) == reference_env().unwrapped.get_action_meanings()


def test_observations_and_points_are_those_of_gymnasiums_wrappers():
    """The same moves give the same frames, to the last pixel, and the same points at the same steps.

    One thing differs: right after a reset, what came before the first frame is black in ale-py's stack, and the first
    frame again in Gymnasium's `FrameStackObservation`. After three steps the stacks are one.
    """
    ours = AtariVectorEnv("pong", 1, noop_max=0, use_fire_reset=False, repeat_action_probability=0.0)
    theirs = reference_env()
    rng = np.random.default_rng(0)
    seen, _ = ours.reset(seed=1)
    expected, _ = theirs.reset(seed=1)
    points, over = [], False
    for step in range(300):
        assert not over
        real = min(step + 1, 4)
        assert np.array_equal(seen[0][-real:], np.asarray(expected)[-real:])
        assert not seen[0][:-real].any() or real == 4
        action = int(rng.integers(6))
        seen, reward, terminated, truncated, _ = ours.step(np.array([action]))
        expected, their_reward, their_terminated, their_truncated, _ = theirs.step(action)
        assert reward[0] == their_reward
        assert (terminated[0], truncated[0]) == (their_terminated, their_truncated)
        over = their_terminated or their_truncated
        points.append(float(their_reward))
    assert sum(map(abs, points)) >= 3, "too few points were played for the comparison to say anything"


def follow_the_ball(frames):
    """Move a paddle to the height of the ball: hand-written, wins by 12 points or so. `frames` uint8 [4, 84, 84]."""
    before, now = frames[-2:, 15:77]

    def place(frame, columns, threshold):
        rows, places = np.nonzero(frame[:, columns] > threshold)
        return (rows.mean(), places.mean()) if len(rows) else None

    field, right = slice(13, 72), slice(73, 77)
    ball, earlier, paddle = place(now, field, 180), place(before, field, 180), place(now, right, 110)
    if ball is None or paddle is None:
        return 0
    coming = earlier is not None and ball[1] > earlier[1]
    distance = ball[0] + (ball[0] - earlier[0] if coming else 0) - paddle[0]
    return ACTION_NAMES.index("NOOP" if abs(distance) <= 2 else "RIGHT" if distance < 0 else "LEFT")


def test_a_policy_plays_the_very_same_game_in_gymnasiums_environment():
    ours = AtariVectorEnv("pong", 1, noop_max=0, use_fire_reset=False, repeat_action_probability=0.0)
    theirs = reference_env()
    games = []
    for seen, step in (
        (ours.reset(seed=1)[0][0], lambda action: [part[0] for part in ours.step(np.array([action]))[:4]]),
        (theirs.reset(seed=1)[0], lambda action: theirs.step(action)[:4]),
    ):
        points, over = [], False
        while not over:
            seen, reward, terminated, truncated = step(follow_the_ball(np.asarray(seen)))
            points.append(float(reward))
            over = terminated or truncated
        games.append(points)
    assert games[0] == games[1]
    assert sum(games[0]) > 0, "a policy that loses every point would tell little"


def test_an_episode_is_followed_by_one_reset_step():
    env = make_env(1)
    env.reset(seed=0)
    over = False
    while not over:
        _, reward, terminated, truncated, _ = env.step(np.array([0]))
        over = bool(terminated[0] or truncated[0])
    assert reward[0] == -1
    _, reward, terminated, truncated, _ = env.step(np.array([0]))
    assert [reward[0], terminated[0], truncated[0]] == [0, False, False]


def test_the_same_seed_and_moves_give_the_same_frames():
    rng = np.random.default_rng(0)
    moves = rng.integers(6, size=(60, 3))

    def play():
        env = make_env(3)
        frames = [env.reset(seed=9)[0].copy()]
        return np.stack([*frames, *(env.step(actions)[0].copy() for actions in moves)])

    first, second = play(), play()
    assert np.array_equal(first, second)
    assert not np.array_equal(first[:, 0], first[:, 1]), "the no-ops at the start should differ"


def test_the_coloured_picture_is_the_observation_in_colour():
    rng = np.random.default_rng(3)
    game = play_in_colour(lambda observations: rng.integers(6, size=len(observations)), seed=3)
    for number, (observation, picture, _) in enumerate(itertools.islice(game, 200)):
        if number % 20 == 0:
            grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
            small = cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)
            # A maximum in colour is not quite one in grey; a ball or paddle elsewhere would differ by 40 and more.
            assert np.abs(small.astype(int) - observation[-1].astype(int)).max() <= 24


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
    stats = []
    real = ppo_core.update
    monkeypatch.setattr(ppo_core, "update", lambda *a, **k: stats.append(real(*a, **k)) or stats[-1])
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = PongPPOArguments(
        total_steps=16, num_envs=2, num_steps=8, num_minibatches=2, num_ppo_epochs=1, selection_episodes=1
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    train(settings, 0, tmp_path, accelerator, save_every=10**9)
    AcceleratorState._reset_state(reset_partial_state=True)
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


def command(folder, *more):
    return [
        sys.executable, "-m", "classic_rl.pong", "--output_dir", str(folder), "--report_to", "none", *TINY, *more,
    ]  # fmt: skip


def run(folder, *more):
    return subprocess.run(command(folder, *more), capture_output=True, text=True, check=False)


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
