"""A store whose sources are at another address, as somebody else's store may name any."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.store.store import LatentStore


@contextmanager
def sources_elsewhere(folder: Path, source: Path) -> Iterator[tuple[LatentStore, list[str]]]:
    """Serve a store's sources by HTTP; yields the store with their addresses, and the requests."""
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            requests.append(self.path)

    handler = partial(Handler, directory=str(source))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            for shard in (folder / "shards").iterdir():
                _rename(shard, str(source), f"http://127.0.0.1:{server.server_port}")
            (folder / "dataset.json").unlink()
            yield LatentStore(str(folder)), requests
        finally:
            server.shutdown()
            thread.join()


def _rename(shard: Path, old: str, new: str) -> None:
    """Write other addresses of the sources into a shard."""
    table = pq.read_table(shard)
    at = table.column_names.index("source_uri")
    uris = pc.replace_substring(table["source_uri"], old, new)
    table = table.set_column(at, pa.field("source_uri", pa.string(), nullable=False), uris)
    pq.write_table(table, shard, compression="none", use_dictionary=False)
