"""Merkle proofs by `eclectus prove`, checked by the script that needs the standard library alone."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import eclectus.tasks.rights.verify_proof as checker
from eclectus.flows.cli.main import main
from eclectus.storage.errors import EclectusError
from eclectus.tasks.rights.merkle import neighbours, root_and_paths
from eclectus.tasks.rights.proofs import prove, root_of_training, training_documents
from tests.support.history import write_history

SCRIPT = Path(checker.__file__)


def ids(count):
    return sorted(hashlib.sha256(str(number).encode()).hexdigest()[:32].encode() for number in range(count))


def proof_of(leaves, leaf):
    root, paths = root_and_paths(leaves, neighbours(leaves, leaf))
    return {
        "document": leaf.decode(), "member": leaves[paths[0].index] == leaf, "root": root.hex(), "leaves": len(leaves),
        "paths": [
            {"leaf": leaves[p.index].decode(), "index": p.index, "siblings": [s.hex() for s in p.siblings]}
            for p in paths
        ],
    }  # fmt: skip


def root_by_definition(leaves):
    """RFC 9162 2.1.1: a tree of n leaves is cut at the largest power of two below n."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    cut = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + root_by_definition(leaves[:cut]) + root_by_definition(leaves[cut:])).digest()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13, 64, 100])
def test_every_leaf_is_proved_and_nothing_else(count):
    leaves = ids(count)
    root = root_by_definition(leaves).hex()
    for leaf in leaves:
        proof = proof_of(leaves, leaf)
        assert proof["root"] == root and proof["member"] and checker.holds(proof, root)
        assert not checker.holds(proof, "00" * 32)
        assert not checker.holds({**proof, "member": False}, root)
    others = [b"0" * 32, b"f" * 32, *(leaf[:2] + b"0" * 30 for leaf in leaves)]
    for leaf in set(others) - set(leaves):
        proof = proof_of(leaves, leaf)
        assert not proof["member"] and checker.holds(proof, root)
        assert not checker.holds({**proof, "member": True}, root)


def test_a_proof_with_any_changed_part_does_not_hold():
    leaves, draw = ids(21), random.Random(0)
    for leaf in (leaves[9], b"8" * 32):
        good = proof_of(leaves, leaf)
        for _ in range(40):
            bad = json.loads(json.dumps(good))
            path = draw.choice(bad["paths"])
            what = draw.choice(["leaf", "index", "sibling", "fewer", "document"])
            if what == "leaf":
                path["leaf"] = draw.randbytes(16).hex()
            elif what == "index":
                path["index"] = (path["index"] + draw.randrange(1, 21)) % 21
            elif what == "sibling":
                path["siblings"][draw.randrange(len(path["siblings"]))] = draw.randbytes(32).hex()
            elif what == "fewer":
                path["siblings"].pop()
            else:
                bad["document"] = leaves[3].decode()
            assert not checker.holds(bad, good["root"]), what


def test_of_a_gap_that_is_no_gap_nothing_is_proved():
    leaves = ids(12)
    root, (first, third) = root_and_paths(leaves, [4, 6])
    proof = {
        "document": leaves[5].decode(), "member": False, "root": root.hex(), "leaves": 12,
        "paths": [
            {"leaf": leaves[p.index].decode(), "index": p.index, "siblings": [s.hex() for s in p.siblings]}
            for p in (first, third)
        ],
    }  # fmt: skip
    assert not checker.holds(proof, root.hex())


def test_leaves_must_be_sorted_and_there_must_be_one():
    with pytest.raises(ValueError, match="not sorted, or one stands twice"):
        root_and_paths([b"b", b"a"])
    with pytest.raises(ValueError, match="needs a leaf"):
        root_and_paths([])


def test_the_command_proves_a_text_and_the_script_checks_it(home, tmp_path, capsys):
    text = "the ship left the harbour"
    document = hashlib.sha256(text.encode()).hexdigest()[:32]
    write_history(home, document=document)
    checkpoint = next(each for each in home.store.all() if each.kind == "checkpoint")
    assert training_documents(home, checkpoint.digest) == [document]
    (tmp_path / "mine.txt").write_text(text)
    (tmp_path / "saved.txt").write_text(f"{text}\r\n")
    (tmp_path / "other.txt").write_text("another text")
    for name, word in (("mine.txt", "is among"), ("saved.txt", "is among"), ("other.txt", "is not among")):
        words = ["prove", str(tmp_path / name), checkpoint.name, "-o", str(tmp_path / "proof.json")]
        main(["--home", str(home.root), *words])
        said, warned = capsys.readouterr()
        assert ("no document is exactly the text of" in warned) == (name == "other.txt")
        assert word in said and f"root {root_of_training([document])}" in said
        root = root_of_training([document])
        for file, given, code in ((name, root, 0), (name, "00" * 32, 1), ("proof.json", root, 1)):
            words = [sys.executable, str(SCRIPT), str(tmp_path / "proof.json"), given, str(tmp_path / file)]
            assert subprocess.run(words, capture_output=True, check=False).returncode == code
    proof = prove(home, checkpoint, document)
    assert proof["member"] and proof["leaves"] == 1


def test_what_cannot_be_proved_is_one_sentence(home, tmp_path):
    write_history(home)
    by_kind = {each.kind: each for each in home.store.all()}
    with pytest.raises(EclectusError, match=r"nowhere.txt cannot be read \(No such file or directory\); give a file"):
        prove(home, by_kind["checkpoint"], "nowhere.txt")
    with pytest.raises(EclectusError, match="is no checkpoint; it is of kind instances"):
        prove(home, by_kind["instances"], "ab" * 16)
    with home.store.draft("checkpoint") as draft:
        draft.file("config.json").write_text("{}")
        fetched = home.store.commit(draft)
    with pytest.raises(EclectusError, match="nothing is known of the documents that checkpoint-"):
        prove(home, fetched, "ab" * 16)
