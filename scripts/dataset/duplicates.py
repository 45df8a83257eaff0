"""Near duplicates between training and held-out rows: MinHash with banding, then exact Jaccard similarity.

Two texts are near duplicates if the Jaccard similarity of their sets of word 3-shingles reaches a threshold. MinHash
signatures (Broder 1997, "On the resemblance and containment of documents") cut into bands find the candidates; every
candidate is then checked exactly. With 16 bands of 4 hashes, a pair at similarity 0.8 is missed once in 5,000.
"""

import re

import numpy as np
import xxhash

BANDS, WIDTH = 16, 4
SHINGLE = 3  # words

# Scripts written without spaces count by character.
_words = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
).findall
_random = np.random.default_rng(20240229)  # fixed: signatures are no knob
_MULTIPLY = _random.integers(1, 2**63, BANDS * WIDTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADD = _random.integers(0, 2**63, BANDS * WIDTH, dtype=np.uint64)
_MIX = _random.integers(1, 2**63, WIDTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def normalized(text: str) -> str:
    """Text with case and white space folded: equal for exact copies."""
    return " ".join(text.casefold().split())


def shingles(text: str) -> np.ndarray:
    """uint64 [n], sorted and unique: hashes of the word 3-shingles of a text (of all its words, if it has fewer)."""
    words = _words(text.casefold())
    if len(words) < SHINGLE:
        parts = [" ".join(words) or normalized(text)]
    else:
        parts = [" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]
    return np.unique(np.array([xxhash.xxh3_64_intdigest(part.encode()) for part in parts], dtype=np.uint64))


def band_keys(texts: list[str]) -> np.ndarray:
    """uint64 [texts, BANDS]: texts that share a key in any band are candidates."""
    sets = [shingles(text) for text in texts]
    starts = np.cumsum([0] + [len(one) for one in sets[:-1]])
    flat = np.concatenate(sets)
    keys = np.empty((len(texts), BANDS), dtype=np.uint64)
    for band in range(BANDS):
        mixed = np.full(len(texts), band, dtype=np.uint64)
        for i in range(WIDTH):
            j = band * WIDTH + i
            hashed = flat * _MULTIPLY[j] + _ADD[j]
            hashed ^= hashed >> np.uint64(32)
            mixed = (mixed ^ np.minimum.reduceat(hashed, starts)) * _MIX[i]
        keys[:, band] = mixed
    return keys


def jaccard(left: str, right: str) -> float:
    """Exact Jaccard similarity of two texts' shingle sets, 0 to 1."""
    a, b = shingles(left), shingles(right)
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def copies_of_held_out(store, split: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Rows that repeat a row of a later split: train rows of eval or test, eval rows of test.

    Args:
        store: the rows.
        split: int8 [rows], 0 train, 1 eval, 2 test, negative for rows left out.
        threshold: Jaccard similarity from which two rows are copies; 1.0 for exact copies only.

    Returns:
        (number of the row, number of the held-out row it repeats), in order of the first.
    """
    keys, owners = [], []
    for numbers, rows in store.batches():
        held = split[numbers] >= 1
        if held.any():
            keys.append(band_keys([row.text for row, keep in zip(rows, held, strict=True) if keep]))
            owners.append(numbers[held])
    if not keys:
        return []
    owner = np.concatenate(owners)
    later = np.argsort(-split[owner], kind="stable")  # test first, so that equal eval rows do not crowd it out
    owner, index = owner[later], np.concatenate(keys)[later]
    order = np.argsort(index, axis=0, kind="stable")
    table = np.take_along_axis(index, order, axis=0)
    found = []
    for numbers, rows in store.batches():
        wanted = (split[numbers] == 0) | (split[numbers] == 1)
        chosen = [(number, row) for number, row, keep in zip(numbers, rows, wanted, strict=True) if keep]
        if not chosen:
            continue
        batch = band_keys([row.text for _, row in chosen])
        first = np.stack([np.searchsorted(table[:, b], batch[:, b], "left") for b in range(BANDS)], axis=1)
        last = np.stack([np.searchsorted(table[:, b], batch[:, b], "right") for b in range(BANDS)], axis=1)
        for i in np.flatnonzero((last > first).any(axis=1)):
            number, row = chosen[i]
            candidates = {
                int(owner[order[k, b]])
                for b in range(BANDS)
                for k in range(first[i, b], min(last[i, b], first[i, b] + 50))
            }
            for other in sorted(candidates):
                if split[other] <= split[number]:
                    continue
                text = store.row(other).text
                if normalized(text) == normalized(row.text) or (threshold < 1 and jaccard(text, row.text) >= threshold):
                    found.append((int(number), other))
                    break
    return found
