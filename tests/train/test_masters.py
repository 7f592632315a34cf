"""FP32 weights that are stored in halves."""

import pytest
import torch

from whalefall.train.masters import Masters


def masters() -> Masters:
    """One in halves, one in BF16 alone, and one in FP32."""
    return Masters(
        {"a": torch.zeros(5, 3, dtype=torch.bfloat16), "b": torch.zeros(4, dtype=torch.bfloat16),
         "c": torch.zeros(2)},
        {"a": torch.zeros(5, 3, dtype=torch.int16)},
    )  # fmt: skip


def test_what_is_put_in_comes_out() -> None:
    torch.manual_seed(0)
    values = {"a": torch.randn(5, 3), "b": torch.randn(4), "c": torch.randn(2)}
    stored = masters()
    stored.copy_(values)
    assert list(stored) == ["a", "b", "c"] and len(stored) == 3
    assert torch.equal(stored["a"], values["a"])
    assert torch.equal(stored["b"], values["b"].bfloat16())
    assert torch.equal(stored["c"], values["c"])
    torch.testing.assert_close(stored.weights["a"].float(), values["a"], rtol=2**-8, atol=0)


def test_bf16_values_are_taken_over() -> None:
    values = {name: torch.ones_like(value).bfloat16() for name, value in masters().items()}
    stored = masters()
    stored.copy_(values)
    assert all(torch.equal(stored[name], values[name].to(stored[name].dtype)) for name in stored)


def test_halves_are_joined_for_who_asks_and_others_given_as_they_are() -> None:
    stored = masters()
    assert stored["a"] is not stored["a"]
    assert stored["b"] is stored.weights["b"] and stored["c"] is stored.weights["c"]
    assert sum(tensor.nbytes for tensor in stored.tensors()) == 4 * 15 + 2 * 4 + 4 * 2


def test_other_names_are_refused() -> None:
    with pytest.raises(KeyError):
        masters()["d"]
