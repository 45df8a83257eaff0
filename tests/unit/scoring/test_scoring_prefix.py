"""evaluate computes what all prompts begin with once; answers, choices, likelihoods and logits are those of whole prompts."""

import sys

import numpy as np
import pytest
from evaluate_script import TONES, make_dataset
from tiny import make_rows

from slmake import cli
from slmake.scoring import transformers_runner
from slmake.scoring.questions import Questions
from slmake.scoring.transformers_runner import TransformersRunner

INSTRUCTION = "Say in one word which of the four tones sadness, joy, fear and surprise the writer of this text has, and nothing else. "


@pytest.fixture(scope="module")
def questions(tmp_path_factory, base) -> Questions:
    template = INSTRUCTION + "Text: {phrase}\nTone:\n{tone}"
    folder = tmp_path_factory.mktemp("scored") / "made"
    return Questions(make_dataset(folder, base, make_rows(48), text_template=template, test_fraction=0.3))


def ask(taught, questions, monkeypatch, shared: int):
    """The run, and how many tokens the model was given."""
    given = []
    monkeypatch.setattr(transformers_runner, "SHARED", shared)
    runner = TransformersRunner(taught, batch_size=5)
    runner.model.register_forward_pre_hook(
        lambda module, arguments, options: given.append(options["input_ids"].numel()), with_kwargs=True
    )
    return runner.ask(questions, 4, cli.Job("evaluate", sys.stderr, None), "merged"), sum(given)


def test_a_shared_prefix_changes_no_figure(taught, questions, monkeypatch):
    assert len(questions.label_tokens) == len(TONES)
    whole, all_tokens = ask(taught, questions, monkeypatch, 10**6)
    shared, fewer_tokens = ask(taught, questions, monkeypatch, 1)
    assert shared.texts == whole.texts
    assert shared.choices == whole.choices
    np.testing.assert_allclose(shared.answer_nll, whole.answer_nll, atol=1e-4)
    np.testing.assert_allclose(np.vstack(shared.logits), np.vstack(whole.logits), atol=1e-4)
    assert fewer_tokens < 0.7 * all_tokens
