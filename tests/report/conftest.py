"""Drawn images, a tiny CLIP and SAEs of random weights; reports of them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

import vision_plugin as vp

HOOK = "blocks.1.hook_resid_post"
COLOURS = ("red", "green", "blue", "orange", "purple")


class Drawn(list):
    """Images with ids and labels, as an image source has them."""

    def __init__(self, images, ids=None, labels=None):
        super().__init__(images)
        self.ids = ids or [f"image {i}" for i in range(len(images))]
        self.labels = labels


def draw_images(n, size=48):
    """A disc or a square of some colour at some place, on noise, and different every time."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for i in range(n):
        noise = rng.integers(90, 166, (size, size, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        x, y = (int(v) for v in rng.integers(2, size - 20, 2))
        pen = ImageDraw.Draw(image)
        shape, colour = ("disc", "square")[i % 2], COLOURS[i % len(COLOURS)]
        (pen.ellipse if i % 2 == 0 else pen.rectangle)((x, y, x + 16, y + 16), fill=colour)
        images.append(image)
        labels.append(f"{colour} {shape}")
    return Drawn(images, labels=labels)


def topk_sae(d_in=32, d_sae=40, k=4, hook_name=HOOK, seed=0, dead=(), **metadata):
    torch.manual_seed(seed)
    config = TopKSAEConfig(
        d_in=d_in, d_sae=d_sae, k=k, metadata=SAEMetadata(hook_name=hook_name, **metadata)
    )
    sae = TopKSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc[list(dead)] = -1e6
    return sae


def standard_sae(d_in=32, d_sae=40, hook_name=HOOK, seed=0):
    torch.manual_seed(seed)
    config = StandardSAEConfig(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(hook_name=hook_name))
    sae = StandardSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, d_sae) / d_in**0.5)
        sae.W_dec.copy_(torch.randn(d_sae, d_in))
    return sae


@pytest.fixture(scope="session")
def model(tiny_clip):
    return vp.load_model(tiny_clip)


@pytest.fixture(scope="session")
def images():
    return draw_images(60)


@pytest.fixture(scope="session")
def sae():
    return topk_sae(dead=(3, 17))


@pytest.fixture(scope="session")
def token_latents(model, sae, images):
    """Latents of every token by the slow road, TransformerLens's cache: [n, tokens, d_sae]."""
    with torch.no_grad():
        _, cache = model.run_with_cache(model.preprocess(list(images)), names_filter=HOOK)
        return sae.encode(cache[HOOK])


@pytest.fixture(scope="session")
def built(tmp_path_factory, model, sae, images):
    """A report with everything in it."""
    out = tmp_path_factory.mktemp("report") / "report"
    scores = {
        "monosemanticity": [float("nan") if k % 5 == 0 else (k * 7 % 40) / 40 for k in range(40)],
        "steerability": torch.linspace(0, 1, 40),
    }
    vp.report(
        sae,
        model,
        images,
        out,
        scores=scores,
        names=[f"concept {k:02d}" for k in range(40)],
        answers={9: [{"prompt": "What is it?", "before": "a", "after": "b", "strength": 20}]},
        compare={"another seed": topk_sae(seed=1), "neurons": "neurons"},
        strengths=[0, 50],
        n_image_pages=20,
        concepts=["a red circle", "a blue square", "a green star"],
        title="Features of a tiny CLIP",
        n_top=6,
        n_sample=4,
    )
    return out


@pytest.fixture(scope="session")
def chromium():
    """A running headless Chromium."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium on the path, which is not there")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright, which is not installed"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


class Visit:
    """A page with all it said and asked for."""

    def __init__(self, browser, folder, **context):
        self.folder = folder
        self.context = browser.new_context(viewport={"width": 1400, "height": 900}, **context)
        self.context.set_default_timeout(180_000)  # other work may keep the machine busy
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("requestfailed", self._failed)
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.blocked = []
        self.root = folder.resolve().as_uri()
        self.context.route(lambda url: not self._own(url), self._block)

    def _own(self, url):
        return url.startswith((self.root, "data:"))

    def _block(self, route):
        """Refuse whatever is not a file of the report."""
        self.blocked.append(route.request.url)
        route.abort("blockedbyclient")

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # the page was left before its image came
            self.complaints.append(f"{request.failure}: {request.url}")

    def open(self, name="index.html"):
        return self.open_address(name)

    def open_address(self, address):
        """Open a page with its state."""
        name, _, state = address.partition("#")
        uri = (self.folder / name).resolve().as_uri()
        self.page.goto(f"{uri}#{state}" if state else uri)
        return self.page

    def rows(self):
        """Number of the feature at each place of the list that is there, in order."""
        found = self.page.evaluate(
            "[...document.querySelectorAll('#view .item')].sort((a, b) => a.dataset.place -"
            " b.dataset.place).map((e) => Number(e.querySelector('a').textContent))"
        )
        return list(found)

    def shown(self, n):
        """Whether the list says that it has so many features."""
        return self.page.locator("#count").text_content().startswith(f"{n} ")

    def check_quiet(self):
        assert self.blocked == []
        assert [u for u in self.requests if not self._own(u)] == []
        assert self.complaints == []


@pytest.fixture
def visit(chromium):
    """Opens reports in a fresh browser context each, and checks at the end that they kept quiet."""
    visits = []

    def start(folder, **context):
        visits.append(Visit(chromium, folder, **context))
        return visits[-1]

    yield start
    for made in visits:
        made.context.close()
        made.check_quiet()
