"""Checks a proof of `eclectus prove`: python verify_proof.py PROOF.json ROOT [FILE]. The standard library is enough."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def root_of(leaf: str, index: int, last: int, siblings: list[str]) -> str:
    """The root of the tree that has this leaf, as in RFC 9162 2.1.3.2; empty for a path that leads nowhere."""
    value = hashlib.sha256(b"\0" + leaf.encode()).digest()
    for each in siblings:
        if not last:
            return ""
        ours_is_right = index % 2 or index == last
        pair = bytes.fromhex(each) + value if ours_is_right else value + bytes.fromhex(each)
        value = hashlib.sha256(b"\1" + pair).digest()
        while ours_is_right and index and not index % 2:
            index, last = index // 2, last // 2
        index, last = index // 2, last // 2
    return "" if last else value.hex()


def holds(proof: dict[str, Any], root: str) -> bool:
    """Whether the proof is one for this root: of its document, or of the leaves between which that would stand."""
    paths, size, ours = proof["paths"], proof["leaves"], proof["document"]
    found = [root_of(each["leaf"], each["index"], size - 1, each["siblings"]) for each in paths]
    if not found or proof["root"] != root or any(each != root for each in found):
        return False
    if proof["member"]:
        return [each["leaf"] for each in paths] == [ours]
    # Neighbours in the tree, one on either side; at an end of the tree only one.
    before = [each["index"] for each in paths if each["leaf"] < ours] or [-1]
    after = [each["index"] for each in paths if each["leaf"] > ours] or [size]
    return len(before) == len(after) == 1 and before[0] + 1 == after[0]


if __name__ == "__main__":
    given, wanted = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    file = Path(sys.argv[3]).read_bytes() if len(sys.argv) > 3 else None
    # With or without the line break at the end, which editors add.
    texts = [] if file is None else [hashlib.sha256(each).hexdigest()[:32] for each in (file, file.rstrip(b"\r\n"))]
    ok = holds(given, wanted) and (file is None or given["document"] in texts)
    what = "is in" if given["member"] else "is not in"
    print(f"{given['document']} {what} {wanted}" if ok else "the proof does not hold")
    sys.exit(not ok)
