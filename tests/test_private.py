"""Texts that are sent to others, without the places of this machine."""

from __future__ import annotations

import pytest

from vision_plugin._private import Places, name_of, without_paths

WHOLE = [
    ("/work/models/dino", "dino"),
    ("/work/models/dino/", "dino"),
    ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    ("https://hub.example/a/b", "https://hub.example/a/b"),
    ("C:\\Users\\joe\\model", "model"),
    ("open_clip:/home/joe/x", "open_clip:x"),
    ("1/2 and a/b", "1/2 and a/b"),
    ("see file:///home/joe/a.png", "see a.png"),
    ("cannot read /home/joe/a/b.png: bad", "cannot read b.png: bad"),
]


@pytest.mark.parametrize(("text", "shown"), WHOLE)
def test_no_place_of_this_machine_is_told(text: str, shown: str) -> None:
    assert without_paths(text) == shown
    assert name_of(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/joe smith/my photo.png", "my photo.png"),
        ("~/pictures/of mine", "of mine"),
        ("../joe/model", "model"),
        ("\\\\server\\joe\\model", "model"),
        ("/home/joe@work/model", "model"),
        ("/", "local"),
        ("fvu", "fvu"),
        ("monosemanticity@/home/joe smith/clip", "monosemanticity@clip"),
        ("monosemanticity@./joe/clip", "monosemanticity@clip"),
        ("monosemanticity@openai/clip", "monosemanticity@openai/clip"),
    ],
)
def test_a_path_is_its_last_name(text: str, shown: str) -> None:
    assert name_of(text) == shown
    assert Places().score_name(f"{text}/sae") == f"{shown}/sae"


def test_two_paths_that_end_alike_are_told_apart_and_one_keeps_its_name() -> None:
    places = Places()
    texts = ("fvu@/a/clip", "/b/clip", "/a/clip/", "/c/clip-2", "/d/clip", "/b/clip")
    found = [places.name_of(text) for text in texts]
    assert found == ["fvu@clip", "clip-2", "clip", "clip-2-2", "clip-3", "clip-2"]
    scores = {places.score_name(f"fvu@{path}/sae") for path in ("/a/clip", "/b/clip")}
    assert scores == {"fvu@clip/sae", "fvu@clip-2/sae"}
    assert {without_paths(score) for score in scores} == scores
