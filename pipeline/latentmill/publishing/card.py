"""The dataset card on the hub: README.md with a YAML header, and a picture of some latents.

Users edit the card on the hub. `push` replaces the part between two marker lines and some fields of
the header, and keeps everything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import yaml

from latentmill.pictures.drawing import Picture, heat_map
from latentmill.publishing.contents import StoreFiles
from latentmill.publishing.views import SELECTION
from latentmill.record import Latent
from latentmill.store.card import MARKER
from latentmill.store.describe import frames_or_vectors
from latentmill.store.measurement import current_result
from latentmill.store.results import LinearityEntry
from latentmill.store.schema import CARD_PATH
from latentmill.store.store import LatentStore
from latentmill.text.printing import counted, size_text

PICTURE_PATH = "latents.png"
BEGIN = "<!-- latentmill: `latentmill push` replaces everything from here to the end marker -->"
END = "<!-- latentmill: end marker -->"
_RECORDS, _FRAMES, _GAP = 4, 256, 6  # shown in the picture
_SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6))


def hub_card(
    contents: StoreFiles, repo: str, existing: str | None, *, new: bool, license_: str | None
) -> str:
    """The text of the card.

    Args:
        contents: The store.
        repo: The URL of the repository.
        existing: The card on the hub. Without one, a README.md that the user wrote in the store.
        new: Whether the repository has no store yet. Only then is our part added to a card that
            does not have the markers; later, the user has removed it.
        license_: The license, if it is to be changed.
    """
    if existing is None:
        own = (contents.storage.read_if_exists(CARD_PATH) or b"").decode(errors="replace")
        existing = "" if MARKER in own else own
    header, body = _split(existing)
    before, begin, rest = body.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not begin and not new:
        section = ""
    else:
        alone = not before.strip() and not after.strip()
        lines = [BEGIN, *([MARKER] if alone else []), "", *_section(contents, repo), "", END]
        section = "\n".join(lines)
    parts = [part for part in (before.strip(), section, after.strip()) if part]
    fields = yaml.safe_dump(
        _fields(contents, header, license_), sort_keys=False, allow_unicode=True, width=10**6
    )
    return f"---\n{fields}---\n" + "\n\n".join(parts) + "\n"


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2, as the hub does: `no`, a language, is text there, and so are yes, on, off."""


_Loader.yaml_implicit_resolvers = {
    first: [one for one in resolvers if first in "tTfF" or one[0] != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _split(text: str) -> tuple[dict[str, Any], str]:
    """The fields of the YAML header, and the text after it. A header that is not valid is text."""
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0].rstrip() == "---" and "---" in [line.rstrip() for line in lines[1:]]:
        end = [line.rstrip() for line in lines].index("---", 1)
        try:
            header = yaml.load("\n".join(lines[1:end]), _Loader)  # noqa: S506  a SafeLoader
        except yaml.YAMLError:
            return {}, text
        if header is None or isinstance(header, dict):
            return header or {}, "\n".join(lines[end + 1 :])
    return {}, text


def _fields(
    contents: StoreFiles, header: Mapping[str, Any], license_: str | None
) -> dict[str, Any]:
    """The fields of the header: ours replaced, the others as they are."""
    info = contents.info
    tags = header.get("tags")
    known = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    configs = header.get("configs")
    others = [
        config
        for config in (configs if isinstance(configs, list) else [])
        if isinstance(config, dict) and config.get("config_name") not in (None, "default")
    ]
    paths = [shard.path for shard in info.shards]
    ours = {
        "config_name": "default",
        "data_files": [{"split": "train", "path": paths}],
    }
    fields = dict(header)
    if license_ is not None:
        fields["license"] = license_
    fields["tags"] = list(dict.fromkeys([*known, "audio", "latents", "latentmill"]))
    size = next((name for name, limit in _SIZES if info.encoded < limit), "n>1M")
    fields["size_categories"] = [size]
    fields["configs"] = [*([ours] if paths else []), *others]
    return fields


def _section(contents: StoreFiles, repo: str) -> Iterator[str]:
    info, store = contents.info, contents.store
    model, name = info.model, repo.partition("datasets/")[2]
    key = repr(next(store.keys(), "KEY")).replace("`", "\\x60")  # valid Python, also for emoji
    yield f"# {name.partition('@')[0]}"
    yield ""
    yield (
        f"Latents of audio, encoded with `{_code(model['name'])}`: "
        f"{counted(info.encoded, 'record')}, {info.hours:.2f} hours, {frames_or_vectors(info)} "
        f"({info.dtype})."
    )
    if len(store):
        yield f"\n![Latents of some records]({PICTURE_PATH})"
    yield "\n## Use\n\n```python\nimport latentmill as lm\n"
    yield f'store = lm.open("{repo}")  # reads over the network what is needed'
    yield f"record = store[{key}]"
    yield "record.latent  # numpy [channels, frames]"
    if store.decodable:
        yield f"audio = store.decode({key})  # numpy [channels, samples], {model['sample_rate']} Hz"
    if info.layout == "time-major":
        yield "dataset = lm.LatentDataset(store, crop=128)  # for training"
    yield "```\n"
    yield f"To download it: `latentmill pull {repo} FOLDER`."
    fields = (
        "" if info.metadata is None else f", and the fields of all records in `{info.metadata}`"
    )
    yield f"\nOther tools read the shards in `shards/`{fields}."
    if info.format == "parquet" and info.layout == "time-major":
        revision = unquote(name.partition("@")[2])
        at = f", revision={json.dumps(revision)}" if revision else ""
        yield "\n```python\nimport numpy as np\nfrom datasets import load_dataset\n"
        yield f'rows = load_dataset("{name.partition("@")[0]}", split="train", streaming=True{at})'
        yield "row = next(iter(rows))"
        yield 'channels, frames = row["shape"]'
        yield 'latent = np.frombuffer(row["latent"], row["dtype"]).reshape(frames, channels).T'
        yield "```"
    yield from _facts(contents)
    yield from _linearity(contents)


def _facts(contents: StoreFiles) -> Iterator[str]:
    info = contents.info
    model = info.model
    size = sum(shard.bytes for shard in info.shards)
    selected = contents.plan.source if SELECTION in contents.plan.source_settings else ""
    rows = {
        "selection": selected,
        "model": model.get("asked") or model["name"],
        "options": json.dumps(model["options"]) if model.get("options") else "",
        "weights": _listed(model.get("provenance")),
        "sample rate": f"{model['sample_rate']} Hz"
        + (f", {counted(model['hop'], 'sample')} per frame" if info.frame_rate else ""),
        "scale factor": f"{model['scale_factor']:g} (stored latents are multiplied by it)",
        "chunking": json.dumps(info.chunking),
        "items": f"{info.encoded} encoded, {info.skipped} skipped, {info.failed} failed",
        "shards": f"{len(info.shards)} ({info.format}), {size_text(size)}",
        "origin": f"`{info.origin}`: the latent of silence, which adding and scaling latents needs",
        "fingerprint": f"`{info.fingerprint}`: of model, weights, preprocessing and chunking",
        "latentmill": info.latentmill_version,
    }
    yield "\n## Data\n\n| | |\n|---|---|"
    for name, value in rows.items():
        if value:
            yield f"| {name} | {_cell(str(value))} |"


def _linearity(contents: StoreFiles) -> Iterator[str]:
    card = current_result(contents.storage, contents.info, "linearity")
    if not isinstance(card, LinearityEntry):
        return
    yield "\n## Linearity"
    yield "\nMedian relative errors of latent arithmetic on this data; smaller is better.\n"
    yield "| | with origin | without |\n|---|---|---|"
    yield f"| scaling | {card.homogeneity:.3g} | {card.homogeneity_raw:.3g} |"
    yield f"| adding | {card.additivity:.3g} | {card.additivity_raw:.3g} |"
    if card.removal is not None and card.removal_raw is not None:
        yield f"| removing, SI-SDR in dB | {card.removal:.3g} | {card.removal_raw:.3g} |"


def _listed(values: object) -> str:
    if not isinstance(values, Mapping):
        return ""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _code(value: object) -> str:
    return " ".join(str(value).replace("`", "'").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def picture(store: LatentStore) -> Picture | None:
    """Heat maps of a few records from all parts of the store, side by side; None if it is empty."""
    latents = [_beginning(store, key) for key in _some_keys(store)]
    if not latents:
        return None
    mean = None if store.codes else store.mean
    gap = np.zeros((len(latents[0]), _GAP)) + (0 if mean is None else mean[:, None])
    joined = [part for latent in latents for part in (latent, gap)][:-1]
    deviation = None if store.codes else store.std
    return heat_map(
        np.concatenate(joined, axis=1), width=1280, height=256, mean=mean, deviation=deviation
    )


def _some_keys(store: LatentStore) -> Sequence[str]:
    count = min(_RECORDS, len(store))
    return [store.index.key(number * len(store) // count) for number in range(count)]


def _beginning(store: LatentStore, key: str) -> Latent:
    entry = store.entry(key)
    if not entry.chunks:
        return store.crop(key, 0, min(entry.frames, _FRAMES))
    chunks: Latent = np.concatenate(list(store[key].latent), axis=1)
    return chunks[:, :_FRAMES]
