"""What the pages say, against the model and the SAE by the slow road."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from sae_lens.saes.sae import SAEMetadata

import vision_plugin as vp
from tests.report.conftest import HOOK, Drawn, draw_images, standard_sae, topk_sae
from vision_plugin.steering import steering_effect


def read_data(folder):
    text = (folder / "data.js").read_text(encoding="ascii")
    prefix = '"use strict";\nconst REPORT = '
    assert text.startswith(prefix)
    assert text.endswith(";\n")
    return json.loads(text[len(prefix) : -2])


def column(data, title):
    place = [c["title"] for c in data["columns"]].index(title)
    return data["values"][place]


def feature(folder, number):
    return (folder / "features" / f"{number}.html").read_text(encoding="utf-8")


def numbers_in(data, latent):
    """Numbers of a feature's top images in the index."""
    return [data["pictures"]["numbers"][slot] for slot in data["images"][latent]]


def shown_in(page):
    """Numbers of the images on a part of a feature's page."""
    return [int(n) for n in re.findall(r'class="frame" data-number="(\d+)"', page)]


def picture(folder, page, number):
    """The copy of an image on a page: its part of a sheet, as the page places it."""
    frame = page.split(f'data-number="{number}"')[1]
    box = re.search(r'viewBox="0 0 (\d+) (\d+)".*?href="\.\./([^"]+)" x="-(\d+)" y="-(\d+)"', frame)
    width, height, source, x, y = box.groups()
    x, y, width, height = int(x), int(y), int(width), int(height)
    return Image.open(folder / source).convert("RGB").crop((x, y, x + width, y + height))


def heat_maps(page):
    """The heat maps of a page as grey arrays."""
    uris = re.findall(r'class="heat" src="data:image/png;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(u))).convert("L")) for u in uris]


def test_top_images_are_those_with_the_largest_latent(built, token_latents):
    data, per_image = read_data(built), token_latents.amax(1)
    for latent in range(40):
        fired = int((per_image[:, latent] > 0).sum())
        expected = per_image[:, latent].sort(descending=True, stable=True).indices[: min(6, fired)]
        assert numbers_in(data, latent) == expected.tolist()


def test_frequencies_and_maxima_are_those_of_the_latents(built, token_latents):
    data, per_image = read_data(built), token_latents.amax(1)
    on_images = (per_image > 0).double().mean(0)
    on_tokens = (token_latents > 0).double().mean((0, 1))
    largest = per_image.amax(0)
    assert column(data, "Images") == pytest.approx(on_images.tolist(), rel=1e-4)
    assert column(data, "Tokens") == pytest.approx(on_tokens.tolist(), rel=1e-4)
    assert column(data, "Max") == pytest.approx(largest.tolist(), rel=1e-4)


def test_a_dead_feature_is_listed_and_says_so(built):
    assert column(read_data(built), "Images")[3] == 0
    assert "fires on none of the 60 images" in feature(built, 3)
    assert "Top images</h2>" not in feature(built, 3)
    assert "fires on none of the" not in feature(built, 4)


def test_scores_and_names_stand_in_index_and_page(built):
    data = read_data(built)
    titles = [c["title"] for c in data["columns"]]
    assert titles[:3] == ["At least", "monosemanticity", "steerability"]
    assert column(data, "monosemanticity")[5] is None
    assert column(data, "monosemanticity")[6] == pytest.approx(0.05)
    assert data["names"][12] == "concept 12"
    assert "concept 12" in feature(built, 12)
    assert "rank 1 of 40" in feature(built, 39)


def test_heat_maps_are_the_patch_latents_of_the_images(built, token_latents):
    latent = int(np.argmax(column(read_data(built), "Images")))
    page = feature(built, latent)
    maps = heat_maps(page)
    shown = shown_in(page)
    assert len(shown) == 6 + 4
    patches = token_latents[shown][:, 1:, latent].reshape(len(shown), 4, 4)
    # An image on which the feature fires elsewhere alone has no map that would only be black.
    mapped = [one for one in patches / patches.max() if float(one.max()) > 0.02]
    assert len(mapped) > 5
    for drawn, expected in zip(maps, mapped, strict=True):
        assert np.abs(drawn / 255 - expected.clamp(0, 1).numpy()).max() < 0.5 / 127 + 0.005


def test_a_value_on_the_cls_token_is_marked(built, token_latents):
    data = read_data(built)
    for latent in range(40):
        top = numbers_in(data, latent)
        on_cls = token_latents[top][:, 0, latent] > token_latents[top][:, 1:, latent].amax(1)
        head = feature(built, latent).split("From its strongest")[0]
        assert head.count(">CLS") == int(on_cls.sum())


def test_a_feature_at_the_class_token_alone_is_shown_undimmed_and_says_why(
    tmp_path, model, images, visit
):
    with torch.no_grad():
        _, cache = model.run_with_cache(model.preprocess(list(images)), names_filter=HOOK)
    tokens = cache[HOOK]
    apart = tokens[:, 0].mean(0) - tokens[:, 1:].mean((0, 1))
    sae = standard_sae()
    with torch.no_grad():
        sae.W_enc[:, 0] = apart
        sae.b_enc[0] = -(tokens[:, 1:] @ apart).max()
        fires = sae.encode(tokens)[..., 0] > 0
    assert bool(fires[:, 0].any())
    assert not bool(fires[:, 1:].any())
    vp.report(sae, model, images, tmp_path / "r", features=[0, 1])
    page = feature(tmp_path / "r", 0)
    assert "fires at the class token" in page
    assert "no place in it" in page
    assert 'class="heat"' not in page
    assert 'id="heat"' not in page
    titles = [c["title"] for c in read_data(tmp_path / "r")["columns"]]
    kinds = read_data(tmp_path / "r")["columns"][titles.index("Token kind")]["names"]
    assert kinds[int(column(read_data(tmp_path / "r"), "Token kind")[0])] == "class token"
    # What a person sees is the picture itself, pixel for pixel, not a dark one.
    shown = visit(tmp_path / "r").open("features/0.html")
    frame = shown.locator(".frame").first
    number = int(frame.get_attribute("data-number"))
    frame.locator("image").evaluate("(e) => e.decode ? e.decode() : null")
    seen = np.asarray(Image.open(io.BytesIO(frame.screenshot())).convert("RGB"), dtype=float)
    copy = np.asarray(picture(tmp_path / "r", page, number))
    assert seen.mean() == pytest.approx(copy.mean(), abs=6)


def test_the_sample_is_drawn_from_images_on_which_it_fires(built, token_latents):
    per_image = token_latents.amax(1)
    latent = int((per_image > 0).sum(0).argmax())
    sample = feature(built, latent).split("From its strongest")[1].split('class="columns"')[0]
    numbers = shown_in(sample)
    assert len(set(numbers)) == 4
    assert bool((per_image[numbers, latent] > 0).all())


def test_images_are_what_the_model_sees(built, model, images):
    number = numbers_in(read_data(built), 0)[0]
    seen = np.asarray(picture(built, feature(built, 0), number))
    pixels = model.preprocess(images[number])[0]
    assert seen.shape == (32, 32, 3)
    processor = model.image_processor.processor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    expected = (pixels * std[:, None, None] + mean[:, None, None]) * 255
    assert np.abs(seen.transpose(2, 0, 1) - expected.numpy()).max() <= 1


def test_decoder_neighbours_are_the_largest_cosines(built, sae):
    rows = sae.W_dec.detach().double()
    cosines = torch.nn.functional.cosine_similarity(rows[7], rows, dim=1)
    cosines[7] = -2
    best = cosines.sort(descending=True)
    table = feature(built, 7).split("Decoder neighbours")[1].split("</table>")[0]
    assert [int(n) for n in re.findall(r'href="(\d+)\.html"', table)] == best.indices[:8].tolist()
    shown = [float(x) for x in re.findall(r"<td class=\"number\">(-?[\d.]+)</td>", table)]
    assert shown == pytest.approx(best.values[:8].tolist(), abs=6e-4)


def test_steering_shows_the_probabilities_of_the_steered_model(built, model, sae, images):
    concepts = ["a red circle", "a blue square", "a green star"]
    spread = [images[i] for i in range(0, 60, 7)][:8]
    effect = steering_effect(
        model,
        sae,
        model.preprocess(spread),
        model.encode_text(concepts),
        {9: 150.0},
        concepts=concepts,
    )
    table = feature(built, 9).split("Steering</h2>")[1].split("</table>")[0]
    assert "held at 150" in table
    cells = re.findall(r"<bdi>(.*?)</bdi>.*?>([\d.e-]+)%</td>.*?>([\d.e-]+)%</td>", table)
    shown = {name: (float(before) / 100, float(after) / 100) for name, before, after in cells}
    for place, name in enumerate(concepts):
        assert shown[name][0] == pytest.approx(float(effect.before[:, place].mean()), rel=6e-3)
        assert shown[name][1] == pytest.approx(float(effect.after[:, place].mean()), rel=6e-3)


def test_an_effect_computed_before_is_shown_as_it_is(tmp_path, model, sae, images):
    effect = steering_effect(
        model,
        sae,
        model.preprocess(images[:2]),
        model.encode_text(["x", "y"]),
        {2: 33.0},
        concepts=["the first", "the second"],
    )
    out = tmp_path / "r"
    vp.report(sae, model, images[:8], out, features=[1, 2], steering={2: effect})
    assert "the second" in feature(out, 2)
    assert "What 2 images are taken for" in feature(out, 2)
    assert "Steering</h2>" not in feature(out, 1)


def percents(page, title):
    table = page.split(f"{title}</h2>")[1].split("</table>")[0]
    cells = re.findall(r"<bdi>([^<]*)</bdi></th>.*?>([\d.e-]+)%</td>.*?>([\d.e-]+)%</td>", table)
    return {name: float(after) / 100 for name, _, after in cells}


@torch.no_grad()
def test_an_edit_is_looked_at_latent_by_latent_and_as_a_whole(tmp_path, model, sae, images):
    edit = vp.Edit.suppress(sae, [4, 9], tokens="patch") + vp.Edit.add(sae, {6: 40.0})
    concepts = ["a red circle", "a blue square", "a green star"]
    out = tmp_path / "r"
    vp.report(
        sae, model, images[:8], out, features=[4, 5, 6], edit=edit, concepts=concepts, layout="none"
    )
    assert column(read_data(out), "edit") == [0, None, 40]

    def probabilities(hook):
        pixels = model.preprocess(images[:8])
        seen = model.run_with_hooks(pixels, fwd_hooks=[(HOOK, hook)])
        unit = torch.nn.functional.normalize(seen, dim=-1)
        texts = model.encode_text(concepts)
        return torch.softmax(model.logit_scale * unit @ texts.T, dim=-1).mean(0)

    def without(x, latents):
        changed = x.clone()
        changed[:, 1:] -= sae.encode(x)[:, 1:, latents] @ sae.W_dec[latents]
        return changed

    one = probabilities(lambda x, hook: without(x, [4]))
    whole = probabilities(lambda x, hook: without(x, [4, 9]) + 40 * sae.W_dec[6])
    page, summary = feature(out, 4), (out / "summary.html").read_text()
    assert "edited: suppress latent 4 to 0" in page
    assert "held at 150" in feature(out, 5)
    assert "suppress latent 4 to 0, 9 to 0" in summary
    for place, name in enumerate(concepts):
        assert percents(page, "Steering")[name] == pytest.approx(float(one[place]), rel=6e-3)
        assert percents(summary, "Edit")[name] == pytest.approx(float(whole[place]), rel=6e-3)


def test_an_edit_of_something_else_is_refused(tmp_path, model, sae, images):
    with pytest.raises(ValueError, match="changes no latent of this SAE"):
        vp.report(sae, model, images[:8], tmp_path / "r", edit=vp.Edit.clamp(HOOK, {1: 2.0}))


@pytest.mark.parametrize("layout", ["dense", "csr", "coo", "numpy"])
def test_given_latents_rank_as_computed_ones(
    tmp_path, built, model, sae, images, layout, token_latents
):
    dense = token_latents.amax(1)
    given = {
        "dense": lambda: dense,
        "csr": dense.to_sparse_csr,
        "coo": dense.to_sparse_coo,
        "numpy": dense.numpy,
    }[layout]()
    out = tmp_path / "r"
    vp.report(sae, model, images, out, latents=given, n_top=6, n_sample=4)
    assert read_data(out)["images"] == read_data(built)["images"]
    assert heat_maps(feature(out, 1))[0].shape == (4, 4)


def test_no_model_is_needed_where_latents_are_given(tmp_path, sae, images, token_latents):
    out = tmp_path / "r"
    vp.report(sae, None, images, out, latents=token_latents.amax(1), n_top=6)
    page = feature(out, 0)
    assert picture(out, page, shown_in(page)[0]).size == (48, 48)
    assert not (out / "images.html").exists()
    assert 'class="heat"' not in feature(out, 0)
    assert 'id="heat"' not in feature(out, 0)


def test_the_tokens_an_sae_was_trained_on_are_those_that_count(tmp_path, model, images):
    sae = topk_sae(tokens="patch")
    out = tmp_path / "r"
    vp.report(sae, model, images[:20], out)
    with torch.no_grad():
        _, cache = model.run_with_cache(model.preprocess(images[:20]), names_filter=HOOK)
        largest = sae.encode(cache[HOOK][:, 1:]).amax((0, 1))
    assert column(read_data(out), "Max") == pytest.approx(largest.tolist(), rel=1e-4)
    assert "patch tokens" in (out / "index.html").read_text()


def test_an_sae_on_the_cls_token_has_no_heat_maps(tmp_path, model, images):
    out = tmp_path / "r"
    vp.report(topk_sae(), model, images[:20], out, tokens="cls")
    assert 'class="heat"' not in "".join(feature(out, k) for k in range(40))
    assert len(list((out / "images").iterdir())) > 0


def test_a_dense_sae_and_one_over_heads_work(tmp_path, model, images):
    for place, hook in enumerate(["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]):
        out = tmp_path / str(place)
        vp.report(standard_sae(hook_name=hook), model, images[:10], out, features=[0, 5])
        assert heat_maps(feature(out, 0))[0].shape == (4, 4)


def test_only_the_features_asked_for_are_reported(tmp_path, model, sae, images):
    out = tmp_path / "r"
    vp.report(sae, model, images, out, features=[30, 2, 2, 11])
    assert read_data(out)["ids"] == [2, 11, 30]
    assert sorted(p.name for p in (out / "features").iterdir()) == ["11.html", "2.html", "30.html"]
    assert 'href="11.html"' in feature(out, 2)
    links = re.findall(r'href="(\d+)\.html"', "".join(feature(out, k) for k in (2, 11, 30)))
    assert set(links) <= {"2", "11", "30"}


def test_every_link_and_image_of_every_page_is_there(built):
    for page in [*sorted(built.glob("*.html")), *sorted((built / "features").iterdir())]:
        for target in re.findall(r'(?:src|href)="([^"#]+)"', page.read_text(encoding="utf-8")):
            if not target.startswith("data:"):
                assert (page.parent / target).is_file(), (page.name, target)


def test_images_that_cannot_be_read_are_left_out_and_listed(tmp_path, model, sae):
    class Broken(Drawn):
        def __getitem__(self, index):
            if index in (2, 5):
                raise ValueError("the file is <cut> off")
            return super().__getitem__(index)

    source = Broken(draw_images(12))
    out = tmp_path / "r"
    vp.report(sae, model, source, out)
    index = (out / "index.html").read_text()
    assert "2 of 12 images could not be read" in index
    assert "the file is &lt;cut&gt; off" in index
    data = read_data(out)
    shown = {number for latent in range(40) for number in numbers_in(data, latent)}
    assert shown.isdisjoint({2, 5})
    with pytest.raises(ValueError, match=r"cannot be read.*max_bad_images"):
        vp.report(sae, model, source, tmp_path / "s", max_bad_images=1)
    assert not (tmp_path / "s").exists()


def test_a_stream_of_images_is_read_in_order(tmp_path, model, sae):
    class Stream(Drawn):
        sequential = True
        read: ClassVar[list[int]] = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

        def label(self, index):
            assert index == self.read[-1], "the label is cheap right after its image alone"
            return f"label {index}"

        @property
        def labels(self):
            raise AssertionError("reads the whole stream")

        @labels.setter
        def labels(self, value):
            pass

    out = tmp_path / "r"
    vp.report(sae, model, Stream(draw_images(20)), out)
    assert Stream.read[:20] == list(range(20))
    assert Stream.read[20:] == sorted(Stream.read[20:])
    number = numbers_in(read_data(out), 0)[0]
    assert f"label {number}" in feature(out, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": {"s": [1.0] * 39}}, r"scores\['s'\] has shape \(39,\).*40 latents"),
        ({"scores": {"s": ["x"] * 40}}, "not a number"),
        ({"names": ["a"]}, "names= has 1 entries.*40 latents"),
        ({"names": {40: "a"}}, "names= names latent 40.*40, from 0"),
        ({"features": []}, "features= is empty"),
        ({"features": [-1]}, "latent -1"),
        ({"features": torch.tensor([1.5])}, "1.5, which is not the number"),
        ({"latents": torch.zeros(3, 40)}, r"\(3, 40\).*60 images"),
        ({"tokens": "register"}, "no 'register' token"),
        ({"tokens": "cats"}, "not a kind of token"),
        ({"n_top": 0}, "n_top=0"),
        ({"concepts": []}, "concepts= is empty"),
        ({"concepts": {"a": torch.zeros(5)}}, "5 dimensions.*embeds images in 16"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, model, sae, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        vp.report(sae, model, images, tmp_path / "r", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_sae_that_does_not_belong_to_the_model_is_refused(tmp_path, model, sae, images):
    with pytest.raises(ValueError, match="64 dimensions"):
        vp.report(topk_sae(d_in=64), model, images, tmp_path / "r")
    nowhere = topk_sae()
    nowhere.cfg.metadata = SAEMetadata()
    with pytest.raises(ValueError, match="does not say which hook it belongs to"):
        vp.report(nowhere, model, images, tmp_path / "r")
    with pytest.raises(ValueError, match="images= is empty"):
        vp.report(sae, model, [], tmp_path / "r")
    with pytest.raises(ValueError, match="neither model= nor latents="):
        vp.report(sae, None, images, tmp_path / "r")


def test_the_package_can_be_called_once_it_is_imported(tmp_path, model, sae, images):
    import vision_plugin.report as package

    out = package(sae, model, images[:4], tmp_path / "r", features=[0])
    assert out == (tmp_path / "r" / "index.html").resolve()
    assert out.is_file()
