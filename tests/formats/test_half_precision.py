"""SAEs loaded in half precision: half the bytes, and sums that are added up in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch

import vision_plugin as vp
from vision_plugin.models import sparse_forward, sparse_latents

D_IN, D_SAE = 64, 900
KINDS: dict[str, Any] = {
    "topk": lambda: sae_lens.TopKSAE(
        sae_lens.TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=7, rescale_acts_by_decoder_norm=True)
    ),
    "jumprelu": lambda: sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)),
    "standard": lambda: sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)),
}


def _saved(kind: str, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    sae = KINDS[kind]()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn.abs() if name == "threshold" else 0.3 * drawn)
    sae.save_model(str(folder))
    return folder


def _exact(sae: Any, kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations and latents of the rounded weights, in float64."""
    p = {name: parameter.detach().double() for name, parameter in sae.named_parameters()}
    centred = x.double() - p["b_dec"] if sae.cfg.apply_b_dec_to_input else x.double()
    pre = centred @ p["W_enc"] + p["b_enc"]
    if kind != "topk":
        return pre, pre.relu() * (pre > p.get("threshold", torch.zeros(())))
    keys = pre * p["W_dec"].norm(dim=1)
    kept = torch.zeros_like(keys, dtype=torch.bool).scatter(1, keys.topk(7).indices, True)
    return keys, keys.relu() * kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_in_half_precision_computes_what_float64_does_but_for_rounding(
    kind, dtype, tmp_path
):
    sae = vp.load_sae(_saved(kind, tmp_path), dtype=dtype)
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert {parameter.dtype for parameter in sae.parameters()} == {half}
    x = torch.randn(33, D_IN, generator=torch.Generator().manual_seed(1)).to(half)
    pre, expected = _exact(sae, kind, x)
    latents, out = sparse_forward(sae, x)
    found = latents.to_dense().double()
    # An entry is rounded a few times, relative to the largest in its sums; the sums are not.
    unit = torch.finfo(half).eps * float(pre.abs().max())
    both = (found != 0) & (expected != 0)
    assert (found - expected)[both].abs().max() <= 2 * unit
    # What is chosen on one side alone lies within rounding of the boundary.
    apart = (found != 0) != (expected != 0)
    assert apart.float().mean() < 0.01
    W_dec, b_dec = sae.W_dec.detach().double(), sae.b_dec.detach().double()
    if kind == "topk":
        found = found / W_dec.norm(dim=1)
    exact = found @ W_dec + b_dec
    assert (out.double() - exact).abs().max() <= 4 * torch.finfo(half).eps * exact.abs().max()


def test_a_decoder_in_half_precision_adds_up_in_float32(tmp_path):
    """Thousands of ones: added up in bfloat16, they would stop counting at 256."""
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=2, d_sae=3000))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.b_enc.fill_(1.0)
        sae.W_dec.fill_(1.0)
    sae.save_model(str(tmp_path))
    half = vp.load_sae(tmp_path, dtype=torch.bfloat16)
    latents, out = sparse_forward(half, torch.zeros(3, 2, dtype=torch.bfloat16))
    assert out.float().tolist() == [[3008.0, 3008.0]] * 3  # 3,000 in bfloat16
    assert int(sparse_latents(half, torch.zeros(1, 2)).values.numel()) == 3000
    assert latents.values.dtype == torch.bfloat16
