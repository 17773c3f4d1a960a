"""Hostile text stays text, and never becomes a path."""

from __future__ import annotations

import html
from html.parser import HTMLParser

import pytest

import vision_plugin as vp
from tests.report.conftest import Drawn, draw_images, topk_sae
from tests.report.test_content import read_data

HOSTILE = [
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 2</script>",
    "\"><img src=x onerror='window.hit = 3'>",
    "' onmouseover='window.hit = 4",
    "../../../etc/passwd",
    "a/b\\c:d*e?f|g",
    "{{ 7 * 7 }}{% raw %}",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe",
    "line\u2028separator\u2029and\x00nul\x1b[31m",
    "\udcff lone surrogate \ud800",
    "\N{SNOWMAN} é \N{GRINNING FACE} \u05e9\u05dc\u05d5\u05dd",
    "javascript:alert(1)",
    "&amp;&lt;&#x3c;script&#x3e;",
    "-->]]><!--",
    "x" * 5000,
]


class Reader(HTMLParser):
    """Tags and attributes as a browser would take them."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += [name for name, _ in attrs]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, model, sae):
    """A report in which every text is hostile."""
    images = draw_images(30)
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(40)]
    source = Drawn(images, ids=texts[:30], labels=texts[5:35])
    folder = tmp_path_factory.mktemp("hostile")
    vp.report(
        sae,
        model,
        source,
        folder / "report",
        names=texts,
        scores={text: range(40) for text in HOSTILE[:5]},
        concepts={
            text: model.encode_text(["a red circle"])[0] + i for i, text in enumerate(HOSTILE)
        },
        title="".join(HOSTILE[:4]),
        answers={0: [{"prompt": HOSTILE[0], "before": HOSTILE[1], "after": HOSTILE[2]}]},
        compare={HOSTILE[1]: topk_sae(seed=1)},
        evaluation={"summary": {f"{HOSTILE[0]}/{HOSTILE[2]}": {HOSTILE[3]: HOSTILE[1]}}},
        n_image_pages=10,
        n_top=5,
        n_sample=2,
    )
    return folder / "report"


def test_no_text_becomes_markup(hostile):
    pages = [*sorted(hostile.glob("*.html")), *sorted((hostile / "features").iterdir())]
    for path in pages:
        page = Reader()
        page.feed(path.read_text(encoding="utf-8"))
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert all(set(a) == {"src", "defer"} for a in scripts)
        assert not any(name.startswith("on") for name in page.attributes)
        for tag, attributes in page.tags:
            source = attributes.get("src") or attributes.get("href") or ""
            assert not source.startswith("javascript:"), tag
            assert ".." not in source.removeprefix("../"), (path.name, source)


def test_no_text_ends_the_data_script(hostile):
    for name in ("data.js", "compare.js", "patches/0.js"):
        text = (hostile / name).read_text(encoding="ascii")
        assert "<" not in text
        assert ">" not in text
        assert "\x00" not in text
    data = read_data(hostile)
    assert data["names"][0] == HOSTILE[0]
    assert data["names"][10] == HOSTILE[10]


def test_files_are_named_by_numbers_alone(hostile):
    for path in hostile.rglob("*"):
        if path.is_file():
            assert path.resolve().is_relative_to(hostile.resolve())
    assert all(p.stem.isdigit() for p in (hostile / "images").iterdir())
    assert all(p.stem.isdigit() for p in (hostile / "features").iterdir())
    assert len(list(hostile.parent.iterdir())) == 1


def test_the_text_itself_can_be_read(hostile):
    page = (hostile / "features" / "0.html").read_text(encoding="utf-8")
    assert f"<bdi>{html.escape(HOSTILE[0], quote=False)}</bdi>" in page
    six = (hostile / "features" / "6.html").read_text(encoding="utf-8")
    assert "{{ 7 * 7 }}{% raw %}" in six


def test_no_script_of_a_text_runs_in_a_browser(hostile, visit):
    visitor = visit(hostile)
    page = visitor.open()
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("window.hit") is None
    assert page.locator("#view .card .text bdi").count() == 40
    page.locator("#distributions summary").click()
    for name in ("map.html", "images.html", "compare.html", "summary.html"):
        page = visitor.open(name)
        page.wait_for_timeout(100)
        assert page.evaluate("window.hit") is None
    for number in range(0, 15):
        page = visitor.open(f"features/{number}.html")
        assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 1
