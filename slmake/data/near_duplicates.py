"""Near duplicates between training and held-out rows: MinHash with banding, then exact Jaccard similarity.

Two texts are near duplicates if the Jaccard similarity of their sets of word 3-shingles reaches a threshold. MinHash
signatures (Broder 1997, "On the resemblance and containment of documents") cut into bands find the candidates; every
candidate is then checked exactly. With 16 bands of 4 hashes, a pair at similarity 0.8 is missed once in 5,000.

Shingles that most rows share, as those of a long instruction, say nothing about two of them: they are left out.
"""

import functools

import numpy as np
import regex
import xxhash

BANDS, WIDTH = 16, 4
SHINGLE = 3  # words
FEWEST = 20  # rows, by which it can be told what most of them share
SAMPLE = 1000  # rows that are looked at for it
NONE = np.empty(0, np.uint64)

# Scripts written without spaces count by character. Marks belong to words, as Hindi's vowel signs, but for those that choose an emoji's
# looks. A symbol is a word (+, =, an emoji), and so is punctuation that calculates: between digits or brackets.
_words = regex.compile(
    r"""(?V1)[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]
    |[[\p{L}\p{N}\p{M}_]--[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\ufe00-\ufe0f]]+
    |\p{S}
    |(?<=[\d)]\s*)[*/%\-]+(?=\s*[\d(])""",
    regex.VERBOSE,
).findall
SEED = 20240229  # fixed: signatures are no knob
_random = np.random.default_rng(SEED)
_MULTIPLY = _random.integers(1, 2**63, BANDS * WIDTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADD = _random.integers(0, 2**63, BANDS * WIDTH, dtype=np.uint64)
_MIX = _random.integers(1, 2**63, WIDTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def normalized(text: str) -> str:
    """Text with case and white space folded: equal for exact copies."""
    return " ".join(text.casefold().split())


def shingles(text: str, common: np.ndarray = NONE) -> np.ndarray:
    """uint64 [n], sorted and unique: hashes of the word 3-shingles of a text (of all its words, if it has fewer).

    Args:
        common: shingles that are left out, but for a text that has no others.
    """
    words = _words(text.casefold())
    if len(words) < SHINGLE:
        parts = [" ".join(words) or normalized(text)]
    else:
        parts = [" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]
    hashes = np.unique(np.array([xxhash.xxh3_64_intdigest(part.encode()) for part in parts], dtype=np.uint64))
    own = np.setdiff1d(hashes, common, assume_unique=True) if len(common) else hashes
    return own if len(own) else hashes


def common_shingles(store, split: np.ndarray) -> np.ndarray:
    """uint64 [n], sorted: shingles that more than half of the rows have, judged by a sample; none where the rows are few."""
    numbers = np.flatnonzero(split >= 0)
    if len(numbers) < FEWEST:
        return NONE
    if len(numbers) > SAMPLE:
        numbers = np.sort(np.random.default_rng(SEED).choice(numbers, SAMPLE, replace=False))
    every = np.concatenate([shingles(store.row(number).text) for number in numbers])
    hashes, counts = np.unique(every, return_counts=True)
    return hashes[2 * counts > len(numbers)]


def band_keys(texts: list[str], common: np.ndarray = NONE) -> np.ndarray:
    """uint64 [texts, BANDS]: texts that share a key in any band are candidates."""
    sets = [shingles(text, common) for text in texts]
    starts = np.cumsum([0] + [len(shingle_set) for shingle_set in sets[:-1]])
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


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two texts' `shingles`, 0 to 1."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def copies_of_heldout(store, split: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Rows that repeat a row of a later split: train rows of eval or test, eval rows of test.

    In memory: 128 bytes for each held-out row, and the rows of one batch.

    Args:
        store: the rows.
        split: int8 [rows], 0 train, 1 eval, 2 test, negative for rows left out.
        threshold: Jaccard similarity from which two rows are copies; 1.0 for exact copies only.

    Returns:
        (number of the row, number of the held-out row it repeats), in order of the first.
    """
    heldout = np.flatnonzero(split >= 1)
    if not len(heldout):
        return []
    heldout = heldout[
        np.argsort(-split[heldout], kind="stable")
    ]  # test first, so that equal eval rows do not crowd it out
    repeated = _exact(store.text_hashes(), split, heldout)
    near = _NearCopies(store, split, heldout, threshold) if threshold < 1 else None
    copies = []
    for numbers, rows in store.batches():
        others = repeated[numbers]
        if near:
            rest = np.flatnonzero((others < 0) & ((split[numbers] == 0) | (split[numbers] == 1)))
            others[rest] = near.find(numbers[rest], [rows[i].text for i in rest])
        copies += [(int(number), int(other)) for number, other in zip(numbers, others, strict=True) if other >= 0]
    return copies


def _exact(hashes: np.ndarray, split: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    """int64 [rows]: the held-out row with the same normalized text in a later split, or -1."""
    heldout = heldout[np.argsort(hashes[heldout], kind="stable")]
    at = np.searchsorted(hashes[heldout], hashes)
    other = heldout[np.minimum(at, len(heldout) - 1)]
    return np.where((hashes[other] == hashes) & (split >= 0) & (split[other] > split), other, -1)


class _NearCopies:
    """The sorted band keys of the held-out rows, and the search in them."""

    MOST = 50  # candidates of one band

    def __init__(self, store, split: np.ndarray, heldout: np.ndarray, threshold: float):
        self.store, self.split, self.threshold = store, split, threshold
        self.common = common_shingles(store, split)
        # Half of each key is enough: every candidate is checked, and a false one is rare.
        self.keys = np.empty((BANDS, len(heldout)), dtype=np.uint32)
        self.owners = np.empty((BANDS, len(heldout)), dtype=np.int32)
        index = np.empty(len(split), dtype=np.int32)
        index[heldout] = np.arange(len(heldout), dtype=np.int32)
        for numbers, rows in store.batches():
            chosen = np.flatnonzero(split[numbers] >= 1)
            if len(chosen):
                self.keys[:, index[numbers[chosen]]] = self._keys([rows[i].text for i in chosen])
        for band, keys in enumerate(self.keys):
            order = np.argsort(keys, kind="stable")
            self.keys[band], self.owners[band] = keys[order], heldout[order]
        self._heldout_shingles = functools.lru_cache(maxsize=1024)(
            lambda number: shingles(store.row(number).text, self.common)
        )

    def _keys(self, texts: list[str]) -> np.ndarray:
        return (band_keys(texts, self.common).T >> np.uint64(32)).astype(np.uint32)

    def find(self, numbers: np.ndarray, texts: list[str]) -> np.ndarray:
        """int64 [rows]: a near copy of each row in a later split, or -1."""
        result = np.full(len(texts), -1)
        if not texts:
            return result
        keys = self._keys(texts)
        first, last = np.empty(keys.shape, np.int64), np.empty(keys.shape, np.int64)
        for band in range(BANDS):
            first[band] = np.searchsorted(self.keys[band], keys[band], "left")
            last[band] = np.searchsorted(self.keys[band], keys[band], "right")
        last = np.minimum(last, first + self.MOST)
        for i in np.flatnonzero((last > first).any(axis=0)):
            same = np.concatenate(
                [self.owners[b, first[b, i] : last[b, i]] for b in np.flatnonzero(last[:, i] > first[:, i])]
            )
            others, bands = np.unique(same[self.split[same] > self.split[numbers[i]]], return_counts=True)
            if not len(others):
                continue
            own = shingles(texts[i], self.common)
            for other in others[np.argsort(-bands, kind="stable")]:  # likely ones first
                if similarity(own, self._heldout_shingles(int(other))) >= self.threshold:
                    result[i] = other
                    break
        return result
