"""Everything of TRL that is not its public API and that we use, in one place.

`tests/test_trl_internals.py` imports this file and names whatever a new TRL has moved.
"""

from trl.models.utils import add_hooks, prepare_deepspeed, remove_hooks, unwrap_model_for_generation
from trl.trainer.utils import (
    print_prompt_completions_sample,
    selective_log_softmax_and_entropy,
    use_adapter,
)

__all__ = [
    "add_hooks",
    "prepare_deepspeed",
    "print_prompt_completions_sample",
    "remove_hooks",
    "selective_log_softmax_and_entropy",
    "unwrap_model_for_generation",
    "use_adapter",
]
