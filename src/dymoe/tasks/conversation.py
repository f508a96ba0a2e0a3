"""What a record asks and answers, in LLaVA's form and in the chat form of other tools, and its image tokens.

A turn is ``{from: human|gpt, value}`` or ``{role: user|assistant, content}``; a content is a text or a list of parts
``{type: text|image, ...}``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief

IMAGE_TOKEN = "<image>"
ASKING, ANSWERING = ("human", "user"), ("gpt", "assistant")
FORMS = {
    "conversations": "a list of {from, value} with human and gpt in turn",
    "messages": "a list of {role, content} with user and assistant in turn",
}
# What other tools write where a picture stands: always meant so, and so meant in a record that has a picture.
_FOREIGN = re.compile(r"<\|\s*(?:image|vision|img)\w*\s*\|>|<img>.*?</img>", re.IGNORECASE | re.DOTALL)
_PERHAPS = re.compile(
    r"(?!(?-i:<image>))<\s*/?\s*(?:image|img|im)(?:[_\s-]?(?:\d+|start|end|patch|here))?\s*>", re.IGNORECASE
)

Turn = tuple[str, Any]  # a question with its image tokens, and an answer as it stands


def read_turns(key: str, value: Any) -> tuple[list[Turn], list[Any]]:
    """The (question, answer) pairs of a conversation, and the pictures that stand in its parts.

    Args:
        key: "conversations" or "messages", for messages of errors; both forms of a turn are read under either.
        value: what stands there.

    Raises:
        DymoeError: what is wrong with it and what would be right.
    """
    right = FORMS[key]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise DymoeError(f"{key!r}: expected {right}, found {type(value).__name__}")
    if value and _speaker(value[0]) == "system":
        value = value[1:]  # the prompt has its own system message, as in LLaVA
    if len(value) < 2 or len(value) % 2:
        raise DymoeError(f"{key!r}: expected {right}, found {len(value)} turns; every question needs its answer")
    pairs: list[Turn] = []
    pictures: list[Any] = []
    for number in range(0, len(value), 2):
        for turn, speakers in ((value[number], ASKING), (value[number + 1], ANSWERING)):
            if _speaker(turn) not in speakers:
                raise DymoeError(f"{key!r}: expected {right}, found {brief(_speaker(turn))} where {speakers[0]} speaks")
        question, answer = (_content(key, value[index], pictures) for index in (number, number + 1))
        if not isinstance(question, str):
            raise DymoeError(f"{key!r}: question {number // 2 + 1}: expected a text, found {type(question).__name__}")
        pairs.append((question, answer))
    return pairs, pictures


def _speaker(turn: Mapping[str, Any]) -> Any:
    speaker = turn.get("from") if turn.get("from") is not None else turn.get("role")
    return speaker.lower() if isinstance(speaker, str) else speaker


def _content(key: str, turn: Mapping[str, Any], pictures: list[Any]) -> Any:
    """What a turn says, of parts with an image token for each picture, whose source goes into `pictures`."""
    content = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if not isinstance(content, list) or not any(isinstance(part, Mapping) for part in content):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_TOKEN)
            named = [part[name] for name in ("image", "image_url", "url", "path") if part.get(name) is not None]
            pictures += [
                each.get("url") if kind == "image_url" and isinstance(each, Mapping) else each for each in named
            ]
        else:
            raise DymoeError(f"{key!r}: expected parts {{type: text|image, ...}}, found {brief(part)}")
    return "\n".join(texts)


def without_tokens(questions: Sequence[str], pictures: int) -> list[str]:
    """The questions without their image tokens.

    The token may be left out; where it stands, it must stand once for the picture, in the first question.

    Args:
        questions: of one record, in turn.
        pictures: how many the record has, 0 or 1.

    Raises:
        DymoeError: tokens and pictures do not agree, a token stands where it cannot, or is another tool's.
    """
    for number, question in enumerate(questions, start=1):
        foreign = _FOREIGN.search(question) or (_PERHAPS.search(question) if pictures else None)
        if foreign:
            raise DymoeError(
                f"question {number} holds {brief(foreign[0])}; the picture belongs under 'image' or 'images', and is "
                f"{IMAGE_TOKEN} in the text or left out there"
            )
    tokens = [question.count(IMAGE_TOKEN) for question in questions]
    if sum(tokens) and not pictures:
        raise DymoeError(f"'image' is missing: {IMAGE_TOKEN} stands in the text, and the record has no picture")
    if sum(tokens) > pictures:
        raise DymoeError(f"{IMAGE_TOKEN} stands {sum(tokens)} times in the text, and the record has one picture")
    if sum(tokens[1:]):
        raise DymoeError(f"{IMAGE_TOKEN} stands in a later question; the picture belongs into the first")
    return [question.replace(IMAGE_TOKEN, "").strip() for question in questions]
