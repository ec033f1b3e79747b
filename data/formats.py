"""Turn rows of any of TRL's formats, plain or conversational, into the one that a stage needs, and check them.

The formats (TRL, "Dataset formats and types"): prompt; prompt + completion; messages (or `conversations`); text;
preference (`chosen`, `rejected`) with a `prompt` or with the prompt inside both sides, as conversations, text, or
Anthropic-style transcripts. Further: ranked responses (`data.rankings`), and `question` with `answer`, as in GSM8K.
"""

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from tieback.data.conversations import (
    Message,
    as_messages,
    check_completion,
    check_messages,
    check_prompt,
    check_text,
    is_blank,
    is_transcript,
    parse_transcript,
    shared_prompt,
)
from tieback.data.errors import DataError, fault
from tieback.data.files import Record
from tieback.data.rankings import check_ranking, ranking_to_pairs

Kind = Literal["demonstrations", "preferences", "prompts"]
Row = dict[str, Any]

# What a row is, by the first of these columns that it has.
_SHAPES = (
    ("responses", "ranking"),
    ("chosen", "preference"),
    ("rejected", "preference"),
    ("completion", "completion"),
    ("messages", "messages"),
    ("prompt", "prompt"),
    ("text", "text"),
    ("question", "question"),
)
_WANTED = {
    "demonstrations": "`prompt` and `completion`, or `messages`, or `text`, or `question` and `answer`, or a preference's `chosen`",
    "preferences": "`chosen` and `rejected` (and `prompt`), or `prompt`, `responses` and `ranks`",
    "prompts": "`prompt`, or `messages`, or `question`, or a preference's `chosen` and `rejected`",
}
_SERVES = {
    "demonstrations": ("completion", "messages", "text", "preference", "ranking", "question"),
    "preferences": ("preference", "ranking"),
    "prompts": ("prompt", "completion", "messages", "preference", "ranking", "question"),
}
_NOT_OF_THE_PROMPT = (
    "completion",
    "messages",
    "chosen",
    "rejected",
    "responses",
    "ranks",
    "truncated",
    "annotator",
)

# GSM8K's solutions end in `#### <number>`, and a prompt must say so; in the words of verl's preprocessing.
_FINAL_ANSWER = "####"
_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
# Its notes for a calculator, such as <<48/2=24>>.
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class _DroppedError(Exception):
    """A row that is left out and counted under the reason, its only argument."""


def convert(records: Iterable[Record], kind: Kind, source: str) -> tuple[list[Row], Counter[str]]:
    """Check every row and turn it into the format of `kind`.

    Args:
        records: the source's rows, at least one; the first decides which format they are taken for.
        kind: "demonstrations" (`prompt` + `completion`, or `messages`, or `text`), "preferences" (`prompt`,
            `chosen`, `rejected`, `prompt_id`, and `annotator` where there is one) or "prompts" (`prompt` and the other
            columns; of demonstrations and preferences each prompt once).
        source: name of the file or data set, for messages.

    Returns:
        The rows, and how many were dropped for which reason: "identical" (both sides are one text), "no_shared_prompt",
        "empty_turn" (of the prompt), "empty_chosen" (an empty `rejected` is a lesson and stays), "no_response" (a
        transcript that ends with the person's turn), "several_turns" (no single answer to demonstrate), "unranked",
        "tied", "repeated_prompt".

    Raises:
        DataError: a row cannot be of that kind or is malformed, or none is left.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    shape = ""
    first: tuple[str, bool] | None = None
    seen: set[str] = set()
    for where, original in records:
        row = _to_chatml(original)
        shape = shape or _shape(row, kind, where)
        try:
            made = _MAKERS[kind](row, shape, where)
        except _DroppedError as reason:
            dropped[str(reason)] += 1
            continue
        for new in made:
            plain = isinstance(next(iter(new.values())), str)
            first = first or (where, plain)
            if plain != first[1]:
                raise fault(
                    where,
                    f"this row is {_format(plain)} and the one at {first[0]} {_format(first[1])}; all must be of one format.",
                )
            if kind == "prompts" and shape != "prompt":
                key = json.dumps(new["prompt"])
                if key in seen:
                    dropped["repeated_prompt"] += 1
                    continue
                seen.add(key)
            rows.append(new)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(f"{source}: no row is left (dropped: {reasons}).")
    return rows, dropped


def _to_chatml(row: Row) -> Row:
    """Copy a row without its null columns, with `role` / `content` for `from` / `value` and `messages` for `conversations`."""
    # Here, since it loads Transformers' models: two seconds of every --help.
    from trl import maybe_convert_to_chatml

    # It renames a message's keys in place, so messages are copied; what they hold stays, and a deep copy would take twice as long.
    return maybe_convert_to_chatml(
        {
            column: [copy.copy(entry) for entry in value] if isinstance(value, list) else value
            for column, value in row.items()
            if value is not None
        }
    )


def _format(plain: bool) -> str:
    return "plain text" if plain else "conversational"


def _shape(row: Row, kind: Kind, where: str) -> str:
    shape = next((shape for column, shape in _SHAPES if column in row), None)
    if shape not in _SERVES[kind]:
        raise fault(
            where, f"{kind} need {_WANTED[kind]}; the columns are {', '.join(map(str, row)) or 'none'}."
        )
    return shape


def _column(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise fault(
            where,
            f"the column `{column}` is missing or null; there are {', '.join(map(str, row)) or 'none'}.",
        )
    return row[column]


def _preference(row: Row, where: str) -> Row:
    """A preference row with an explicit prompt."""
    chosen, rejected = _column(row, "chosen", where), _column(row, "rejected", where)
    if chosen == rejected:
        raise _DroppedError("identical")
    transcripts = is_transcript(chosen) and is_transcript(rejected)
    if transcripts:
        chosen, rejected = parse_transcript(chosen), parse_transcript(rejected)
        if any(side[-1]["role"] != "assistant" for side in (chosen, rejected)):
            raise _DroppedError("no_response")
    if transcripts or "prompt" not in row:
        prompt, chosen, rejected = _split_shared(chosen, rejected, where)
    else:
        prompt = _prompt(row, where)
        prompt, chosen, rejected = _fit_to_prompt(prompt, chosen, rejected)

    if transcripts and any(not message["content"] for message in prompt):
        raise _DroppedError("empty_turn")
    prompt = check_prompt(prompt, where)
    conversational = isinstance(prompt, list)
    chosen = check_completion(chosen, where, "chosen", conversational=conversational, may_be_blank=True)
    rejected = check_completion(rejected, where, "rejected", conversational=conversational, may_be_blank=True)
    if is_blank(chosen):
        raise _DroppedError("empty_chosen")
    if chosen == rejected:
        raise _DroppedError("identical")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _split_shared(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of two sides that both begin with the prompt."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        check_messages(chosen, where, "chosen", may_be_blank=True)
        check_messages(rejected, where, "rejected", may_be_blank=True)
        prompt: Any = shared_prompt(chosen, rejected)
        parts = (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    else:
        check_text(chosen, where, "chosen")
        check_text(rejected, where, "rejected")
        if chosen[0] != rejected[0]:
            raise _DroppedError("no_shared_prompt")
        from trl import extract_prompt  # here, as in `_to_chatml`

        split = extract_prompt({"chosen": chosen, "rejected": rejected})
        parts = (split["prompt"], split["chosen"], split["rejected"])
    if not parts[0]:
        raise _DroppedError("no_shared_prompt")
    return parts


def _fit_to_prompt(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Make a plain prompt of conversational sides a message, and cut the prompt off sides that repeat it."""
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt = as_messages(prompt)
        if all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _prompt(row: Row, where: str) -> Any:
    """The row's prompt, a transcript among them made a conversation."""
    prompt = _column(row, "prompt", where)
    if is_transcript(prompt):
        prompt = parse_transcript(prompt)
        if prompt[-1] == {"role": "assistant", "content": ""}:
            prompt.pop()
    return check_prompt(prompt, where)


def _question(row: Row, where: str) -> list[Message]:
    """The question as the user's message; where its answer ends in `####`, with the instruction to do so."""
    question = check_text(_column(row, "question", where), where, "question")
    if _FINAL_ANSWER in str(row.get("answer", "")):
        question = f"{question} {_INSTRUCTION}"
    return [{"role": "user", "content": question}]


def _ranked(row: Row, where: str) -> Row:
    check_ranking(row, where)
    if "ranks" not in row:
        raise _DroppedError("unranked")
    return row


def _pairs(row: Row, shape: str, where: str) -> list[Row]:
    """Preference rows, with a `prompt_id` that the pairs of one prompt share."""
    if shape == "ranking":
        pairs = ranking_to_pairs(_ranked(row, where))
        if not pairs:
            raise _DroppedError("tied")
        made = [pair for pair in pairs if pair["chosen"] != pair["rejected"] and not is_blank(pair["chosen"])]
        if not made:
            raise _DroppedError("identical")
    else:
        made = [_preference(row, where)]
    annotator = row.get("annotator")
    for pair in made:
        pair["prompt_id"] = str(row["prompt_id"]) if "prompt_id" in row else _digest(pair["prompt"])
        if annotator is not None:
            pair["annotator"] = str(annotator)
    return made


def _digest(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]


def _demonstrations(row: Row, shape: str, where: str) -> list[Row]:
    if shape == "text":
        return [{"text": check_text(_column(row, "text", where), where, "text")}]
    if shape == "messages":
        messages = check_messages(_column(row, "messages", where), where, "messages")
        if messages[-1]["role"] != "assistant":
            raise fault(
                where,
                f"the last message must be the assistant's, not the {messages[-1]['role']}'s.",
                "messages",
            )
        return [{"messages": messages}]
    if shape == "completion":
        prompt = _prompt(row, where)
        completion = _column(row, "completion", where)
        prompt = as_messages(prompt) if isinstance(completion, list) else prompt
        completion = check_completion(
            completion, where, "completion", conversational=isinstance(prompt, list)
        )
        return [{"prompt": prompt, "completion": completion}]
    if shape == "question":
        answer = check_text(_column(row, "answer", where), where, "answer")
        solution = {"role": "assistant", "content": _CALCULATOR.sub("", answer)}
        return [{"prompt": _question(row, where), "completion": [solution]}]
    if shape == "ranking":
        ranks = _ranked(row, where)["ranks"]
        best = row["responses"][ranks.index(min(ranks))]
        prompt, completion = row["prompt"], best
        if isinstance(prompt, list):
            completion = [{"role": "assistant", "content": best}]
    else:
        pair = _preference(row, where)
        prompt, completion = pair["prompt"], pair["chosen"]
    if is_blank(completion):
        raise _DroppedError("empty_chosen")
    if isinstance(completion, list) and len(completion) > 1:
        raise _DroppedError("several_turns")
    return [{"prompt": prompt, "completion": completion}]


def _prompts(row: Row, shape: str, where: str) -> list[Row]:
    if shape == "preference":
        prompt = _preference(row, where)["prompt"]
    elif shape == "messages":
        messages = check_messages(_column(row, "messages", where), where, "messages")
        while messages and messages[-1]["role"] not in ("user", "tool"):
            messages.pop()
        if not messages:
            raise fault(where, "it holds no message of the user's.", "messages")
        prompt = messages
    elif shape == "ranking":
        prompt = check_ranking(row, where)["prompt"]
    elif shape == "question":
        prompt = _question(row, where)
    else:
        prompt = _prompt(row, where)
    return [
        {
            "prompt": prompt,
            **{name: row[name] for name in row if name != "prompt" and name not in _NOT_OF_THE_PROMPT},
        }
    ]


_MAKERS = {"demonstrations": _demonstrations, "preferences": _pairs, "prompts": _prompts}
