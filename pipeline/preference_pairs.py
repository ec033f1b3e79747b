"""The pairs that a reward model learns from: of collect, of people or of a data set, by whom, and on which annotators agree."""

from collections import Counter

from accelerate import PartialState
from datasets import concatenate_datasets

from tieback.cli.errors import UsageError
from tieback.data.sources import Rows, load_rows
from tieback.pipeline.arguments import RunArguments
from tieback.pipeline.settings.reward import PairArguments
from tieback.reward_model.reliability import Agreement, agreement_with_others, merge_votes


def pairs_to_learn_from(
    sources: list[str], pair_args: PairArguments, seed: int
) -> tuple[Rows, dict[str, Agreement]]:
    """The pairs of all sources that the settings keep, and with `least_agreement` the annotators' agreement.

    Raises:
        UsageError: see `without_unreliable` and `agreed_pairs`.
    """
    rows, agreements = without_unreliable(
        load_pairs(sources, pair_args, seed), pair_args.least_agreement, " and ".join(sources)
    )
    return agreed_pairs(rows, pair_args.least_pair_agreement), agreements


def collected_pairs(run: RunArguments) -> list[str]:
    """The pairs of this round and of those before: as collect left them ranked, else as people ranked them.

    Raises:
        UsageError: a round has none.
    """
    sources = []
    for round in range(1, run.round + 1):
        collected, labelled = (run.stage_dir(stage, round) for stage in ("collect", "label"))
        by_people = labelled / "preferences.jsonl"
        if (collected / "preferences.jsonl").is_file() or not (collected / "responses.jsonl").is_file():
            sources.append(str(run.require("collect", "preferences.jsonl", round)))
        elif by_people.is_file():
            sources.append(str(by_people))
        else:
            raise UsageError(
                f"The responses in {collected} are not ranked. Rank them with `python -m pipeline.label --responses "
                f"{collected / 'responses.jsonl'} --output {by_people}` (or `make label`), or collect with annotator: "
                "simulated, or name pairs that people made with --dataset_name (or `make reward DATA=...`)."
            )
    return sources


def load_pairs(sources: list[str], pair_args: PairArguments, seed: int) -> Rows:
    """The preference rows of all sources, one after the other."""
    parts = [
        load_rows(
            source,
            "preferences",
            split=pair_args.dataset_train_split,
            config=pair_args.dataset_config,
            max_rows=pair_args.max_rows,
            seed=seed,
        )
        for source in sources
    ]
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
    return Rows(concatenate_datasets([part.dataset for part in parts]), dict(dropped))


def without_unreliable(
    rows: Rows, least_agreement: float | None, source: str
) -> tuple[Rows, dict[str, Agreement]]:
    """The rows without those of annotators who agree too rarely with others, and the agreement of all of whom it is known.

    Raises:
        UsageError: there are no annotators to tell apart, or nobody would be left.
    """
    if least_agreement is None:
        return rows, {}
    names = set(rows.dataset["annotator"]) if "annotator" in rows.dataset.column_names else set()
    if len(names - {None}) < 2:
        raise UsageError(
            f"least_agreement compares annotators, and the pairs of {source} name {len(names - {None})} in a column `annotator`. "
            "Leave it out."
        )
    agreements = agreement_with_others(rows.dataset.to_list())
    out = [name for name, agreement in agreements.items() if agreement.share < least_agreement]
    kept = rows.dataset.filter(lambda annotator: annotator not in out, input_columns="annotator")
    if not len(kept):
        raise UsageError(
            f"least_agreement {least_agreement} leaves out all annotators of {source} ({', '.join(out)}): they order pairs in "
            "opposite ways. Look at their judgements (`tieback label … --summary`), or lower it."
        )
    if PartialState().is_main_process:
        for name in out:
            share, shared = agreements[name]
            print(f"left out: {name}, who orders {share:.0%} of {shared} shared pairs as most others do")
    dropped = {**rows.dropped, "unreliable": len(rows.dataset) - len(kept)}
    return Rows(kept, dropped), agreements


def agreed_pairs(rows: Rows, least_pair_agreement: float | None) -> Rows:
    """One row for each two responses, on whose order so great a share of their annotators agree; without the annotators' names.

    Raises:
        UsageError: there is no such pair.
    """
    if least_pair_agreement is None:
        return rows
    kept, disputed = merge_votes(rows.dataset.to_list(), least_pair_agreement)
    if not kept:
        raise UsageError(
            f"least_pair_agreement {least_pair_agreement} leaves out all {disputed} pairs: their annotators disagree. Lower it."
        )
    dataset = rows.dataset.select(kept)
    if "annotator" in dataset.column_names:
        dataset = dataset.remove_columns("annotator")
    merged = len(rows.dataset) - len(kept) - disputed
    return Rows(dataset, {**rows.dropped, "merged": merged, "disputed": disputed})
