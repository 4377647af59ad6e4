"""`certify`: servers answer with an export as the training model answers, or the command fails."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eclectus.storage.artifact import Artifact
    from eclectus.storage.home import Home
    from eclectus.tasks.certify.certify import Certification
    from eclectus.tasks.certify.record import CertifyParameters

NOT_CERTIFIED = 1


def add_certify_command(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the command. add: the function in `eclectus.flows.cli.main`."""
    certify = add(
        "certify",
        _certify,
        "check that servers answer with an export as the training model does (transformers, vLLM, llama.cpp)",
        checkpoint="export's folder, or checkpoint, as in `artifacts`",
    )
    certify.add_argument(
        "--servers",
        help="servers to ask, with commas: transformers-4.57, transformers-5, vllm, llama.cpp (default: all that can "
        "be installed); one that is named must answer",
    )
    certify.add_argument(
        "--tolerance",
        type=float,
        help="largest allowed difference of a log-probability in float32 (default: 0.001); in 16 bits the mean "
        "difference may be 0.1",
    )
    certify.add_argument(
        "--against", help="checkpoint to compare with (default: what it was exported from, if it is in this home)"
    )


def _certify(chosen: argparse.Namespace) -> None:
    from eclectus.storage.errors import EclectusError
    from eclectus.storage.home import Home
    from eclectus.tasks.certify.certify import Asked, certify_checkpoint
    from eclectus.tasks.certify.compare import TOLERANCE
    from eclectus.tasks.certify.record import CertifyParameters, write_into_card
    from eclectus.tasks.certify.servers import chosen_servers

    tolerance = TOLERANCE if chosen.tolerance is None else chosen.tolerance
    if not tolerance > 0:
        raise EclectusError(f"--tolerance is {chosen.tolerance:g}; expected a number above 0")
    home = Home.found()
    asked = Asked(chosen_servers(chosen.servers), bool(chosen.servers), tolerance, against=chosen.against)
    found, folder, artifact = certify_checkpoint(
        home, chosen.checkpoint, asked, report=lambda text: print(f"  {text}", flush=True)
    )
    if home.journal.is_dir():
        parameters = CertifyParameters(
            checkpoint=chosen.checkpoint,
            servers=[server.name for server in asked.servers],
            tolerance=tolerance,
            against=chosen.against,
        )
        _record(home, parameters, found, folder, artifact)
    else:
        found.notes.append("there is no home, so the lineage does not have this certification")
    if artifact is None and (card := write_into_card(folder, found)):
        print(f"  table in {card}")
    _show(found)
    if not found.certified:
        raise SystemExit(NOT_CERTIFIED)


def _record(
    home: Home, parameters: CertifyParameters, found: Certification, folder: Path, artifact: Artifact | None
) -> None:
    from eclectus.flows.run import open_run
    from eclectus.models.checkpoints.seal import files_digest
    from eclectus.storage.journal import now
    from eclectus.tasks.certify.certify import as_statistics
    from eclectus.tasks.certify.record import CertificationSettings, certify

    settings = CertificationSettings(
        certified_name=artifact.name if artifact else folder.resolve().name,
        certified_weights=artifact.digest if artifact else files_digest(folder),
        certified_at=now(),
        certified_result=as_statistics(found),
    )
    with open_run("certify", parameters, home):
        stored = certify(checkpoint=artifact, settings=settings)
    print(f"  {stored.name} in the lineage")


def _show(found: Certification) -> None:
    for each in found.comparisons:
        texts = f"{each.equal_texts} of {each.texts} texts equal"
        verdict = "certified" if each.certified else f"NOT CERTIFIED: {'; '.join(each.faults)}"
        print(
            f"{each.server} {each.version} in {each.dtype}: {verdict} (log-probabilities differ by at most "
            f"{each.max_difference:.2g}, {each.mean_difference:.2g} in the mean of {each.compared:,}; {texts}; "
            f"{each.seconds:.0f} s)"
        )
    for server, reason in found.unavailable.items():
        print(f"{server}: not certified: {reason}")
    for line in found.damage:
        print(f"NOT CERTIFIED: {line}")
    for note in found.notes:
        print(f"note: {note}")
    verdict = "certified" if found.certified else "NOT CERTIFIED"
    against = f", compared with {found.reference}" if found.reference else ""
    print(f"{found.name}: {verdict}{against}")
