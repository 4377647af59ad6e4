"""Records made at random, as bytes of JSON, with the text that a reader must find in them."""

from __future__ import annotations

import json

COLUMNS = ["text", "id", "language", "domain", "source", "work"]
LETTERS = "aé中🙂 \"\\\n\t{}[],:'0-"


def made_up(draw, depth=0):
    """Any JSON value."""
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind > 6:
        return {made_text(draw): made_up(draw, depth + 1) for _ in range(draw.randrange(4))}
    if kind == 6:
        return [made_up(draw, depth + 1) for _ in range(draw.randrange(4))]
    simple = (None, True, draw.randrange(-(10**25), 10**25), draw.random() * 1e300, float("nan"), made_text(draw))
    return simple[kind]


def made_text(draw):
    return "".join(draw.choice(LETTERS) for _ in range(draw.randrange(12)))


def record(draw, number):
    """(bytes of one record, its text or None if it has none that can be kept)."""
    fields = {draw.choice([*COLUMNS[1:], "other"]): made_up(draw) for _ in range(draw.randrange(5))}
    text = f"{number} {made_text(draw)}"
    kind = draw.randrange(14)
    if kind == 0:
        return json.dumps(
            {**fields, "text": draw.choice([None, 3, [], {"a": "b"}, True, 1.5, "", " \n"])}
        ).encode(), None
    if kind == 1:
        return json.dumps({**fields, "body": text}).encode(), None
    if kind == 2:
        return json.dumps({**fields, "text": text + "\ud83d"}).encode(), None
    if kind == 3:
        content = json.dumps({**fields, "text": "@" + text}, ensure_ascii=False).encode()
        return content.replace(b'"text": "@', b'"text": "\xff'), None
    if kind == 4:
        return json.dumps(draw.choice([[1, {"text": "x"}], 17, None, "text", True])).encode(), None
    # Fields in any order, escapes or not, with or without blanks.
    items = list({**fields, "text": text}.items())
    draw.shuffle(items)
    separators = draw.choice([(",", ":"), (", ", ": "), (" , ", " :\t")])
    return json.dumps(dict(items), ensure_ascii=draw.random() < 0.5, separators=separators).encode(), text


def cut(draw, content):
    """A record that is damaged so that its end is lost."""
    return content[: draw.randrange(2, len(content) - 1)] if content.startswith(b"{") else content
