"""The store of validated rows."""

import numpy as np
from prepared import flat

from slmake.data.store import Row, Store


def test_store_gives_rows_back_in_batches(tmp_path):
    rows = [Row(file="f", line=i, prompt=f"p {i}", answer="ab"[i % 2], text=f"text {i}") for i in range(1, 8)]
    with Store(tmp_path / "rows.sqlite", few_answers=2) as store:
        assert store.add(rows[:5]) == 5
        assert store.add(rows[5:]) == 2
        batches = list(store.batches(3))
        assert [indices.tolist() for indices, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]
        assert flat(found for _, found in batches) == rows
        assert store.row(4) == rows[4]
        assert store.answers() == ["b", "a"]
        assert store.answer_codes().tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert not (tmp_path / "rows.sqlite").exists()


def test_store_forgets_answers_when_there_are_many(tmp_path):
    with Store(tmp_path / "rows.sqlite", few_answers=2) as store:
        store.add(Row(file="f", line=i, prompt="p", answer=a, text=a) for i, a in enumerate("abca", 1))
        assert store.answers() is None
        assert store.answer_codes().tolist() == [0, 0, 0, 0]
        assert store.exact_duplicates(np.ones(4, dtype=bool)) == 1
