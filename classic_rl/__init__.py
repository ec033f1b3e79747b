"""Classic tasks that show the same PPO core at work: a gridworld, CartPole and Pong."""
