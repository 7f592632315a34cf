from whalefall.data.draws import draw, draw_bits, generator


def test_draws_stay_what_they_were():
    """Prepared data and resumed runs depend on these."""
    assert draw_bits("rows", 0, 1) == 10249884509472431051
    assert draw("heldout", 0, "name") == 0.41690129454681113
    assert generator("document", 0, "name").integers(0, 1000, 4).tolist() == [384, 527, 269, 465]


def test_keys_of_other_parts_or_types_draw_otherwise():
    keys = [("a", 1), ("a", "1"), ("a1",), (1, "a"), ("a", 1, 0)]
    assert len({draw_bits(*key) for key in keys}) == len(keys)


def test_draws_are_uniform():
    draws = [draw("key", number) for number in range(4000)]
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert abs(sum(draws) / len(draws) - 0.5) < 0.025  # five standard deviations
