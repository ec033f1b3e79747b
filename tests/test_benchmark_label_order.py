"""The benchmark of the order of labelling: what is shown to the annotator, what is held out, and what the table says."""

from pathlib import Path

import pytest

from benchmarks import label_order
from tieback.pipeline.labelling.items import Item


def made_items(count: int) -> list[Item]:
    rows = ({"prompt_id": str(n), "prompt": f"Question {n}?", "responses": ["a", "b"]} for n in range(count))
    return [Item(f"{number:04d}", row) for number, row in enumerate(rows)]


def test_both_orders_begin_alike_and_show_no_item_twice_nor_one_that_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, list[str]] = {}
    held_out: set[str] = set()
    asked = []

    def train(folder: Path, items: list[Item], *_: object) -> None:
        trained[folder.name] = [item.item_id for item in items]

    def accuracy(folder: Path, items: list[Item]) -> float:
        held_out.update(item.item_id for item in items)
        return len(trained[folder.name]) / 100

    def by_number(items: list[Item], names: list[str]) -> list[Item]:
        asked.append(Path(names[0]).name)
        return sorted(items, key=lambda item: item.item_id)

    monkeypatch.setattr(label_order, "train", train)
    monkeypatch.setattr(label_order, "accuracy", accuracy)
    monkeypatch.setattr(label_order, "most_uncertain_first", by_number)
    args = label_order.parse(["--run_dir", str(tmp_path), "--judgements", "40", "20", "30"])
    curves = label_order.curves_of(made_items(900), 0, args)
    assert list(trained) == ["first_20", "random_30", "random_40", "uncertain_first_30", "uncertain_first_40"]
    # The newest reward model says what is shown next.
    assert asked == ["first_20", "uncertain_first_30"]
    assert len(held_out) == 800
    for ids in trained.values():
        assert len(set(ids)) == len(ids)
        assert not held_out & set(ids)
        assert ids[:20] == trained["first_20"]
    assert trained["random_40"][:30] == trained["random_30"]
    new = trained["uncertain_first_40"][20:]
    rest = sorted({f"{number:04d}" for number in range(900)} - held_out - set(trained["first_20"]))
    assert new == rest[:20]
    assert curves == {order: {20: 0.2, 30: 0.3, 40: 0.4} for order in label_order.ORDERS}


def test_the_table_has_means_and_ranges_over_the_seeds(tmp_path: Path) -> None:
    found = [
        {"random": {250: 0.6, 1000: 0.7}, "uncertain first": {250: 0.6, 1000: low}} for low in (0.72, 0.76)
    ]
    args = label_order.parse(["--seeds", "0", "1"])
    text = label_order.table(found, args)
    assert text.startswith("3 epochs, seeds 0, 1; ")
    assert "| judgements | 250 | 1,000 |\n| --- | --- | --- |\n" in text
    assert text.endswith("| uncertain first | 0.600 (0.600 to 0.600) | 0.740 (0.720 to 0.760) |")
    label_order.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
