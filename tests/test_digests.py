"""Digests of weights, tokenizers and rows: the same wherever the content is the same, another where anything differs."""

import json
from pathlib import Path

import launching
import pytest
import torch
import toy
from datasets import Dataset
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from tieback.pipeline.digests import rows_digest, tokenizer_digest
from tieback.pipeline.trainer.module_digest import module_digest


class Mixed(nn.Module):
    """Parameters of several types and shapes: larger than a chunk, odd, a scalar, empty, not contiguous, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.arange(40_001.0))
        self.narrow = nn.Parameter(torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).T)
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("codes", torch.arange(7, dtype=torch.uint8))


def test_the_digest_of_a_model_is_a_known_number_in_every_process() -> None:
    assert module_digest(Mixed()) == module_digest(Mixed()) == "b1c23fe695d96f65"


@pytest.mark.parametrize("name", ["large", "narrow", "scalar", "codes"])
@pytest.mark.parametrize("place", [0, -1])
def test_one_number_makes_another_digest(name: str, place: int) -> None:
    changed = Mixed()
    with torch.no_grad():
        entry = getattr(changed, name)
        entry[(place,) * entry.dim()] += 1
    assert module_digest(changed) != module_digest(Mixed())


def test_chunks_that_change_places_names_types_and_shapes_make_another_digest() -> None:
    digests = {module_digest(Mixed())}
    swapped, renamed, cast, reshaped, moved = (Mixed() for _ in range(5))
    with torch.no_grad():
        swapped.large[:32_768] = torch.cat([swapped.large[16_384:32_768], swapped.large[:16_384].clone()])
    renamed.other = renamed._parameters.pop("scalar")
    cast.narrow.data = cast.narrow.data.half()
    reshaped.large.data = reshaped.large.data.reshape(1, -1)
    moved.codes[0], moved.large.data[0] = 1, 5.0
    for model in (swapped, renamed, cast, reshaped, moved):
        digests.add(module_digest(model))
    assert len(digests) == 6


def test_where_a_tensor_lies_in_memory_does_not_matter() -> None:
    model = Mixed()
    shifted = torch.cat([torch.zeros(1), model.large.data])[1:]
    assert shifted.storage_offset() == 1
    model.large.data = shifted
    assert module_digest(model) == module_digest(Mixed())


ROWS = [
    {"prompt": [{"role": "user", "content": f"Frage {number} ü"}], "n": number, "x": [0.1 * number, None]}
    for number in range(1500)
]


def test_the_digest_of_rows_is_that_of_their_content_wherever_they_come_from(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    assert rows_digest(rows) == "aa602c83c9cbea47"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    read = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    selected = Dataset.from_list(ROWS[::-1]).select(range(1499, -1, -1))
    filtered = Dataset.from_list([*ROWS, *ROWS]).filter(lambda _, index: index < 1500, with_indices=True)
    for dataset in (read, selected, filtered, rows.with_format("torch")):
        assert rows_digest(dataset) == rows_digest(rows)


def test_any_other_row_order_or_column_makes_another_digest() -> None:
    rows = Dataset.from_list(ROWS[:9])
    others = [
        rows.select(range(8)),
        rows.select([1, 0, *range(2, 9)]),
        rows.rename_column("n", "m"),
        rows.remove_columns("n"),
        Dataset.from_list([*ROWS[:8], {**ROWS[8], "n": 0}]),
        Dataset.from_list([*ROWS[:8], {**ROWS[8], "x": [0.8, 0.0]}]),
    ]
    assert len({rows_digest(dataset) for dataset in (rows, *others)}) == 7


def test_a_tokenizer_is_known_by_vocabulary_special_tokens_and_template() -> None:
    tok, template, pad, vocabulary = (toy.tokenizer() for _ in range(4))
    assert tokenizer_digest(tok) == tokenizer_digest(template)
    tok(["red cat", "red"], padding=True, truncation=True, max_length=3)  # use leaves no trace
    assert tokenizer_digest(tok) == tokenizer_digest(template)
    template.chat_template += " "
    pad.pad_token = pad.eos_token
    vocabulary.add_tokens(["<|more|>"])
    assert len({tokenizer_digest(one) for one in (tok, template, pad, vocabulary)}) == 4


def plain_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(130, 130)


ZERO3 = """\
import sys
import deepspeed, torch
from accelerate import PartialState
from tieback.cli.errors import run
from tieback.pipeline.trainer.module_digest import module_digest
sys.path.insert(0, sys.argv[1])
from test_digests import plain_layer

def main():
    state = PartialState()
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        model = plain_layer()
    assert model.weight.numel() == 0
    digest = module_digest(model)
    assert model.weight.numel() == 0
    if state.is_main_process:
        open(sys.argv[2], "w").write(digest)

run(main)
"""


@pytest.mark.backends
@pytest.mark.slow
def test_weights_that_zero_3_has_partitioned_have_the_digest_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "zero3.py").write_text(ZERO3)
    config = launching.write_config(tmp_path, "zero3")
    arguments = (str(Path(__file__).parent), str(tmp_path / "digest"))
    done = launching.launch(config, tmp_path / "zero3.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "digest").read_text() == module_digest(plain_layer())


def test_a_weight_that_is_made_of_several_tensors_counts_with_all_of_them() -> None:
    """As torchao's quantised weights are."""

    def digest(scale: float) -> str:
        module = torch.nn.Linear(4, 3, bias=False)
        packed = TwoTensor(torch.arange(12.0).view(3, 4), torch.full((3, 4), scale))
        module.weight = torch.nn.Parameter(packed, requires_grad=False)
        return module_digest(module)

    assert digest(1.0) == digest(1.0) != digest(2.0)
