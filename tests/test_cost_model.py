"""The model of cost: operations against those that PyTorch counts, and a fit that finds what it was made from."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cost_model import PHASES, Gpu, Shape, counts, fit, predict, predict_sharded

SHAPE = Shape(rows=4, prompt=24, completion=16, hidden=64, layers=3, vocabulary=500)
GROUPED = Shape(
    rows=2, prompt=64, completion=64, hidden=256, layers=2, vocabulary=1000, intermediate=1024, kv=64
)


def llama(shape: Shape) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate or shape.hidden * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 32,
        num_key_value_heads=(shape.kv or shape.hidden) // 32,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("shape", [SHAPE, GROUPED], ids=["small", "grouped queries"])
def test_weights_and_operations_are_those_of_the_model(shape: Shape) -> None:
    model = llama(shape)
    matrices = [p.numel() for p in model.model.layers.parameters() if p.ndim == 2]
    assert shape.trunk == sum(matrices)
    width = shape.prompt + shape.completion
    ids = torch.zeros(shape.rows, width, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=shape.completion, use_cache=False)
    # Eager attention multiplies what the mask then hides: as much again as we count.
    attention = 2 * shape.layers * shape.hidden * width * shape.tokens
    counted = shape.trunk_operations + attention + shape.head_operations
    assert counter.get_total_flops() == counted


def test_the_fit_finds_the_rates_that_made_the_measurements() -> None:
    rates = {
        phase: {name: 10.0**-9 * (place + 1) for place, name in enumerate(of)}
        for phase, of in counts(SHAPE).items()
    }
    changes = [{"rows": 40}, {"completion": 90}, {"hidden": 128}, {"layers": 9}, {"vocabulary": 9000}]
    shapes = [SHAPE, *(replace(SHAPE, **change) for change in changes)]
    found = fit(shapes, [predict(shape, rates) for shape in shapes])
    for phase in PHASES:
        assert found[phase] == pytest.approx(rates[phase], rel=1e-6)
    other = replace(SHAPE, rows=10, completion=50, layers=5)
    assert predict(other, found) == pytest.approx(predict(other, rates), rel=1e-6)


def test_no_rate_of_a_fit_is_negative() -> None:
    shapes = [replace(SHAPE, rows=rows) for rows in (8, 16, 32, 64)]
    falling = [dict.fromkeys(PHASES, 1 / shape.rows) for shape in shapes]
    rates = fit(shapes, falling)
    assert all(rate >= 0 for of in rates.values() for rate in of.values())


def test_gpus_share_the_operations_and_pay_for_the_exchange() -> None:
    free = Gpu(link=float("inf"), bandwidth=float("inf"), launch=0.0)
    one, eight = predict_sharded(GROUPED, 1, free), predict_sharded(GROUPED, 8, free)
    assert one == pytest.approx({phase: 8 * seconds for phase, seconds in eight.items()})
    slow = predict_sharded(GROUPED, 8, replace(free, link=1e9))
    whole = 2.0 * (GROUPED.trunk + GROUPED.hidden * GROUPED.vocabulary) * 7 / 8 / 1e9
    # Score: one pass of one model; update: in each of 4 epochs two models, there and back, and gradients in fp32.
    assert slow["score"] - eight["score"] == pytest.approx(whole)
    assert slow["update"] - eight["update"] == pytest.approx(4 * 2 * 4 * whole)
