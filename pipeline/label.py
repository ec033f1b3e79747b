"""Judge responses in a browser: rank several to a prompt, or compare SFT with PPO without knowing which is which.

    python -m pipeline.label --responses runs/helpdesk/collect/responses.jsonl --output preferences.jsonl
    python -m pipeline.label --compare runs/helpdesk/evaluate/samples.jsonl --output comparisons.jsonl
    python -m pipeline.label --responses ... --output preferences.jsonl --summary
    python -m pipeline.label --responses ... --output preferences.jsonl --push_to_hub me/rankings

Needs the extra `label`. Writes preference rows that `pipeline/reward.py --dataset_name preferences.jsonl` reads as they
are and, beside them, `preferences.judgements.jsonl`: the log of everything that was said, which is only appended to.
The server answers this machine alone; several annotators, by name, may use it or servers of their own on one output.
"""

import importlib.util
import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path

from tieback.cli.arguments import parse_flags
from tieback.cli.errors import UsageError, run
from tieback.pipeline.labelling.guidelines import keep_guidelines, read_guidelines
from tieback.pipeline.labelling.items import read_comparisons, read_known, read_responses
from tieback.pipeline.labelling.judgements import JudgementLog
from tieback.pipeline.labelling.session import Session
from tieback.pipeline.stage import quiet_libraries


@dataclass
class LabelArguments:
    """What is judged, where judgements go, and how the page is served."""

    output: str = field(
        metadata={
            "help": "File of preference pairs to write (.jsonl); the log of judgements is beside it, <name>.judgements.jsonl."
        }
    )
    responses: str | None = field(
        default=None,
        metadata={
            "help": "File of responses to rank, as pipeline/collect.py writes it, or a hub data set with the columns `prompt` and `responses`."
        },
    )
    responses_split: str = field(
        default="train", metadata={"help": "Split of the responses ('train[:500]', say)."}
    )
    compare: list[str] | None = field(
        default=None,
        metadata={
            "help": "File of pairs to compare side by side, as pipeline/evaluate.py writes it; or several, of evaluations on the same prompts, whose PPO policies are compared with each other and with the first one's SFT."
        },
    )
    guidelines: str | None = field(
        default=None,
        metadata={
            "help": "File of guidelines (Markdown) to judge by: they stand above each item, open on the first one, and each judgement names their version."
        },
    )
    gold: str | None = field(
        default=None,
        metadata={
            "help": "File of responses with known ranks (rows as of --responses, with `ranks`), mixed in unmarked: --summary tells how often each annotator orders them so. They give no preferences."
        },
    )
    gold_share: float = field(
        default=0.1, metadata={"help": "Share of such items among those that an annotator is shown."}
    )
    adjudicate: bool = field(
        default=False,
        metadata={
            "help": "Show the items whose responses people have ordered differently, to others than those, blind; what they say then stands in the place of the earlier judgements."
        },
    )
    leave_out_below: float = field(
        default=0.0,
        metadata={
            "help": "With --gold: annotators who order less than this share of at least 20 pairs with a known order as known give no preferences; their judgements stay in the log."
        },
    )
    leave_out_hasty: bool = field(
        default=False,
        metadata={
            "help": "Judgements that were made faster than anyone reads give no preferences; they stay in the log."
        },
    )
    summary: bool = field(
        default=False,
        metadata={"help": "Print agreement, counts, times and biases instead of serving the page."},
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "Upload pairs and judgements to this data set of the hub (owner/name), with a data card, instead of serving the page. Annotators become numbers, notes are left out."
        },
    )
    hub_private: bool = field(default=True, metadata={"help": "Make that data set private, where it is new."})
    overlap: float = field(
        default=0.1,
        metadata={
            "help": "Share of the items that every annotator is shown, so that their agreement can be measured."
        },
    )
    uncertain_to: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models (folders or hub names): items on whose ranking they are least sure come first; with several, those on which they disagree most."
        },
    )
    until_finished: bool = field(
        default=False, metadata={"help": "End when every item is judged, instead of at ctrl-C."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the order in which responses stand on the page."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to serve at."})
    port: int | None = field(
        default=None, metadata={"help": "Port of the server; the first free one from 7860 where not set."}
    )
    password: str | None = field(
        default=None,
        metadata={
            "help": 'Password that the page asks for (user name "annotator"); needed where the host is not this machine\'s own.'
        },
    )

    def __post_init__(self) -> None:
        if (self.responses is None) == (self.compare is None):
            raise UsageError("Name what to judge: either --responses or --compare.")
        if not 0 <= self.overlap <= 1:
            raise UsageError(f"overlap is a share, from 0 to 1, not {self.overlap}.")
        if not 0 <= self.gold_share <= 1:
            raise UsageError(f"gold_share is a share, from 0 to 1, not {self.gold_share}.")
        if not 0 <= self.leave_out_below <= 1:
            raise UsageError(f"leave_out_below is a share, from 0 to 1, not {self.leave_out_below}.")
        if self.leave_out_below and not self.gold:
            raise UsageError("--leave_out_below is measured by items with known ranks: name them by --gold.")
        if self.gold and self.compare:
            raise UsageError(
                "--gold has ranks of the responses of --responses; it cannot be mixed into --compare."
            )
        if Path(self.output).suffix != ".jsonl":
            raise UsageError(f"--output {self.output}: the name must end in .jsonl.")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise UsageError(f"port must be between 1 and 65535, but is {self.port}.")
        if not _is_loopback(self.host) and not self.password:
            raise UsageError(
                f"--host {self.host} would let other machines in: set a --password, or leave the host at 127.0.0.1."
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, port: int | None) -> None:
    """Check that a server can listen at an address, before anything is read or loaded.

    Raises:
        UsageError: the host is not this machine's, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        where = host if port is None else f"{host}, port {port}"
        raise UsageError(
            f"No page can be served at {where} ({error.strerror or error}). Name another --port or --host."
        ) from error


def main() -> None:
    """Run the command."""
    quiet_libraries()
    missing = [
        name
        for name in ("gradio", "krippendorff", "markdown_it", "nh3")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} must be installed: `pip install 'tieback[label]'` (in a checkout, `make setup`)."
        )
    (args,) = parse_flags(LabelArguments, "python -m pipeline.label")
    if not (args.summary or args.push_to_hub):
        check_address(args.host, args.port)
    output = Path(args.output)
    items = (
        read_responses(args.responses, args.responses_split)
        if args.responses
        else read_comparisons(*map(Path, args.compare or ()))
    )
    known = read_known(Path(args.gold)) if args.gold else []
    guidelines = None if args.guidelines is None else read_guidelines(Path(args.guidelines))
    log = open_log(output)
    if args.summary or args.push_to_hub:
        from tieback.pipeline.labelling.agreement import agreement_matrix, judgement_figures

        judgements = list(log.judgements.values())
        figures = judgement_figures(items, judgements, known)
        if args.summary:
            from tieback.pipeline.labelling.strengths import strengths
            from tieback.pipeline.labelling.summary import print_summary

            compared = strengths(items, judgements) if args.compare and len(args.compare) > 1 else []
            print_summary(figures, agreement_matrix(items, judgements), compared)
        if args.push_to_hub:
            from tieback.pipeline.labelling.publishing import push

            address = push(args.push_to_hub, output, items, judgements, figures, args.hub_private)
            print(f"{output} → {address}")
        return
    if args.uncertain_to:
        # Only here: it brings in the trainers, which take seconds to import.
        from tieback.pipeline.labelling.ordering import most_uncertain_first

        items = most_uncertain_first(items, args.uncertain_to)
    from tieback.pipeline.labelling.page import build_page, serve

    if guidelines is not None:
        keep_guidelines(guidelines, output)
    session = Session(
        items,
        log,
        output,
        args.overlap,
        args.seed,
        side_by_side=args.compare is not None,
        guidelines=guidelines,
        known=known,
        known_share=args.gold_share,
        adjudicate=args.adjudicate,
        leave_out_hasty=args.leave_out_hasty,
        leave_out_below=args.leave_out_below,
    )
    if args.adjudicate and session.is_finished():
        raise UsageError(
            f"{log.path} has no item that people have ordered differently and nobody has settled."
        )
    auth = ("annotator", args.password) if args.password else None
    until = session.is_finished if args.until_finished else None
    serve(build_page(session, "Tieback: judge responses"), args.host, args.port, auth, until)


def open_log(output: Path) -> JudgementLog:
    """The log beside an output file.

    Raises:
        UsageError: the output is there and the log is not: something else made it, which must not be overwritten.
    """
    log = JudgementLog(output.with_suffix(".judgements.jsonl"))
    if output.exists() and not log.path.exists():
        raise UsageError(
            f"{output} exists, but was not made here ({log.path.name} is missing): name another --output."
        )
    log.refresh()
    return log


if __name__ == "__main__":
    run(main)
