"""Scores of answers, seeded bootstrap intervals, and the distance between two models' logits. NumPy only."""

import unicodedata

import numpy as np

PERCENTILES = (2.5, 97.5)  # of a 95% interval
BLOCK = 64  # rows of logits that are compared at once
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"  # scripts without spaces between words
# What ROUGE-L counts: letters of these scripts one by one, words of all others; each with its vowel signs and accents.
WORD = rf"(?V1)[[{UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{N}}]--[{UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]*"


def held_out(dataset: dict) -> int:
    """How many answers the test split has, by what prepare recorded: of a conversation one for each trained turn, else one for each row."""
    return dataset.get("sequences", dataset["rows"])["test"]


def is_right(expected: str, answer: str) -> bool:
    """Whether an answer is the expected text, or a label: exact match, the whole answer without outer white space."""
    return answer == expected


def accuracy(expected: list[str], answers: list[str]) -> float:
    """Share of right answers."""
    return sum(is_right(e, a) for e, a in zip(expected, answers, strict=True)) / len(expected)


def macro_f1(expected: list[str], answers: list[str], labels: list[str]) -> float:
    """Unweighted mean over labels of F1 = 2 TP / (2 TP + FP + FN); an answer outside the labels is wrong for its own."""
    return float(_macro_f1(*_indicators(expected, answers, labels), np.ones((1, len(expected))))[0])


def per_class(expected: list[str], answers: list[str], labels: list[str]) -> dict[str, dict]:
    """Precision, recall, F1 and the number of rows of every label; 0 where a ratio has no denominator."""
    scores = {}
    for label in labels:
        hits = sum(e == label and is_right(label, a) for e, a in zip(expected, answers, strict=True))
        given, there = sum(is_right(label, a) for a in answers), expected.count(label)
        scores[label] = {
            "precision": round(hits / given, 6) if given else 0.0,
            "recall": round(hits / there, 6) if there else 0.0,
            "f1": round(2 * hits / (given + there), 6) if given + there else 0.0,
            "rows": there,
        }
    return scores


def confusion(expected: list[str], answers: list[str], labels: list[str]) -> list[list[int]]:
    """Counts [labels, labels + 1]: a row per expected label, a column per answer, the last for any other answer."""
    counts = [[0] * (len(labels) + 1) for _ in labels]
    for e, a in zip(expected, answers, strict=True):
        column = next((i for i, label in enumerate(labels) if is_right(label, a)), len(labels))
        counts[labels.index(e)][column] += 1
    return counts


def resamples(rows: int, samples: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Weights [samples, rows] of bootstrap resamples: how often each row was drawn (Efron 1979).

    Args:
        groups: int [rows], from 0: rows of one group (the answers of a conversation) are drawn together, since they are not independent.
    """
    count = rows if groups is None else int(groups[-1]) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples).astype(np.float64)
    return drawn if groups is None else drawn[:, groups]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of bootstrapped values; NaN is a resample that has no value."""
    low, high = np.nanpercentile(values, PERCENTILES)
    return round(float(low), 6), round(float(high), 6)


def bootstrapped(expected: list[str], answers: list[str], labels: list[str] | None, weights: np.ndarray) -> dict:
    """Accuracy (and macro-F1 for a classification) of every resample, float64 [samples] each."""
    right = np.array([is_right(e, a) for e, a in zip(expected, answers, strict=True)], dtype=np.float64)
    scores = {"accuracy": weights @ right / weights.sum(axis=1)}
    if labels:
        scores["macro_f1"] = _macro_f1(*_indicators(expected, answers, labels), weights)
    return scores


def _indicators(expected: list[str], answers: list[str], labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hits and errors of every row for every label, float64 [rows, labels] each."""
    wanted = np.array([[e == label for label in labels] for e in expected])
    given = np.array([[is_right(label, a) for label in labels] for a in answers])
    return (wanted & given).astype(np.float64), (wanted != given).astype(np.float64)


def _macro_f1(hits: np.ndarray, errors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    twice, wrong = 2 * (weights @ hits), weights @ errors
    total = twice + wrong
    # A label that a resample neither holds nor was answered has no F1: it is left out of that mean.
    f1 = np.divide(twice, total, out=np.zeros_like(total), where=total > 0)
    return f1.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)


def rouge_l(expected: list[str], answers: list[str]) -> float:
    """Mean ROUGE-L F-measure (Lin 2004), as torchmetrics computes it: words in lower case, without punctuation.

    Its own words are of the letters a to z only; these are of every script (see WORD), and the same for English.
    """
    import regex
    from torchmetrics.functional.text.rouge import rouge_score

    scores = rouge_score(
        answers,
        expected,
        rouge_keys="rougeL",
        normalizer=lambda text: unicodedata.normalize("NFC", text.lower()),
        tokenizer=regex.compile(WORD).findall,
    )
    return float(scores["rougeL_fmeasure"])


def parity(reference: np.ndarray, other: np.ndarray) -> dict:
    """How far two models' distributions of the first answer token lie apart. (Of a text, each position is a prompt of its own.)

    Args:
        reference: logits float32 [prompts, vocabulary] of the model that came first.
        other: the same of the model made from it.

    Returns:
        Mean and maximum Kullback-Leibler divergence KL(reference || other) in nats, share of prompts with the same most likely
        token, and the largest absolute difference of two logits.
    """
    divergences, largest = [], 0.0
    for start in range(0, len(reference), BLOCK):
        p, q = (x[start : start + BLOCK].astype(np.float64) for x in (reference, other))
        largest = max(largest, float(np.abs(p - q).max()))
        p, q = log_softmax(p), log_softmax(q)
        divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
    kl = np.maximum(np.concatenate(divergences), 0)
    return {
        "prompts": len(reference),
        "kl_mean": round(float(kl.mean()), 6),
        "kl_max": round(float(kl.max()), 6),
        "top1_agreement": round(float((reference.argmax(-1) == other.argmax(-1)).mean()), 6),
        "logit_diff_max": round(largest, 4),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def score(expected: list[str], answers: list[str], labels: list[str] | None, weights: np.ndarray) -> dict:
    """Accuracy with its interval; for a classification macro-F1, share of answers outside the labels, and what is confused
    with what; for open text ROUGE-L."""
    drawn = bootstrapped(expected, answers, labels, weights)
    scores: dict = {"accuracy": round(accuracy(expected, answers), 6)}
    scores["accuracy_low"], scores["accuracy_high"] = interval(drawn["accuracy"])
    if not labels:
        return scores | {"rouge_l": round(rouge_l(expected, answers), 6)}
    scores["macro_f1"] = round(macro_f1(expected, answers, labels), 6)
    scores["macro_f1_low"], scores["macro_f1_high"] = interval(drawn["macro_f1"])
    counts = confusion(expected, answers, labels)
    scores["outside_labels"] = round(sum(row[-1] for row in counts) / len(answers), 6)
    scores["per_class"] = per_class(expected, answers, labels)
    return scores | {"confusion": counts}


def summary(metrics: dict, names: list[str]) -> str:
    """The first score of metrics.json, for every model, as one line."""
    if metrics["test_rows"]:
        shown = ", ".join(f"{name} {metrics[name]['accuracy']:.1%}" for name in names)
        return f"accuracy on {metrics['test_rows']} test rows: {shown}"
    shown = ", ".join(f"{name} {metrics[name]['perplexity']:,.2f}" for name in names)
    return f"no dataset; perplexity of {metrics['texts']} fixed texts: {shown}"


def drop(
    expected: list[str], before: list[str], after: list[str], labels: list[str] | None, weights: np.ndarray
) -> dict:
    """What accuracy (and macro-F1) lose from one model to the next, with intervals of paired resamples."""
    old, new = (bootstrapped(expected, answers, labels, weights) for answers in (before, after))
    once = np.ones((1, len(expected)))
    was, is_ = (bootstrapped(expected, answers, labels, once) for answers in (before, after))
    scores = {}
    for name in old:
        scores[name] = round(float(was[name][0] - is_[name][0]), 6)
        scores[f"{name}_low"], scores[f"{name}_high"] = interval(old[name] - new[name])
    return scores
