"""Search over the metadata file against a filter in Python."""

from __future__ import annotations

import fnmatch
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from view_server import STEMS, Site, serving

from latentmill.errors import StoreError
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore, open_store
from latentmill.view.catalog import Catalog
from latentmill.view.query import FieldCondition, Search
from support.latent_store import write_latents

WORDS = ["Kick", "kick hats", "été", "", "a*b", "100%", "x.y", "(", "\\d", "[a]", "Straße", "_"]


def own(number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"title": WORDS[number % len(WORDS)], "number": number * 7 % 31}
    if number % 3:
        found |= {"bpm": number * 0.5 - 9, "live": number % 2 == 0}
    if number % 7 == 0:
        found["title"] = None
    return found


COUNT = 90


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    """Small units and small row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentmill.store.metadata.ROW_GROUP", 16)
        url = str(tmp_path_factory.mktemp("many") / "store")
        lengths = [3 + n * 5 % 11 for n in range(COUNT)]
        return write_latents(url, lengths, metadata=[own(n) for n in range(COUNT)], per_unit=11)


@pytest.fixture(scope="module")
def catalog(many: LatentStore) -> Catalog:
    return Catalog(many)


def value_of(record: Any, field: str) -> Any:
    if field.startswith("metadata_"):
        return record.metadata.get(field.removeprefix("metadata_"))
    return getattr(record, field)


def holds(record: Any, condition: FieldCondition) -> bool:
    value = value_of(record, condition.field)
    if value is None:
        return False
    if condition.op == "contains":
        return str(condition.value).lower() in value.lower()
    if condition.op == "min":
        return bool(value >= condition.value)
    if condition.op == "max":
        return bool(value <= condition.value)
    return bool(value == condition.value)


numbers = st.one_of(
    st.integers(-12, 40), st.floats(-12, 40), st.sampled_from([0.5, 2**53, 1e300, -1e300, 2**63])
)
conditions = st.one_of(
    st.builds(
        FieldCondition,
        field=st.sampled_from(["metadata_number", "metadata_bpm", "frames", "duration"]),
        op=st.sampled_from(["is", "min", "max"]),
        value=numbers,
    ),
    st.builds(
        FieldCondition,
        field=st.sampled_from(["metadata_title", "role", "group"]),
        op=st.sampled_from(["is", "contains"]),
        value=st.sampled_from([*WORDS, "k", "DRUMS", "group 1", "%", "."]),
    ),
    st.builds(
        FieldCondition, field=st.just("metadata_live"), op=st.just("is"), value=st.booleans()
    ),
)
patterns = st.sampled_from(
    ["", "item", "ITEM/0000", "7", "*7", "item/*", "?tem/0001?", "*0*5", "[0]*", ".*", "item/00010"]
)


@settings(max_examples=60, deadline=None)
@given(
    key=patterns,
    where=st.lists(conditions, max_size=3),
    sort=st.sampled_from(["key", "metadata_bpm", "frames", "metadata_number"]),
    descending=st.booleans(),
)
def test_a_search_finds_what_a_filter_in_python_finds(
    many: LatentStore,
    catalog: Catalog,
    key: str,
    where: list[FieldCondition],
    sort: str,
    descending: bool,
) -> None:
    records = list(many)
    if set(key) & set("*?"):
        pattern = fnmatch.translate(key.lower().replace("[", "[[]"))
        wanted = [r for r in records if re.match(pattern, r.key.lower())]
    else:
        wanted = [r for r in records if key.lower() in r.key.lower()]
    wanted = [r for r in wanted if all(holds(r, condition) for condition in where)]
    if sort == "key":
        wanted = wanted[::-1] if descending else wanted
    else:
        having = [r for r in wanted if value_of(r, sort) is not None]
        having.sort(key=lambda r: -value_of(r, sort) if descending else value_of(r, sort))
        wanted = having + [r for r in wanted if value_of(r, sort) is None]
    search = Search(key=key, where=tuple(where), sort=sort, descending=descending)
    found = catalog.search(search)
    assert [row["key"] for row in catalog.rows(found.tolist())] == [r.key for r in wanted]


LARGE = [2**53 + 1, 5, None, 2**53, 1 - 2**63, 2**63 - 1, 5, -(2**53) - 1]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    own_metadata = [{"id": one} for one in LARGE]
    url = str(tmp_path_factory.mktemp("large") / "store")
    return write_latents(url, [3] * len(LARGE), metadata=own_metadata)


@pytest.mark.parametrize("descending", [False, True])
def test_whole_numbers_are_sorted_exactly(large: LatentStore, descending: bool) -> None:
    """float64 would round them, and equal ones stay in order."""
    having = [n for n, one in enumerate(LARGE) if one is not None]
    having.sort(key=lambda n: (-1 if descending else 1) * LARGE[n])
    found = Catalog(large).search(Search(sort="metadata_id", descending=descending))
    assert found.tolist() == [*having, LARGE.index(None)]
    nothing = Search(key="no such key", sort="metadata_id", descending=descending)
    assert Catalog(large).search(nothing).tolist() == []


def test_whole_numbers_that_javascript_would_round(large: LatentStore) -> None:
    """They are text for the page, which sends them back as text."""
    with serving(large) as site:
        for number, one in enumerate(LARGE):
            if one is None:
                continue
            shown = json.loads(site.get("api/record", key=f"item/{number:05d}").json["metadata"])
            assert shown == {"id": str(one) if abs(one) >= 2**53 else one}
            where = [{"field": "metadata_id", "op": "is", "value": shown["id"]}]
            found = site.get("api/search", where=where).json["records"]
            assert [r["key"] for r in found] == [
                f"item/{n:05d}" for n, other in enumerate(LARGE) if other == one
            ]
        where = [{"field": "metadata_id", "op": "min", "value": str(2**53 + 1)}]
        assert site.get("api/search", where=where).json["total"] == 2
        for text in ("1.5", "x", "", "9" * 20):
            where = [{"field": "metadata_id", "op": "is", "value": text}]
            assert "cannot be compared" in site.get("api/search", where=where).json["error"]


def test_half_a_surrogate_pair_beside_a_large_number(tmp_path: Path) -> None:
    own_metadata = [{"id": 2**53 + 1, "title": "\ud83d"}]
    with serving(write_latents(str(tmp_path / "store"), [3], metadata=own_metadata)) as site:
        shown = json.loads(site.get("api/record", key="item/00000").json["metadata"])
    assert shown == {"id": str(2**53 + 1), "title": "\ud83d"}


def test_rows_are_in_the_asked_order(catalog: Catalog) -> None:
    positions = [89, 0, 17, 17, 16, 15, 40]
    rows = catalog.rows(positions)
    assert [row["key"] for row in rows] == [f"item/{n:05d}" for n in positions]
    assert catalog.rows([]) == []


def test_the_most_frequent_values(catalog: Catalog) -> None:
    found = dict(catalog.values("metadata_title"))
    titles = [own(n)["title"] for n in range(COUNT)]
    assert found == {word: titles.count(word) for word in WORDS if word in titles}


def test_pages(site: Site) -> None:
    whole = site.get("api/search").json
    assert whole["total"] == 7
    parts = [site.get("api/search", offset=at, limit=3).json["records"] for at in (0, 3, 6, 9)]
    assert list(itertools.chain(*parts)) == whole["records"]
    assert [len(part) for part in parts] == [3, 3, 1, 0]


def test_filters_and_order_by_requests(site: Site) -> None:
    where = [
        {"field": "metadata_bpm", "op": "min", "value": 100},
        {"field": "group", "op": "is", "value": "north"},
    ]
    found = site.get("api/search", where=where, sort="metadata_bpm", descending=1).json
    assert [one["key"] for one in found["records"]] == ["north/vocals", "north/drums"]
    values = site.get("api/values", field="role").json["values"]
    assert {one["value"]: one["count"] for one in values} == dict.fromkeys(STEMS, 2)


def test_a_record(site: Site, store: LatentStore) -> None:
    found = site.get("api/record", key="north/drums").json
    record = store["north/drums"]
    for name in ("key", "frames", "duration", "rms", "group", "role", "source_uri", "num_samples"):
        assert found[name] == getattr(record, name)
    assert json.loads(found["metadata"]) == record.metadata


@pytest.mark.parametrize("kind", ["unsealed", "earlier version"])
@pytest.mark.filterwarnings("ignore:.* is not complete")
def test_a_store_without_the_file(kind: str, tmp_path: Path) -> None:
    """It is searched in a temporary file, which is gone again."""
    own_metadata = [own(n) for n in range(20)]
    store = write_latents(str(tmp_path / "s"), [3] * 20, metadata=own_metadata, per_unit=7)
    before = Catalog(store)
    path = tmp_path / "s" / DATASET_PATH
    document = json.loads(path.read_text())
    (tmp_path / "s" / document.pop("metadata")).unlink()
    del document["metadata_hash"]
    path.unlink()
    if kind == "earlier version":
        path.write_text(json.dumps(document))
    files = sorted((tmp_path / "s").rglob("*"))
    catalog = Catalog(open_store(tmp_path / "s", device="cpu"))
    assert catalog.rows(range(20)) == before.rows(range(20))
    assert catalog.fields == before.fields
    assert sorted((tmp_path / "s").rglob("*")) == files


def test_a_store_in_a_bucket(s3_bucket: str) -> None:
    store = write_latents(f"{s3_bucket}/s", [3] * 20, metadata=[own(n) for n in range(20)])
    catalog = Catalog(store)
    found = catalog.search(Search(where=(FieldCondition(field="role", op="is", value="bass"),)))
    assert found.tolist() == [1, 5, 9, 13, 17]


def test_a_damaged_file(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "s"), [3] * 4)
    path = Path(store.url, str(store.info.metadata))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="run the same encode command"):
            Catalog(store)
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        Catalog(store)


def test_a_file_that_is_truncated_while_it_is_read(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "s"), [3] * 4)
    catalog = Catalog(store)
    os.truncate(Path(store.url, str(store.info.metadata)), 0)
    with pytest.raises(StoreError, match="run the same encode command"):
        catalog.search(Search(key="item"))
