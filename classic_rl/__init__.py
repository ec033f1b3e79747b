"""Classic tasks that show the same PPO core at work: a gridworld, CartPole and Pong."""

import gymnasium

gymnasium.register(id="tieback/GridWorld-v0", entry_point="classic_rl.grid_environment:GridWorld")
