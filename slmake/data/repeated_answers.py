"""Answers of test conversations that training has behind the very same turns: scoring them would measure memory.

Two conversations may begin alike and end differently. As wholes they are no copies of each other, so both stay; but each answer of
the test split is scored by itself, and those that the model has learned word by word are not.
"""

import json
from array import array

import numpy as np
import xxhash

from slmake.data.conversation import Conversation
from slmake.data.near_duplicates import normalized
from slmake.data.store import Row, Store


def answer_keys(conversation: Conversation) -> dict[int, int]:
    """By index of each trained turn, a hash of it and of all turns and tools before it, with case and white space folded."""
    digest, keys = xxhash.xxh3_64(json.dumps(conversation.tools).encode()), {}
    for number, turn in enumerate(conversation.turns):
        # An id only links a call to its result, and exports of real services have a new one for each.
        calls = [{**call, "id": None} for call in turn.get("tool_calls") or []]
        same = {**turn, "content": normalized(turn["content"]), "tool_calls": calls, "tool_call_id": None}
        digest.update(json.dumps(same, sort_keys=True).encode())
        if number in conversation.trained:
            keys[number] = digest.intdigest()
    return keys


def repeated_answers(store: Store, split: np.ndarray) -> dict[int, list[int]]:
    """Answers of test conversations that training has, too, as indices of turns by number of the row.

    In memory: 8 bytes for each trained answer, and the rows of one batch.

    Args:
        split: int8 [rows], 0 train, 2 test.
    """
    learned = array("Q")
    for numbers, rows in store.batches():
        for number, row in zip(numbers, rows, strict=True):
            if split[number] == 0 and row.chat:
                learned.extend(answer_keys(Conversation.parse(row.chat)).values())
    known = np.unique(np.frombuffer(learned, dtype=np.uint64)) if learned else np.zeros(0, np.uint64)
    repeated = {}
    for numbers, rows in store.batches():
        for number, row in zip(numbers, rows, strict=True):
            if split[number] == 2 and row.chat:
                keys = answer_keys(Conversation.parse(row.chat))
                own = np.array(list(keys.values()), dtype=np.uint64)
                same = known[np.searchsorted(known[:-1], own)] == own if len(known) else np.zeros(len(own), bool)
                if same.any():
                    repeated[int(number)] = [turn for turn, learned_too in zip(keys, same, strict=True) if learned_too]
    return repeated


def without_answers(row: Row, turns: list[int]) -> Row:
    """A conversation of which some answers are not asked for."""
    conversation = Conversation.parse(row.chat)
    left = [turn for turn in conversation.trained if turn not in turns]
    return row._replace(chat=conversation._replace(trained=left).to_json(), answers=len(left))
