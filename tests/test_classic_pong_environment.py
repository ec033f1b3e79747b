"""The Pong that is learnt is the one that others play: frames, points and resets against Gymnasium's own wrappers."""

import itertools

import ale_py
import cv2
import gymnasium as gym
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from tieback.classic_rl.pong_environment import ACTION_NAMES, make_env, play_in_colour


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
