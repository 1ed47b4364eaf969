"""The page in a real Chromium."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from view_server import SCRIPT, STEMS, Site, serving

from latentmill.store.store import LatentStore
from latentmill.view.desk import Desk
from support.browser import Watched, watched_page
from support.runs import PATIENCE_SECONDS
from support.stem_files import waveform, write_segments, write_stem_store, write_stems

ROWS = "#results tbody tr"
READY = ".play:not([disabled])"


@contextmanager
def opened(browser: Any, site: Site, **options: Any) -> Iterator[Watched]:
    """The page, whose console must stay empty and which requests nothing from elsewhere."""
    with watched_page(browser, **options) as watched:
        watched.page.on("dialog", lambda dialog: watched.errors.append(f"dialog {dialog.message}"))
        watched.page.goto(site.url)
        watched.page.wait_for_selector(ROWS)
        yield watched
        assert watched.errors == []
        foreign = [url for url in watched.requests if not url.startswith((site.url, "data:"))]
        assert foreign == []


def keys(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(f"{ROWS} .key").all_inner_texts()]


def wait_for_keys(page: Any, *wanted: str) -> None:
    page.wait_for_selector(f"#found:has-text('{len(wanted)} of 7 records')")
    page.get_by_role("button", name=wanted[0], exact=True).wait_for()
    assert keys(page) == list(wanted)


def heard(page: Any) -> np.ndarray:
    """The samples behind `Download WAV`, `[channels, samples]`."""
    with page.expect_download() as download:
        page.click("text=Download WAV")
    data = Path(download.value.path()).read_bytes()
    assert download.value.suggested_filename == "mix.wav"
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].T


def add_group(page: Any, group: str) -> None:
    page.wait_for_selector("#groups option:nth-child(2)", state="attached")
    page.select_option("#groups", group)
    page.wait_for_selector(f"#desk {READY}")


def set_slider(page: Any, label: str, value: float) -> None:
    """As a person who drags it."""
    page.get_by_label(label).first.evaluate(
        "(e, value) => { e.value = value; e.dispatchEvent(new Event('input')); }", value
    )


def wait_for_mix(page: Any) -> None:
    """Until the mix of the last change is decoded."""
    page.wait_for_selector("#desk .side-note:text-matches('peak|silent')")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        (1440, "light"),
        pytest.param(390, "light", marks=pytest.mark.slow),
        pytest.param(1440, "dark", marks=pytest.mark.slow),
    ],
)
def test_every_part_at_every_width(browser: Any, site: Site, width: int, scheme: str) -> None:
    """Nothing overflows, and axe-core finds no serious fault."""
    with opened(browser, site, width=width, scheme=scheme) as watched:
        page = watched.page
        page.click("text=Add a filter")
        assert (watched.overflow(), watched.serious_faults()) == (0, [])
        page.click(f"{ROWS} button.link >> nth=2")
        page.wait_for_selector(f"#record {READY}")
        page.wait_for_selector("#record img.latent")
        assert (watched.overflow(), watched.serious_faults()) == (0, [])
        page.click("nav button[data-place=desk]")
        add_group(page, "north")
        wait_for_mix(page)
        assert (watched.overflow(), watched.serious_faults()) == (0, [])


def test_search_and_filters(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        page.fill("#key", "BASS")
        wait_for_keys(page, "north/bass", "south/bass")
        page.fill("#key", "*th/v*")
        wait_for_keys(page, "north/vocals", "south/vocals")
        page.fill("#key", "")
        page.click("text=Add a filter")
        page.get_by_label("Field", exact=True).select_option("metadata_bpm")
        page.get_by_label("Value of bpm").fill("105")
        wait_for_keys(page, "north/vocals", "south/vocals")
        page.get_by_label("Comparison").select_option("max")
        page.get_by_label("Value of bpm").fill("-5")
        wait_for_keys(page, SCRIPT)
        page.get_by_label("Remove this filter").click()
        page.wait_for_selector("#found:has-text('7 records')")
        page.select_option("#sort", "duration")
        page.click("#direction")
        page.wait_for_selector(f"{ROWS}:first-child:has-text('north/bass')")


def test_a_server_that_has_ended(browser: Any, store: LatentStore) -> None:
    """The page tells it, for a search and for the mix; it keeps what it has."""
    with watched_page(browser) as watched:
        page = watched.page
        with serving(store) as site:
            page.goto(site.url)
            page.wait_for_selector(ROWS)
            add_group(page, "south")
        page.fill("#key", "drums")
        page.wait_for_selector("#found:has-text('The server does not answer')")
        page.get_by_label("Mute south/bass").click()
        page.wait_for_selector("#desk .side-note:has-text('The server does not answer')")
        assert page.locator("#desk .strips > li").count() == 3


def test_names_that_look_like_html_are_text(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        page.get_by_role("button", name=SCRIPT, exact=True).click()
        page.wait_for_selector(f"#record {READY}")
        assert page.inner_text("#record h2") == SCRIPT
        text = page.inner_text("#record table.pairs >> nth=0")
        assert "<img src=x onerror=alert(1)>" in text and "<b>bold</b>" in text
        assert page.locator("#record b, #record script, #record img[src=x]").count() == 0
        page.click("text=Add to the mixing desk")
        page.click("nav button[data-place=desk]")
        page.wait_for_selector(f"#desk {READY}")
        assert SCRIPT in page.inner_text(".strip-name")
        assert "alert" in page.inner_text("#desk pre")


def open_record(page: Any, key: str) -> None:
    page.get_by_role("button", name=key, exact=True).click()
    # `wait_for_selector` would keep the player in memory.
    page.locator(f"#record .player[aria-label='{key}']").wait_for()


def test_a_record_opens_while_the_one_before_is_decoded(
    browser: Any, store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests of a record that is left are aborted: a browser has six connections, and each
    record needs four, for its sound and pictures."""
    released, audio = threading.Event(), Desk.audio

    def held(*args: Any) -> np.ndarray:
        assert released.wait(PATIENCE_SECONDS)
        return audio(*args)

    monkeypatch.setattr(Desk, "audio", held)
    aborted: list[str] = []
    with serving(store) as site, opened(browser, site) as watched:
        page = watched.page
        page.on("requestfailed", lambda request: aborted.append(request.url))
        try:
            for stem in STEMS:
                open_record(page, f"south/{stem}")
        finally:
            released.set()
        page.wait_for_selector("#record .side-note:text-matches('peak')")
        page.wait_for_selector("#record img.latent")
        assert [sum(f"south%2F{stem}" in url for url in aborted) for stem in STEMS] == [4, 4, 0]
        assert page.locator("#message").is_hidden()


def sounds_in_memory(page: Any) -> int:
    """The number of decoded sounds that the page still has after a garbage collection."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    kind = session.send("Runtime.evaluate", {"expression": "AudioBuffer.prototype"})
    prototype = {"prototypeObjectId": kind["result"]["objectId"]}
    found = session.send("Runtime.queryObjects", prototype)["objects"]["objectId"]
    counting = {"functionDeclaration": "function () { return this.length; }"}
    counted = session.send("Runtime.callFunctionOn", {"objectId": found, **counting})
    session.detach()
    number: int = counted["result"]["value"]
    return number


def test_the_sounds_of_a_record_that_is_left_are_freed(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        for stem in STEMS:
            open_record(page, f"north/{stem}")
            page.locator(f"#record {READY}").click()
        page.get_by_label("Original", exact=True).check()
        page.wait_for_selector("#record .side-note:has-text('SNR')")
        for _ in range(20):  # a sound that was just stopped is freed a little later
            if (kept := sounds_in_memory(page)) == 2:
                break
            page.wait_for_timeout(100)
        assert kept == 2  # both versions of the last record


def test_segments_of_a_group_are_placed_as_in_the_recording(browser: Any, tmp_path: Path) -> None:
    source = write_stems(tmp_path / "songs")
    manifest = write_segments(source / "segments.jsonl", source, 1.0)
    with (
        serving(write_stem_store(tmp_path / "store", manifest)) as site,
        watched_page(browser) as watched,
    ):
        page = watched.page
        page.goto(site.url)
        add_group(page, "north")
        wait_for_mix(page)
        offsets = page.get_by_label("Offset (frames)")
        frames = offsets.evaluate_all("inputs => inputs.map((one) => one.value)")
        assert sorted(frames) == ["0", "0", "0", "100", "100", "100"]
        song = sum(waveform(source, f"north/{role}", 6400) for role in ("bass", "drums", "keys"))
        assert np.allclose(heard(page), song, atol=5e-4)


def test_sliders_change_what_is_heard(browser: Any, split_site: Site) -> None:
    with opened(browser, split_site) as watched:
        page = watched.page
        add_group(page, "north")
        wait_for_mix(page)
        before = heard(page)
        set_slider(page, "Gain", -12)
        wait_for_mix(page)
        quieter = heard(page)
        assert quieter.shape == before.shape
        difference = before - quieter  # of the first channel: (1 - 10^(-12/20)) of it
        page.get_by_label("Solo north/bass").click()
        wait_for_mix(page)
        alone = heard(page)
        factor = 10 ** (-12 / 20)
        assert np.allclose(difference * factor, alone * (1 - factor), atol=2e-3)
        assert np.abs(alone).max() > 0.02
        set_slider(page, "Pan", 1)
        wait_for_mix(page)
        panned = heard(page)
        assert np.abs(panned[0]).max() < 2e-3
        assert np.allclose(panned[1], alone[1], atol=2e-3)
        page.get_by_label("Offset (frames)").first.fill("25")
        wait_for_mix(page)
        later = heard(page)
        assert np.allclose(later[1, 25 * 32 :][:4000], panned[1][:4000], atol=2e-3)
        page.get_by_label("Mute north/bass").click()
        wait_for_mix(page)
        assert np.abs(heard(page)).max() < 2e-3


def test_the_versions_of_a_mix(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        add_group(page, "south")
        assert "the whole mix" in page.inner_text("#desk")
        page.get_by_label("Decoded, then added").check()
        note = page.locator("#desk .side-note")
        page.wait_for_selector("#desk .side-note:has-text('decoded channels')")
        assert float(re.findall(r"SNR of (\d+\.\d) dB", note.inner_text())[0]) > 100
        page.get_by_label("Originals, added").check()
        page.wait_for_selector("#desk .side-note:has-text('originals')")
        assert float(re.findall(r"SNR of (\d+\.\d) dB", note.inner_text())[0]) > 40


@pytest.mark.slow
def test_it_plays_and_keeps_its_position(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        add_group(page, "south")
        slider = page.get_by_label("Position in the mix")
        slider.fill("0.5")
        page.locator("#desk .play").click()
        page.wait_for_selector("#desk .play:has-text('Pause')")
        page.get_by_label("Decoded, then added").check()
        page.wait_for_selector("#desk .side-note:has-text('decoded channels')")
        page.wait_for_selector("#desk .play:has-text('Play')")  # it has ended by itself
        slider.fill("0.5")
        page.get_by_label("Latent mix").check()
        assert page.inner_text("#desk .time").startswith("0:00.5")


def test_with_the_keyboard_alone(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        page.locator("#key").focus()
        page.keyboard.type("north/drums")
        wait_for_keys(page, "north/drums")
        for _ in range(5):  # filter, order, direction, list, key
            page.keyboard.press("Tab")
        focused = "document.activeElement.textContent"
        assert page.evaluate(focused) == "north/drums"
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#desk {READY}")
        gain = page.get_by_label("Gain")
        gain.focus()
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        assert gain.get_attribute("aria-valuetext") == "\N{MINUS SIGN}2.0 dB"
        wait_for_mix(page)
        assert "0.794328" in page.inner_text("#desk pre")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) != "none"
        assert page.locator("[role=status]").count() >= 2


@pytest.mark.slow
def test_the_desk_is_kept_when_the_page_is_loaded_again(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        assert "--channels split" in page.inner_text("#desk-content")
        add_group(page, "south")
        assert page.get_by_label("Pan").first.is_disabled()
        page.reload()
        page.wait_for_selector(f"#desk {READY}")
        assert page.locator(".strip").count() == 3
        page.get_by_label("Remove south/bass from the desk").click()
        assert page.locator(".strip").count() == 2
        page.click("text=Remove all channels")
        assert page.locator(".strip").count() == 0


@pytest.mark.slow
def test_the_lines_can_be_copied(browser: Any, site: Site) -> None:
    with opened(browser, site) as watched:
        page = watched.page
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        add_group(page, "south")
        wait_for_mix(page)
        page.get_by_role("button", name="Copy").click()
        page.wait_for_selector("button:has-text('Copied')")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == page.locator("#desk pre code").text_content()
