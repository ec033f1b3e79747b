"""Everything of TRL that is not its public API and that we use, in one place.

`tests/test_trl_internals.py` imports this file and names whatever a new TRL has moved.
"""

from trl.kernels import ChunkedLogProbFunction
from trl.models.utils import add_hooks, prepare_deepspeed, remove_hooks, unwrap_model_for_generation
from trl.trainer.utils import (
    is_async_callable,
    print_prompt_completions_sample,
    selective_log_softmax_and_entropy,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

__all__ = [
    "ChunkedLogProbFunction",
    "add_hooks",
    "is_async_callable",
    "prepare_deepspeed",
    "print_prompt_completions_sample",
    "remove_hooks",
    "selective_log_softmax_and_entropy",
    "shutdown_event_loop_in_daemon",
    "start_event_loop_in_daemon",
    "unwrap_model_for_generation",
]
