"""Ask a transformers model: answers, probabilities, logits for parity, latency."""

import copy
import math
import time
from collections.abc import Set
from pathlib import Path

import numpy as np

from slmake import cli, params
from slmake.params.evaluate import AnswerSampling
from slmake.scoring.questions import Questions
from slmake.scoring.run import WARM_UP, Run, empty_run, peak_bytes, percentiles, readable, reset_peak

CHUNK = 2**26  # largest number of logits (rows x tokens x vocabulary) in memory
LABELS_AT_ONCE = 3  # labels of a row that one pass scores
SHARED = 16  # tokens; to copy the cache of a shorter prefix takes longer than to compute it


def _sampler(sampling: AnswerSampling, device):
    """A function that draws token ids [rows] by logits [rows, vocabulary]."""
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    generator = torch.Generator(device).manual_seed(sampling.seed)
    warp = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    return lambda logits: torch.multinomial(warp(None, logits).softmax(-1), 1, generator=generator)[:, 0]


def _leads(logits) -> np.ndarray:
    """How far the highest logit is above the next one, float64 [...], of logits [..., vocabulary]."""
    best, second = logits.topk(2, dim=-1).values.double().unbind(-1)
    return (best - second).cpu().numpy()


def ends_of(model) -> list[int]:
    """The tokens at which an answer of a transformers model ends, as its export's does.

    Some are not the tokenizer's end token: of Phi-3 and Gemma, those that close a turn. A generation_config.json with other settings
    alone leaves them to config.json.
    """
    sources = (model.generation_config, model.config, model.config.get_text_config())
    named = next((ends for source in sources if (ends := getattr(source, "eos_token_id", None)) is not None), [])
    return named if isinstance(named, list) else [named]


class TransformersRunner:
    """A Hugging Face model, with or without an adapter, asked in batches of similar length in its own data type.

    Args:
        folder: the model's folder.
        batch_size: rows in a batch.
        latency_rows: rows that are asked again one by one to time what a user waits for; 0 for none.
    """

    def __init__(self, folder: Path, batch_size: int, latency_rows: int = 0):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from slmake.training.shared_prefix import only_attends

        reset_peak()
        began = time.monotonic()
        self.folder, self.batch_size, self.latency_rows = folder, batch_size, latency_rows
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # cuDNN plans its attention anew for every shape, and each batch has another: 8 s for 128 rows on an H200, 1.4 s without it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        with readable(folder):
            self.model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", trust_remote_code=False, local_files_only=True, use_safetensors=True
            ).to(self.device)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self.model.eval()
        config = self.model.config.get_text_config()
        self.vocabulary = config.vocab_size
        self.ends = frozenset(ends_of(self.model))
        # Tokens that can be removed from its cache again: those of a sliding window that is not full; none of a convolution's state.
        self.croppable = (getattr(config, "sliding_window", None) or math.inf) if only_attends(self.model) else 0
        self.prefix_tokens, self.prefix_cache = 0, None  # what all prompts begin with, while they are asked
        self.load_s = time.monotonic() - began

    def add_adapter(self, folder: Path, quantized: params.Finetune | None = None) -> None:
        """Put a LoRA adapter on the model, unmerged.

        Args:
            quantized: the settings of QLoRA, to give the base the 4-bit weights that the adapter was trained on.
        """
        from peft import PeftModel

        began = time.monotonic()
        if quantized:
            self._quantize(quantized)
        with readable(folder):
            self.model = PeftModel.from_pretrained(self.model, folder).to(self.device).eval()
        self.load_s += time.monotonic() - began

    def _quantize(self, section: params.Finetune) -> None:
        """Round the linear weights as QLoRA does, and as merge does with `onto: dequantized`."""
        from slmake.merging.merge import fake_quantize, linear_weights
        from slmake.training.model import pick_device, pick_dtype

        names = linear_weights(self.folder)
        dtype = pick_dtype(section.compute_dtype, pick_device())
        for name, weight in self.model.named_parameters():
            if name in names:
                weight.data = fake_quantize(weight.data, dtype, section.quant_type, section.double_quant).to(weight)

    def ask(self, questions: Questions, new_tokens: int, job: cli.Job, name: str, rows: list[int] | None = None) -> Run:
        """See `Runner`.

        Args:
            rows: ask these questions only; all by default.
        """
        import torch

        run, began = empty_run(questions), time.monotonic()
        chosen = range(len(run.texts)) if rows is None else rows
        order = sorted(chosen, key=lambda i: -len(questions.prompts[i]))
        seconds = {"prefill": 0.0, "decode": 0.0}
        tokens = {"prefill": 0, "decode": 0}
        with job.progress(len(order), f"rows of {name}") as bar, torch.inference_mode():
            self._share_prefix(questions, seconds, tokens)
            for start in range(0, len(order), self.batch_size):
                self._batch(questions, order[start : start + self.batch_size], new_tokens, run, seconds, tokens)
                bar.update(min(self.batch_size, len(order) - start))
            run.timings = {"load_s": self.load_s, "score_s": time.monotonic() - began}
            run.timings |= {f"{key}_tokens_per_s": tokens[key] / max(seconds[key], 1e-9) for key in seconds}
            self.prefix_tokens, self.prefix_cache = 0, None
            run.timings |= self._latency(questions, new_tokens)
        run.timings["peak_memory_bytes"] = peak_bytes()
        return run

    def sample(
        self, questions: Questions, new_tokens: int, sampling: AnswerSampling, job: cli.Job, name: str
    ) -> list[list[str]]:
        """Sampled texts, [n][scored rows]."""
        import torch

        texts: list[list[str]] = [[""] * questions.scored for _ in range(sampling.n)]
        order, step = range(questions.scored), max(1, self.batch_size // sampling.n)
        pick = _sampler(sampling, self.device)
        with job.progress(sampling.n * questions.scored, f"answers of {name}, sampled") as bar, torch.inference_mode():
            for start in order[::step]:
                chosen = order[start : start + step]
                logits, cache, mask, _ = self._prefill([questions.prompts[i] for i in chosen], [[]] * len(chosen))
                each = torch.arange(len(chosen), device=self.device).repeat_interleave(sampling.n)
                cache.reorder_cache(each)
                first, mask = logits[each, 0], mask[each]
                answers = self._continue(first, cache, mask, new_tokens, self.ends | {questions.end}, pick)
                for k, answer in enumerate(answers):
                    row, number = divmod(k, sampling.n)
                    texts[number][chosen[row]] = self.tokenizer.decode(answer, skip_special_tokens=True)
                bar.update(len(answers))
        return texts

    def _share_prefix(self, questions: Questions, seconds: dict, tokens: dict) -> None:
        """Compute what all prompts begin with (an instruction, a system prompt) once: each batch begins with its cache."""
        import torch

        from slmake.training.shared_prefix import common_length

        room = max(map(len, questions.prompts)) + max(map(len, questions.answers))
        common = common_length(prompt[:-1] for prompt in questions.prompts)  # the last token gives the answer's logits
        if common >= SHARED and room < self.croppable:
            ids, start = torch.from_numpy(questions.prompts[0][:common])[None].to(self.device), time.perf_counter()
            self.prefix_cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            self.prefix_tokens = common
            seconds["prefill"] += time.perf_counter() - start
            tokens["prefill"] += common

    def _latency(self, questions: Questions, new_tokens: int) -> dict:
        """Percentiles of the time that rows take one by one; empty without `latency_rows`."""
        count = min(self.latency_rows, questions.scored)
        chosen = [int(i) for i in np.linspace(0, questions.scored - 1, count)]
        waits = []
        for i in chosen[:1] * WARM_UP + chosen:
            start = time.perf_counter()
            logits, cache, mask, _ = self._prefill([questions.prompts[i]], [[]])
            self._continue(logits[:, 0], cache, mask, new_tokens, self.ends | {questions.end})
            waits.append(1000 * (time.perf_counter() - start))
        return percentiles(waits[WARM_UP:]) if chosen else {}

    def _prefill(self, rows: list[np.ndarray], answers: list[list[int]], cached: bool = True):
        """One pass over prompts and the answers behind them.

        Args:
            cached: make a cache.

        Returns:
            float32 logits [rows, 1 + longest answer, vocabulary] behind each prompt and each answer token; the cache and the
            mask [rows, longest prompt] of the prompts alone; seconds taken.
        """
        import torch

        longest, more = max(len(row) for row in rows), max(len(answer) for answer in answers)
        common = self.prefix_tokens
        ids = torch.zeros((len(rows), longest + more), dtype=torch.long)
        mask = torch.zeros_like(ids)
        mask[:, :common] = 1
        for k, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            # Prompts are padded on the left (behind the shared prefix), so that generation continues at their right end.
            # Padding on the right is not read.
            begin = longest - len(row) + common
            ids[k, begin:longest] = torch.from_numpy(row[common:])
            ids[k, longest : longest + len(answer)] = torch.tensor(answer, dtype=torch.long)
            mask[k, begin:] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        start = time.perf_counter()
        shared = copy.deepcopy(self.prefix_cache)
        if shared is not None:
            shared.reorder_cache(torch.zeros(len(rows), dtype=torch.long, device=self.device))
        out = self.model(
            input_ids=ids[:, common:],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, common:],
            past_key_values=shared,
            use_cache=cached or shared is not None,
            logits_to_keep=1 + more,
        )
        cache = out.past_key_values
        if more and cached:
            cache.crop(-more)
        return out.logits.float(), cache, mask[:, :longest], time.perf_counter() - start

    def _batch(
        self, questions: Questions, chosen: list[int], new_tokens: int, run: Run, seconds: dict, tokens: dict
    ) -> None:
        import torch

        answers = [questions.answers[i] for i in chosen]
        longest = max(len(answer) for answer in answers)
        room = max(len(questions.prompts[i]) for i in chosen) + longest
        # Score the expected answers in the prompt's own pass, where memory and cache allow it.
        one_pass = len(chosen) * longest * self.vocabulary <= CHUNK and room < self.croppable
        behind = [answer[:-1] if one_pass else [] for answer in answers]
        logits, cache, mask, taken = self._prefill([questions.prompts[i] for i in chosen], behind)
        seconds["prefill"] += taken
        tokens["prefill"] += int(mask[:, self.prefix_tokens :].sum()) + sum(map(len, behind))
        first = logits[:, 0]
        log_first = first.log_softmax(-1)
        if one_pass:
            scores = self._summed(logits.log_softmax(-1), answers)
        else:
            scores = self._score(log_first, cache, mask, list(range(len(chosen))), answers)
        run.answer_nll[chosen] = -scores
        if questions.label_tokens:
            picked, run.margins[chosen] = self._best_labels(questions, chosen, scores, log_first, cache, mask)
            for i, label in zip(chosen, picked, strict=True):
                run.choices[i] = label
        ends = self.ends | {questions.end}
        generated: list[list[int] | None] = [None] * len(chosen)
        if one_pass and tokens["decode"]:  # the first batch is generated token by token, to time it
            likeliest, leads = logits.argmax(-1).tolist(), _leads(logits)
            for k, answer in enumerate(answers):
                stop = next((n for n, token in enumerate(answer) if token in ends), len(answer))
                decided = min(stop + 1, new_tokens)
                if decided <= len(answer) and likeliest[k][:decided] == answer[:decided]:
                    generated[k] = answer[: min(stop, new_tokens)]
                    run.margins[chosen[k]] = min(run.margins[chosen[k]], *leads[k, :decided])
        rest = [k for k, answer in enumerate(generated) if answer is None]
        if rest:
            start = time.perf_counter()
            if len(rest) < len(chosen):
                cache.reorder_cache(torch.tensor(rest, device=self.device))
            least = np.full(len(rest), np.inf)
            continuations = self._continue(first[rest], cache, mask[rest], new_tokens, ends, least=least)
            seconds["decode"] += time.perf_counter() - start
            asked = [chosen[k] for k in rest]
            run.margins[asked] = np.minimum(run.margins[asked], least)
            tokens["decode"] += sum(map(len, continuations))
            for k, answer in zip(rest, continuations, strict=True):
                generated[k] = answer
        for k, i in enumerate(chosen):
            run.texts[i] = self.tokenizer.decode(generated[k], skip_special_tokens=True)
            if i < questions.compared:
                positions, own = questions.positions(i), logits[k]
                if positions[-1] >= len(own):  # of a text, that did not fit into the prompts' own pass
                    own = self._prefill([questions.prompts[i]], [answers[k][:-1]], cached=False)[0][0]
                run.logits[i] = own[positions].cpu().numpy()

    @staticmethod
    def _summed(logs, answers: list[list[int]]) -> np.ndarray:
        """Sum over each answer's tokens, float64 [rows], of log probabilities [rows, tokens, vocabulary]."""
        import torch

        return np.array(
            [
                float(logs[k, torch.arange(len(answer)), torch.tensor(answer)].double().sum())
                for k, answer in enumerate(answers)
            ]
        )

    def _best_labels(self, questions, chosen, scores, log_first, cache, mask) -> tuple[np.ndarray, np.ndarray]:
        """Index of the most likely label of each row, and how much less likely (in log probability, at least) the next one is.

        Args:
            scores: the log probability of the expected label, which is known already.
        """
        labels = questions.label_tokens
        # No label is more likely than its first token: only those whose first token is more likely than the best are scored.
        highest = log_first[:, [ids[0] for ids in labels]].double().cpu().numpy()
        scored = np.full_like(highest, -np.inf)
        names = {name: index for index, name in enumerate(questions.form["labels"])}
        expected = [names[questions.expected[i]] for i in chosen]
        rows = np.arange(len(chosen))
        scored[rows, expected] = highest[rows, expected] = scores
        while True:
            open_bounds = np.where(np.isneginf(scored), highest, -np.inf)
            nearest = np.argsort(-open_bounds, axis=1, kind="stable")[:, :LABELS_AT_ONCE]
            best = scored.max(1)
            pairs = [
                (k, int(label)) for k, few in enumerate(nearest) for label in few if open_bounds[k, label] > best[k]
            ]
            if not pairs:
                second, first = np.sort(np.column_stack([highest, np.full(len(rows), -np.inf)]), axis=1)[:, -2:].T
                return scored.argmax(1), first - second
            values = self._score(log_first, cache, mask, [k for k, _ in pairs], [labels[label] for _, label in pairs])
            for (k, label), value in zip(pairs, values, strict=True):
                scored[k, label] = highest[k, label] = value

    def _score(self, log_first, cache, mask, rows: list[int], answers: list[list[int]]) -> np.ndarray:
        """Log probability, float64 [rows], of an answer's tokens behind each chosen row's prompt; the cache stays as it is."""
        import torch

        longest = max(len(answer) for answer in answers) - 1
        total = np.array([float(log_first[row, answer[0]]) for row, answer in zip(rows, answers, strict=True)])
        if not longest:
            return total
        step = max(1, CHUNK // (longest * log_first.shape[-1]))
        for start in range(0, len(rows), step):
            part, wanted = rows[start : start + step], answers[start : start + step]
            ids = torch.zeros((len(part), longest), dtype=torch.long)
            for k, answer in enumerate(wanted):  # padded on the right, which is not read
                ids[k, : len(answer) - 1] = torch.tensor(answer[:-1])
            own = copy.deepcopy(cache)
            own.reorder_cache(torch.tensor(part, device=self.device))
            before = mask[part]
            out = self.model(
                input_ids=ids.to(self.device),
                attention_mask=torch.cat([before, torch.ones_like(ids, device=self.device)], dim=1),
                position_ids=before.sum(-1, keepdim=True) + torch.arange(longest, device=self.device),
                past_key_values=own,
                use_cache=True,
            )
            total[start : start + len(part)] += self._summed(
                out.logits.float().log_softmax(-1), [answer[1:] for answer in wanted]
            )
        return total

    def _continue(self, logits, cache, mask, new_tokens: int, ends: Set[int], pick=None, least=None) -> list[list[int]]:
        """The tokens of each row's answer, up to its end token (which is left out); the cache grows.

        Args:
            ends: tokens that end an answer.
            pick: token ids [rows] by logits [rows, vocabulary]; the most likely ones by default.
            least: float64 [rows], lowered to the smallest lead of a token of the answer, its end token included.
        """
        import torch

        answers: list[list[int]] = [[] for _ in range(len(mask))]
        running = [True] * len(mask)
        for step in range(new_tokens):
            token = pick(logits) if pick else logits.argmax(-1)
            if least is not None:
                least[running] = np.minimum(least, _leads(logits))[running]
            for k, number in enumerate(token.tolist()):
                running[k] = running[k] and number not in ends
                if running[k]:
                    answers[k].append(number)
            if step == new_tokens - 1 or not any(running):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1].float()
        return answers
