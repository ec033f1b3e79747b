"""Iterations of CleanRL's `ppo_atari_envpool.py` on Pong: `cleanrl_pong.py THREADS`.

Written anew after its published settings and network (Huang et al. 2022): envpool's Pong-v5, orthogonal weights, one
shared Adam, clipped value loss, advantages normalised by minibatch. Logging is left out.
"""

import sys

import envpool
import numpy as np
import torch
from pong_world import (
    BATCH_SIZE,
    CLIP_RANGE,
    ENT_COEF,
    EPOCHS,
    GAE_LAMBDA,
    GAMMA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NUM_ENVS,
    NUM_STEPS,
    STEPS,
    VF_COEF,
)
from protocol import Turns
from torch import Tensor, nn
from torch.distributions import Categorical


def layer(module: nn.Module, std: float = np.sqrt(2)) -> nn.Module:
    """Orthogonal weights, no bias."""
    nn.init.orthogonal_(module.weight, std)
    nn.init.constant_(module.bias, 0.0)
    return module


class Agent(nn.Module):
    """The Nature network with two heads."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            layer(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer(nn.Linear(512, num_actions), std=0.01)
        self.critic = layer(nn.Linear(512, 1), std=1)

    def act(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Action, its log-probability, entropy and value."""
        hidden = self.network(x / 255.0)
        probs = Categorical(logits=self.actor(hidden))
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden)


def main() -> None:
    """Train for as many turns as there are."""
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    envs = envpool.make(
        "Pong-v5",
        env_type="gym",
        num_envs=NUM_ENVS,
        num_threads=threads,
        episodic_life=True,
        reward_clip=True,
        seed=0,
    )
    agent = Agent(envs.action_space.n)
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    obs = torch.zeros((NUM_STEPS, NUM_ENVS, *envs.observation_space.shape))
    actions = torch.zeros((NUM_STEPS, NUM_ENVS))
    logprobs, rewards, dones, values = (torch.zeros((NUM_STEPS, NUM_ENVS)) for _ in range(4))
    first = envs.reset()
    next_obs = torch.Tensor(first[0] if isinstance(first, tuple) else first)
    next_done = torch.zeros(NUM_ENVS)
    turns = Turns()
    while True:
        turns.wait()
        for step in range(NUM_STEPS):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprob, _, value = agent.act(next_obs)
            values[step], actions[step], logprobs[step] = value.flatten(), action, logprob
            new_obs, reward, *ends = envs.step(action.numpy())
            done = ends[0] if len(ends) == 2 else np.logical_or(ends[0], ends[1])
            rewards[step] = torch.tensor(reward)
            next_obs, next_done = torch.Tensor(new_obs), torch.Tensor(done)
        with torch.no_grad():
            next_value = agent.critic(agent.network(next_obs / 255.0)).reshape(1, -1)
            advantages = torch.zeros_like(rewards)
            last = torch.zeros(NUM_ENVS)
            for t in reversed(range(NUM_STEPS)):
                ongoing = 1.0 - (next_done if t == NUM_STEPS - 1 else dones[t + 1])
                following = next_value if t == NUM_STEPS - 1 else values[t + 1]
                delta = rewards[t] + GAMMA * following * ongoing - values[t]
                advantages[t] = last = delta + GAMMA * GAE_LAMBDA * ongoing * last
            returns = advantages + values
        flat = {
            "obs": obs.reshape((-1, *envs.observation_space.shape)),
            "logprobs": logprobs.reshape(-1),
            "actions": actions.reshape(-1),
            "advantages": advantages.reshape(-1),
            "returns": returns.reshape(-1),
            "values": values.reshape(-1),
        }
        indices = np.arange(STEPS)
        for _ in range(EPOCHS):
            np.random.shuffle(indices)
            for start in range(0, STEPS, BATCH_SIZE):
                part = {name: tensor[indices[start : start + BATCH_SIZE]] for name, tensor in flat.items()}
                _, new_logprob, entropy, new_value = agent.act(part["obs"], part["actions"].long())
                log_ratio = new_logprob - part["logprobs"]
                ratio = log_ratio.exp()
                scaled = part["advantages"]
                scaled = (scaled - scaled.mean()) / (scaled.std() + 1e-8)
                policy_loss = torch.max(
                    -scaled * ratio, -scaled * torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
                ).mean()
                new_value = new_value.view(-1)
                clipped = part["values"] + torch.clamp(new_value - part["values"], -CLIP_RANGE, CLIP_RANGE)
                value_loss = (
                    0.5
                    * torch.max((new_value - part["returns"]) ** 2, (clipped - part["returns"]) ** 2).mean()
                )
                loss = policy_loss - ENT_COEF * entropy.mean() + VF_COEF * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
                optimizer.step()
        turns.done()


if __name__ == "__main__":
    main()
