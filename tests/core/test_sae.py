"""The definition of encode and decode, against SAELens and by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from neuroscope_vllm.core.errors import SAEError
from neuroscope_vllm.core.sae import SAE, SAEInfo, check_fits

INFO = SAEInfo(source="x", format="saelens", architecture="jumprelu", d_model=2, width=3, layer=20)


def by_hand(threshold: list[float]) -> SAE:
    encoder = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    return SAE(
        encoder, torch.zeros(3), torch.tensor(threshold), encoder.t(), torch.tensor([1.0, 2]), INFO
    )


def test_the_threshold_is_strict_and_the_value_is_the_preactivation() -> None:
    sae = by_hand([0.5, 0.5, 0.5])
    x = torch.tensor([[0.5, 0.25], [0.75, 0.5], [-0.75, 0.0]])
    assert sae.encode(x).tolist() == [[0, 0, 0], [0.75, 1.0, 0], [0, 0, 0.75]]


def test_a_negative_threshold_lets_nothing_negative_through() -> None:
    assert by_hand([-1.0] * 3).encode(torch.tensor([[-0.5, 0.0]])).tolist() == [[0, 0, 0.5]]


def test_inactive_is_never_minus_zero() -> None:
    f = by_hand([0.5] * 3).encode(torch.tensor([[-0.0, -0.0]]))
    assert not torch.signbit(f).any()


def test_decode_adds_the_bias_back() -> None:
    sae = by_hand([0.5] * 3)
    assert sae.decode(torch.tensor([[2.0, 0.0, 1.0]])).tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_encode_works_in_fp32_whatever_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    f = by_hand([0.5] * 3).encode(torch.tensor([[0.75, 0.5]], dtype=dtype))
    assert f.dtype == torch.float32
    assert f.tolist() == [[0.75, 1.0, 0.0]]


def test_to_moves_every_tensor_and_keeps_features_contiguous(make_sae) -> None:
    moved = make_sae().to(dtype=torch.float64)
    for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec"):
        assert getattr(moved, name).dtype == torch.float64
    assert moved.W_enc.t().is_contiguous()


def test_fvu_is_zero_for_a_perfect_reconstruction_and_one_for_the_mean() -> None:
    # relu(x) - relu(-x) = x, so this SAE reconstructs everything.
    eye = torch.eye(2)
    perfect = SAE(
        torch.cat([eye, -eye], dim=1),
        torch.zeros(4),
        torch.zeros(4),
        torch.cat([eye, -eye]),
        torch.zeros(2),
        INFO,
    )
    x = torch.randn(50, 2)
    assert perfect.fvu(x) < 1e-12
    assert perfect.explained_variance(x) == pytest.approx(1.0)
    assert perfect.l0(x) == 2.0
    silent = SAE(
        perfect.W_enc, perfect.b_enc, torch.full((4,), 1e9), perfect.W_dec, x.mean(dim=0), INFO
    )
    assert silent.fvu(x) == pytest.approx(1.0)
    assert silent.l0(x) == 0.0


def test_a_fixed_scalar_folds_into_the_parameters_as_gemma_scope_says(make_sae, make_rows) -> None:
    """arXiv 2408.05147, appendix A: trained on x / C with b_dec subtracted, released for x."""
    trained, C = make_sae(), 7.5
    x = make_rows(trained, 200) * C
    draw = torch.Generator().manual_seed(0)
    b_dec = torch.randn(trained.d_model, generator=draw)
    normalised = x / C
    pre = (normalised - b_dec) @ trained.W_enc + trained.b_enc
    f = torch.where(pre > trained.threshold, pre.relu(), 0.0)
    decoded = f @ trained.W_dec + b_dec

    released = replace(
        trained,
        b_enc=C * trained.b_enc - C * (b_dec @ trained.W_enc),
        b_dec=C * b_dec,
        threshold=C * trained.threshold,
    )
    ours = released.encode(x)
    torch.testing.assert_close(ours, C * f, rtol=1e-5, atol=1e-3)
    assert 10 < (f > 0).sum() / len(f) < 200
    torch.testing.assert_close(released.decode(ours), C * decoded, rtol=1e-5, atol=1e-2)
    assert released.fvu(x) == pytest.approx(
        float(
            (normalised - decoded).square().sum() / (normalised - normalised.mean(0)).square().sum()
        ),
        rel=1e-4,
    )
    # Dividing released parameters' input once more is another function: here hardly anything fires.
    assert released.l0(normalised) < 0.2 * released.l0(x)


def test_reading_rms_is_dividing_by_it_first(make_sae, make_rows) -> None:
    """`sae_input` rms, the seed's: the same parameters, and a decoder that gives the RMS back."""
    sae = make_sae(threshold=1.0)
    x = make_rows(sae, 50)
    rms = x.square().mean(dim=1, keepdim=True).sqrt()
    f = sae.encode(x / rms)
    assert (f > 0).any()
    reading = sae.reading_rms()
    torch.testing.assert_close(reading.encode(x), f)
    torch.testing.assert_close(reading.encode(x * 40), f)
    torch.testing.assert_close(reading.decode(f, of=x), sae.decode(f) * rms)
    assert reading.W_enc is sae.W_enc
    assert sae.info.input_norm is None
    # Where each row is normalised already, its scale makes no difference.
    assert reading.reading_rms() is reading


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"d_model": 3, "num_layers": 26, "layer": 20}, "residuals of size 2 but this model's"),
        ({"d_model": 2, "num_layers": 20, "layer": 20}, "20 layers, numbered 0 to 19"),
        ({"d_model": 2, "num_layers": 26, "layer": -1}, "layer -1 does not exist"),
        ({"d_model": 2, "num_layers": 26, "layer": 12}, "trained on layer 20 and cannot read"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused(asked: dict[str, int], says: str) -> None:
    with pytest.raises(SAEError, match=says):
        check_fits(INFO, **asked)


def test_an_sae_that_fits_passes() -> None:
    check_fits(INFO, d_model=2, num_layers=26, layer=20)


def test_the_package_has_only_its_names() -> None:
    import neuroscope_vllm.core.sae as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loader'"):
        _ = package.loader


@pytest.mark.parametrize("module", ["errors", "sae.info", "labels"])
def test_torch_free_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, neuroscope_vllm.core.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
