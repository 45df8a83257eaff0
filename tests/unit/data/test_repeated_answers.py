"""Conversations that begin alike: an answer that training has behind the very same turns is not scored."""

import json

import pytest
from test_conversation import assistant, call, prepared, tool, user  # noqa: F401

HELLO = [user("Hello there"), assistant("What do you need?")]


def talk(number: int, *more: dict) -> dict:
    """A conversation that begins as all do, and goes on as no other."""
    return {"messages": [*HELLO, user(f"Part {number} of bicycle {number * 7}?"), assistant(f"Shelf {number}."), *more]}


def files(folder, **splits: list[dict]) -> dict[str, str]:
    for name, rows in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return {name: str(folder / f"{name}.json") for name in splits}


OWN = {"duplicates": "remove", "near_duplicate_threshold": 0.8, "eval_fraction": 0.0, "test_fraction": 0.0}


def scored(built) -> list[tuple[int, str]]:
    return [(example["turns"][0], example["answer"]) for example in built.test]


def test_a_common_beginning_is_not_scored_and_trains_on(prepared, tmp_path, capsys):  # noqa: F811
    train, test = [talk(number) for number in range(6)], [talk(10), talk(11)]
    built = prepared(files(tmp_path, train=train, test=test), **OWN)
    assert scored(built) == [(4, "Shelf 10."), (4, "Shelf 11.")]
    assert [example["turns"] for example in built.train] == [[2, 4]] * 6
    assert built.report["duplicates"]["answers_not_scored"] == 2
    assert "2 answers of test conversations are not scored" in capsys.readouterr().err


def test_a_conversation_that_training_continues(prepared, tmp_path):  # noqa: F811
    """Rows made of every beginning of a conversation: none of the shorter one's answers is left, so the row is not scored at all."""
    more = [user("And how many are left of it there now?"), assistant("Two.")]
    source = files(tmp_path, train=[talk(1, *more), talk(2)], test=[talk(1), talk(3)])
    built = prepared(source, **OWN)
    assert scored(built) == [(4, "Shelf 3.")]
    assert built.report["rows"]["test"] == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([user("Hello there"), assistant("Yes?")], HELLO),  # another answer
        ([user("Hello you"), assistant("What do you need?")], HELLO),
        ([{"role": "system", "content": "Be short."}, *HELLO], HELLO),
        (
            [user("a"), call(), tool("3"), assistant("Three.")],
            [user("a"), call({"part": "pump"}), tool("3"), assistant("Three.")],
        ),
    ],
    ids=["answer", "question", "system", "call"],
)
def test_other_turns_or_another_answer_are_scored(prepared, tmp_path, first, second):  # noqa: F811
    end = [user("Is there a lamp for the back of it?"), assistant("Yes.")]
    rows = {
        "train": [{"messages": [*first, *end]}],
        "test": [{"messages": [*second, user("And a bell, in red or blue?"), assistant("No.")]}],
    }
    built = prepared(files(tmp_path, **rows), **OWN)
    answers = sum(turn["role"] == "assistant" for turn in rows["test"][0]["messages"])
    assert len(built.test) == answers
    assert "answers_not_scored" not in built.report["duplicates"]


def test_case_and_white_space_are_folded(prepared, tmp_path):  # noqa: F811
    shout = [user("HELLO  there"), assistant("What do you need? "), *talk(5)["messages"][2:]]
    built = prepared(files(tmp_path, train=[talk(1), talk(2)], test=[{"messages": shout}]), **OWN)
    assert scored(built) == [(4, "Shelf 5.")]


def test_answers_without_a_loss_are_not_learned(prepared, tmp_path):  # noqa: F811
    """With train_on last, training has the last answer alone; the test split is asked for that one, too."""
    source = files(tmp_path, train=[talk(1), talk(2)], test=[talk(3)])
    built = prepared(source, train_on="last", **OWN)
    assert scored(built) == [(4, "Shelf 3.")]
    assert "answers_not_scored" not in built.report["duplicates"]


def test_refuse_names_the_first(prepared, tmp_path, capsys):  # noqa: F811
    source = files(tmp_path, train=[talk(1), talk(2)], test=[talk(3), talk(4)])
    with pytest.raises(SystemExit):
        prepared(source, **OWN | {"duplicates": "refuse"})
    assert (
        "2 answers of test conversations are in training rows, too, behind the same turns; the first is"
        in capsys.readouterr().err
    )


def test_nothing_left_to_score(prepared, tmp_path, capsys):  # noqa: F811
    more = [user("And how many are left of it there now?"), assistant("Two.")]
    source = files(tmp_path, train=[talk(1, *more), talk(2)], test=[talk(1)])
    with pytest.raises(SystemExit):
        prepared(source, stages=("finetune", "evaluate"), **OWN)
    assert "all 2 answers of the test conversations are in training rows" in capsys.readouterr().err


def test_the_id_of_a_call_makes_no_other_answer(prepared, tmp_path):  # noqa: F811
    """Exports of real services have a new id in each call; a template does not write it."""

    def asked(ident: str, question: str) -> dict:
        made = call()
        made = {**made, "tool_calls": [{**made["tool_calls"][0], "id": ident}]}
        turns = [user("How many lamps?"), made, {**tool("3"), "tool_call_id": ident}, assistant("Three.")]
        return {"messages": [*turns, user(question), assistant("No.")]}

    rows = {
        "train": [asked("call_1", "And a bell, in red or blue?")],
        "test": [asked("call_2", "Is the shop open on a Sunday?")],
    }
    built = prepared(files(tmp_path, **rows), **OWN)
    assert [answer for _, answer in scored(built)] == ["No."]
    assert built.report["duplicates"]["answers_not_scored"] == 2
