"""Watch a policy: returns of whole episodes, and a video of one."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
from gymnasium.vector import VectorEnv

# Observations [N, ...] → actions int64 [N].
Act = Callable[[np.ndarray], np.ndarray]


def episode_returns(env: VectorEnv, act: Act, seed: int) -> np.ndarray:
    """Undiscounted return of the first episode in each sub-environment.

    One episode of each and no more: the first N to finish of many would be the short ones.

    Args:
        env: the environment; its sub-environments are started anew.
        act: the policy.
        seed: of the environments.
    """
    observations, _ = env.reset(seed=seed)
    returns = np.zeros(env.num_envs)
    running = np.ones(env.num_envs, dtype=bool)
    while running.any():
        observations, rewards, terminated, truncated, _ = env.step(act(observations))
        returns[running] += rewards[running]
        running &= ~(terminated | truncated)
    return returns


def film_episode(env: gym.Env, act: Act, seed: int) -> Iterator[np.ndarray]:
    """Play one episode in an environment made with `render_mode="rgb_array"`.

    Yields:
        Frames uint8 `[height, width, 3]`.
    """
    observation, _ = env.reset(seed=seed)
    yield np.asarray(env.render())
    over = False
    while not over:
        action = act(np.asarray(observation)[None])[0]
        observation, _, terminated, truncated, _ = env.step(action)
        yield np.asarray(env.render())
        over = terminated or truncated


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write an MP4 (H.264) of frames uint8 `[height, width, 3]`, all of one size."""
    writer = None
    for frame in frames:
        if writer is None:
            height, width, _ = frame.shape
            # The codec wants even sizes; enlarging to a multiple of 2 is ffmpeg's work.
            writer = imageio_ffmpeg.write_frames(
                str(path), (width, height), fps=fps, macro_block_size=2, ffmpeg_log_level="error"
            )
            writer.send(None)
        writer.send(np.ascontiguousarray(frame))
    if writer is None:
        raise ValueError(f"{path}: there are no frames to write.")
    writer.close()
