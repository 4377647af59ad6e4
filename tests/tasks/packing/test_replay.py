import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.tasks.documents.table import DocumentsWriter, read_table
from eclectus.tasks.packing.replay import ReplaySettings, replay


def test_nothing_that_the_grouping_dropped_is_drawn(home):
    rows = [
        (f"{number:032x}", "en" if number < 10 else "el", "original" if number < 10 else "expanded")
        for number in range(20)
    ]
    columns = dict(zip(("document", "language", "group"), map(list, zip(*rows, strict=True)), strict=True))
    with home.store.draft("documents") as draft:
        with DocumentsWriter(draft) as writer:
            writer.write(pa.table({**columns, "text": ["text"] * 20, "split": ["train"] * 20}))
        documents = home.store.commit(draft)
    with home.store.draft("grouping") as draft:
        pq.write_table(pa.table({"row": pa.array([1, 3, 12, 14, 16])}), draft.file("order.parquet"))
        grouping = home.store.commit(draft)
    with home.store.draft("documents") as draft:
        replay.function(documents, ReplaySettings(), draft, grouping)
        drawn = read_table(home.store.commit(draft), ["document"])["document"].to_pylist()
    assert drawn and set(drawn) <= {columns["document"][row] for row in (1, 3, 12, 14, 16)}
