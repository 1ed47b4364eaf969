"""The report in a real browser: nothing is loaded, everything plays, everybody can reach it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reporting.conftest import ENCODED
from support.browser import Watched, patient_context, watched_page

LOOKS = [
    (390, "light"),
    (1440, "dark"),
    pytest.param(390, "dark", marks=pytest.mark.slow),
    pytest.param(1440, "light", marks=pytest.mark.slow),
]


@pytest.fixture
def address(report_file: Path) -> str:
    return report_file.as_uri()


@pytest.fixture
def watched(browser: Any, address: str) -> Iterator[Watched]:
    with watched_page(browser) as opened:
        opened.page.goto(address)
        yield opened


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_the_page_looks_right(browser: Any, address: str, width: int, scheme: str) -> None:
    with watched_page(browser, width=width, scheme=scheme) as watched:
        page = watched.page
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach((one) => one.open = true)")
        assert watched.overflow() <= 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")
        assert watched.serious_faults() == []
        loaded = page.evaluate(
            "Array.from(document.images, (one) => one.complete && one.naturalWidth > 0)"
        )
        assert loaded and all(loaded)
        assert watched.errors == []
        assert {url for url in watched.requests if not url.startswith("data:")} == {address}


def test_every_player_plays(watched: Watched) -> None:
    players = watched.page.evaluate(
        """async () => {
          const found = [];
          for (const audio of document.querySelectorAll("audio")) {
            audio.muted = true;
            await audio.play();
            await new Promise((done, failed) => {
              audio.addEventListener("timeupdate", () => audio.currentTime > 0 && done());
              audio.addEventListener("ended", done);
              audio.addEventListener("error", () => failed(audio.error.message));
            });
            found.push([audio.currentTime, audio.duration]);
          }
          return found;
        }"""
    )
    assert len(players) > 20
    assert all(0 < at <= duration for at, duration in players)
    assert watched.errors == []


def test_the_other_sound_of_a_record_continues_at_the_same_time(watched: Watched) -> None:
    first, second = watched.page.evaluate(
        """async () => {
          const card = Array.from(document.querySelectorAll("article.item")).find(
            (one) => one.textContent.includes("late"));
          const [a, b] = card.querySelectorAll("audio");
          a.muted = b.muted = true;
          await a.play();
          a.currentTime = 4;
          await new Promise((done) => a.addEventListener("timeupdate", done));
          await b.play();
          return [[a.paused, a.currentTime], [b.paused, b.currentTime]];
        }"""
    )
    assert first[0] is True
    assert second[0] is False
    assert second[1] == pytest.approx(first[1], abs=0.5)
    assert second[1] >= 3.9
    assert watched.page.locator("article.item .playhead:visible").count() == 1


def test_the_map_is_coloured_by_any_field(watched: Watched) -> None:
    page = watched.page
    field = page.get_by_label("Colour by")
    classes = "Array.from(document.querySelectorAll('#map-frame circle'), (c) => c.classList[0])"
    role = page.evaluate(classes)
    assert sorted(set(role)) == ["c0", "c1", "c2", "none"]
    assert role.count("none") == 5
    assert page.locator("#map-legend li").all_text_contents()[-1].strip() == "without (5)"
    field.select_option(label="level in dBFS")
    steps = page.evaluate(classes)
    assert steps.count("none") == 1  # silence has no level
    assert {"s0", "s6"} <= set(steps) <= {"none", *(f"s{n}" for n in range(7))}
    field.select_option(label="metadata bpm")
    assert page.evaluate(classes).count("none") == 5


def test_the_map_is_reached_by_keyboard(watched: Watched) -> None:
    page = watched.page
    page.get_by_label("Colour by").focus()
    page.keyboard.press("Tab")
    record = page.locator("#map-record")
    assert record.text_content()
    for to_the_end, back in (("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowUp")):
        for _ in range(ENCODED):
            page.keyboard.press(to_the_end)
        seen = {record.text_content()}
        for _ in range(ENCODED):
            page.keyboard.press(back)
            seen.add(record.text_content())
        assert len(seen) == ENCODED


def test_pointing_at_a_record_names_it(watched: Watched) -> None:
    page = watched.page
    page.locator("#map-frame circle").nth(2).scroll_into_view_if_needed()
    page.locator("#map-frame circle").nth(2).hover(force=True)
    key = page.locator("#map-table th.key").nth(2).text_content()
    assert (page.locator("#map-record").text_content() or "").startswith(f"{key}: ")


def test_the_page_works_without_its_script(browser: Any, address: str) -> None:
    context = patient_context(browser, java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("#map-frame circle").count() > 5
    assert page.locator("audio").count() > 20
    assert not page.get_by_label("Colour by").is_visible()
    context.close()


def test_no_other_script_runs(browser: Any, address: str, tmp_path: Path) -> None:
    """The policy of the page stops what is added to it."""
    html = Path(address.removeprefix("file://")).read_text()
    spoiled = tmp_path / "spoiled.html"
    added = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x.png'>"
    spoiled.write_text(html.replace("</main>", f"{added}</main>"))
    with watched_page(browser) as watched:
        watched.page.goto(spoiled.as_uri())
        assert watched.page.title() != "owned"
        assert len(watched.errors) >= 2
