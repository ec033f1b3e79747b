"""Two processes (gloo, CPU) against one on the same global batch, each result to fp32 rounding."""

import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from reference.toy import (
    ToyActorCritic,
    make_batch,
    parameters,
    poisoned,
    with_imitation,
    with_reference_and_weights,
)

from tieback.ppo_core import Batch, PPOHyperparameters, explained_variance, update, whiten

WORLD = 2
LENGTHS = [1, 3, 5, 2, 5, 4, 1, 2]
HYPER = PPOHyperparameters(num_ppo_epochs=2, num_minibatches=4, ent_coef=0.1, max_grad_norm=0.3)

# name: (number of rows of rank 0, settings of the update)
UPDATES: dict[str, tuple[int, dict[str, Any]]] = {
    "even shards": (4, {}),
    "micro-batches of one row": (4, {"micro_batch_size": 1}),
    "one minibatch": (4, {"hyper": replace(HYPER, num_minibatches=1)}),
    "uneven shards": (5, {"micro_batch_size": 1}),
    "an empty shard": (8, {}),
    "a shard with one row for many minibatches": (1, {"micro_batch_size": 1}),
    "a wholly masked shard": (4, {"lengths": [2, 5, 1, 3, 0, 0, 0, 0]}),
    "garbage under the mask": (4, {"garbage": math.nan}),
    "KL in the loss and importance weights": (
        5,
        {"hyper": replace(HYPER, kl_loss_coef=0.3), "extended": True, "garbage": math.nan},
    ),
    "imitation, uneven shards": (5, {"micro_batch_size": 1, "imitating": True}),
    "imitation, an empty shard": (8, {"imitating": True}),
    "critic warm-up": (4, {"value_only": True, "adamw": True}),
    "no value term": (4, {"hyper": replace(HYPER, vf_coef=0.0), "adamw": True}),
    "early stop": (3, {"hyper": replace(HYPER, num_ppo_epochs=4, target_kl=0.02), "off_policy": 0.0}),
    "AdamW": (5, {"adamw": True}),
}


def run_update(
    accelerator: Accelerator,
    rows: slice,
    *,
    hyper: PPOHyperparameters = HYPER,
    micro_batch_size: int = 2,
    lengths: list[int] = LENGTHS,
    garbage: float = 0.0,
    extended: bool = False,
    imitating: bool = False,
    off_policy: float = 0.3,
    value_only: bool = False,
    adamw: bool = False,
) -> dict[str, Any]:
    """Update the toy on `rows` of the global batch."""
    batch = make_batch(lengths, off_policy=off_policy)
    batch = with_imitation(batch) if imitating else batch
    batch = poisoned(with_reference_and_weights(batch) if extended else batch, garbage)[rows]
    policy = ToyActorCritic()
    if adamw:
        optimizer: Any = torch.optim.AdamW(policy.parameters(), lr=0.05, weight_decay=0.5)
    else:
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    # The generators of the ranks differ: that of rank 0 decides.
    generator = torch.Generator().manual_seed(7 + accelerator.process_index)
    stats = update(
        policy,
        optimizer,
        batch,
        hyper,
        accelerator,
        micro_batch_size,
        generator=generator,
        value_only=value_only,
    )
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    return {"parameters": parameters(policy), "stats": stats, "gradients left": len(gradients)}


def run_statistics(accelerator: Accelerator, rows: slice) -> dict[str, Any]:
    """Whitening and explained variance of `rows`."""
    batch: Batch = poisoned(make_batch(LENGTHS), math.nan)[rows]
    return {
        "whitened": whiten(batch.advantages, batch.mask, accelerator=accelerator),
        "unshifted": whiten(batch.advantages, batch.mask, shift_mean=False, accelerator=accelerator),
        "explained": explained_variance(batch.old_values, batch.returns, batch.mask, accelerator),
    }


def run_faulty(accelerator: Accelerator, rows: slice) -> str:
    """The error of an update where one element of the last row alone is not finite."""

    class Faulty(ToyActorCritic):
        def evaluate(self, minibatch: Batch) -> Any:
            logprobs, values, entropies = super().evaluate(minibatch)
            return logprobs, values + torch.where(minibatch.inputs["fault"], math.nan, 0.0), entropies

    batch = make_batch(LENGTHS)
    fault = torch.zeros_like(batch.mask)
    fault[-1, 0] = True
    batch = replace(batch, inputs=batch.inputs | {"fault": fault})[rows]
    policy = accelerator.prepare(Faulty())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    try:
        update(policy, optimizer, batch, replace(HYPER, num_minibatches=1), accelerator, 2)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def run_all(accelerator: Accelerator, shard: Callable[[int], slice]) -> dict[str, Any]:
    """Every case; `shard` gives this process's rows for the number of rows of rank 0."""
    results: dict[str, Any] = {
        name: run_update(accelerator, shard(first), **settings) for name, (first, settings) in UPDATES.items()
    }
    results["statistics"] = run_statistics(accelerator, shard(3))
    results["statistics, an empty shard"] = run_statistics(accelerator, shard(8))
    results["fault"] = run_faulty(accelerator, shard(4))
    return results


def process(rank: int, port: int, folder: str) -> None:
    """One of the two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    results = run_all(accelerator, lambda first: slice(0, first) if rank == 0 else slice(first, None))
    torch.save(results, Path(folder) / f"{rank}.pt")
    accelerator.end_training()
    # Gloo's threads may abort a process that ends by itself ("terminate called without an active exception").
    os._exit(0)


@pytest.fixture(scope="module")
def one() -> Iterator[dict[str, Any]]:
    """Results of a single process on the global batch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield run_all(Accelerator(cpu=True), lambda _: slice(None))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of two processes, by rank."""
    folder = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(process, args=(port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", UPDATES)
def test_two_processes_update_as_one_does(case: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    expected = one[case]
    assert not torch.isclose(expected["parameters"], parameters(ToyActorCritic())).all()
    for result in two:
        torch.testing.assert_close(result[case]["parameters"], expected["parameters"], rtol=5e-6, atol=5e-6)
        assert result[case]["gradients left"] == 0
        for name, figure in vars(expected["stats"]).items():
            assert getattr(result[case]["stats"], name) == pytest.approx(figure, rel=5e-5, abs=1e-6), name
    assert torch.equal(two[0][case]["parameters"], two[1][case]["parameters"])


def test_a_critic_warm_up_of_two_processes_leaves_the_policy_as_it_is(two: list[dict[str, Any]]) -> None:
    actor = ToyActorCritic().actor.flatten()
    for result in two:
        assert torch.equal(result["critic warm-up"]["parameters"][: len(actor)], actor)


def test_without_a_value_term_two_processes_leave_the_critic_as_it_is(two: list[dict[str, Any]]) -> None:
    critic = ToyActorCritic().critic
    for result in two:
        assert torch.equal(result["no value term"]["parameters"][-len(critic) :], critic)


def test_all_processes_stop_early_together(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for results in (one, *two):
        stats = results["early stop"]["stats"]
        assert stats.stopped_early
        assert 0 < stats.optimizer_steps < 16


@pytest.mark.parametrize("case", ["statistics", "statistics, an empty shard"])
def test_whitening_and_explained_variance_are_global(
    case: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    for name in ("whitened", "unshifted"):
        joined = torch.cat([result[case][name] for result in two])
        torch.testing.assert_close(joined, one[case][name], rtol=2e-6, atol=2e-6)
    for result in two:
        torch.testing.assert_close(result[case]["explained"], one[case]["explained"])


def test_a_fault_on_one_process_is_raised_on_all(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert "value loss (1 of 23 elements)" in one["fault"]
    assert [result["fault"] for result in two] == [one["fault"]] * WORLD
