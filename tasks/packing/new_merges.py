"""Merges learned on top of those of a byte-level BPE: which they are, and which must not be (docs/methods.md 2.8).

    words       of the new languages, as the base's own tokenizer cuts and encodes them, with their counts
    repeat      merge the most frequent pair of neighbouring tokens that is allowed; the result is a new token

An old text changes only if a new merge applies in it; the first that did would join two *old* tokens, since there is no
new one in it yet. So it is enough that no pair of old tokens which is merged stands in a text of the old languages;
what is built on allowed pairs is safe without a further look.

Price: each merge touches only the words that hold its pair; about a second per megabyte of text.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

LONGEST_WORD = 512
"""Tokens of a word; a longer one is no word, and its merges would cost its length squared."""
FEWEST = 2
"""A pair that is rarer than this in the sample makes no token."""

Merge = tuple[str, str]
Refused = str | None


@dataclass
class Learned:
    """merges: in the order of their ranks. left_out: by reason, pairs that were frequent enough and not allowed."""

    merges: list[Merge] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def learn_merges(
    words: Mapping[str, int],
    encode: Callable[[str], Sequence[str]],
    count: int,
    refused: Callable[[str, str], Refused],
    taken: frozenset[str] | set[str],
) -> Learned:
    """At most `count` merges on top of an encoding.

    words: with their counts. encode: the tokens of a word. refused: the reason why two old tokens must not be merged,
    None if they may. taken: strings that no new token may be.
    """
    pieces = _Pieces(words, encode)
    learned, made = Learned(), set(taken)
    old = len(pieces.strings)

    def reason(left: int, right: int) -> Refused:
        if pieces.strings[left] + pieces.strings[right] in made:
            return "collides with a token"
        if left < old and right < old:
            return refused(pieces.strings[left], pieces.strings[right])
        return None

    # Ties are broken by the tokens' strings, so that the result does not depend on the order of words.
    heap = [pieces.entry(pair) for pair in pieces.counts]
    heapq.heapify(heap)
    while heap and len(learned.merges) < count:
        negative, *_, pair = heapq.heappop(heap)
        now = pieces.counts.get(pair, 0)
        if now < FEWEST:
            continue
        if now != -negative:
            heapq.heappush(heap, pieces.entry(pair))
            continue
        why = reason(*pair)
        if why is not None:
            learned.left_out[why] += 1
            continue
        learned.merges.append((pieces.strings[pair[0]], pieces.strings[pair[1]]))
        made.add(pieces.strings[pair[0]] + pieces.strings[pair[1]])
        for each in pieces.merge(pair):
            heapq.heappush(heap, pieces.entry(each))
    return learned


class _Pieces:
    """Words as numbers of tokens; counts of neighbouring pairs, and the words that hold each."""

    def __init__(self, words: Mapping[str, int], encode: Callable[[str], Sequence[str]]) -> None:
        self.strings: list[str] = []
        self.counts: Counter[tuple[int, int]] = Counter()
        self._words: list[list[int]] = []
        self._weights: list[int] = []
        self._holders: dict[tuple[int, int], set[int]] = defaultdict(set)
        number: dict[str, int] = {}
        for word, weight in sorted(words.items()):
            tokens = encode(word)
            # Where a byte has no token, neighbours in the encoding are none in the text.
            if not 2 <= len(tokens) <= LONGEST_WORD or "".join(tokens) != word:
                continue
            for token in tokens:
                if token not in number:
                    number[token] = len(self.strings)
                    self.strings.append(token)
            self._words.append([number[token] for token in tokens])
            self._weights.append(weight)
        for index in range(len(self._words)):
            self._add(index)

    def entry(self, pair: tuple[int, int]) -> tuple[int, str, str, tuple[int, int]]:
        return -self.counts[pair], self.strings[pair[0]], self.strings[pair[1]], pair

    def merge(self, pair: tuple[int, int]) -> set[tuple[int, int]]:
        """Replaces the pair by a new token in all words; returns the pairs that this made."""
        new, made = len(self.strings), set[tuple[int, int]]()
        self.strings.append(self.strings[pair[0]] + self.strings[pair[1]])
        for index in sorted(self._holders.pop(pair)):
            word = self._words[index]
            for each in itertools.pairwise(word):
                self.counts[each] -= self._weights[index]
            self._words[index] = _merged(word, pair, new)
            made.update(each for each in self._add(index) if new in each)
        del self.counts[pair]
        return made

    def _add(self, index: int) -> list[tuple[int, int]]:
        word = self._words[index]
        found = list(itertools.pairwise(word))
        for each in found:
            self.counts[each] += self._weights[index]
            self._holders[each].add(index)
        return found


def _merged(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    result, place = [], 0
    while place < len(word):
        if place + 1 < len(word) and (word[place], word[place + 1]) == pair:
            result.append(new)
            place += 2
        else:
            result.append(word[place])
            place += 1
    return result
