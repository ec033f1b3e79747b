"""Settings of the tutorials' PPO on Pong, which every trainer is given, and the count of turns."""

NUM_ENVS = 8
NUM_STEPS = 128
BATCH_SIZE = 256
EPOCHS = 4
LEARNING_RATE = 2.5e-4
CLIP_RANGE = 0.1
ENT_COEF = 0.01
VF_COEF = 0.5
MAX_GRAD_NORM = 0.5
GAMMA, GAE_LAMBDA = 0.99, 0.95
STEPS = NUM_ENVS * NUM_STEPS
# More steps than are ever measured.
TOTAL_STEPS = 10_000_000
