"""Diagnostics of the ensemble against numbers worked out by hand or by numpy."""

import numpy as np
import pytest
import torch

from asyppo_verl import order_statistics
from asyppo_verl.metrics import (
    correlation,
    ensemble_metrics,
    explained_variance,
    mask_metrics,
    moments,
    quantiles,
    selection_metrics,
    tied_share,
)


def everything(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bool)


def test_explained_variance_by_hand():
    returns = torch.tensor([0.0, 1.0, 0.0, 1.0])  # variance 1/4
    # Residuals 0.5, -0.5, 0.5, -0.5 around returns of half the size: also variance 1/4.
    cases = [(returns, 1), (torch.full((4,), 0.3), 0), (torch.tensor([-0.5, 1.5, -0.5, 1.5]), 0), (1 - returns, -3)]
    for values, expected in cases:
        _, cov = moments([values, returns], everything(4))
        assert explained_variance(cov, 0, 1) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("size", [0.0, 1e6, 1e30, 3e38])
def test_absurd_values_explain_nothing(size):
    """Values so large that verl's GAE, ``(r - V) + V``, leaves nothing of the rewards in the returns."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])
    for values in (torch.full((4,), size), torch.tensor([1.0, -1.0, 0.5, 0.25]) * size):
        _, cov = moments([values, (rewards - values) + values], everything(4))
        assert explained_variance(cov, 0, 1) <= 1e-6
    _, cov = moments([torch.full((4,), size), torch.zeros(4)], everything(4))
    assert explained_variance(cov, 0, 1) == 0


def test_correlation_is_the_mean_over_pairs():
    values = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    pairs = np.corrcoef(values.numpy())[np.triu_indices(4, 1)]
    assert correlation(moments(values, everything(200))[1]) == pytest.approx(pairs.mean(), abs=1e-12)
    opposite = torch.stack([values[0], -2 * values[0] + 1])
    assert correlation(moments(opposite, everything(200))[1]) == pytest.approx(-1)
    assert correlation(moments(torch.stack([values[0], torch.ones(200)]), everything(200))[1]) == 0


@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_moments_are_those_of_numpy_also_far_from_zero(mean, chunk, monkeypatch):
    monkeypatch.setattr(order_statistics, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(3, 500, generator=generator, dtype=torch.float64) + mean
    is_response = torch.rand(500, generator=generator) < 0.6
    vectors[:, ~is_response] = float("nan")
    means, cov = moments(vectors, is_response)
    seen = vectors[:, is_response].numpy()
    np.testing.assert_allclose(means.numpy(), seen.mean(axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(cov.numpy(), np.cov(seen, bias=True), atol=1e-9)


def test_quantiles_are_scores_of_response_tokens():
    score = torch.tensor([5.0, 100.0, 1.0, 4.0, 2.0, 3.0])
    is_response = torch.tensor([True, False, True, True, True, True])
    assert quantiles(score, is_response, (0.0, 0.2, 0.6, 1.0)) == [1.0, 1.0, 3.0, 5.0]


def test_observation_and_padding_tokens_are_never_looked_at():
    generator = torch.Generator().manual_seed(1)
    values, returns = torch.randn(2, 60, generator=generator), torch.randn(60, generator=generator)
    is_response = torch.rand(60, generator=generator) < 0.7
    value, sigma = values.mean(0), values.std(0, correction=0)
    expected = ensemble_metrics(values, value, sigma, returns, is_response)
    for tensor in (values, value, sigma, returns):
        tensor[..., ~is_response] = 1e6
    assert ensemble_metrics(values, value, sigma, returns, is_response) == expected
    assert {"asyppo/critic_0/explained_var", "asyppo/critic_1/explained_var", "asyppo/critic_correlation"} <= set(
        expected
    )


def test_one_critic_has_no_correlation():
    values = torch.randn(1, 8)
    flags = everything(8)
    assert "asyppo/critic_correlation" not in ensemble_metrics(values, values[0], values[0] * 0, values[0], flags)


def test_selection_metrics_by_hand():
    metrics = selection_metrics(
        torch.tensor([1.0, -3.0, 4.0, -8.0, 99.0]),
        torch.tensor([0.3, 0.2, 0.1, 0.2, 0.2]),
        torch.tensor([True, True, False, False, True]),
        torch.tensor([False, True, True, True, True]),
        torch.tensor([True, True, True, True, False]),
    )
    assert metrics == {
        "asyppo/adv_masked_fraction": 0.5,
        "asyppo/entropy_filtered_fraction": 0.25,
        "asyppo/sigma/tied": 0.5,
        "asyppo/adv_abs_kept": 2.0,
        "asyppo/adv_abs_masked": 6.0,
    }


def test_mask_metrics_by_hand():
    """Masked are |A| = 4 and 8 of a mean of 4; returns 1, 0 there and 1, 0 elsewhere: no correlation. Nothing masked: nothing."""
    advantages = torch.tensor([1.0, -3.0, 4.0, -8.0, 99.0])
    returns, is_response = torch.tensor([1.0, 0.0, 1.0, 0.0, 7.0]), torch.tensor([True, True, True, True, False])
    keep = torch.tensor([True, True, False, False, True])
    metrics = mask_metrics(advantages, returns, keep, is_response)
    assert metrics == pytest.approx({"asyppo/mask/adv_ratio": 1.5, "asyppo/mask/return_correlation": 0.0})
    on_right = mask_metrics(advantages, returns, returns == 0, is_response)
    assert on_right == pytest.approx({"asyppo/mask/adv_ratio": 2.5 / 4, "asyppo/mask/return_correlation": 1.0})
    assert mask_metrics(advantages, returns, keep | is_response, is_response) == {}
    assert mask_metrics(advantages * 0, returns, keep, is_response)["asyppo/mask/adv_ratio"] == 1


@pytest.mark.parametrize("chunk", [1, 2, 1 << 18])
def test_ties_by_hand(chunk, monkeypatch):
    monkeypatch.setattr(order_statistics, "CHUNK", chunk)
    sigma, is_response = torch.tensor([0.1, 0.2, 0.2, 0.3, 0.2, 0.2]), everything(6)
    is_response[4] = False
    for masked, expected in [([0], 0), ([0, 1], 1 / 2), ([0, 1, 2], 2 / 3), ([0, 1, 2, 5], 0), ([], 0), ([1], 1)]:
        keep = everything(6)
        keep[masked] = False
        assert tied_share(sigma, keep, is_response) == expected
