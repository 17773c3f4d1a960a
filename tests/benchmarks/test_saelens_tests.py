"""SAELens's tests meet the sparse classes under SAELens's names, and no other name of ours."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import sae_lens
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae, topk_sae

from benchmarks import saelens_tests
from vision_plugin import sae

SWAPPED = {
    "topk": (topk_sae, "TopKTraining"),
    "batchtopk": (batchtopk_sae, "BatchTopKTraining"),
    "matryoshka_batchtopk": (matryoshka_batchtopk_sae, "MatryoshkaBatchTopKTraining"),
}


def test_swap_leaves_the_names_that_saelens_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in SWAPPED.values():  # so that they are put back afterwards
        for place in (sys.modules[module.__name__], sae_lens):
            monkeypatch.setattr(place, f"{name}SAE", getattr(place, f"{name}SAE"))
    with mock.patch.dict(SAE_TRAINING_CLASS_REGISTRY):
        sae.register()
        stock = {
            name: entry
            for name, entry in SAE_TRAINING_CLASS_REGISTRY.items()
            if entry[0].__module__.startswith("sae_lens.")
        }
        saelens_tests.swap()
        assert SAE_TRAINING_CLASS_REGISTRY.keys() == stock.keys()
        for name, (sae_class, config_class) in stock.items():
            assert get_sae_training_class(name)[1] is config_class
            if name not in SWAPPED:
                assert get_sae_training_class(name)[0] is sae_class
        for name, (module, class_name) in SWAPPED.items():
            swapped = get_sae_training_class(name)[0]
            assert swapped.__name__ == f"Sparse{class_name}SAE"
            assert getattr(module, f"{class_name}SAE") is swapped
            assert getattr(sae_lens, f"{class_name}SAE") is swapped
