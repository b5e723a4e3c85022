"""The pages in a real Chromium: what people see, with mouse, keyboard and phone."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from browser import chromium, executable
from playwright.sync_api import Browser, Page, expect
from shop import Shop, Site, serving

from pic_daemon.corrections import read_corrections

pytestmark = pytest.mark.skipif(
    executable() is None, reason="Debian's chromium is not installed"
)
PAGES = ["/matches", "/matches?status=all", "/failures", "/dashboard", "/record/41"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert complaints == []  # such as what the content security policy kept out


def drawn(page: Page) -> list[bool]:
    """Of each picture in sight, whether there is one."""
    return page.locator(".pair img").evaluate_all(
        "pictures => pictures.slice(0, 4).map(picture => picture.complete"
        " && picture.naturalWidth > 50)"
    )


def test_a_match_is_seen_beside_its_catalog_picture(site: Site, page: Page) -> None:
    page.goto(site.url + "/", wait_until="networkidle")
    expect(page).to_have_title("Matches · Match log")
    assert drawn(page) == [True] * 4
    first = page.get_by_role("article").first
    left, right = (
        first.get_by_role("img", name=name).bounding_box()
        for name in ("Dropped picture a & <b>.jpg", "Catalog picture product-00004.jpg")
    )
    assert left and right
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]


def test_filters_are_used_and_cleared(site: Site, page: Page) -> None:
    page.goto(site.url + "/matches")
    page.get_by_label("Lowest score").fill("0.9")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("article")).to_have_count(1)
    expect(page.get_by_label("Lowest score")).to_have_value("0.9")
    page.get_by_role("link", name="Clear").click()
    expect(page.get_by_role("article")).to_have_count(30)
    page.get_by_role("link", name="Older").click()
    expect(page.get_by_role("article")).to_have_count(12)
    page.get_by_role("link", name="Newer").click()
    expect(page.get_by_role("heading", name="a & <b>.jpg")).to_be_visible()
    page.get_by_label("Verdict").select_option("no match")
    page.get_by_label("Folder").fill(str(site.shop.drop / "today"))
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("article")).to_have_count(1)


def test_a_day_of_the_dashboard_leads_to_its_matches(site: Site, page: Page) -> None:
    page.goto(site.url + "/dashboard")
    row = page.get_by_role("row").filter(has_text="40").last
    row.get_by_role("link").click()
    expect(page.get_by_role("article")).to_have_count(30)
    page.get_by_role("link", name="Older").click()
    expect(page.get_by_role("article")).to_have_count(10)


def test_everything_is_done_with_the_keyboard_alone(page: Page, tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    shop.copy_of(1, "a.jpg", at=10)
    shop.copy_of(2, "b.jpg", at=0)
    with serving(shop) as url:
        page.goto(url + "/matches")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("main")).to_be_focused()
        button = page.get_by_role("article").last.get_by_role("button", name="Not ours")
        for _ in range(40):
            page.keyboard.press("Tab")
            if button.evaluate("button => button === document.activeElement"):
                break
        outline = button.evaluate("button => getComputedStyle(button).outlineStyle")
        assert outline == "solid"
        page.keyboard.press("Enter")
        expect(button).to_have_attribute("aria-pressed", "true")
        assert page.url.endswith("/matches?#record-1")
        (said,) = read_corrections(shop.database)
        assert (said.label, Path(said.path).name) == ("not-ours", "a.jpg")
        # The server ends with this block: what the new page still loads would be refused.
        page.wait_for_load_state("networkidle")


def test_one_logs_in_corrects_and_logs_out(page: Page, tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    shop.copy_of(1, "a.jpg")
    token = tmp_path / "token"
    token.write_text("a-word-that-is-long-enough")
    token.chmod(0o600)
    with serving(shop, "--host", "0.0.0.0", "--token-file", token) as url:
        page.goto(url.replace("0.0.0.0", "127.0.0.1") + "/dashboard")
        page.get_by_label("Your name").fill("Ada")
        page.get_by_label("Token").fill("a-word-that-is-long-enough")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("button", name="Ours", exact=True).click()
        expect(page.get_by_text("Ada, 20")).to_be_visible()
        page.get_by_role("link", name="a.jpg", exact=True).click()
        expect(page.get_by_role("listitem").filter(has_text="Ours: Ada")).to_be_visible()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        assert read_corrections(shop.database)[0].who == "Ada"


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("width", [320, 375, 1100])
def test_no_page_is_wider_than_the_screen(
    site: Site, page: Page, path: str, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.goto(site.url + path)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width <= 375:  # wide enough for a finger
        heights = page.locator(".judge button, .filters .main").evaluate_all(
            "all => all.map(one => one.offsetHeight).filter(height => height)"
        )
        assert all(height >= 40 for height in heights)


def test_on_a_phone_the_filters_fold_away(site: Site, page: Page) -> None:
    page.set_viewport_size({"width": 375, "height": 700})
    page.goto(site.url + "/matches")
    expect(page.get_by_label("Lowest score")).to_be_hidden()
    page.get_by_text("Filters", exact=True).click()
    page.get_by_label("Lowest score").fill("0.9")
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_role("article")).to_have_count(1)


@pytest.mark.parametrize("path", PAGES)
def test_a_screen_reader_finds_its_way(site: Site, page: Page, path: str) -> None:
    page.goto(site.url + path)
    for landmark in ("banner", "main", "contentinfo"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    expect(page.get_by_role("navigation", name="Pages")).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    assert page.locator("html").get_attribute("lang") == "en"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, img, a, button")]
            .filter(one => one.type !== "hidden")
            .filter(one => !(one.labels?.length || one.alt || one.innerText?.trim()
                             || one.getAttribute("aria-label")))
            .map(one => one.outerHTML)"""
    )
    assert nameless == []
    levels = page.locator("h1, h2, h3").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert all(after - before <= 1 for before, after in pairwise(levels))
    if not path.startswith("/record"):
        here = page.get_by_role("navigation", name="Pages").locator("[aria-current=page]")
        expect(here).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_text_stands_out_from_its_ground(
    site: Site, browser: Browser, path: str, scheme: str
) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(site.url + path)
    weakest = page.evaluate(_CONTRAST)
    dark = (
        page.evaluate("getComputedStyle(document.body).backgroundColor")
        == "rgb(20, 23, 29)"
    )
    page.close()
    assert dark == (scheme == "dark")
    assert weakest[0] >= 4.5, weakest  # WCAG 2, level AA


_CONTRAST = """() => {
    const parts = color => color.match(/[\\d.]+/g).map(Number);
    const light = color => {
        const [r, g, b] = parts(color).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = one => {
        for (; one; one = one.parentElement) {
            const color = getComputedStyle(one).backgroundColor;
            if ((parts(color)[3] ?? 1) === 1) return color;
        }
        return "rgb(255, 255, 255)";
    };
    let weakest = [21, ""];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const one = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || !one.checkVisibility()) continue;
        const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort();
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < weakest[0]) weakest = [ratio, one.outerHTML.slice(0, 200)];
    }
    return weakest;
}"""
