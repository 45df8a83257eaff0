"""The twenty texts that stand in for a dataset where params.yaml has no section prepare: a model is measured and calibrated with them.

Each is read in two parts: an opening, which is the prompt, and the rest, whose tokens the model must predict.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from slmake import outputs, params
from slmake.data.chat import ChatTemplate
from slmake.data.splits import SPLITS
from slmake.data.template import Conversations, FieldTemplate
from slmake.data.tokenize import IGNORED, Example, Tokenize, lengths_summary, load_tokenizer
from slmake.data.writer import Writer
from slmake.errors import UserError

LONGEST = 96  # tokens of a text; longer ones lose their end
OPENING = 0.25  # share of a text that is the prompt, at least
NEW_TOKENS = 32  # that a model writes behind an opening, to be timed
ANSWER_TOKENS = 256  # that a model answers a user with, at most

TEXTS = (
    "The ferry left the harbour at six, an hour late, because the captain would not sail before the fog had lifted. Nobody complained. "
    "The passengers stood at the rail with paper cups of coffee and watched the lighthouse come out of the grey, first as a shadow, then "
    "as a white tower with a red roof.",
    "Researchers have measured how much water a city tree gives back to the air on a hot day. A full-grown lime evaporates up to four "
    "hundred litres, which cools the street below it by as much as three degrees. Young trees, the study says, need about fifteen years "
    "before they have the same effect.",
    "A: Did you find the key?\nB: It was in the drawer, under the letters. I had looked there twice.\nA: And the letters? Did you read "
    "them?\nB: Only the one with your name on it. I thought you would not mind.\nA: I do mind. But since you have read it, tell me what "
    "he wants.\nB: He wants to come home.",
    "To make bread for two days you need 500 g of flour, 350 g of water, 10 g of salt and 3 g of dry yeast.\n\n1. Mix flour and water and "
    "let them rest for half an hour.\n2. Add salt and yeast and knead for ten minutes.\n3. Let the dough rise overnight in the "
    "refrigerator.\n4. Shape it, wait one hour, and bake it at 230 degrees.",
    'def moving_average(values: list[float], width: int) -> list[float]:\n    """The mean of every window of `width` neighbours."""\n'
    '    if width < 1:\n        raise ValueError("width must be at least 1")\n    result = []\n    for end in range(width, len(values) + 1):\n'
    "        window = values[end - width : end]\n        result.append(sum(window) / width)\n    return result\n",
    "SELECT customers.name, COUNT(orders.id) AS orders, SUM(orders.amount) AS total\nFROM customers\nLEFT JOIN orders ON orders.customer_id = "
    "customers.id\nWHERE customers.country = 'PT' AND orders.created_at >= '2023-01-01'\nGROUP BY customers.name\nHAVING SUM(orders.amount) > "
    "1000\nORDER BY total DESC\nLIMIT 10;",
    "async function loadUser(id) {\n  const response = await fetch(`/api/users/${id}`);\n  if (!response.ok) {\n    throw new Error(`user "
    "${id}: ${response.status}`);\n  }\n  const user = await response.json();\n  return { ...user, name: user.name.trim() };\n}\n",
    '{\n  "name": "garden-sensor",\n  "version": "1.4.2",\n  "interval_seconds": 60,\n  "sensors": [\n    {"id": 1, "kind": "temperature", '
    '"unit": "celsius"},\n    {"id": 2, "kind": "moisture", "unit": "percent"}\n  ],\n  "upload": {"enabled": true, "retries": 3}\n}\n',
    "Question: A train travels 180 kilometres in two hours and then 90 kilometres in one and a half hours. What is its average speed over "
    "the whole way?\nAnswer: The whole way is 180 + 90 = 270 kilometres. The whole time is 2 + 1.5 = 3.5 hours. The average speed is 270 / "
    "3.5, which is about 77 kilometres per hour.",
    "Dear Ms Okafor,\n\nthank you for your order of 12 March. The two lamps left our warehouse this morning and should reach you by Friday. "
    "The shade that you asked about is out of stock until May; if you would rather have the grey one, please write to us and we will send "
    "it without extra cost.\n\nKind regards,\nthe shop at the bridge",
    "| planet | radius (km) | moons | day |\n|---|---|---|---|\n| Mercury | 2,440 | 0 | 59 days |\n| Venus | 6,052 | 0 | 243 days |\n| Earth | "
    "6,371 | 1 | 24 hours |\n| Mars | 3,390 | 2 | 25 hours |\n| Jupiter | 69,911 | more than 90 | 10 hours |\n",
    "Als wir am Abend in das Dorf zurückkamen, brannte in keinem Haus mehr Licht. Nur vor der Bäckerei saß ein alter Mann auf der Bank und "
    "grüßte uns, als hätte er den ganzen Tag auf uns gewartet. Er fragte, ob wir den See gefunden hätten, und lachte, als wir nickten.",
    "Le marché ouvre à sept heures, mais les habitués arrivent bien avant. Ils savent que le fromager garde pour eux les meilleurs morceaux "
    "et que la marchande de fleurs, vers midi, donne ce qu'elle n'a pas vendu. Quand il pleut, tout le monde se retrouve sous la halle et "
    "l'on parle du temps.",
    "Mi abuela guardaba las fotografías en una caja de galletas, sin fechas ni nombres. Los domingos las sacaba todas sobre la mesa y nos "
    "contaba quién era cada uno. La historia cambiaba un poco cada vez, pero el final era siempre el mismo: todos habían sido felices "
    "aquel verano.",
    "Prima di partire controlla tre cose: le gomme, l'olio e l'acqua. La strada per il passo è stretta e sale per venti chilometri senza un "
    "distributore. In inverno la chiudono alla prima neve, spesso già a novembre; in estate ci passano più ciclisti che automobili.",
    "Поезд пришёл рано утром, когда на платформе ещё никого не было. Она взяла чемодан и пошла к выходу, стараясь не смотреть на часы. "
    "За углом стояло то самое кафе, и в окне, как десять лет назад, горела маленькая лампа.",
    "春天的时候,河边的柳树最先变绿。早上有人在树下打太极拳,也有人带着孩子放风筝。中午太阳很暖和,老人们坐在长椅上聊天,说今年的花比去年开得早。",
    "駅前の本屋は今月で閉店するそうだ。子どものころ、毎週土曜日に父とそこへ行き、一冊だけ好きな本を買ってもらった。店の人は私の名前を覚えていて、新しい本が入ると教えてくれた。",
    "في الصباح الباكر يفتح الخباز دكانه، وتملأ رائحة الخبز الشارع كله. يمر به التلاميذ في طريقهم إلى المدرسة، فيعطي كل واحد منهم قطعة صغيرة "
    "ويسأله عن دروسه.",
    "बारिश शुरू होते ही बच्चे गली में निकल आए। किसी ने काग़ज़ की नाव बनाई, किसी ने छाता उलटा करके पानी भर लिया। माँ खिड़की से आवाज़ देती रहीं, पर कोई घर लौटने को तैयार नहीं था।",
)


def divided(text: str, encode: Callable[[str], list[int]]) -> tuple[str, list[int], list[int]]:
    """A text's opening, and the tokens of both parts, cut where the opening's own tokens are the beginning of the whole text's.

    Raises:
        UserError: this tokenizer has no such place in it.
    """
    whole = encode(text)
    while len(whole) > LONGEST:
        text = text[: len(text) * LONGEST // (len(whole) + 1)]
        whole = encode(text)
    for end in range(int(len(text) * OPENING), len(text)):
        opening = encode(text[:end])
        if opening and opening == whole[: len(opening)] and len(opening) < len(whole):
            return text[:end], opening, whole[len(opening) :]
    raise UserError(
        "the base model's tokenizer cuts no text in two, so nothing can be measured without a dataset. Add the section prepare to params.yaml."
    )


def write_texts(base: Path, folder: Path) -> dict:
    """Write a dataset of the texts: train for calibration and test for scores are the same rows, and eval is empty.

    Returns:
        The statistics that `data.dataset.Preparation` gives of a dataset: no source, no rows, and the number of `texts`.
    """
    tokenizer = load_tokenizer(base)
    section = params.Prepare(source=Path(__file__).name, text_template="{text}{more}", max_seq_len=LONGEST)
    tokenize = Tokenize(section, tokenizer, FieldTemplate(section))
    examples = []
    for number, text in enumerate(TEXTS, 1):
        opening, head, tail = divided(text, tokenize.encode_prompt)
        labels = [IGNORED] * len(head) + tail
        examples.append(Example(number, opening, tokenizer.decode(tail), head + tail, labels, [], 0, 0))
    for split in SPLITS:
        with Writer(folder / f"{split}.parquet", section, 0, "line-by-line", chats=False) as writer:
            writer.write([] if split == "eval" else examples)
    outputs.write_json(folder / "prompt.json", prompt_of(tokenize, base))
    return {
        "source": {},
        "rows": dict.fromkeys(("read", *SPLITS), 0),
        "texts": len(TEXTS),
        "tokens": {"texts": sum(len(example.ids) for example in examples)},
        "length": lengths_summary(Counter(len(example.ids) for example in examples)),
        "labels": {split: {} for split in SPLITS},
        "truncated": 0,
        "examples": [],
        "duplicates": {"removed_from_train": 0, "removed_from_eval": 0, "within_train": 0},
    }


def prompt_of(tokenize: Tokenize, base: Path) -> dict:
    """prompt.json of a model without a dataset: what a user writes goes into the chat template if there is one that works, else in as it
    is. `texts` says how the texts are read, which are never in a chat."""
    section, tokenizer = tokenize.section, tokenize.tokenizer
    plain = {"add_special_tokens": True, **tokenize.inference()}
    written = tokenize.template.inference() | plain
    with contextlib.suppress(UserError, ValueError):  # no chat template, or one that does not show an answer as it is
        chat = ChatTemplate(tokenizer, section.chat_template_kwargs, section.chat_date)
        chat.split([{"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"}])
        template = Conversations("messages", chat, section.train_on)
        written = template.inference() | Tokenize(section, tokenizer, template).inference()
    context = outputs.read_json(base / "config.json", output=base).get("max_position_embeddings") or ANSWER_TOKENS * 2
    return written | {
        "end_token": tokenizer.eos_token,
        "end_token_id": tokenizer.eos_token_id,
        "labels": None,
        "longest_answer_tokens": min(ANSWER_TOKENS, context // 2),
        "texts": {**plain, "longest_answer_tokens": NEW_TOKENS},
    }
