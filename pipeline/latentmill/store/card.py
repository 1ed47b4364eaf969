"""The dataset card, README.md: `datasets.load_dataset(STORE)` reads the shards that it names."""

from __future__ import annotations

import json

from latentmill.storage.storage import Storage
from latentmill.store.schema import CARD_PATH, DatasetInfo

MARKER = "<!-- written by latentmill: replaced when the store is sealed -->"


def write_card(storage: Storage, info: DatasetInfo) -> None:
    """Write the card of a seal, unless there is a README.md of the user's own."""
    there = storage.read_if_exists(CARD_PATH)
    if there is None or MARKER.encode() in there:
        storage.write(CARD_PATH, card(info).encode())


def card(info: DatasetInfo) -> str:
    """The text: a YAML header that lists the shards by name, and what they hold.

    A pattern such as shards/* would find records of superseded shards, too. Strings are written as
    JSON, which is YAML.
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
        "read the shards that are listed above; other files in `shards/` do not count.",
        "",
    ]
    return "\n".join(lines)
