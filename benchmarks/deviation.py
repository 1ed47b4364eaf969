"""Runs `latentmill encode` with every family, and compares each item with its own package's call.

    python benchmarks/deviation.py [--audio FOLDER] [--only NAME ...] [--results FOLDER]

THE WEIGHTS ARE RANDOM AND SMALL: the repositories that the tests write, of the packages' real
classes (music2latent: the published architecture). Without --audio, the source is a manifest of
18 of the shared recordings: mono and stereo, 0.04 to 46 s, one-shots, loops, speech, music, and a
segment of a stem. Each row is the real command with `--dtype float32`, with `--channels split` in
rows of that name; one embedded Ray serves all of them.

The deviation is ||ours - theirs|| / ||theirs|| of an item up to one chunk, the largest of all; for
codes, the share that differs. It is rounding, whatever the weights are. For longer items the
package encodes the item in one piece, so the deviation is that of the chunks; if a frame depends
on its whole chunk, it depends on the weights.

With --only the other rows of the results are kept. `package_calls.py` has the families.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, ROOT, SHARED_AUDIO, random_linear_cae, write_result
from package_calls import CASES, Case

FLAC = (
    *("tabla_ke1", "elec_flip", "hat_psych", "bd_klub", "tabla_na", "loop_industrial"),
    *("drum_cymbal_open", "bass_woodsy_c", "guit_harmonics", "ride_tri", "loop_amen_full"),
    *("loop_safari", "ambi_glass_hum"),
)
OGG = ("456440*", "sorohanro*", "198-209*", "Hungarian*")
STEM, START, DURATION = "potassium/*KEYS*", 60.0, 32.0


def write_manifest(file: Path) -> None:
    """The fixed part of the shared audio."""
    rows: list[tuple[Path, float | str, float | str]] = []
    rows += [(SHARED_AUDIO / "flac" / f"{name}.flac", "", "") for name in FLAC]
    rows += [(next((SHARED_AUDIO / "ogg").glob(f"{one}.ogg")), "", "") for one in OGG]
    rows.append((next((SHARED_AUDIO / "stems").glob(STEM)), START, DURATION))
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "start", "duration"])
        writer.writerows(rows)


def encode(case: Case, source: str, out: Path, repos: Path, split: bool) -> None:
    """Run the command in this process, on its Ray; an item that fails ends the benchmark."""
    from latentmill.cli import entry

    command = ["latentmill", "encode", source, str(out), "-q", "--workers", "1"]
    command += ["--model", case.model.replace("REPOS", str(repos)), "--dtype", "float32"]
    for name, value in case.options.items():
        command += ["--model-option", f"{name}={value.replace('REPOS', str(repos))}"]
    command += [*case.settings, *(("--channels", "split") if split else ())]
    sys.argv = command
    try:
        entry.main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{' '.join(command)} ended with {ended.code}") from ended


@torch.inference_mode()
def measure(case: Case, source: str, repos: Path, split: bool) -> dict[str, Any]:
    """A row of the table."""
    import latentmill as lm
    from latentmill.encoding.single import encode_whole
    from latentmill.store.verify import read_source

    with tempfile.TemporaryDirectory() as folder:
        encode(case, source, Path(folder) / "store", repos, split)
        store = lm.open(folder + "/store")
        model = store.model()
        spec, chunk = model.spec, store.info.chunking["samples"]
        repo = Path(str(case.options.get("repo", case.model)).replace("REPOS", str(repos)))
        repo = Path(str(repo).partition(":")[2] or repo)
        short: list[float] = []
        longer: list[float] = []
        for record in store:
            audio = torch.from_numpy(read_source(record, spec.channels))
            if case.theirs is None:
                theirs = encode_whole(model, audio)
            else:
                missing = 0 if spec.short_last_chunk else spec.padded(audio.shape[1])
                missing = max(missing, spec.min_samples) - audio.shape[1]
                padded = torch.nn.functional.pad(audio, (0, max(0, missing)))[None]
                parts = padded.split(1, dim=1) if split else [padded]
                theirs = torch.cat([case.theirs(repo, part)[0].float() for part in parts])
                if ":" in case.model:  # the package does not scale
                    theirs = theirs * (1 if case.codes else spec.scale_factor)
            ours = torch.from_numpy(record.latent)
            ours = ours[0] if ours.ndim == 3 else ours  # the only chunk
            figures = short if audio.shape[1] <= chunk else longer
            figures.append(compared(ours, theirs, case.codes))
    return {
        "reference": case.reference,
        "sample_rate": spec.sample_rate,
        "hop": spec.hop,
        "latent_channels": spec.latent_channels,
        "channels": "split" if split else ("stereo" if spec.channels == 2 else "mono"),
        "stitch": store.info.chunking["stitch"],
        "items": store.info.encoded,
        "failed": store.info.failed,
        "differing_codes" if case.codes else "deviation": largest(short),
        "longer_items": len(longer),
        "longer": largest(longer),
    }


def compared(ours: Tensor, theirs: Tensor, codes: bool) -> float:
    """A package may return fewer frames (it truncates) or rows (without the loudness)."""
    frames = min(ours.shape[1], theirs.shape[1])
    assert abs(ours.shape[1] - theirs.shape[1]) <= 1, (ours.shape, theirs.shape)
    ours, theirs = ours[: len(theirs), :frames], theirs[:, :frames]
    if codes:
        return float((ours != theirs).float().mean())
    return float((ours - theirs).norm() / theirs.norm())


def largest(figures: list[float]) -> float | None:
    return float(f"{max(figures):.2g}") if figures else None


def number(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    return f"{value:.1g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def show(table: dict[str, Any]) -> None:
    print("| model | audio | hop, D | items | compared with | deviation | longer items |")
    print("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        codes = row.get("differing_codes")
        found = (
            number(row.get("deviation")) if codes is None else f"{codes:.2g} of the codes differ"
        )
        longer = f"{number(row['longer'])}, {row['stitch']}" if row["longer_items"] else ""
        shape = f"{row['hop']}, {row['latent_channels']}"
        rate = f"{row['sample_rate'] / 1000:g} kHz {row['channels']}"
        items = f"{row['items']}"
        print(f"| {name} | {rate} | {shape} | {items} | {row['reference']} | {found} | {longer} |")


def write_repos(root: Path) -> None:
    """The tests' repositories; music2latent, which has no configuration, in its own size."""
    from support import tiny_encoders, tiny_models, tiny_tokenizers

    tiny_models.write_repos(root)
    tiny_encoders.write_encoders(root / "encoders")
    for name in CASES:
        if name.startswith("hf, "):
            model_type = name.removeprefix("hf, ")
            tiny_tokenizers.write_tokenizer(root / "tokenizers" / model_type, model_type)


def rows(names: list[str]) -> list[tuple[str, bool]]:
    return [(name, split) for name in names for split in (False, True)[: 1 + CASES[name].split]]


def names(pairs: list[tuple[str, bool]]) -> list[str]:
    return [f"{name}, split" if split else name for name, split in pairs]


def kept(results: Path) -> dict[str, Any]:
    """The rows of an earlier run; those that are measured again are replaced."""
    file = results / "deviation.json"
    found: dict[str, Any] = json.loads(file.read_text())["models"] if file.exists() else {}
    return {row: value for row, value in found.items() if "items" in value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio", type=Path, help="a folder; default: part of the shared audio")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    with (
        random_linear_cae("tiny", ("lin-cae", "lin-cae-2", "m2l")),
        tempfile.TemporaryDirectory() as folder,
    ):
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # of what `hf:` measures
        from latentmill.engine.cluster import connect

        torch.set_num_threads(1)
        repos = Path(folder) / "repos"
        write_repos(repos)
        source = arguments.audio or Path(folder) / "recordings.csv"
        if arguments.audio is None:
            write_manifest(source)
        table, failed = {}, []
        with connect(None):
            chosen = rows(arguments.only)
            for row, (name, split) in zip(names(chosen), chosen, strict=True):
                try:
                    table[row] = measure(CASES[name], str(source), repos, split)
                except Exception as error:  # noqa: BLE001  the others are still measured
                    failed.append(f"{row}: {error!r}")
                print(row, table.get(row, failed[-1:]), file=sys.stderr, flush=True)
    for each in failed:
        print(each, file=sys.stderr)
    if failed:
        raise SystemExit(1)
    table = {**kept(arguments.results), **table}
    table = {row: table[row] for row in names(rows(list(CASES))) if row in table}
    show(table)
    write_result(
        "deviation",
        {
            "script": "benchmarks/deviation.py",
            "weights": "random, tiny",
            "audio": str(arguments.audio or "18 of the shared recordings"),
            "models": table,
        },
        arguments.results,
    )


if __name__ == "__main__":
    main()
