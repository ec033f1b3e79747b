"""Pong as a vector environment, as most people's agents play it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from ale_py.vector_env import AtariVectorEnv

from tieback.classic_rl.evaluation import Act

ACTION_NAMES = ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
# An agent's step is 4 of the console's 60 frames a second.
FRAME_SKIP, STEPS_PER_SECOND = 4, 15
_RULES: dict[str, Any] = {
    "repeat_action_probability": 0.0,
    "img_height": 84,
    "img_width": 84,
    "grayscale": True,
    "stack_num": 4,
    "frameskip": FRAME_SKIP,
    "maxpool": True,
    "noop_max": 30,
    "use_fire_reset": False,
    "reward_clipping": True,
    "autoreset_mode": "NextStep",
}


def make_env(num_envs: int) -> AtariVectorEnv:
    """Pong many times over: 84x84 grey frames, the newest 4 stacked, maximum of the last two frames of every 4.

    Episodes begin with up to 30 no-ops, actions are never repeated by chance ("sticky"), rewards are the points (±1),
    and an environment resets in the step after an episode's end (Gymnasium's `AutoresetMode.NEXT_STEP`). It is what
    `AtariPreprocessing` and `FrameStackObservation` make of PongNoFrameskip-v4 (tests/test_classic_pong_environment.py).
    """
    return AtariVectorEnv("pong", num_envs, **_RULES)


def play_in_colour(act: Act, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Play one episode, step by step.

    A second environment with the same seed, in colour and full size, is given the same actions: the console is
    deterministic, so it shows what the first one plays.

    Yields:
        The observation uint8 `[4, 84, 84]` acted on, the picture `[210, 160, 3]` of it, and the reward that followed.
    """
    env = make_env(1)
    colour = AtariVectorEnv(
        "pong", 1, **{**_RULES, "img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
    )
    observations, _ = env.reset(seed=seed)
    pictures, _ = colour.reset(seed=seed)
    over = False
    while not over:
        observation, picture = observations[0].copy(), pictures[0, 0].copy()
        actions = act(observations)
        observations, rewards, terminated, truncated, _ = env.step(actions)
        pictures, *_ = colour.step(actions)
        over = bool(terminated[0] or truncated[0])
        yield observation, picture, float(rewards[0])
    env.close()
    colour.close()
