"""Resuming with another number of processes: the run goes on where the mathematics allows, or says why not."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from workers import resume_cases

from tieback.cli.errors import UsageError
from tieback.pipeline.trainer.run_identity import Identity, _check_processes, seed_of_process

pytestmark = pytest.mark.backends

WORKER = Path(resume_cases.__file__)
# After these iterations of two an epoch: within an epoch, and at its end.
STEPS = (1, 2)
SHARDED = ("zero2", "zero3", "fsdp2")

Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module", autouse=True)
def fixed_sample() -> Iterator[None]:
    """Takes back what `resume_cases.run` puts into this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume_cases.TransformersSampler, "sample", resume_cases.TransformersSampler.sample)
        patch.setattr(resume_cases.PPOTrainer, "_check_sampling", resume_cases.PPOTrainer._check_sampling)
        yield


def launched(folder: Path, backend: str, processes: int, checkpoints: Sequence[Path]) -> list[Results]:
    """What each process of a launched worker comes to."""
    folder.mkdir()
    cpu = {"use_cpu": True} if backend == "multi_gpu" else {}
    config = launching.write_config(folder, backend, num_processes=processes, **cpu)
    done = launching.launch(config, WORKER, str(folder), json.dumps([str(path) for path in checkpoints]))
    assert done.returncode == 0, done.stderr[-3000:]
    for path in checkpoints:
        assert (
            done.stderr.count(f"{path}: the number of processes was {3 - processes}, is {processes}: ") == 1
        )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def one(folder: Path) -> Results:
    """One process, straight."""
    return resume_cases.run(folder / "one", 1, [])


@pytest.fixture(scope="module")
def two(folder: Path, one: Results) -> list[Results]:
    """Each of two processes, straight and from the checkpoints of one."""
    assert one
    return launched(folder / "two", "multi_gpu", 2, checkpoints(folder / "one"))


def checkpoints(run: Path) -> list[Path]:
    return [run / "straight" / f"checkpoint-{step}" for step in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_two_processes_go_on_from_the_checkpoint_of_one(
    folder: Path, one: Results, two: list[Results], step: int
) -> None:
    for rank in range(2):
        resumed = two[rank][str(folder / "one" / "straight" / f"checkpoint-{step}")]
        assert_same_run(resumed, one["straight"])
        assert resumed["seed"] == seed_of_process(0, step, rank)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_one_process_goes_on_from_the_checkpoint_of_two(
    folder: Path, tmp_path: Path, two: list[Results], step: int
) -> None:
    trainer = resume_cases.make_trainer(tmp_path, 1)
    trainer.train(resume_from_checkpoint=str(folder / "two" / "straight" / f"checkpoint-{step}"))
    resumed = resume_cases.summary(trainer)
    assert_same_run(resumed, two[0]["straight"])
    assert resumed["seed"] == seed_of_process(0, step, 0)


@pytest.mark.slow
def test_sharded_models_go_on_from_whole_ones_and_whole_ones_from_sharded(
    folder: Path, tmp_path: Path, one: Results
) -> None:
    for rank in launched(folder / "sharded", "fsdp2", 2, checkpoints(folder / "one")):
        for checkpoint in checkpoints(folder / "one"):
            assert_same_run(rank[str(checkpoint)], one["straight"])
    for checkpoint in checkpoints(folder / "sharded"):
        trainer = resume_cases.make_trainer(tmp_path, 1)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_same_run(resume_cases.summary(trainer), one["straight"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["multi_gpu", *SHARDED])
def test_what_is_named_changes_alike_under_every_backend(
    folder: Path, one: Results, two: list[Results], backend: str
) -> None:
    ranks = two if backend == "multi_gpu" else launched(folder / backend, backend, 2, [])
    for rank in ranks:
        assert_same_run(rank["changed"], one["changed"])
    rates = [entry["learning_rate"] for entry in one["changed"]["logs"]]
    assert rates == pytest.approx([0.01, 0.008, 0.018, 0.012, 0.006])


def assert_same_run(resumed: Results, straight: Results) -> None:
    torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=0, atol=2e-6)
    assert len(resumed["logs"]) == len(straight["logs"]) == 5
    for entry, expected in zip(resumed["logs"], straight["logs"], strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert resumed["kl"] == pytest.approx(straight["kl"], rel=1e-5)
    assert resumed["moments"] == pytest.approx(straight["moments"], rel=1e-5)


def written_by(folder: Path, destination: Path, processes: int, **settings: Any) -> str:
    """A checkpoint as another number of processes would have written it."""
    checkpoint = destination / "checkpoint-2"
    shutil.copytree(folder / "one" / "straight" / "checkpoint-2", checkpoint)
    state = json.loads((checkpoint / "ppo_state.json").read_text())
    state["identity"]["processes"] = processes
    state["identity"]["settings"] |= settings
    (checkpoint / "ppo_state.json").write_text(json.dumps(state))
    return str(checkpoint)


@pytest.mark.slow
@pytest.mark.usefixtures("one")
def test_another_global_batch_is_refused_with_the_numbers(folder: Path, tmp_path: Path) -> None:
    trainer = resume_cases.make_trainer(tmp_path, 1, per_device_train_batch_size=4)
    message = r"was 2, is 1\. With per_device_train_batch_size=4 .* have 4 completions in the place of 8.*_size to 8\."
    with pytest.raises(UsageError, match=message):
        trainer.train(resume_from_checkpoint=written_by(folder, tmp_path, 2))
    assert trainer.state.global_step == 0


def test_a_batch_that_does_not_divide_needs_another_number_of_processes() -> None:
    before, now = (
        Identity(
            settings={"global_batch_size": rows, "backend": "replicated"}, inputs={}, processes=processes
        )
        for rows, processes in ((8, 2), (12, 3))
    )
    with pytest.raises(UsageError, match="8 do not divide among 3 processes: start another number"):
        _check_processes(Path("checkpoint-2"), before, now, [])


@pytest.mark.slow
@pytest.mark.usefixtures("one")
def test_checkpoints_of_another_backend_are_refused(folder: Path, tmp_path: Path) -> None:
    trainer = resume_cases.make_trainer(tmp_path, 1)
    checkpoint = written_by(folder, tmp_path, 1, backend="zero2")
    with pytest.raises(UsageError, match="cannot go on with this: backend was 'zero2', is 'replicated'"):
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
@pytest.mark.usefixtures("one")
def test_deepspeed_goes_on_with_as_many_processes_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = resume_cases.make_trainer(tmp_path, 1)
    checkpoint = written_by(folder, tmp_path, 4, backend="zero2")
    monkeypatch.setattr("tieback.pipeline.resume.backend_name", lambda accelerator: "zero2")
    with pytest.raises(
        UsageError, match=r"was 4, is 1\. DeepSpeed .* in 4 parts, one a process: start 4 again"
    ):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_no_two_processes_and_no_two_steps_draw_alike() -> None:
    seeds = [
        seed_of_process(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < 2**32
