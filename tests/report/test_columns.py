"""What the pages say beyond images: places, partners, bounds, names, summaries; no private path."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import vision_plugin as vp
from tests.report.conftest import HOOK, Drawn, draw_images, topk_sae
from tests.report.test_content import column, feature, numbers_in, read_data


def read_script(path):
    return json.loads(path.read_text(encoding="ascii").split(" = ", 1)[1].rstrip()[:-1])


def test_where_a_feature_fires_is_counted_over_all_tokens(built, token_latents):
    positive = token_latents.clamp(min=0).double()
    for latent in (4, 9):
        page = feature(built, latent).split("Where it fires")[1].split("</table>")[0]
        rows = re.findall(r'row">([\w ]+)</th><td class="number">(.*?)%</td>.*?>(.*?)%</td>', page)
        found = {kind: (float(share), float(fires)) for kind, share, fires in rows}
        of_cls, of_all = positive[:, 0, latent].sum(), positive[:, :, latent].sum()
        assert found["class token"][0] == pytest.approx(float(100 * of_cls / of_all), rel=6e-3)
        fires = (positive[:, 1:, latent] > 0).double().mean()
        assert found["patches"][1] == pytest.approx(float(100 * fires), rel=6e-3)


def test_features_that_fire_together_are_those_that_correlate(built, token_latents):
    per_image = token_latents.amax(1).clamp(min=0).double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.nan_to_num(np.corrcoef(per_image.T))
    np.fill_diagonal(correlations, -2)
    best = np.sort(correlations[7])[::-1][:8]
    table = feature(built, 7).split("Features that fire together")[1].split("</table>")[0]
    shown = [float(x) for x in re.findall(r'<td class="number">(-?[\d.]+)</td>', table)]
    assert shown == pytest.approx([v for v in best if v > 0], abs=6e-4)
    first = int(re.findall(r'href="(\d+)\.html"', table)[0])
    assert correlations[7, first] == pytest.approx(best[0])


def test_the_comparison_matches_by_correlation_and_by_cosine(built, model, sae, images):
    other = topk_sae(seed=1)
    with torch.no_grad():
        _, cache = model.run_with_cache(model.preprocess(list(images)), names_filter=HOOK)
        here, there = (one.encode(cache[HOOK]).amax(1).clamp(min=0) for one in (sae, other))
    found = read_script(built / "compare.js")
    assert [one["name"] for one in found] == ["another seed", "neurons"]
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec[:, None], other.W_dec[None], dim=2)
    forth = found[0]["cosine"]["forth"]
    assert [latent for latent, _ in forth] == cosines.argmax(1).tolist()
    assert [v for _, v in forth] == pytest.approx(cosines.amax(1).tolist(), abs=1e-3)
    assert [k for k, _ in found[0]["cosine"]["back"]] == cosines.argmax(0).tolist()
    joined = torch.cat([here, there], 1).double().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.nan_to_num(np.corrcoef(joined.T))[:40, 40:]
    shown = [v for _, v in found[0]["correlation"]["forth"]]
    assert shown == pytest.approx(correlations.max(1).tolist(), abs=1e-3)
    assert column(read_data(built), "Images") != found[0]["columns"]["frequency"]
    frequency = (there > 0).double().mean(0).tolist()
    assert found[0]["columns"]["frequency"] == pytest.approx(frequency, rel=1e-4)


def test_the_first_order_is_a_bound_that_knows_the_support(tmp_path, sae, images):
    latents = torch.zeros(60, 40)
    latents[:2, 0] = 1.0  # two images
    latents[:30, 1] = 1.0
    latents[:59, 2] = 1.0  # all but one
    score, z = [math.nan] * 40, [math.nan] * 40
    score[:3], z[:3] = [0.99, 0.8, 0.55], [2.0, 9.0, 60.0]
    of_sae = {"score": score, "z": z, "mean_similarity": 0.5}
    nulled = {k: [None if x != x else x for x in v] for k, v in list(of_sae.items())[:2]}
    evaluation = {"per_latent": {"monosemanticity": {"sae": {**of_sae, **nulled}}}}
    out = tmp_path / "r"
    vp.report(sae, None, images, out, latents=latents, evaluation=evaluation)
    data = read_data(out)
    assert data["columns"][0]["title"] == "At least"
    bound = column(data, "At least")
    assert bound[:3] == pytest.approx(
        [0.99 - 1.645 * 0.49 / 2, 0.8 - 1.645 * 0.3 / 9, 0.55 - 1.645 * 0.05 / 60], abs=1e-4
    )
    # One on two images and one on 59 of 60 stand apart from what can be ranked.
    assert data["states"][:4] == [1, 0, 2, 3]


def test_names_show_their_checks(tmp_path, model, sae, images):
    names = {
        1: {"name": "disc", "method": "text", "auroc": 0.9, "interval": [0.8, 0.95], "chance": 0.5},
        2: [{"name": "red", "auroc": 0.51, "low": 0.4, "high": 0.6}, "second"],
    }
    out = tmp_path / "r"
    vp.report(sae, model, images[:12], out, features=[1, 2, 4], names=names)
    assert read_data(out)["names"] == ["disc", "red", ""]
    assert column(read_data(out), "Name check") == [0.9, 0.51, None]
    first, second = (feature(out, k).split("Names</h2>")[1].split("</table>")[0] for k in (1, 2))
    assert "0.8 to 0.95" in first
    assert "no better" not in first
    assert "no better" in second
    assert "second" in second
    assert "Names</h2>" not in feature(out, 4)
    for wrong in ({1: {"method": "x"}}, {1: {"name": "a", "auroc": "high"}}):
        with pytest.raises(ValueError, match=r"names\[1\]"):
            vp.report(sae, model, images[:12], tmp_path / "s", names=wrong)


def test_labels_of_every_column_can_be_searched(tmp_path, model, sae):
    class Labelled(Drawn):
        column_names = ("kind", "tags", "size")

        def column(self, name):
            n = range(len(self))
            return {
                "kind": [f"kind {i % 3}" for i in n],
                "tags": [["a", f"tag {i % 2}"] for i in n],
                "size": [float(i) for i in n],
            }[name]

    out = tmp_path / "r"
    vp.report(sae, model, Labelled(draw_images(30)), out, n_top=8)
    data = read_data(out)
    texts = data["pictures"]["texts"]
    assert {"kind 0", "a, tag 1"} <= set(texts["all"])
    number = numbers_in(data, 0)[0]
    slot = data["images"][0][0]
    assert f"kind {number % 3}" in {texts["all"][t] for t in texts["of"][slot]}
    assert "kind, tags" in (out / "index.html").read_text()
    assert "Labels agree" in [c["title"] for c in data["columns"]]


def test_the_summary_has_the_table_and_the_curves(tmp_path, model, sae, images):
    n = int(sae.cfg.d_sae)
    evaluation = {
        "n_images": 1234,
        "summary": {
            "fvu/sae": {"explained_variance": 0.7},
            "fvu/random": {"cosine": 0.2},
            "monosemanticity@/home/jane-doe/a/clip/sae": {"mean_score": 0.625},
            "monosemanticity@/home/jane-doe/b/clip/sae": {"mean_score": 0.375},
        },
        "per_latent": {
            f"monosemanticity@/home/jane-doe/{place}/clip": {"sae": {"score": [0.5] * n}}
            for place in ("b", "a")
        },
        "equal_firing": {
            "labels": {"difference": 0.1, "low": 0.05, "high": 0.2, "verdict": "above"}
        },
        "left_out": {
            "hierarchy": "no taxonomy at /home/jane-doe/x.csv",
            "stability@/home/jane-doe/b/clip/random": "no other SAE",
        },
    }
    training = [{"step": 10, "l0": 8.0}, {"step": 20, "l0": 9.0}]
    kinds = [{"kind": "patch", "l0": 4.0, "explained_variance": 0.5}]
    study = {"saes": [{"layer": layer, "kinds": kinds} for layer in (1, 3)]}
    out = tmp_path / "r"
    more = {"evaluation": evaluation, "training": training, "study": study}
    vp.report(sae, model, images[:12], out, features=[1, 2, 4], **more)
    page = (out / "summary.html").read_text()
    for text in ("1,234", "explained variance", "0.05 to 0.2", "random directions", "L0 by layer"):
        assert text in page
    for text in ("monosemanticity@clip</", "stability@clip/random"):
        assert text in page
    table = page.partition("All scores</caption>")[2]
    second, first = (table.index(f"monosemanticity@{name}<") for name in ("clip-2", "clip"))
    assert second < first  # the table has the other order, and the columns' names
    assert "0.625" in table[second:first]
    assert "0.375" in table[first:]
    assert page.count("<polyline") == 3
    assert sum("monosemanticity@clip" in c["title"] for c in read_data(out)["columns"]) == 2
    for path in out.rglob("*.*"):
        assert b"jane-doe" not in path.read_bytes(), path.name


def test_names_of_the_naming_command_come_with_every_method(tmp_path, model, sae, images):
    names = vp.name_features(
        model, sae, images, methods=("decoder", "dissect"), min_images=1, progress=False,
        vocabulary=["a red circle", "a blue square", "a green star", "a tree"],
    )  # fmt: skip
    names.save(tmp_path / "names.json")
    out = tmp_path / "r"
    read = vp.lens.read_names(tmp_path / "names.json", sae=sae)
    vp.report(sae, model, images, out, features=range(12), names=read)
    assert read_data(out)["names"] == [name or "" for name in names.names[:12]]
    latent = next(k for k in range(12) if names.names[k])
    page = feature(out, latent).split("Names</h2>")[1].split("</table>")[0]
    rows = re.findall(r"<bdi>(.*?)</bdi></th><td><bdi>(.*?)</bdi></td>", page)
    assert rows[0] == (names.names[latent], names.made_by[latent])
    wanted = {m: one.names[latent] for m, one in names.candidates.items() if one.names[latent]}
    assert {method: name for name, method in rows} == wanted
    assert names.check is not None
    checked = [float(names.check.auroc[k]) for k in range(12)]
    shown = [math.nan if v is None else v for v in column(read_data(out), "Name check")]
    assert shown == pytest.approx(checked, rel=1e-4, nan_ok=True)


def test_answers_stand_beside_the_image_they_are_about(tmp_path, model, sae, images):
    spoken = {"latent": 2, "prompt": "What <is> it?", "strength": 9.0}
    spoken |= {"before": ["a disc", "a square"], "after": ["a disc", "a frog"]}
    out = tmp_path / "r"
    answers = {"model": "m", "answers": [spoken], "images": [0, 7]}
    vp.report(sae, model, images[:20], out, features=[1, 2], answers=answers)
    says = feature(out, 2).split("What the language model says")[1].split("</table>")[0]
    assert "What &lt;is&gt; it?" in says
    assert re.findall(r"<strong><bdi>(.*?)</bdi>", says) == ["a frog"]
    assert re.findall(r'aria-label="image (\d+)"', says) == ["0", "7"]
    assert "What the language model says" not in feature(out, 1)
    for wrong, why in (({"images": [0, 20]}, "names image 20"), ({"answers": [{}]}, "ask again")):
        with pytest.raises(ValueError, match=why):
            vp.report(sae, model, images[:20], tmp_path / "s", answers={**answers, **wrong})


def test_no_path_and_no_user_stand_in_any_file(tmp_path, tiny_clip, sae):
    model = vp.load_model(tiny_clip)
    images = draw_images(12)
    images.ids = [str(tmp_path / "photos" / f"{i}.png") for i in range(12)]
    vp.report(sae, model, images, tmp_path / "r", title=f"SAE of {tmp_path}/sae")
    for path in (tmp_path / "r").rglob("*"):
        if path.suffix in (".html", ".js", ".json"):
            text = path.read_text(encoding="utf-8")
            assert str(tmp_path) not in text, path.name
            assert tiny_clip not in text, path.name


def test_files_are_few(tmp_path, images):
    from vision_plugin.report._sprites import ImageWriter

    writer = ImageWriter(tmp_path, range(10_000), size=64, n_features=1000)
    n_sheets = 10_000 / writer.large.across**2 + 10_000 / writer.small.across**2
    assert 1000 + n_sheets < 1990


def test_a_run_of_wandb_gets_a_table_and_the_pages(tmp_path, model, sae, images, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = wandb.init(project="p", mode="offline", dir=str(tmp_path))
    try:
        vp.report(sae, model, images[:12], tmp_path / "r", features=[1, 2], title="A <b> title")
        assert "report/features" in dict(run.summary)
        folder = Path(run.dir).parent
    finally:
        run.finish()
    assert sys.modules["wandb"].run is None
    # What the run would send: the artifact by its kind, with the pages in its list of files.
    wanted = [b"vision_plugin-report", b"A-b-title", b"index.html", b"features/2.html"]
    for _ in range(100):
        sent = b"".join(path.read_bytes() for path in folder.glob("*.wandb"))
        if all(text in sent for text in wanted):
            break
        time.sleep(0.2)  # wandb's own process writes the file
    assert [text for text in wanted if text not in sent] == []


def test_an_unknown_layout_and_a_stray_comparison_are_refused(tmp_path, model, sae, images):
    with pytest.raises(ValueError, match="layout='t-sne'"):
        vp.report(sae, model, images[:8], tmp_path / "r", layout="t-sne")
    with pytest.raises(ValueError, match=r"'words'.*or 'neurons'"):
        vp.report(sae, model, images[:8], tmp_path / "r", compare="words")
    with pytest.raises(ValueError, match="compare= needs a model"):
        vp.report(sae, None, images[:8], tmp_path / "r", latents=torch.zeros(8, 40), compare=sae)
