"""The dataset card, README.md; `datasets.load_dataset(STORE)` reads the shards that it lists."""

from __future__ import annotations

import json

from latentmill.storage.storage import Storage
from latentmill.store.schema import CARD_PATH, DatasetInfo

MARKER = "<!-- written by latentmill: replaced when the store is sealed -->"


def write_card(storage: Storage, info: DatasetInfo) -> None:
    """Write the card of a sealed store, unless the user has replaced README.md."""
    existing = storage.read_if_exists(CARD_PATH)
    if existing is None or MARKER.encode() in existing:
        storage.write(CARD_PATH, card(info).encode())


def card(info: DatasetInfo) -> str:
    """The card's text: a YAML header that lists the shards, and a summary of their contents.

    A pattern such as shards/* would also match superseded shards. Strings are written as JSON,
    which is valid YAML.
    """
    lines = ["---", "tags: [audio, latents, latentmill]"]
    if info.shards:
        lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train"]
        lines += ["    path:", *(f"    - {json.dumps(shard.path)}" for shard in info.shards)]
    model = json.dumps(str(info.model.get("name", ""))).replace("`", "'")
    lines += [
        "---",
        MARKER,
        "",
        f"Audio latents of model `{model}`: {info.encoded} records, {info.hours:.2f} hours.",
        "",
        "Read them with `latentmill.open(...)` or `latentmill.LatentDataset(...)`. Other tools",
        "read the shards that are listed above; ignore other files in `shards/`.",
        "",
    ]
    return "\n".join(lines)
