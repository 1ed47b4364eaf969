"""The files of stable-audio-tools and Stable Audio 3.

Both read them with `PreEncodedDataset` (stable_audio_tools/data/dataset.py,
stable_audio_3/data/dataset.py): KEY.npy `[C, T]` and KEY.json; `silence.npy` `[1, C, T]`, with
which Stable Audio 3 pads; the list of the files, without which older versions would read
`silence.npy` as an item; the configuration for `train.py --dataset-config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from latentmill.errors import ConfigError
from latentmill.export.layout import Layout, caption_of, escaped, with_first_escaped
from latentmill.ops import fit
from latentmill.record import FloatArray, Record, time_major_bytes
from latentmill.store.npy import npy_bytes

CONFIG_PATH = "dataset_config.json"
SILENCE_PATH = "silence.npy"
FILES_PATH = "filelist.txt"
RESERVED = ("silence", "dataset_config", "details")  # the names of the export's own files


class StableAudio(Layout):
    """A `.npy` and a `.json` file for each item."""

    tool = "stable-audio-tools"
    takes_frames = True
    hashed = True

    def check(self) -> None:
        if ".npy" in self.root:  # its reader replaces .npy in the whole path by .json
            raise ConfigError(f"{self.root} has .npy in its name: use another name.")

    @staticmethod
    def name(key: str) -> str:
        name = escaped(key).replace(".npy", "%2Enpy")
        # Stable Audio 3 reads silence.npy in any folder as the latent to pad with.
        reserved = name in RESERVED or name.rpartition("/")[2] == "silence"
        return with_first_escaped(name) if reserved else name

    def paths(self, name: str) -> Sequence[str]:
        return f"{name}.npy", f"{name}.json"

    def contents(self, record: Record, values: Mapping[str, FloatArray]) -> Sequence[bytes]:
        length = max(record.frames, self.frames or 0)
        latent = self.means(fit(record.latent, length, origin=self.store.origin))
        digest = xxhash.xxh3_64_hexdigest(time_major_bytes(record.latent))
        info = _info(record, length) | {"latent_hash": digest}
        return npy_bytes(latent), json.dumps(info).encode()

    def last(self, names: Sequence[str]) -> Mapping[str, bytes]:
        config: dict[str, Any] = {
            "dataset_type": "pre_encoded",
            "datasets": [{"id": "latentmill", "path": self.root}],
            "random_crop": True,
        }
        if self.frames is not None:
            config["latent_crop_length"] = self.frames
        return {
            SILENCE_PATH: npy_bytes(self._silence()[None]),
            FILES_PATH: "".join(f"{name}.npy\n" for name in names).encode(),
            CONFIG_PATH: json.dumps(config).encode(),
        }

    def _silence(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The latent of silence, as long as the longest sample."""
        longest = int(self.store.index.column("frames").max()) if len(self.store) else 1
        return self.means(self.store.origin.of_length(max(longest, self.frames or 1)))


def _info(record: Record, length: int) -> dict[str, Any]:
    """The JSON of a sample whose latent is extended to `length` frames."""
    # The reader of stable-audio-tools interprets names with __ as commands.
    own = {name: value for name, value in record.metadata.items() if not name.startswith("__")}
    return {
        **own,
        "prompt": caption_of(own),
        "seconds_start": 0.0,
        "seconds_total": record.duration,
        "padding_mask": [1] * record.frames + [0] * (length - record.frames),
        "sample_rate": record.sample_rate,
        "path": record.source_uri,
        "relpath": record.key,
    }
