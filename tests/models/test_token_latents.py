"""Latents of tokens in sparse form are the dictionary's own, and score as dense ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from torchmetrics import Metric

import vision_plugin as vp
from tests.metrics._cases import CASES, images
from vision_plugin import metrics
from vision_plugin.evaluation import EvaluationConfig, evaluate_config
from vision_plugin.images import open_images
from vision_plugin.kernels import SparseLatents
from vision_plugin.metrics import neuron_dictionary, random_dictionary
from vision_plugin.models import TokenLatents, encode_tokens
from vision_plugin.sae import Validator

N, TOKENS, D_IN, D_SAE = 5, 4, 12, 50
DICTIONARIES = {
    "topk": lambda: TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=6)),
    "topk, layer norm": lambda: TopKSAE(
        TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=6, normalize_activations="layer_norm")
    ),
    "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)),
    "gated": lambda: GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE)),
    "skip transcoder": lambda: SkipTranscoder(
        SkipTranscoderConfig(d_in=D_IN, d_out=7, d_sae=D_SAE, apply_b_dec_to_input=False)
    ),
    "random directions": lambda: random_dictionary(D_IN, D_SAE, k=6, seed=1),
    "neurons": lambda: neuron_dictionary(D_IN),
}


def dictionary(name: str) -> Any:
    torch.manual_seed(0)
    made = DICTIONARIES[name]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return made


@pytest.mark.parametrize("name", DICTIONARIES)
def test_they_are_what_the_dictionary_encodes_and_decodes(name: str) -> None:
    made, source = dictionary(name), torch.randn(N, TOKENS, D_IN)
    with torch.no_grad():
        expected, decoded = made.encode(source), made(source)
        found = encode_tokens(made, source)
    torch.testing.assert_close(found.dense, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reconstruction, decoded, rtol=1e-4, atol=1e-5)
    assert isinstance(found.rows, SparseLatents) == (name != "neurons")
    assert found.n_active == int((expected != 0).sum())
    for how, pooled in (("max", expected.amax(1)), ("mean", expected.mean(1))):
        one = found.pooled(how)
        assert one.is_sparse == (name != "neurons")
        torch.testing.assert_close(
            one.to_dense() if one.is_sparse else one, pooled, rtol=1e-4, atol=1e-5
        )
    for tokens in (None, torch.tensor([3, 1]), torch.tensor([], dtype=torch.int64)):
        of_some = expected if tokens is None else expected[:, tokens]
        rows = found.flat(tokens)
        rows = rows.to_dense() if rows.is_sparse else rows
        torch.testing.assert_close(rows, of_some.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_an_sae_over_heads_takes_them_joined() -> None:
    """SAELens's ``reshape_activations`` is for activations with an axis of heads."""
    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name="blocks.0.attn.hook_z")
    cfg = TopKSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=6, reshape_activations="hook_z", metadata=metadata
    )
    sae, source = TopKSAE(cfg), torch.randn(N, TOKENS, D_IN)
    with torch.no_grad():
        expected = sae.encode(source.view(N, TOKENS, 3, D_IN // 3))
    found = encode_tokens(sae, source)
    torch.testing.assert_close(found.dense, expected, rtol=1e-4, atol=1e-5)
    assert found.reconstruction.shape == source.shape
    with torch.no_grad():
        assert torch.equal(sae.encode(source.view(N, TOKENS, 3, D_IN // 3)), expected)


def test_negative_latents_stay_dense() -> None:
    sae = dictionary("topk")
    sae.hook_sae_acts_post.add_hook(lambda tensor, hook: -tensor)
    found = encode_tokens(sae, torch.randn(N, TOKENS, D_IN))
    assert isinstance(found.rows, torch.Tensor)
    assert "sparse_latents" not in found.entries("max")
    assert (found.pooled("max") <= 0).all()


class Plain(Metric):
    """A metric as another package writes it, which knows of dense latents alone."""

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, latents: torch.Tensor) -> None:
        assert not latents.is_sparse
        self.total += latents.amax(-1).sum()

    def compute(self) -> torch.Tensor:
        return self.total


class Sparse(Plain):
    sparse_latents = True

    def update(self, latents: torch.Tensor) -> None:
        assert latents.is_sparse
        self.total += latents.coalesce().values().amax()


@pytest.mark.parametrize("metric", [Plain, Sparse])
@pytest.mark.parametrize("level", ["image", "token", "patch"])
def test_a_metric_gets_the_form_that_it_takes(metric: type[Plain], level: str) -> None:
    found = encode_tokens(dictionary("topk"), torch.randn(N, TOKENS, D_IN))
    batch = {key: make() for key, make in (found.entries("max", torch.tensor([1, 2]))).items()}
    asks = type(metric.__name__, (metric,), {"latents_per": level})()
    metrics.feed(asks, batch)
    assert asks.compute() > 0


TAKES_SPARSE = [
    name
    for name, case in CASES.items()
    if getattr(metrics.get(case.registered), "sparse_latents", False)
]


@pytest.mark.parametrize("name", TAKES_SPARSE)
def test_a_metric_scores_sparse_latents_as_dense_ones(name: str) -> None:
    assert len(TAKES_SPARSE) >= 9
    known = images()
    tokens = known["token_latents"] * (known["token_latents"] > 0.3)
    rows = TokenLatents(tokens.flatten(0, 1), known["reconstruction"])
    where = tokens.flatten(0, 1).to_sparse_csr()
    sparse = TokenLatents(
        SparseLatents(
            where.values(), where.col_indices().int(), where.crow_indices().int(), tokens.shape[-1]
        ),
        known["reconstruction"],
    )
    patches = torch.arange(1, tokens.shape[1])
    results = []
    for latents in (rows, sparse):
        makers = latents.entries("max", patches)
        assert ("sparse_patch_latents" in makers) == (latents is sparse)
        metric = CASES[name].build()
        batch = {**known, **{key: make() for key, make in makers.items()}}
        for domain in ("home", "far") if name == "cross_domain" else ("home",):
            metrics.feed(metric, {**batch, "domain": domain})
        results.append(metric.compute())
    dense, found = (metrics.summary_of(result) for result in results)
    assert dense.keys() == found.keys()
    for key, value in dense.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), key


@pytest.mark.slow
def test_nothing_dense_is_made_of_a_sparse_sae(
    tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an evaluation by every metric on images nor a validation makes dense latents."""
    hook = "blocks.1.hook_resid_post"
    model, images = vp.load_model(tiny_clip), open_images("demo:24@3")
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=400, k=4))
    torch.nn.init.normal_(sae.W_enc)
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata.tokens = "all"

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("dense latents were made")

    monkeypatch.setattr(SparseLatents, "to_dense", refuse)
    monkeypatch.setattr(sae, "encode", refuse)
    monkeypatch.setattr(sae, "decode", refuse)
    cfg = EvaluationConfig(
        sae="sae",
        images="demo:24@3",
        output_path=str(tmp_path / "scores.json"),
        metrics=("all",),
        controls=("neurons", "random"),
        taxonomy="demo",
        masks="demo",
        domain_images=("demo:24@9",),
        steering_images=0,
        metric_options='{"localization": {"min_images": 1, "min_active_patches": 1}}',
    )
    result = evaluate_config(cfg, model=model, sae=sae, images=images, concepts=[])
    assert set(result.left_out) == {"steerability", "stability"}
    assert {"dissection", "localization", "sparse_probing", "sparsity"} <= result.results.keys()
    assert result.encoded.latents.layout == torch.sparse_csr
    names = ("uniqueness", "localization")
    scores = Validator(model, images, [hook], n_images=24, names=names).score(sae)
    assert scores["l0"] == pytest.approx(result.results["sparsity"]["sae"].l0)
    assert "uniqueness/mean_jaccard" in scores
