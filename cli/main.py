"""The command `tieback`: every program by its name, with the flags that it has as a script."""

import importlib.util
import runpy
import sys

PROGRAMS = {
    "rlhf": ("tieback.pipeline.rlhf", "all stages one after the other, in one round or several"),
    "sft": ("tieback.pipeline.sft", "1. supervised fine-tuning on demonstrations"),
    "collect": ("tieback.pipeline.collect", "2. responses of the newest policy, ranked or left for people"),
    "label": ("tieback.pipeline.label", "rank responses in a browser, or compare SFT with PPO"),
    "reward": ("tieback.pipeline.reward", "3. a reward model from the ranked pairs"),
    "ppo": ("tieback.pipeline.ppo", "4. PPO against reward models and reward functions"),
    "evaluate": ("tieback.pipeline.evaluate", "5. PPO against SFT on held-out prompts, and the report"),
    "memory": ("tieback.pipeline.memory", "the memory that a run of PPO will need, before a model is loaded"),
    "preflight": (
        "tieback.pipeline.preflight",
        "what a short trial says of a run of PPO, before it is started",
    ),
    "replay": (
        "tieback.pipeline.replay",
        "saved rollouts of PPO: figures computed again, and a page by token",
    ),
    "report": ("tieback.pipeline.report", "the report of a run anew, or of several runs side by side"),
    "gridworld": ("tieback.classic_rl.gridworld", "Q-learning in a 3x3 grid"),
    "cartpole": ("tieback.classic_rl.cartpole", "CartPole by Double DQN, or by PPO"),
    "pong": ("tieback.classic_rl.pong", "Pong from pixels by PPO"),
}
# What the extra `classic` brings.
CLASSIC = ("ale_py", "gymnasium", "imageio_ffmpeg")


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def main() -> None:
    """Run the program that the first word of the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: tieback PROGRAM [--help] [settings]\n")
        print("\n".join(f"  {program:<10} {what}" for program, (_, what) in PROGRAMS.items()))
        print("\nOn several GPUs: accelerate launch --config_file CONFIG -m tieback.pipeline.ppo [settings]")
        return
    if name not in PROGRAMS:
        from tieback.cli.arguments import nearest

        print(
            f"error: there is no program `{name}`.{nearest(name, PROGRAMS)} `tieback --help` lists them.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    module = PROGRAMS[name][0]
    if module.startswith("tieback.classic_rl.") and any(map(_is_missing, CLASSIC)):
        print(
            f"error: {name} needs `pip install 'tieback[classic]'` (in a checkout, `make setup`).",
            file=sys.stderr,
        )
        raise SystemExit(2)
    del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
