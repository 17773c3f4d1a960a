"""A person at the pages, in a real browser, from the file system."""

from __future__ import annotations

import shutil

import pytest

import vision_plugin as vp
from tests.report.conftest import topk_sae
from tests.report.test_content import column, read_data

pytestmark = pytest.mark.slow


@pytest.fixture
def index(built, visit):
    visitor = visit(built)
    visitor.open().wait_for_selector("html[data-ready]")
    return visitor


def ranked(data, title, *, down=True):
    """Features by a column; those without a number last, ties by number."""
    values = dict(zip(data["ids"], column(data, title), strict=True))
    defined = [k for k in data["ids"] if values[k] is not None]
    defined.sort(key=lambda k: ((-1 if down else 1) * values[k], k))
    return defined + [k for k in data["ids"] if values[k] is None]


def test_the_index_opens_sorted_by_the_first_score_with_images(index, built):
    data = read_data(built)
    assert index.rows() == ranked(data, "monosemanticity")
    shown = [row.locator("img").count() for row in index.page.locator("#rows tr").all()]
    assert shown == [len(data["images"][latent]) for latent in index.rows()]
    assert max(shown) > 1
    images = index.page.locator("#rows img")
    images.last.scroll_into_view_if_needed()
    assert images.last.evaluate("(i) => i.decode().then(() => i.naturalWidth)") > 0


@pytest.mark.parametrize("title", ["steerability", "Images", "Max"])
def test_a_click_on_a_heading_sorts_and_another_turns_it_round(index, built, title):
    heading = index.page.get_by_role("button", name=title, exact=False).first
    heading.click()
    assert index.rows() == ranked(read_data(built), title)
    assert index.page.locator("th[aria-sort=descending]").count() == 1
    heading.click()
    assert index.rows() == ranked(read_data(built), title, down=False)
    assert index.page.locator("th[aria-sort=ascending]").count() == 1


def test_names_and_numbers_sort(index):
    index.page.locator("[data-sort=name]").click()
    assert index.rows() == list(range(40))
    index.page.locator("[data-sort=id]").click()
    index.page.locator("[data-sort=id]").click()
    assert index.rows() == list(range(39, -1, -1))


def test_dead_and_alive_features_are_told_apart(index, built):
    data = read_data(built)
    dead = {k for k, f in zip(data["ids"], column(data, "Images"), strict=True) if f == 0}
    assert dead >= {3, 17}
    index.page.locator("[name=state][value=dead]").check()
    assert set(index.rows()) == dead
    assert index.page.locator("#count").text_content() == f"{len(dead)} of 40 features"
    index.page.locator("[name=state][value=alive]").check()
    assert set(index.rows()) == set(range(40)) - dead


def test_search_and_range_narrow_the_list(index, built):
    index.page.locator("#query").fill("CONCEPT 1")
    assert sorted(index.rows()) == list(range(10, 20))
    index.page.locator("#query").fill("#7")
    assert index.rows() == [7]
    index.page.locator("#query").fill("")
    index.page.locator("#range-column").select_option(label="steerability")
    index.page.locator("#range-low").fill("0.5")
    index.page.locator("#range-high").fill("0.75")
    values = dict(enumerate(column(read_data(built), "steerability")))
    assert sorted(index.rows()) == [k for k in range(40) if 0.5 <= values[k] <= 0.75]
    index.page.locator("#query").fill("nothing like it")
    assert index.page.locator("#empty").is_visible()
    index.page.locator("#clear-empty").click()
    assert len(index.rows()) == 40


def test_a_view_survives_reload_and_the_way_back(index, built):
    page = index.page
    alive = sum(frequency > 0 for frequency in column(read_data(built), "Images"))
    assert alive > 26
    page.locator("[data-sort=max]").click()
    page.locator("[name=state][value=alive]").check()
    page.locator("#size").select_option("25")
    page.locator("#next").click()
    rows = index.rows()
    assert len(rows) == alive - 25
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert index.rows() == rows
    page.locator("#rows th a").first.click()
    page.wait_for_selector("h1")
    page.locator("#up").click()
    page.wait_for_selector("html[data-ready]")
    assert index.rows() == rows
    assert page.locator("#page").input_value() == "2"


def test_the_keyboard_alone_will_do(index):
    page = index.page
    page.keyboard.press("/")
    page.keyboard.type("#12")
    assert index.rows() == [12]
    page.keyboard.press("Escape")
    page.locator("#rows th a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/features/12.html")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/features/13.html")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/features/12.html")
    page.keyboard.press("u")
    page.wait_for_url("**/index.html*")


def test_a_feature_at_random_is_one_of_those_listed(index):
    index.page.locator("#query").fill("concept 3")
    index.page.locator("#random").click()
    index.page.wait_for_url("**/features/3*.html")


def test_the_heat_map_switches_on_and_off(index):
    page = index.page
    index.open("features/4.html")
    heat = page.locator(".heat").first
    assert heat.is_visible()
    page.locator("[name=heat][value=off]").check()
    assert not heat.is_visible()
    page.locator("[name=heat][value=colour]").check()
    assert heat.is_visible()
    assert "colours" in heat.evaluate("(e) => getComputedStyle(e).filter")
    page.keyboard.press("h")
    assert not heat.is_visible()
    page.keyboard.press("h")
    assert heat.evaluate("(e) => getComputedStyle(e).mixBlendMode") == "multiply"
    box, frame = heat.bounding_box(), page.locator(".frame").first.bounding_box()
    assert box == frame


def test_the_choice_of_heat_map_is_kept_from_page_to_page(index):
    index.open("features/4.html")
    index.page.locator("[name=heat][value=off]").check()
    index.open("features/5.html")
    assert not index.page.locator(".heat").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(built, visit, scheme):
    visitor = visit(built, color_scheme=scheme)
    page = visitor.open()
    page.wait_for_selector("html[data-ready]")
    for selector in ("body", "#rows th a", "#count", "#head button"):
        ratio = page.evaluate(CONTRAST, selector)
        assert ratio >= 4.5, (selector, ratio)


CONTRAST = """(selector) => {
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = (text) => rgb(text).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ink = getComputedStyle(document.querySelector(selector)).color;
  const page = getComputedStyle(document.body).backgroundColor;
  const [a, b] = [luminance(ink), luminance(page)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.mark.parametrize("width", [380, 1400])
def test_pages_do_not_scroll_sideways(built, visit, width):
    visitor = visit(built)
    visitor.page.set_viewport_size({"width": width, "height": 800})
    for name in ("index.html", "features/4.html"):
        page = visitor.open(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_feature_page_works_without_scripts(built, visit):
    visitor = visit(built, java_script_enabled=False)
    page = visitor.open("features/4.html")
    assert page.locator(".heat").first.is_visible()
    page.locator("[name=heat][value=off]").check()
    assert not page.locator(".heat").first.is_visible()


def test_a_report_works_wherever_it_is_moved(built, visit, tmp_path):
    moved = tmp_path / "a folder # with % odd ? name"
    shutil.copytree(built, moved)
    visitor = visit(moved)
    page = visitor.open()
    page.wait_for_selector("html[data-ready]")
    page.locator("#rows tr:has(img) th a").first.click()
    page.wait_for_selector("h1")
    assert page.evaluate("document.querySelector('.image').naturalWidth") > 0


def test_real_features_of_a_real_model_are_shown(shared, emoji_clip, visit, tmp_path):
    parquet = shared / "data" / "noto.parquet"
    if not parquet.is_file():
        pytest.skip("needs noto.parquet in the data folder, which is not there")
    from vision_plugin.images import open_images

    images = open_images(str(parquet), label_column="subgroup", n_images=256)
    model = vp.load_model(emoji_clip)
    sae = topk_sae(d_in=192, d_sae=256, k=8, hook_name="blocks.4.hook_resid_post")
    vp.report(sae, model, images, tmp_path / "r", features=range(64), concepts=["heart", "dog"])
    visitor = visit(tmp_path / "r")
    page = visitor.open()
    page.wait_for_selector("html[data-ready]")
    page.locator("[name=state][value=alive]").check()
    page.locator("#rows th a").first.click()
    page.wait_for_selector("h1")
    page.wait_for_function("document.querySelector('.image').naturalWidth === 64")
    assert page.locator(".heat").first.evaluate("(e) => [e.naturalWidth, e.naturalHeight]") == [
        8,
        8,
    ]
    assert page.get_by_text("Labels of the top images").is_visible()
    assert page.get_by_role("heading", name="Steering").is_visible()
