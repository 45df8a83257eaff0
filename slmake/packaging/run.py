"""Ask this model: python run.py "your text" (needs only: pip install onnxruntime-genai)."""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

here = Path(__file__).parent
form = json.loads((here / "prompt.json").read_text(encoding="utf-8"))
model = og.Model(str(here))
tokenizer = og.Tokenizer(model)
if form["prompt"] is None:  # a model for chats
    prompt = tokenizer.apply_chat_template(
        json.dumps([{"role": "user", "content": sys.argv[1]}]), add_generation_prompt=True
    )
else:
    prompt = form["prompt"].format(**dict(zip(form["fields"], sys.argv[1:], strict=True)))
ids = tokenizer.encode(prompt)
settings = og.GeneratorParams(model)
settings.set_search_options(max_length=len(ids) + form["longest_answer_tokens"], do_sample=False)
generator = og.Generator(model, settings)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
answer = [token for token in generator.get_sequence(0)[len(ids) :] if token != form["end_token_id"]]
print(tokenizer.decode(answer).strip())
