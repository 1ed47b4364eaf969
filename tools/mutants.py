"""How many random changes to core modules do the modules' own tests notice?

    python tools/mutants.py --count 300 --seed 1 --results tools/results/mutants.json
    python tools/mutants.py --unnoticed --results tools/results/mutants.json   # after new tests

Each mutant is one changed operator, comparison or constant. It counts as noticed if the tests of
its module fail or do not end in time. First the tests of each module run unchanged, and it is
recorded which lines of the module each of them executes. A mutant is then tried with the tests that
execute its line, the fastest first, until one fails; one on a line that no test executes is
unnoticed. Mutants that change no result (the size of a buffer, a redundant condition) count as
unnoticed, too. Write the reason into the results as `no_effect`: the score is printed with and
without them. A mutant takes about two seconds of CPU time; run by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mutant_trials import tried
from mutation import Mutant, mutants_of

# Each module, and the tests that are about it.
MODULES = {
    "encoding/chunks.py": ["tests/encoding/test_chunks.py", "tests/encoding/test_stitch.py"],
    "encoding/lanes.py": ["tests/encoding/test_lanes.py"],
    "plan/drafting.py": ["tests/plan"],
    "plan/compare.py": ["tests/run/test_extend.py"],
    "plan/sort.py": ["tests/plan"],
    "store/commit.py": ["tests/store/test_commit.py", "tests/store/test_writers.py"],
    "store/index.py": [
        "tests/store/test_index.py",
        "tests/store/test_index_damage.py",
        "tests/store/test_schemas.py",
    ],
    "store/seal.py": ["tests/store/test_seal.py", "tests/store/test_revisions.py"],
    "store/statistics.py": ["tests/store/test_statistics.py"],
    "ops/arithmetic.py": ["tests/ops"],
    "ops/origin.py": ["tests/ops"],
    "ops/time.py": ["tests/ops"],
    "reader/order.py": ["tests/reader/test_order.py"],
    "reader/crops.py": ["tests/reader/test_crops.py", "tests/reader/test_dataset.py"],
    "reader/sharding.py": [
        "tests/reader/test_ranks.py",
        "tests/reader/test_stream.py",
        "tests/reader/test_order.py",
    ],
    "reader/batches.py": ["tests/reader/test_batches.py"],
    "reader/column_conditions.py": ["tests/reader/test_column_conditions.py"],
    "decoding/decoder.py": ["tests/decoding/test_decoder.py"],
    "sources/manifest.py": ["tests/sources/test_source_manifest.py"],
    "audio/headers.py": [
        "tests/audio/test_audio_truncation.py",
        "tests/audio/test_audio_decode.py",
    ],
    "engine/dispatch.py": ["tests/engine/test_dispatch.py"],
    "engine/lease.py": ["tests/engine/test_lease.py"],
}


def _chosen(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """Random mutants, as many of each module, if it has so many."""
    shuffled = []
    for module in modules:
        found = mutants_of(module)
        shuffled.append(random.Random(f"{seed} {module}").sample(found, len(found)))
    turns = itertools.zip_longest(*shuffled)
    return [mutant for turn in turns for mutant in turn if mutant is not None][:count]


def main() -> None:
    """Try the mutants, and write what was noticed after each of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modules", nargs="*", default=list(MODULES), choices=MODULES)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument(
        "--unnoticed",
        action="store_true",
        help="retry the unnoticed mutants of --results for which no reason (`no_effect`) is given",
    )
    asked = parser.parse_args()
    if asked.unnoticed:
        result = json.loads(asked.results.read_text("utf-8"))
        known = [Mutant(**one) for one in result["unnoticed"]]
        chosen = [one for one in known if one.module in asked.modules and not one.no_effect]
    else:
        known, chosen = [], _chosen(asked.modules, asked.count, asked.seed)
        command = f"python tools/mutants.py --count {asked.count} --seed {asked.seed}"
        result = {"command": command, "tried": 0, "noticed_at_first": 0}
    chosen.sort(key=lambda mutant: asked.modules.index(mutant.module))
    for module, mutants in itertools.groupby(chosen, key=lambda mutant: mutant.module):
        for mutant, noticed in tried(module, MODULES[module], list(mutants)):
            if not asked.unnoticed:
                result["tried"] += 1
                result["noticed_at_first"] += noticed
            if noticed:
                known = [one for one in known if one != mutant]
            else:
                known += [] if asked.unnoticed else [mutant]
                print(f"{module}:{mutant.line}: {mutant.was} -> {mutant.now}", flush=True)
            _write(asked.results, result, known)


def _write(path: Path, result: dict[str, Any], unnoticed: list[Mutant]) -> None:
    """Write the results with the scores: of all mutants, and of those that have an effect."""
    noticed = result["tried"] - len(unnoticed)
    result["noticed"] = noticed
    result["noticed_of_those_with_an_effect"] = round(
        noticed / max(1, result["tried"] - sum(bool(one.no_effect) for one in unnoticed)), 4
    )
    result["unnoticed"] = [
        {name: value for name, value in asdict(one).items() if value} for one in unnoticed
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
