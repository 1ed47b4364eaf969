"""Stores whose values are not sounds: fields of vectors and tokens, and of models without a
decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from view_server import serving

import latentmill as lm
from latentmill.plan import FieldEntry
from latentmill.store.store import LatentStore
from support.browser import watched_page
from support.field_stores import write_fields
from support.latent_store import write_latents

LENGTHS = [7, 40, 12]
FRAMES = "4 channels, 10.77 frames/s, float16"  # 44100 Hz, one frame for 4096 samples


def field(folder: Path, name: str) -> LatentStore:
    """A field of a made-up store: `text`, `windows`, or frames computed from latents."""
    store = write_latents(str(folder / "store"), LENGTHS)
    write_fields(store, LENGTHS, names=[name])
    if name == "from latents":
        url = f"{store.url}/fields/smooth"
        return write_latents(url, LENGTHS, field=FieldEntry("smooth", "frames", "latents"))
    return lm.open(f"{store.url}/fields/{name}")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("text", "tokens of 5 numbers, float16"),
        ("windows", "vectors of 6 numbers, float16"),
        ("from latents", FRAMES),
    ],
)
def test_a_field_without_sounds_is_neither_played_nor_mixed(
    browser: Any, tmp_path: Path, name: str, values: str
) -> None:
    with serving(field(tmp_path, name)) as site, watched_page(browser) as watched:
        page = watched.page
        page.goto(site.url)
        page.locator("#results button.key").first.click()
        page.locator("#record img.latent").evaluate("(image) => image.decode()")
        assert page.inner_text("#about").endswith(f"kHz mono · latents: {values}")
        assert page.locator("#record img").count() == 1
        assert "cannot be decoded" in page.inner_text("#record .note")
        assert page.locator("#record .player").count() == 0
        adding = page.locator("button.add, #record button:has-text('Add to the mixing desk')")
        assert adding.count() == len(LENGTHS) + 1
        assert not any(one.is_enabled() for one in adding.all())
        page.click("nav button[data-place=desk]")
        assert "cannot be decoded" in page.inner_text("#desk-content")
        assert watched.errors == []  # an answer with an error would be one


def test_a_store_of_latents_has_a_rate(tmp_path: Path) -> None:
    with serving(write_latents(str(tmp_path / "store"), LENGTHS)) as site:
        facts = site.get("api/store").json
    assert facts["values"] == FRAMES
    assert (facts["why_no_sound"], facts["why_no_mix"]) == ("", "")
