"""Near duplicates between training and held-out rows."""

import random

import numpy as np
import pytest

from slmake.data import near_duplicates
from slmake.data.near_duplicates import BANDS, band_keys, copies_of_heldout, normalized, shingles, similarity
from slmake.data.store import Row, Store

TRAIN, EVAL, TEST, LEFT_OUT = 0, 1, 2, -1


@pytest.fixture
def copies(tmp_path):
    """copies_of_heldout over [(split, text), …], in that order."""

    def run(rows: list[tuple[int, str]], threshold: float = 0.8) -> list[tuple[int, int]]:
        with Store(tmp_path / "rows.sqlite", few_answers=50) as store:
            store.add(
                Row(file="file", line=i, prompt=text, answer="answer", text=text) for i, (_, text) in enumerate(rows, 1)
            )
            return copies_of_heldout(store, np.array([split for split, _ in rows], dtype=np.int8), threshold)

    return run


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(count)]


def changed_at(text: list[str], place: int) -> list[str]:
    return [*text[:place], "changed", *text[place + 1 :]]


# Similarity


def jaccard(left: str, right: str) -> float:
    return similarity(shingles(left), shingles(right))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("a b c d", "a b c d", 1.0),
        ("a b c d", "a b c e", 1 / 3),  # {abc, bcd} and {abc, bce}
        ("a b c d e", "b c d e f", 1 / 2),  # {abc, bcd, cde} and {bcd, cde, def}
        ("a b c", "d e f", 0.0),
        ("One, two: THREE!", "one two three", 1.0),
        ("a b c a b c", "a b c a b", 1.0),  # sets: {abc, bca, cab} twice
        ("yes", "YES", 1.0),
        ("yes", "no", 0.0),
        ("yes please", "yes", 0.0),
        ("", "", 1.0),
    ],
)
def test_jaccard(left, right, expected):
    assert jaccard(left, right) == jaccard(right, left) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "count"),
    [("a b c d e", 3), ("a b c", 1), ("a b", 1), ("a", 1), ("", 1), ("?!", 1), ("a a a a a", 1)],
)
def test_shingles_are_sorted_and_unique(text, count):
    found = shingles(text)
    assert found.dtype == np.uint64
    assert len(found) == count
    assert found.tolist() == sorted(set(found.tolist()))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is 12 + 5?", "What is 12 - 5?"),
        ("12 * 5 =", "12 / 5 ="),
        ("(3 + 4) * 2", "(3 + 4) - 2"),
        ("2**3", "2*3"),
        ("12 − 5", "12 × 5"),
        ("if (x < 3) return", "if (x > 3) return"),
        ("my dog 😍", "my dog 😢"),
        ("लड़का आया", "लड़की आयी"),
    ],
)
def test_operators_emojis_and_vowel_signs_tell_texts_apart(copies, left, right):
    assert jaccard(left, right) < 0.8
    assert copies([(TRAIN, left), (TEST, right)]) == []
    assert copies([(TRAIN, f"{left}."), (TEST, left)]) == [(0, 1)]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Sign-up, and/or log in!", "sign up and or log in"),
        ("well - no * at all", "well no at all"),
        ("love ❤️ it", "love ❤ it"),  # with and without the sign that asks for a picture
        ("in COVID-19 times", "in covid 19 times"),
    ],
)
def test_punctuation_tells_no_texts_apart(left, right):
    assert jaccard(left, right) == 1.0


def test_exercises_that_differ_by_the_operator_only_all_stay(copies):
    exercises = [f"{a} {op} {b} =" for a in range(10, 20) for b in range(2, 12) for op in "+-*"]
    random.Random(8).shuffle(exercises)
    assert copies([(TEST if number % 5 == 0 else TRAIN, text) for number, text in enumerate(exercises)]) == []


def test_normalized_folds_case_and_space_only():
    assert normalized("  Straße\n und\tWEG ") == normalized("STRASSE und weg")
    assert normalized("joy!") != normalized("joy?")


# Candidates


def test_band_keys_depend_on_the_text_only():
    """The same text has the same keys in any batch, and one row of keys per text."""
    texts = ["a b c d e f", "x", "", "a b c d e g"]
    keys = band_keys(texts)
    assert keys.shape == (4, BANDS)
    assert keys.dtype == np.uint64
    for i, text in enumerate(texts):
        assert np.array_equal(band_keys([text])[0], keys[i])
    assert np.array_equal(band_keys(texts[::-1]), keys[::-1])


def test_recall_at_a_similarity_of_four_fifths():
    """Pairs at similarity 0.8 or just above share a band: at most 2 of 1,000 are missed (1 in 5,000 is expected)."""
    rng = random.Random(1)
    lefts, rights = [], []
    while len(lefts) < 1000:
        text = words(rng, rng.randint(29, 40))
        other = changed_at(text, rng.randint(2, len(text) - 3))
        if 0.8 <= jaccard(" ".join(text), " ".join(other)) <= 0.86:
            lefts.append(" ".join(text))
            rights.append(" ".join(other))
    shared = (band_keys(lefts) == band_keys(rights)).any(axis=1)
    assert shared.sum() >= 998


def test_few_candidates_among_different_texts():
    """At similarity 0.2, one pair in 40 shares a band."""
    rng = random.Random(2)
    lefts, rights = [], []
    for _ in range(1000):
        common = words(rng, 8)  # 6 shared shingles of 30 in all
        lefts.append(" ".join(common + words(rng, 12)))
        rights.append(" ".join(common + words(rng, 12)))
    assert 0.19 < jaccard(lefts[0], rights[0]) < 0.21
    shared = (band_keys(lefts) == band_keys(rights)).any(axis=1)
    assert shared.mean() < 0.05


# Copies


def test_exact_and_near_copies_are_found(copies):
    text = "the quick brown fox jumps over the lazy dog while the old cat sleeps in the warm sun"
    rows = [
        (TRAIN, "nothing like the others at all"),
        (TRAIN, text.upper()),
        (TRAIN, text.replace("sun", "shade")),  # 15 of 17 shingles shared
        (TRAIN, text.replace("dog", "hound")),  # 13 of 19
        (TEST, "yet another text of its own"),
        (TEST, text),
    ]
    assert jaccard(rows[2][1], text) == pytest.approx(15 / 17)
    assert jaccard(rows[3][1], text) == pytest.approx(13 / 19)
    assert copies(rows) == [(1, 5), (2, 5)]
    assert copies(rows, threshold=0.6) == [(1, 5), (2, 5), (3, 5)]
    assert copies(rows, threshold=0.9) == [(1, 5)]


def test_threshold_of_one_finds_exact_copies_only(copies):
    """The same words with other punctuation are no exact copy; other case and space are."""
    rows = [(TRAIN, "So, it works!"), (TRAIN, "so it  WORKS"), (TEST, "so it works")]
    assert copies(rows, threshold=1.0) == [(1, 2)]
    assert copies(rows, threshold=0.99) == [(0, 2), (1, 2)]


def test_agrees_with_comparing_every_pair(copies):
    """600 rows with mutated copies: the same train rows as a comparison of all pairs finds."""
    rng = random.Random(3)
    held = [words(rng, rng.randint(6, 30)) for _ in range(150)]
    train = [words(rng, 12) for _ in range(150)]
    for text in held + held:
        other = list(text)
        for _ in range(rng.randint(0, 2)):
            other = changed_at(other, rng.randrange(len(other)))
        train.append(other)
    rows = [(TRAIN, " ".join(text)) for text in train] + [(TEST, " ".join(text)) for text in held]
    expected = [
        number
        for number, text in enumerate(train)
        if any(jaccard(" ".join(text), " ".join(other)) >= 0.8 for other in held)
    ]
    assert 100 < len(expected) < 300
    assert [number for number, _ in copies(rows)] == expected


@pytest.mark.parametrize("text", ["Yes", "thank you", "🙂", "?", "42"])
def test_short_texts(copies, text):
    """Texts of fewer than three words are compared whole."""
    others = ["No", "thank them", "🙃", "!", "43", text + " not", "a " + text]
    rows = [*((TRAIN, other) for other in others), (TRAIN, text), (TEST, text)]
    assert copies(rows) == [(7, 8)]


def test_empty_texts_are_copies_of_each_other(copies):
    assert copies([(TRAIN, ""), (TRAIN, " \n"), (TRAIN, "a"), (TEST, "")]) == [(0, 3), (1, 3)]


CHINESE = "今天早上我在公园里遇见了一位多年不见的老朋友，我们坐在湖边的长椅上聊了很久，直到太阳下山才各自回家。"
JAPANESE = "きのう駅前の小さな喫茶店で、十年ぶりに高校時代の先生と会って、閉店まで昔の話をして笑いました。"


@pytest.mark.parametrize("text", [CHINESE, JAPANESE], ids=["Chinese", "Japanese"])
def test_copies_in_text_without_spaces(copies, text):
    rows = [(TRAIN, "昨天晚上他一个人在家里看了一部很长的电影。"), (TRAIN, text), (TEST, text)]
    assert copies(rows) == [(1, 2)]


@pytest.mark.parametrize("text", [CHINESE, JAPANESE], ids=["Chinese", "Japanese"])
def test_near_copies_in_text_without_spaces(copies, text):
    """One character of fifty changed: a near copy in any script, though there are no spaces between words."""
    rows = [(TRAIN, text[:20] + "犬" + text[21:]), (TEST, text)]
    assert copies(rows) == [(0, 1)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Я забыл ключи дома и ждал соседа до самого вечера у подъезда", "Я ЗАБЫЛ ключи дома и ждал соседа до самого вечера у подъезда"),
        ("मैं कल बाज़ार गया था", "मैं कल बाज़ार  गया था"),
    ],
    ids=["Cyrillic", "Devanagari"],
)  # fmt: skip
def test_other_scripts(copies, train, test):
    assert copies([(TRAIN, train), (TRAIN, test[: len(test) // 2]), (TEST, test)]) == [(0, 2)]


# What most rows share


def instructed(rng: random.Random, count: int, instruction: list[str], length: int = 10) -> list[str]:
    return [" ".join(instruction + words(rng, length)) for _ in range(count)]


def test_a_long_instruction_makes_no_copies(copies):
    """Rows are compared by their own words, however long the text is that most of them share; copies are still found."""
    rng = random.Random(5)
    instruction = words(rng, 120)
    texts = instructed(rng, 60, instruction)
    assert jaccard(texts[0], texts[1]) > 0.8
    near = " ".join(changed_at(texts[50].split(), 129))  # 9 of 11 shingles are shared
    rows = [(TRAIN, text) for text in texts[:40]] + [(TEST, text) for text in texts[40:]]
    assert copies(rows) == []
    assert copies([*rows, (TRAIN, near), (TRAIN, texts[55])], threshold=0.8) == [(60, 50), (61, 55)]
    assert copies(rows[:20] + rows[40:60], threshold=0.99) == []


def test_what_half_of_the_rows_share_counts(copies):
    """With few rows, no shingle counts as common."""
    rng = random.Random(6)
    shared, others = instructed(rng, 20, words(rng, 120)), instructed(rng, 20, [])
    splits = [TRAIN, TEST] * 10
    rows = list(zip(splits, shared, strict=True))
    assert len(copies([*rows, *zip(splits, others, strict=True)])) == 10
    assert copies(rows) == []
    assert len(copies(rows[:18])) == 9


def test_rows_of_shared_words_only_are_compared_whole(copies):
    """Thirty rows of one text: without what they share, nothing would be left of them."""
    text = "one and the same text for all of these rows"
    assert copies([(TRAIN, text)] * 20 + [(TRAIN, text + "!")] + [(TEST, text)]) == [(i, 21) for i in range(21)]


def test_what_most_rows_share_is_judged_by_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(near_duplicates, "SAMPLE", 30)
    rng = random.Random(7)
    instruction = words(rng, 20)
    with Store(tmp_path / "rows.sqlite", few_answers=50) as store:
        store.add(Row("file", i, text, "answer", text) for i, text in enumerate(instructed(rng, 300, instruction)))
        common = near_duplicates.common_shingles(store, np.zeros(300, np.int8))
        assert common.tolist() == shingles(" ".join(instruction)).tolist()
        assert len(near_duplicates.common_shingles(store, np.full(300, LEFT_OUT, np.int8))) == 0


# Which split gives way


def test_eval_gives_way_to_test_and_train_to_both(copies):
    rows = [(TEST, "in all three of them"), (EVAL, "in all three of them"), (TRAIN, "in all three of them")]
    assert copies(rows) == [(1, 0), (2, 0)]
    rows = [(EVAL, "in train and in eval"), (TRAIN, "in train and in eval"), (TEST, "something else here")]
    assert copies(rows) == [(1, 0)]


def test_copies_inside_one_split_stay(copies):
    text = "one and the same text"
    for split in (TRAIN, EVAL, TEST):
        assert (
            copies([(split, text), (split, text), (TEST if split == TRAIN else TRAIN, "another text of its own")]) == []
        )


def test_rows_left_out_are_neither_copies_nor_originals(copies):
    text = "one and the same text"
    assert copies([(LEFT_OUT, text), (TRAIN, text)]) == []
    assert copies([(LEFT_OUT, text), (TEST, text)]) == []


def test_no_held_out_rows(copies):
    assert copies([(TRAIN, "a"), (TRAIN, "a")]) == []


def test_many_equal_rows_hide_nothing(copies):
    """Sixty equal eval rows: each of them repeats the one test row."""
    rows = [(EVAL, "how are you today")] * 60 + [(TEST, "how are you today")]
    assert copies(rows) == [(i, 60) for i in range(60)]


@pytest.mark.parametrize("threshold", [0.99, 1.0])
def test_look_alikes_hide_no_exact_copy(copies, threshold):
    """Rows made from one frame share their band keys by the hundred; every exact copy is found all the same."""
    frame = " ".join(words(random.Random(4), 60))
    texts = [f"{frame} {i}" for i in range(300)]
    rows = [(TRAIN, text) for text in texts] + [(TEST, text) for text in texts]
    assert copies(rows, threshold) == [(i, 300 + i) for i in range(300)]


def test_rows_in_more_than_one_batch(copies):
    """A row is compared with held-out rows of every batch of 4,096."""
    rows = [(TRAIN, f"text number {i}") for i in range(5000)]
    rows[10] = (TEST, "text number 4999")
    rows[4998] = (TEST, "text number 11")
    assert copies(rows) == [(11, 4998), (4999, 10)]
