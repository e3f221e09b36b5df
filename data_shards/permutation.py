"""Keyed permutations of `range(n)` as pure functions: any element in O(1), with no table and no state.

A Feistel network over a power of two that holds `n`, walked until it lands inside `range(n)` (cycle walking; Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). Keys are mixed with SplitMix64's finalizer (Steele, Lea,
Flood, OOPSLA 2014). Everything is 64-bit integer arithmetic written out here, so that an order changes neither with
NumPy's version nor with the machine.
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_NUM_ROUNDS = 8
_ROUND_SALTS = [np.uint64((number + 1) * _GOLDEN % 2**64) for number in range(_NUM_ROUNDS)]
# Halves of one or two bits reach few of the permutations (a chi-square test over all orders of 5 elements shows it).
_MIN_DOMAIN_BITS = 6


def mix64(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, element by element: uint64 array in, new uint64 array out."""
    values = values ^ (values >> np.uint64(30))
    values *= _MULTIPLIER_1
    values ^= values >> np.uint64(27)
    values *= _MULTIPLIER_2
    values ^= values >> np.uint64(31)
    return values


def derive_keys(*words: int | np.ndarray) -> np.ndarray:
    """64-bit keys from integer words (ints, or int64/uint64 arrays of one length): a 1-d uint64 array.

    The order of the words matters; words equal modulo 2**64 are the same word.
    """
    keys = np.zeros(1, dtype=np.uint64)
    for word in words:
        if isinstance(word, np.ndarray):
            word_array = word.astype(np.uint64, copy=False)
        else:
            word_array = np.array([int(word) % 2**64], dtype=np.uint64)
        keys = mix64((keys + np.uint64(_GOLDEN)) ^ word_array)
    return keys


def permute(indices: np.ndarray, size: int | np.ndarray, *, keys: np.ndarray) -> np.ndarray:
    """Image of each index under the permutation of `range(size)` that its key names.

    `indices`: 1-d integers in `range(size)`; `keys` (uint64) and `size`: one for all or one an index; sizes up to
    2**53. Returns int64. Indices with equal keys and sizes are mapped by the same bijection. The loop runs about
    log2(len(indices)) times: a pass leaves at most half of the elements outside (more below 32 elements).
    """
    limits = np.atleast_1d(np.asarray(size)).astype(np.uint64)
    domain_bits = _domain_bits(limits)
    image = _feistel(np.asarray(indices).astype(np.uint64), domain_bits, keys)
    outside = np.flatnonzero(image >= limits)
    while outside.size:
        rest = [words if words.size == 1 else words[outside] for words in (limits, domain_bits, keys)]
        walked = _feistel(image[outside], rest[1], rest[2])
        image[outside] = walked
        outside = outside[walked >= rest[0]]
    return image.astype(np.int64)


def _domain_bits(sizes: np.ndarray) -> np.ndarray:
    """Bits of the power-of-two domain of each size (uint64 array, exact up to 2**53)."""
    _, bits = np.frexp((sizes - np.uint64(1)).astype(np.float64))
    return np.maximum(bits, _MIN_DOMAIN_BITS).astype(np.uint64)


def _feistel(values: np.ndarray, domain_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass through the network on domains of 2**domain_bits elements; overwrites and returns `values`."""
    low_bits = domain_bits // np.uint64(2)
    # The round function's best bits are its highest ones, so each half is cut from the top.
    low_shift, high_shift = np.uint64(64) - low_bits, np.uint64(64) - (domain_bits - low_bits)
    low = values & ((np.uint64(1) << low_bits) - np.uint64(1))
    high = values >> low_bits
    for number, salt in enumerate(_ROUND_SALTS):
        mixed = (high if number % 2 else low) ^ (keys + salt)
        mixed *= _MULTIPLIER_1
        mixed ^= mixed >> np.uint64(32)
        mixed *= _MULTIPLIER_2
        if number % 2:
            low ^= mixed >> low_shift
        else:
            high ^= mixed >> high_shift
    return (high << low_bits) | low
