"""The networks of the classic tasks: a Q-network, and actor-critics as `ppo_core.update` wants them."""

import math
from collections.abc import Iterable, Sequence

import torch
from gymnasium import Space
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from tieback.classic_rl.distributions import Categorical, Distribution, diagonal_gaussian
from tieback.ppo_core import Batch

# The least variance of a pixel, in grey levels squared, and its largest deviation from its mean, in standard deviations.
_LEAST_VARIANCE, _MOST_DEVIATIONS = 1.0, 5.0


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
    """Base of policies that see one step at a time.

    A subclass's `forward(observations)` returns the parameters of the distributions over actions, `[N, ...]`, and the
    values `[N]`. They are logits of discrete actions, unless a subclass overrides `distribution`. A `Batch` for
    `evaluate` has one step a row (`Batch.flatten_time`) with the inputs `observations` and `actions`.
    """

    def distribution(self, parameters: Tensor) -> Distribution:
        """The distributions over actions that the first output of `forward` stands for."""
        return Categorical(parameters)

    def act(self, observations: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Choose actions: sampled, or the likeliest.

        Returns:
            Actions (int64 `[N]`, or float32 `[N, D]` of a Gaussian), their log-probabilities `[N]` and the values `[N]`
            of the observations.
        """
        parameters, values = self(observations)
        distribution = self.distribution(parameters)
        actions = distribution.mode if deterministic else distribution.sample()
        return actions, distribution.log_prob(actions), values.float()

    def evaluate(self, minibatch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the actions taken, values and entropies, each `[b, 1]`."""
        parameters, values = self(minibatch.inputs["observations"])
        distribution = self.distribution(parameters)
        logprobs = distribution.log_prob(minibatch.inputs["actions"])
        return logprobs.unsqueeze(1), values.float().unsqueeze(1), distribution.entropy().unsqueeze(1)


class MlpActorCritic(ActorCritic):
    """Actor and critic apart, two tanh layers each: for observations of a few numbers, and discrete actions.

    Args:
        num_features: size of an observation.
        num_outputs: of the actor: one logit an action.
        width: of the layers.
    """

    def __init__(self, num_features: int, num_outputs: int, width: int = 64) -> None:
        super().__init__()

        def tower(outputs: int, gain: float) -> nn.Sequential:
            return nn.Sequential(
                orthogonal(nn.Linear(num_features, width), math.sqrt(2)),
                nn.Tanh(),
                orthogonal(nn.Linear(width, width), math.sqrt(2)),
                nn.Tanh(),
                orthogonal(nn.Linear(width, outputs), gain),
            )

        # Small last weights: the first policy is nearly the same in every state.
        self.actor, self.critic = tower(num_outputs, 0.01), tower(1, 1.0)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the actor `[N, num_outputs]` and values `[N]` of observations `[N, features]`."""
        return self.actor(observations), self.critic(observations).squeeze(1)


class GaussianActorCritic(MlpActorCritic):
    """The same for actions that are `num_outputs` real numbers: the actor's outputs are their means.

    The logarithms of the standard deviations are parameters of their own and do not depend on the state. They begin at
    0, so an action space of about −1 to 1 is explored from the start.
    """

    def __init__(self, num_features: int, num_outputs: int, width: int = 64) -> None:
        super().__init__(num_features, num_outputs, width)
        self.log_std = nn.Parameter(torch.zeros(num_outputs))

    def distribution(self, parameters: Tensor) -> Distribution:
        """Diagonal Gaussians with the means `[N, num_outputs]`."""
        return diagonal_gaussian(parameters, self.log_std)


def mlp_actor_critic(observation_space: Space, action_space: Space) -> MlpActorCritic:
    """The actor-critic that fits an environment: categorical for `Discrete` actions, Gaussian for a `Box` of them.

    Args:
        observation_space: a `Box` of a few numbers in one dimension.
        action_space: actions of one environment.

    Raises:
        TypeError: the spaces are of other kinds.
    """
    if not (isinstance(observation_space, Box) and len(observation_space.shape) == 1):
        raise TypeError(f"Observations must be a Box of one dimension, but are {observation_space}.")
    num_features = observation_space.shape[0]
    if isinstance(action_space, Discrete):
        return MlpActorCritic(num_features, int(action_space.n))
    if isinstance(action_space, Box):
        return GaussianActorCritic(num_features, math.prod(action_space.shape))
    raise TypeError(f"Actions must be Discrete or a Box, but are {action_space}.")


class NatureActorCritic(ActorCritic):
    """The convolutional network of Mnih et al. 2015 (Nature) with an actor and a critic head.

    Observations are uint8 `[N, 4, 84, 84]`: four grey frames, the newest last. Each pixel is shifted and scaled by
    `pixel_mean` and `pixel_variance`: at first this divides it by 255, and after `observe_frames` it is the pixel's
    deviation from its mean so far, so that the still background becomes 0 and the ball stands out.
    """

    pixel_mean: Tensor
    pixel_variance: Tensor
    num_frames: Tensor

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
        self.register_buffer("pixel_mean", torch.zeros(84, 84))
        self.register_buffer("pixel_variance", torch.full((84, 84), 255.0**2 - _LEAST_VARIANCE))
        self.register_buffer("num_frames", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe_frames(self, frames: Tensor) -> None:
        """Take more frames into the mean and the variance of each pixel, over all frames so far (Chan et al. 1979).

        Call it between an update and the next rollout: a policy must not change between acting and learning from it.

        Args:
            frames: uint8 `[N, 84, 84]`.
        """
        frames = frames.to(self.pixel_mean.device, torch.float32)
        mean, variance = frames.mean(dim=0), frames.var(dim=0, correction=0)
        share = len(frames) / (self.num_frames + len(frames))
        spread = share * (1 - share) * (mean - self.pixel_mean) ** 2
        # With no frames before, the share is 1, and lerp forgets the initial values to the last bit.
        self.pixel_variance.lerp_(variance, share).add_(spread)
        self.pixel_mean.lerp_(mean, share)
        self.num_frames += len(frames)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, actions]` and values `[N]`."""
        kind = observations.device.type
        dtype = (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.critic.weight.dtype
        )
        # A pixel that never changed has no variance, and gets that of one grey level.
        scale = (self.pixel_variance + _LEAST_VARIANCE).rsqrt()
        frames = observations.to(dtype, memory_format=torch.channels_last)
        normalised = frames.sub_(_by_pixel(self.pixel_mean, frames)).mul_(_by_pixel(scale, frames))
        normalised.clamp_(-_MOST_DEVIATIONS, _MOST_DEVIATIONS)
        features = self.body(normalised)
        return self.actor(features), self.critic(features).squeeze(1)


def _by_pixel(values: Tensor, frames: Tensor) -> Tensor:
    """`values` `[84, 84]` for each of the 4 frames, in the memory layout of `frames`: several times faster there."""
    return values.to(frames.dtype).expand(1, *frames.shape[1:]).contiguous(memory_format=torch.channels_last)
