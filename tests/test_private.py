"""Texts that are sent to others, without the places of this machine."""

from __future__ import annotations

import pytest

from vision_plugin._private import name_of, score_name, without_paths

WHOLE = [
    ("/work/models/dino", "dino"),
    ("/work/models/dino/", "dino"),
    ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    ("https://hub.example/a/b", "https://hub.example/a/b"),
    ("C:\\Users\\joe\\model", "model"),
    ("open_clip:/home/joe/x", "open_clip:x"),
    ("1/2 and a/b", "1/2 and a/b"),
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
    assert score_name(f"{text}/sae") == f"{shown}/sae"
