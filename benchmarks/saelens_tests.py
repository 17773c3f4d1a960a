"""Run SAELens's own tests with the sparse training classes in the place of SAELens's.

    git clone --branch v6.54.12 https://github.com/decoderesearch/SAELens
    python benchmarks/saelens_tests.py SAELens

SAELens's tests are not in its wheel, hence the checkout. Everything after the folder goes to
pytest; ``--stock`` runs the tests on SAELens's own classes instead, to compare with.

A test that fills the weights with ``torch.rand_like`` gets other weights than on SAELens's classes:
torch draws in the order of the memory, and the sparse classes store ``W_enc`` latent-major.
``test_BatchTopKTrainingSAE_save_and_load_inference_sae`` depends on the drawn numbers: 500 steps
bring the threshold close to the smallest activation kept, and it fails, on SAELens's classes, too,
where an activation lies between the two.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import sae_lens
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too


def swap() -> None:
    """Put the sparse classes where SAELens's tests find SAELens's; configurations stay theirs."""
    from vision_plugin.sae._prefix import PREFIX
    from vision_plugin.sae._sparse_register import CLASSES

    for sparse, sparse_config in CLASSES:
        stock_config = sparse_config.__bases__[-1]
        architecture = stock_config.architecture()
        stock, _ = SAE_TRAINING_CLASS_REGISTRY[architecture]
        SAE_TRAINING_CLASS_REGISTRY[architecture] = (sparse, stock_config)
        for module in (sys.modules[stock.__module__], sae_lens):
            setattr(module, stock.__name__, sparse)
    # The tests run over every registered name, and know how to configure only SAELens's own.
    for name in [name for name in SAE_TRAINING_CLASS_REGISTRY if name.startswith(PREFIX)]:
        del SAE_TRAINING_CLASS_REGISTRY[name]


def main(arguments: list[str]) -> int:
    """Run the tests of a checkout of SAELens."""
    stock = "--stock" in arguments
    folder, *more = [argument for argument in arguments if argument != "--stock"]
    if not (Path(folder) / "tests" / "saes").is_dir():
        raise SystemExit(f"{folder} has no tests/saes: name a checkout of SAELens")
    os.chdir(folder)
    sys.path.insert(0, str(Path.cwd()))  # its tests import tests.helpers
    if not stock:
        swap()
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "tests/saes", *more]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
