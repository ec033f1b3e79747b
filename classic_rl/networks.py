"""The networks of the classic tasks: a Q-network, and actor-critics as `ppo_core.update` wants them."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

import ppo_core
from ppo_core import Batch


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Linear | nn.Conv2d:
    """Give a layer orthogonal weights and no bias (Saxe et al. 2014, as in OpenAI Baselines)."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Scale(nn.Module):
    """Divides each feature by its usual magnitude, so that small ones (an angle) count as much as large ones."""

    magnitudes: Tensor

    def __init__(self, magnitudes: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("magnitudes", torch.tensor(magnitudes), persistent=False)

    def forward(self, observations: Tensor) -> Tensor:
        """Scaled observations `[N, features]`."""
        return observations / self.magnitudes


def q_network(
    magnitudes: Sequence[float], num_actions: int, hidden: Iterable[int] = (24, 24)
) -> nn.Sequential:
    """Fully connected layers with ReLU between: observations `[N, features]` → Q `[N, actions]`.

    With the defaults for CartPole (4 features, 2 actions) it has 770 parameters.

    Args:
        magnitudes: usual magnitude of each feature.
        num_actions: outputs.
        hidden: widths of the layers between.
    """
    layers: list[nn.Module] = [Scale(magnitudes)]
    num_features = len(magnitudes)
    for width in hidden:
        layers += [nn.Linear(num_features, width), nn.ReLU()]
        num_features = width
    return nn.Sequential(*layers, nn.Linear(num_features, num_actions))


class ActorCritic(nn.Module):
    """Base of policies over discrete actions that see one step at a time.

    A subclass's `forward(observations)` returns logits `[N, actions]` and values `[N]`. A `Batch` for `evaluate` has
    one step a row (`Batch.flatten_time`) with the inputs `observations` and `actions`.
    """

    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Choose actions: sampled, or the likeliest.

        Returns:
            Actions int64 `[N]`, their log-probabilities `[N]` and the values `[N]` of the observations.
        """
        logits, values = self(observations)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        if deterministic:
            actions = logprobs.argmax(dim=-1)
        else:
            actions = torch.multinomial(logprobs.exp(), 1).squeeze(1)
        return actions, logprobs.gather(1, actions.unsqueeze(1)).squeeze(1), values.float()

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the actions taken, values and entropies, each `[b, 1]`."""
        logits, values = self(minibatch.inputs["observations"])
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        chosen = logprobs.gather(1, minibatch.inputs["actions"].unsqueeze(1))
        return chosen, values.float().unsqueeze(1), ppo_core.entropy(logits.float()).unsqueeze(1)


class MlpActorCritic(ActorCritic):
    """Actor and critic apart, two tanh layers each: for observations of a few numbers."""

    def __init__(self, num_features: int, num_actions: int, width: int = 64) -> None:
        super().__init__()

        def tower(outputs: int, gain: float) -> nn.Sequential:
            return nn.Sequential(
                orthogonal(nn.Linear(num_features, width), math.sqrt(2)),
                nn.Tanh(),
                orthogonal(nn.Linear(width, width), math.sqrt(2)),
                nn.Tanh(),
                orthogonal(nn.Linear(width, outputs), gain),
            )

        # Small last weights: the first policy is near uniform.
        self.actor, self.critic = tower(num_actions, 0.01), tower(1, 1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, actions]` and values `[N]` of observations `[N, features]`."""
        return self.actor(observations), self.critic(observations).squeeze(1)


class NatureActorCritic(ActorCritic):
    """The convolutional network of Mnih et al. 2015 (Nature) with an actor and a critic head.

    Observations are uint8 `[N, 4, 84, 84]`: four grey frames, the newest last.
    """

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        gain = math.sqrt(2)
        self.body = nn.Sequential(
            orthogonal(nn.Conv2d(4, 32, 8, stride=4), gain),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2), gain),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1), gain),
            nn.ReLU(),
            nn.Flatten(),
            orthogonal(nn.Linear(64 * 7 * 7, 512), gain),
            nn.ReLU(),
        )
        self.actor = orthogonal(nn.Linear(512, num_actions), 0.01)
        self.critic = orthogonal(nn.Linear(512, 1), 1.0)
        # Convolutions on CPUs and tensor cores are fastest so.
        self.body.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, actions]` and values `[N]`."""
        dtype = torch.get_autocast_dtype(observations.device.type)
        enabled = torch.is_autocast_enabled(observations.device.type)
        frames = observations.to(dtype if enabled else self.critic.weight.dtype)
        features = self.body(frames.contiguous(memory_format=torch.channels_last) / 255)
        return self.actor(features), self.critic(features).squeeze(1)
