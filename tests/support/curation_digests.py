"""Curates a folder and prints the digests of what comes out, as JSON: `python -m tests.support.curation_digests`.

Arguments: sources, and settings as JSON. The home is $ECLECTUS_HOME; with RAY_ADDRESS parts go to a cluster.
"""

import json
import sys

from eclectus.flows.curate import curate
from eclectus.flows.flow import call_in_run
from eclectus.flows.parameters import CurateParameters
from eclectus.storage.home import Home
from eclectus.storage.journal import Journal
from eclectus.storage.step_keys import KnownKeys
from eclectus.tasks.ray_cluster import shut_ray
from eclectus.tasks.run import Run, activate


def digests(home, **settings):
    """By name: documents, grouping, tokenizer, instances."""
    with Journal(home.journal, "digests") as journal:
        journal.event("run_started", flow="curate", parameters={}, packages={})
        with activate(Run("digests", home, journal, KnownKeys(home.keys, home.store), [], "curate")):
            made = call_in_run(curate, CurateParameters(**settings))
        journal.event("run_ended", state="completed")
    shut_ray()
    names = ("ingested", "documents", "grouping", "tokenizer", "original", "expanded", "review")
    return {name: getattr(made, name).digest for name in names if getattr(made, name)}


if __name__ == "__main__":
    print(json.dumps(digests(Home.open(), sources=[sys.argv[1]], **json.loads(sys.argv[2]))))
