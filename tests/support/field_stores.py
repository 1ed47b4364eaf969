"""Stores with made-up fields of every kind, written through the real writers; no model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentmill.encoding.fingerprint import fingerprint
from latentmill.plan import FieldEntry, UnitLimits, draft, freeze, read_items
from latentmill.record import Outcome
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.seal import seal, write_origin
from latentmill.store.store import LatentStore
from support.latent_store import HOP, RATE, write_latents

# Fields with a rate, by name: hop, sample rate and channels.
RATES = {"fine": (480, 24000, 3), "coarse": (40960, 44100, 2), "whole": (2048, 44100, 2)}
NAMES = [*RATES, "codes", "text", "clap", "windows"]


def tokens_of(number: int) -> int:
    return 1 + number * 3 % 11


def write_fields(
    store: LatentStore,
    lengths: list[int],
    *,
    names: Sequence[str] = NAMES,
    failed: tuple[int, ...] = (),
) -> None:
    """Add frames, codes, ragged tokens and vectors to a store of `write_latents`."""
    random = np.random.default_rng(len(lengths))

    def write(
        name: str, kind: Any, arrays: list[np.ndarray], model: dict[str, Any], **entry: Any
    ) -> None:
        if name not in names:
            return
        # Embedding of the empty text; codes of silence must be whole numbers.
        origin = np.arange(len(arrays[0]) * 16, dtype=np.float32).reshape(-1, 16) + 100
        write_latents(
            f"{store.url}/fields/{name}",
            [array.shape[1] for array in arrays],
            channels=len(arrays[0]),
            latents=arrays,
            model=model,
            failed=failed if name == "text" else (),
            field=FieldEntry(name, kind, "audio", **entry),
            prefix=store.index.key(0).partition("/")[0],
            origin=None if kind == "frames" else origin[:, : 1 if name == "clap" else 16],
        )

    def half(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float16)

    for name, (hop, rate, channels) in RATES.items():
        counts = [-(-length * HOP * rate // (RATE * hop)) for length in lengths]
        arrays = [half(channels, count) for count in counts]
        write(name, "frames", arrays, {"hop": hop, "sample_rate": rate})
    codes = [random.integers(0, 1024, (2, 2 * length)).astype(np.float16) for length in lengths]
    write("codes", "codes", codes, {"hop": HOP // 2, "codebook_size": 1024})
    tokens = [half(5, tokens_of(number)) for number in range(len(lengths))]
    write("text", "tokens", tokens, {})
    write("clap", "vector", [half(6, 1) for _ in lengths], {})
    windows = [half(6, 1 + number % 3) for number in range(len(lengths))]
    write("windows", "vector", windows, {}, window_seconds=10.0)


def write_tokens(store: LatentStore, name: str, tokens: Mapping[str, np.ndarray]) -> None:
    """Add a field with tokens `[D, n]`, by key, to a store of any kind."""
    plan = replace(store.plan, field=FieldEntry(name, "tokens", "metadata:text"))
    storage = Storage(f"{store.url}/fields/{name}")
    dimensions = len(next(iter(tokens.values())))
    model = {**plan.fingerprint["model"], "latent_channels": dimensions}
    document = plan.fingerprint | {"model": model, "settings": {"dtype": "float16"}}
    items = [item for unit in plan.units for item in read_items(store.storage, unit)]
    with draft(items, UnitLimits(unit_seconds=1000)) as drafted:
        plan = freeze(replace(plan, fingerprint=document, units=(), parts=()), drafted, storage)
    write_origin(storage, np.zeros((dimensions, 1), np.float32))
    for unit in plan.units:
        outcomes = [
            Outcome(key, "encoded", record=replace(store[key], latent=tokens[key]))
            for key in (item.key for item in read_items(storage, unit))
        ]
        commit = write_unit(
            storage,
            unit.name,
            outcomes,
            format_name=plan.format,
            fingerprint=fingerprint(document),
            info={"model": model, "dtype": "float16"},
        )
        write_commit(storage, commit, {"total_seconds": 1.0})
    seal(storage, plan)
