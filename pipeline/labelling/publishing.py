"""Judgements as a data set of the hub: preference pairs, what was said of each item, and a card that says how they came about."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from tieback.cli.errors import UsageError, first_line
from tieback.data.files import read_file
from tieback.pipeline.labelling.items import Item
from tieback.pipeline.labelling.judgements import ASPECTS, Judgement

PREFERENCES, JUDGEMENTS = "preferences.jsonl", "judgements.jsonl"
# What a card says of the figures of `--summary`, and how.
_FIGURES = {
    "items/judged": ("items judged", "{:,.0f}"),
    "items/by_several": ("of them by several people", "{:,.0f}"),
    "agreement/pairwise": ("pairs that two people order alike, ties left out", "{:.0%}"),
    "agreement/alpha": ("Krippendorff's alpha over the pairs", "{:.2f}"),
    "ties/share": ("pairs that were tied", "{:.0%}"),
    "seconds/median": ("median time for an item", "{:.0f} s"),
    "bias/first_shown": ("pairs won by the response shown first", "{:.0%}"),
    "bias/longer": ("pairs won by the longer response", "{:.0%}"),
}


def push(
    name: str,
    output: Path,
    items: Sequence[Item],
    judgements: Sequence[Judgement],
    figures: Mapping[str, float],
    private: bool,
) -> str:
    """Upload the preference pairs of `output` and the judgements of these items; returns the data set's address.

    Names of annotators become `annotator_1`, …, alike in both files; notes stay on this machine.

    Args:
        name: of the data set, owner/name.
        output: preference pairs that the page has written.
        items: that were judged.
        judgements: of these, and of others.
        figures: see `judgement_figures`.
        private: whether it is to be visible to its owner alone, where it is new.

    Raises:
        UsageError: there is nothing to push, or the hub did not take it.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), output, items, judgements, figures)
        try:
            api = HfApi()
            repository = api.create_repo(name, repo_type="dataset", private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=folder,
                commit_message="Upload by Tieback",
            )
        except Exception as error:  # of the network, of the hub, of the name, and of having no token
            raise UsageError(
                f"--push_to_hub {name}: the hub did not take it ({first_line(error)}). Log in with `hf auth login`; the files lie "
                f"at {output} as before."
            ) from error
    return str(getattr(commit, "repo_url", repository))


def write_dataset(
    folder: Path,
    output: Path,
    items: Sequence[Item],
    judgements: Sequence[Judgement],
    figures: Mapping[str, float],
) -> None:
    """Write what `push` uploads into a folder; `datasets.load_dataset(folder)` gives the preference pairs.

    Raises:
        UsageError: there are no preference pairs, or guidelines that judgements name are missing.
    """
    pairs = [row for _, row in read_file(output)] if output.is_file() and output.stat().st_size else []
    if not pairs:
        raise UsageError(f"{output} has no preference pairs to push: judge some items first.")
    by_id = {item.item_id: item for item in items}
    known = [judgement for judgement in judgements if judgement.item_id in by_id]
    names = {str(row["annotator"]) for row in pairs if row.get("annotator")} | {
        each.annotator for each in known
    }
    aliases = {name: f"annotator_{number}" for number, name in enumerate(sorted(names), start=1)}
    _write_rows(
        folder / PREFERENCES,
        (
            {**row, "annotator": aliases[str(row["annotator"])]} if row.get("annotator") else row
            for row in pairs
        ),
    )
    _write_rows(folder / JUDGEMENTS, (_row(each, by_id[each.item_id], aliases) for each in known))
    guidelines = sorted({each.guidelines for each in known if each.guidelines is not None})
    for version in guidelines:
        kept = output.with_suffix(f".guidelines-{version}.md")
        if not kept.is_file():
            raise UsageError(
                f"{kept} is missing, the guidelines that some judgements name: put the file back, from where the page was served."
            )
        (folder / f"guidelines-{version}.md").write_text(kept.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "README.md").write_text(card(len(pairs), known, figures, guidelines), encoding="utf-8")


def card(
    num_pairs: int, judgements: Sequence[Judgement], figures: Mapping[str, float], guidelines: Sequence[str]
) -> str:
    """The data card, in Markdown under the hub's header."""
    header = {
        "tags": ["preference", "rlhf", "human-feedback"],
        "configs": [
            {"config_name": "preferences", "data_files": PREFERENCES, "default": True},
            {"config_name": "judgements", "data_files": JUDGEMENTS},
        ],
    }
    rows = [
        f"| {label} | {form.format(figures[name])} |"
        for name, (label, form) in _FIGURES.items()
        if name in figures
    ]
    flags = Counter(each.flag for each in judgements if each.flag is not None)
    flagged = ", ".join(f"{flag} {count}" for flag, count in sorted(flags.items())) or "none"
    by = len({each.annotator for each in judgements})
    lines = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        "# Rankings of responses",
        f"{len(judgements):,} judgements by {by} {'person' if by == 1 else 'people'}, made with the labelling page of Tieback; {num_pairs:,} preference pairs follow from them.",
        "| | |\n| --- | --- |\n" + "\n".join([*rows, f"| flagged | {flagged} |"]),
        f"- `{PREFERENCES}`: `prompt`, `chosen`, `rejected`, `annotator`; what `pipeline/reward.py` and TRL's `RewardTrainer` read.\n"
        f"- `{JUDGEMENTS}`: one line a judgement: `prompt`, `responses`, `ranks` (1 = best, equal = tied; none where the item is flagged), `ratings` from 1 to 5, "
        "`flag`, `seconds`, `order` (in which the responses stood on the page), `guidelines` (their version).\n"
        "- Names of annotators are replaced by numbers. Their notes are left out.",
    ]
    if guidelines:
        files = ", ".join(f"`guidelines-{version}.md`" for version in guidelines)
        lines.append(f"What people judged by: {files}.")
    return "\n\n".join(lines) + "\n"


def _row(judgement: Judgement, item: Item, aliases: Mapping[str, str]) -> dict[str, Any]:
    said = {name: value for name, value in vars(judgement).items() if name not in ("note", "annotator")}
    # One type a column, whatever was rated: the hub reads the file as a table.
    ratings = {aspect: judgement.ratings.get(aspect) for aspect in ASPECTS}
    texts = {"prompt": item.row["prompt"], "responses": item.row["responses"]}
    return {**texts, **said, "ratings": ratings, "annotator": aliases[judgement.annotator]}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
