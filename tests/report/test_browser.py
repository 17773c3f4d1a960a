"""A person at the pages, in a real browser, from the file system."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from tests.report.conftest import draw_images, topk_sae
from tests.report.test_content import column, numbers_in, read_data

SCREENS = Path(__file__).parent / "screens"
AXE = Path(__file__).parent / "axe" / "axe.min.js"
PAGES = ("index.html", "map.html", "images.html", "compare.html", "summary.html", "features/4.html")


@pytest.fixture
def index(built, visit):
    visitor = visit(built)
    visitor.open().wait_for_selector("html[data-ready]")
    return visitor


def ready(page):
    page.wait_for_selector("html[data-ready]")
    return page


def ranked(data, title, *, down=True):
    """Features by a column, as the pages promise.

    By a score, features on few images and those that fire almost everywhere stand apart; those
    without a number come last, ties by number.
    """
    values = dict(zip(data["ids"], column(data, title), strict=True))
    ranks = next(c["ranks"] for c in data["columns"] if c["title"] == title)
    apart = {0: 0, 2: 1, 1: 2, 3: 3}
    states = dict(zip(data["ids"], data["states"], strict=True))

    def key(latent):
        value = values[latent]
        if value is None:
            return (9, 0, latent)
        return (apart[states[latent]] if ranks else 0, (-1 if down else 1) * value, latent)

    return sorted(data["ids"], key=key)


def test_the_index_opens_sorted_by_the_first_column_with_images(index, built):
    from playwright.sync_api import expect

    data = read_data(built)
    assert data["columns"][0]["title"] == "At least"
    assert index.rows() == ranked(data, "At least")
    cards = index.page.locator("#view .card").all()
    shown = [card.locator(".thumb").count() for card in cards]
    places = [int(card.get_attribute("data-place")) for card in cards]
    order = index.rows()
    assert shown == [min(4, len(data["images"][order[place]])) for place in places]
    index.page.set_viewport_size({"width": 1400, "height": 3000})
    picture = index.page.locator("#view .thumb").first  # drawn anew in the other size
    expect(picture).to_have_css("background-image", re.compile(r"thumbs/0\.jpg"))


@pytest.mark.slow
@pytest.mark.parametrize("title", ["monosemanticity", "steerability", "Images", "Max"])
def test_any_column_sorts_and_turns_round(index, built, title):
    index.page.locator("#sort").select_option(label=title)
    assert index.rows() == ranked(read_data(built), title)
    index.page.locator("#turn").click()
    assert index.rows() == ranked(read_data(built), title, down=False)
    index.page.locator("[name=mode][value=list]").check()
    assert index.page.locator("[role=columnheader][aria-sort=ascending]").count() == 1
    head = index.page.locator("#heads [aria-sort] button")
    head.click()
    there = index.rows()  # those in view: the list is virtual
    assert len(there) > 10
    assert there == ranked(read_data(built), title)[: len(there)]


def test_search_finds_names_numbers_and_labels_best_first(index, built):
    data = read_data(built)
    index.page.locator("#query").fill("CONCEPT 1")
    assert sorted(index.rows()) == list(range(10, 20))
    index.page.locator("#query").fill("#7")
    assert index.rows() == [7]
    index.page.locator("#query").fill("red disc")
    texts = data["pictures"]["texts"]
    hits = {
        latent: sum(
            any("red disc" in texts["all"][t] for t in texts["of"][slot])
            for slot in data["images"][latent]
        )
        for latent in range(40)
    }
    found = index.rows()
    assert set(found) == {latent for latent, n in hits.items() if n}
    states = dict(zip(data["ids"], data["states"], strict=True))
    usual = [hits[latent] for latent in found if states[latent] == 0]
    assert usual == sorted(usual, reverse=True)
    assert index.page.locator("#sort").input_value() == "match"
    index.page.locator("#query").fill("")
    assert index.rows() == ranked(data, "At least")
    index.page.locator("#query").fill("nothing like it")
    assert index.page.locator("#empty").is_visible()
    index.page.locator("#clear-empty").click()
    assert index.shown(40)


def test_search_takes_whole_words_before_parts_and_finds_file_names(visit, model, sae, tmp_path):
    images = draw_images(12)
    images.labels = ["car", "cart", "scar", *["tree"] * 9]
    images.ids = [f"shelf/picture {i} of oak.png" for i in range(12)]
    latents = torch.zeros(12, 40)
    for latent, number in ((2, 1), (3, 2), (4, 0), (5, 5)):
        latents[number, latent] = 1.0
    vp.report(sae, None, images, tmp_path / "r", latents=latents, features=[2, 3, 4, 5])
    visitor = visit(tmp_path / "r")
    page = ready(visitor.open())
    assert page.locator("#query").get_attribute("placeholder") == "label, file name, #number"
    page.locator("#query").fill("car")
    assert visitor.rows() == [4, 2, 3]
    page.locator("#query").fill("picture 5 of oak")
    assert visitor.rows() == [5]


def test_a_request_for_anything_else_is_refused_outright(visit, built, tmp_path):
    """The block that all visits work under, on a page that does ask for something."""
    shutil.copytree(built, tmp_path / "r")
    summary = tmp_path / "r" / "summary.html"
    policy = re.compile(r"<meta http-equiv=.*?>")
    page = policy.sub("", summary.read_text()).replace(
        "</body>", '<img src="http://127.0.0.1:9/x.png"><img src="file:///etc/hosts"></body>'
    )
    summary.write_text(page)
    visitor = visit(tmp_path / "r")
    visitor.open("summary.html").wait_for_timeout(100)
    blocked = set(visitor.blocked)
    with pytest.raises(AssertionError):
        visitor.check_quiet()
    for found in (visitor.blocked, visitor.complaints, visitor.requests):
        found.clear()
    assert blocked == {"http://127.0.0.1:9/x.png", "file:///etc/hosts"}


def test_states_are_told_apart(index, built):
    data = read_data(built)
    of = {name: [k for k in range(40) if data["states"][k] == i] for i, name in enumerate(STATES)}
    assert set(of["dead"]) >= {3, 17}
    for state, latents in of.items():
        index.page.locator(f"[name=state][value={state}]").check()
        assert sorted(index.rows()) == latents


STATES = ("usual", "few", "dense", "dead")


def test_a_brush_over_a_distribution_selects(index, built):
    page = index.page
    page.locator("#distributions summary").click()
    titles = [c["title"] for c in read_data(built)["columns"]]
    figure = page.locator(".histogram").nth(titles.index("steerability"))
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 20, steps=4)
    page.mouse.up()
    values = dict(enumerate(column(read_data(built), "steerability")))
    found = sorted(index.rows())
    assert found == [k for k in range(40) if 0.5 <= values[k] <= 0.75]
    assert "f.score1=" in page.evaluate("location.hash")
    low, high = figure.locator("input").all()
    assert float(low.input_value()) == pytest.approx(0.5, abs=0.02)
    # The same by fields alone.
    low.fill("0.9")
    low.press("Enter")
    high.fill("")
    high.press("Enter")
    low.blur()
    assert sorted(index.rows()) == [k for k in range(40) if values[k] >= 0.9]
    page.locator("#filters button").click()
    assert index.shown(40)


def test_a_rectangle_in_the_scatter_selects(index, built):
    page = index.page
    page.locator("#scatter summary").click()
    page.locator("#across").select_option(label="steerability")
    page.locator("#up-column").select_option(label="Max")
    box = page.locator("#plot").bounding_box()
    page.mouse.move(box["x"] + 14, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 14 + (box["width"] - 28) / 2, box["y"] + box["height"] - 2, steps=6)
    page.mouse.up()
    values = dict(enumerate(column(read_data(built), "steerability")))
    assert sorted(index.rows()) == [k for k in range(40) if values[k] <= 0.5]


def test_a_selection_is_a_list_of_latents(index):
    page = index.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for latent in (12, 5):
        page.get_by_label(f"Select feature {latent}", exact=True).check()
    assert page.locator("#latents").input_value() == "5 12"
    page.locator("#copy").click()
    page.wait_for_function("document.getElementById('copied').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "5 12"
    page.locator("#unpick").click()
    page.locator("#query").fill("concept 3")
    page.locator("#pick-all").click()
    assert page.locator("#latents").input_value() == " ".join(map(str, range(30, 40)))


def test_a_view_survives_reload_and_the_way_back(index):
    page = index.page
    page.locator("#sort").select_option(label="Max")
    page.locator("[name=state][value=usual]").check()
    page.locator("[name=mode][value=list]").check()
    page.get_by_label("Select feature", exact=False).first.check()
    rows, picked = index.rows(), page.locator("#latents").input_value()
    page.reload()
    ready(page)
    assert index.rows() == rows
    assert page.locator("#latents").input_value() == picked
    page.locator("#view a").first.click()
    page.wait_for_selector("h1:has-text('Feature')")
    page.locator("#up").click()
    ready(page)
    assert index.rows() == rows
    assert page.locator("[name=mode][value=list]").is_checked()


def test_the_keyboard_alone_will_do(index):
    page = index.page
    page.keyboard.press("/")
    page.keyboard.type("#12")
    assert index.rows() == [12]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("x")
    assert page.locator("#latents").input_value() == "12"
    page.keyboard.press("Enter")
    page.wait_for_url("**/features/12.html")
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**/features/13.html")
    page.keyboard.press("ArrowLeft")
    page.wait_for_url("**/features/12.html")
    page.keyboard.press("u")
    page.wait_for_url("**/index.html*")
    ready(page)
    page.keyboard.press("g")
    assert page.locator("[name=mode][value=list]").is_checked()


@pytest.mark.slow
def test_a_feature_at_random_is_one_of_those_listed(index):
    index.page.locator("#query").fill("concept 3")
    index.page.locator("#random").click()
    index.page.wait_for_url("**/features/3*.html")


def test_the_heat_map_fades_and_tells_the_value_under_the_pointer(index, built, token_latents):
    page = index.page
    data = read_data(built)
    latent = next(k for k in data["ids"] if data["states"][k] == 0)
    index.open(f"features/{latent}.html")
    frame = page.locator(".frame[data-scale]:not(.grid-map)").first
    heat = frame.locator(".heat")
    heat.evaluate("(e) => e.decode()")
    page.locator("#fade").fill("30")
    assert float(heat.evaluate("(e) => getComputedStyle(e).opacity")) == pytest.approx(0.3)
    number = int(frame.get_attribute("data-number"))
    patches = token_latents[number, 1:, latent].reshape(4, 4).clamp(min=0)
    scale = float(frame.get_attribute("data-scale"))
    box = frame.bounding_box()
    for row, column_ in ((0, 0), (1, 2), (3, 3)):
        x = box["x"] + (column_ + 0.5) * box["width"] / 4
        page.mouse.move(x, box["y"] + (row + 0.5) * box["height"] / 4)
        text = page.locator("#under").text_content()
        assert text.endswith(f"row {row + 1}, column {column_ + 1}")
        told = float(text.split(" at ")[0])
        expected = float(patches[row, column_])
        assert told == pytest.approx(expected, abs=scale / 127 + 0.06 * expected)
    page.locator("[name=heat][value=off]").check()
    assert not heat.is_visible()
    index.open("features/5.html")
    assert page.locator("[name=heat][value=off]").is_checked()
    assert page.locator("#fade").input_value() == "30"


def test_a_search_leads_to_the_pictures_patch_by_patch(index, built):
    page = index.page
    data = read_data(built)["pictures"]
    page.locator("#query").fill("red disc")
    links = page.locator("#found a").all()
    wanted = {
        f"images.html#image={data['numbers'][slot]}"
        for slot in data["pages"]
        if any("red disc" in data["texts"]["all"][t] for t in data["texts"]["of"][slot])
    }
    assert {link.get_attribute("href") for link in links} == wanted
    links[0].click()
    page.wait_for_selector("#stage .image")
    assert "red disc" in page.locator("#one-title").text_content()
    index.open("index.html#query=%235")
    ready(page)
    assert not page.locator("#found").is_visible()


def test_a_label_leads_to_the_features_that_share_it(index):
    page = index.page
    index.open("features/4.html")
    link = page.locator("section[aria-labelledby=labels-title] a").first
    label = link.text_content()
    link.click()
    page.wait_for_url("**/index.html#*")
    ready(page)
    assert page.locator("#query").input_value() == label
    assert page.locator("#sort").input_value() == "match"
    assert 4 in index.rows()


def test_a_click_on_a_patch_lists_its_features(index, token_latents):
    page = index.page
    index.open("images.html#image=6")
    page.wait_for_selector("html[data-image='6']")
    ready(page)
    page.wait_for_selector("#stage .image")
    box = page.locator("#stage").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.4)
    assert page.locator("#patch-title").text_content() == "Row 2, column 3"
    values = token_latents[6, 1 + 4 + 2]
    order = values.sort(descending=True, stable=True)
    expected = [int(k) for k, v in zip(order.indices, order.values, strict=True) if v > 0][:8]
    shown = [int(t) for t in page.locator("#at-patch a").all_text_contents()]
    assert shown == expected
    sums = token_latents[6].clamp(min=0).sum(0).sort(descending=True).indices[:5].tolist()
    over = [int(t) for t in page.locator("#over-image a").all_text_contents()]
    assert over[:5] == sums
    page.locator("#stage").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#patch-title").text_content() == "Row 2, column 4"
    assert page.evaluate("location.hash") == "#image=6&patch=7"


@pytest.mark.slow
def test_the_map_is_coloured_searched_lassoed_and_linked(index):
    page = index.page
    index.open("map.html#feature=7")
    ready(page)
    assert "Feature 7" in page.locator("#card").text_content()
    page.locator("#colour").select_option(label="Images")
    assert "Images" in page.locator("#card").text_content()
    page.locator("#whole").click()
    page.locator("[name=drag][value=lasso]").check()
    box = page.locator("#plot").bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    for x, y in ((0.99, 0.01), (0.99, 0.99), (0.01, 0.99)):
        page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y, steps=3)
    page.mouse.up()
    assert page.locator("#n-picked").text_content() == "40 features"
    assert page.locator("#latents").input_value() == " ".join(map(str, range(40)))
    page.reload()
    ready(page)
    assert page.locator("#n-picked").text_content() == "40 features"
    page.locator("#plot").focus()
    page.keyboard.press("n")
    page.keyboard.press("+")
    assert "view=" in page.evaluate("location.hash")
    page.keyboard.press("Enter")
    page.wait_for_url("**/features/*.html")


def test_the_comparison_parts_what_both_have_from_what_one_has(index, built):
    page = index.page
    index.open("compare.html#measure=cosine&least=-1")
    ready(page)
    data = read_data(built)
    alive = sum(state != 3 for state in data["states"])
    assert page.locator("#count").text_content().startswith(f"{alive} pairs")
    page.locator("#least").fill("1")
    page.locator("#least").blur()
    assert page.locator("#count").text_content().startswith("0 pairs")
    page.locator("[name=part][value=here]").check()
    assert page.locator("#count").text_content().startswith(f"{alive} features")
    page.locator("#other").select_option(label="neurons")
    assert "32 features there" in page.locator("#about").text_content()
    assert page.locator("#charts .chart").count() == 4


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_axe_finds_no_violation(built, visit, scheme):
    visitor = visit(built, color_scheme=scheme, bypass_csp=True)
    page = visitor.page
    for name in (*PAGES, "index.html#mode=list&open=ds", "features/3.html", "features/9.html"):
        page.goto("about:blank")
        visitor.open_address(name)
        page.wait_for_timeout(100)
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate(
            "async () => (await axe.run()).violations.map((v) => [v.id, v.nodes[0].html])"
        )
        # axe itself asks for the style sheet again, which a page from a file may not.
        visitor.complaints.clear()
        assert found == [], name


@pytest.mark.parametrize(
    "width", [360, *(pytest.param(w, marks=pytest.mark.slow) for w in (768, 1440))]
)
def test_pages_do_not_scroll_sideways(built, visit, width):
    visitor = visit(built)
    visitor.page.set_viewport_size({"width": width, "height": 800})
    for name in (*PAGES, "index.html#mode=list&open=ds"):
        page = visitor.open_address(name)
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_layouts_are_those_that_were_looked_at(built, visit, width, tmp_path):
    """Small grey screenshots, with room for other fonts; REPORT_SCREENS=write stores new ones."""
    visitor = visit(built)
    visitor.page.set_viewport_size({"width": width, "height": 800})
    for name in PAGES:
        page = visitor.open_address(name)
        page.wait_for_timeout(400)
        page.screenshot(path=tmp_path / "now.png")
        now = Image.open(tmp_path / "now.png").convert("L").reduce(8)
        stored = SCREENS / f"{Path(name).stem}-{width}.png"
        if os.environ.get("REPORT_SCREENS") == "write":
            now.save(stored)
        before = np.asarray(Image.open(stored), dtype=float)
        assert before.shape == np.asarray(now).shape, name
        assert np.abs(np.asarray(now, dtype=float) - before).mean() < 9, name


@pytest.mark.slow
def test_a_feature_page_works_without_scripts(built, visit):
    visitor = visit(built, java_script_enabled=False)
    page = visitor.open("features/4.html")
    heat = page.locator(".frame:not(.grid-map) .heat").first
    assert heat.is_visible()
    page.locator("[name=heat][value=off]").check()
    assert not heat.is_visible()


@pytest.mark.slow
def test_a_report_works_wherever_it_is_moved(built, visit, tmp_path):
    moved = tmp_path / "a folder # with % odd ? name"
    shutil.copytree(built, moved)
    visitor = visit(moved)
    page = ready(visitor.open())
    page.locator("#view a").first.click()
    page.wait_for_selector("h1:has-text('Feature')")
    sheets = [u for u in visitor.requests if "/images/" in u]
    assert sheets
    assert page.evaluate(
        "(u) => new Promise((done) => { const i = new Image(); i.onload = () => done(i.width);"
        " i.onerror = () => done(0); i.src = u; })",
        sheets[0],
    )


@pytest.mark.slow
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
    page = ready(visitor.open())
    assert "tags" in page.locator("#query").get_attribute("placeholder")
    data = read_data(tmp_path / "r")
    page.locator("#query").fill("flag")
    assert 0 < len(visitor.rows()) <= 64
    texts = data["pictures"]["texts"]
    best = numbers_in(data, visitor.rows()[0])
    flags = [n for n in best if any("flag" in texts["all"][t].lower() for t in _texts(data, n))]
    assert len(flags) >= len(best) / 2
    page.locator("#view a").first.click()
    page.wait_for_selector("h1:has-text('Feature')")
    assert page.locator(".heat").first.evaluate("(e) => [e.naturalWidth, e.naturalHeight]") == [
        8,
        8,
    ]
    assert page.get_by_text("Labels of the top images").is_visible()
    assert page.get_by_role("heading", name="Steering").is_visible()


def _texts(data, number):
    return data["pictures"]["texts"]["of"][data["pictures"]["numbers"].index(number)]
