import torch

from model.draws import uniform_draws

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The splitmix64 finaliser in unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_the_reference_is_splitmix64() -> None:
    # First outputs of the published generator with the seed 1234567.
    outputs = [mix((1234567 + (i + 1) * GOLDEN) & MASK) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_equal_the_integer_reference() -> None:
    keys = [0, 1, -1, 123456789, 2**63 - 1, -(2**63)]
    for salt in (1, 2):
        draws = uniform_draws(torch.tensor(keys), 5, salt)
        expected = [
            [
                (mix((mix((mix((key * GOLDEN) & MASK) + salt) & MASK) + (i + 1) * GOLDEN) & MASK) >> 40) / 2**24
                for i in range(5)
            ]
            for key in keys
        ]
        torch.testing.assert_close(draws, torch.tensor(expected), rtol=0, atol=0)


def test_an_image_draws_the_same_alone_and_in_any_batch() -> None:
    keys = torch.tensor([5, 9, 5, 77])
    together = uniform_draws(keys, 100, salt=1)
    for row, key in enumerate(keys):
        torch.testing.assert_close(together[row], uniform_draws(key[None], 100, salt=1)[0], rtol=0, atol=0)
    torch.testing.assert_close(together[0], together[2], rtol=0, atol=0)


def test_more_slots_leave_the_first_ones_alone() -> None:
    key = torch.tensor([42])
    torch.testing.assert_close(uniform_draws(key, 200, 1)[:, :50], uniform_draws(key, 50, 1), rtol=0, atol=0)


def test_draws_are_uniform() -> None:
    draws = uniform_draws(torch.arange(200), 1000, salt=1)
    assert bool(((draws >= 0) & (draws < 1)).all())
    # 200,000 draws in 20 bins of 10,000: five standard deviations are 5 * sqrt(10,000 * 0.95) = 487.
    counts = torch.histc(draws, bins=20, min=0, max=1)
    torch.testing.assert_close(counts, torch.full((20,), 10_000.0), rtol=0, atol=487)


def test_neighbouring_keys_slots_and_salts_are_unrelated() -> None:
    draws = uniform_draws(torch.arange(300), 300, salt=1) - 0.5
    other = uniform_draws(torch.arange(300), 300, salt=2) - 0.5
    pairs = {
        "keys": (draws[1:], draws[:-1]),
        "slots": (draws[:, 1:], draws[:, :-1]),
        "salts": (draws, other),
        "key and slot": (draws, draws.T),
    }
    for name, (a, b) in pairs.items():
        off_diagonal = a != b
        correlation = (a * b)[off_diagonal].mean() * 12  # variance of the uniform distribution is 1/12
        # about 90,000 pairs: five standard deviations are 5 / 300, and sqrt(2) more where each pair counts twice
        assert abs(float(correlation)) < 0.025, name


def test_no_images_and_no_slots() -> None:
    assert uniform_draws(torch.zeros(0, dtype=torch.int64), 5, 1).shape == (0, 5)
    assert uniform_draws(torch.tensor([1]), 0, 1).shape == (1, 0)
