"""What the trainer uses of TRL besides its public API: there, called as we call it, and imported in one place."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERNALS = ROOT / "pipeline" / "trl_internals.py"
# It runs with a TRL of its own, of one version.
PEER = ROOT / "benchmarks" / "workers" / "trl_ppo.py"
PACKAGES = ("ppo_core", "data", "reward_model", "pipeline", "classic_rl", "benchmarks", "tests")

# How each is called: number of positional arguments, and keywords.
CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ChunkedLogProbFunction": (10, ()),  # and the context
    "add_hooks": (1, ()),
    "is_async_callable": (1, ()),
    "prepare_deepspeed": (2, ()),
    "print_prompt_completions_sample": (6, ()),
    "remove_hooks": (1, ()),
    "selective_log_softmax_and_entropy": (4, ()),
    "shutdown_event_loop_in_daemon": (2, ()),
    "start_event_loop_in_daemon": (1, ()),
    "unwrap_model_for_generation": (2, ("gather_deepspeed3_params", "gradient_checkpointing_kwargs")),
}
# Positional parameters whose order we rely on.
ORDERS = {
    "ChunkedLogProbFunction": [
        "ctx",
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ],
    "add_hooks": ["model"],
    "is_async_callable": ["func"],
    "prepare_deepspeed": ["model", "accelerator"],
    "print_prompt_completions_sample": [
        "prompts",
        "completions",
        "rewards",
        "advantages",
        "step",
        "num_samples",
    ],
    "remove_hooks": ["model"],
    "selective_log_softmax_and_entropy": ["logits", "index", "entropy_requires_grad", "temperature"],
    "shutdown_event_loop_in_daemon": ["thread", "loop"],
    "start_event_loop_in_daemon": ["name"],
    "unwrap_model_for_generation": ["model", "accelerator"],
}


def imported_names() -> dict[str, str]:
    """Each name that trl_internals.py imports, with its module, read without importing."""
    return {
        alias.name: node.module or ""
        for node in ast.walk(ast.parse(INTERNALS.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_the_calls_listed_here_are_those_of_the_file() -> None:
    assert set(CALLS) == set(ORDERS) == set(imported_names())


@pytest.mark.parametrize("name", CALLS)
def test_trl_still_has_it_where_we_look_and_takes_what_we_pass(name: str) -> None:
    module = imported_names()[name]
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.fail(f"TRL has moved {module}.{name}: mend pipeline/trl_internals.py.")
    if isinstance(function, type):
        function = function.forward  # type: ignore[attr-defined]
    signature = inspect.signature(function)
    count, keywords = CALLS[name]
    try:
        signature.bind(*[None] * count, **dict.fromkeys(keywords))
    except TypeError as error:
        pytest.fail(f"TRL has changed the arguments of {module}.{name}: {signature} ({error}).")
    order = list(signature.parameters)[: len(ORDERS[name])]
    assert order == ORDERS[name], f"TRL has changed the order of the arguments of {module}.{name}."


def trl_imports(path: Path) -> list[str]:
    """Modules of TRL, below its top level, that a file imports from."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    found += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return [module for module in found if module.startswith("trl.")]


def test_nothing_else_reaches_into_trl() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files = [path for path in files if path not in (INTERNALS, PEER)]
    assert len(files) > 50
    offenders = {str(path.relative_to(ROOT)): trl_imports(path) for path in files if trl_imports(path)}
    assert offenders == {}, (
        "Import these in pipeline/trl_internals.py, from the top level of trl, or not at all."
    )
