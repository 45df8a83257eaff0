"""The server with a real tokenizer and its own chat template, and its page in a real browser."""

import json

import openai
import pytest
import real_tokenizers
from browser import DRIVER, INSTALL, PROGRAM, opened, wait_for
from served import CHAT, TEXT, WEATHER, export, serving, wait_until

from slmake import generation
from slmake.tool_calls import CallForm

HI = [{"role": "user", "content": "Wie ist das Wetter in Köln? 👋"}]
THOUGHT = "<think>\n\n</think>\n\n"
pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> generation.Exported:
    """A tiny random Llama with Qwen3's tokenizer, exported."""
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = real_tokenizers.exported("qwen3", folder, length=2048)
    end = {"end_token": tokenizer.eos_token, "end_token_id": tokenizer.eos_token_id}
    chat = {**CHAT["chat"], "answer_prefix": THOUGHT}  # as prepare finds it
    return generation.Exported(folder / "onnx", {**CHAT, **end, "chat": chat})


def test_tools_of_real_templates_are_called(real):
    """Through OpenAI's client, with the form that the template has, and the result goes back through it."""
    with serving(real) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        fields = {"model": "tiny", "tools": [WEATHER], "tool_choice": "required", "max_tokens": 120}
        choice = client.chat.completions.create(messages=HI, **fields).choices[0]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Rome", "Oslo")
        assert 1 <= arguments["days"] <= 7
        turns = [*HI, choice.message.model_dump(exclude_none=True)]
        turns.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"temperature": 12})})
        again = client.chat.completions.create(model="tiny", messages=turns, tools=[WEATHER], max_tokens=8)
        asked = real.chat_prompt(
            [
                *HI,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{**call.model_dump(), "function": {"name": "weather", "arguments": arguments}}],
                },
                {**turns[-1]},
            ],
            [WEATHER],
        )
        assert again.usage.prompt_tokens == len(real.encode(asked))
        assert '"city"' in asked


def test_prompts_with_tools_are_those_of_transformers(real):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real.folder)
    turns = [{"role": "system", "content": "Be kind"}, *HI]
    expected = tokenizer.apply_chat_template(turns, tools=[WEATHER], tokenize=False, add_generation_prompt=True)
    assert real.chat_prompt(turns, [WEATHER]) == expected + THOUGHT


def test_the_form_of_calls_is_the_templates(real):
    assert CallForm.of(real) == CallForm("<tool_call>\n", "\n</tool_call>", "name", "arguments")


@pytest.mark.skipif(not (PROGRAM and DRIVER), reason=INSTALL)
def test_the_page_in_a_browser(tmp_path, base):
    """A chat, its second turn, a stop in the middle, a refusal that is shown, and no console error."""
    model = generation.Exported(export(base, tmp_path / "onnx"), CHAT)
    with serving(model) as (url, server), opened() as browser:
        browser.get(url)
        wait_for(browser, "document.getElementById('name').textContent == 'tiny'")

        def send(text: str) -> None:
            browser.execute_script(
                "document.getElementById('text').value = arguments[0]; document.getElementById('form').requestSubmit()",
                text,
            )

        def shown(kind: str) -> list[str]:
            script = "return [...document.querySelectorAll('#log .' + arguments[0])].map(x => x.textContent)"
            return browser.execute_script(script, kind)

        def settle() -> None:
            wait_for(browser, "document.getElementById('stop').disabled")

        send("Hi")
        settle()
        first = model.answer("Hi")
        assert (shown("user"), shown("assistant")) == (["Hi"], [first])
        assert browser.find_element("id", "speed").text.endswith(" tokens/s")
        send("Again")
        settle()
        turns = [("user", "Hi"), ("assistant", first), ("user", "Again")]
        asked = model.chat_prompt([{"role": role, "content": content} for role, content in turns])
        assert shown("assistant")[1] == model.decode(model.generate(model.encode(asked), 12))

        browser.execute_script("document.getElementById('tokens').value = 600")
        send("too much")
        settle()
        assert "the model reads 512" in shown("error")[0]
        assert browser.find_element("id", "text").get_attribute("value") == "too much"

        browser.execute_script(
            "document.getElementById('reset').click(); document.getElementById('tokens').value = 450"
        )
        assert shown("assistant") == []
        send("Hi")
        wait_for(browser, "!document.getElementById('stop').disabled")
        browser.execute_script("document.getElementById('stop').click()")
        settle()
        wait_until(lambda: not server.state()["active"])
        loud = [
            entry
            for entry in browser.get_log("browser")
            if entry["level"] == "SEVERE" and "400" not in entry["message"]
        ]
        assert loud == []


@pytest.mark.skipif(not (PROGRAM and DRIVER), reason=INSTALL)
def test_the_page_of_a_model_of_texts_and_with_a_key(tmp_path, base):
    """Each message stands alone, and the key of the settings is sent."""
    model = generation.Exported(export(base, tmp_path / "onnx"), TEXT)
    with serving(model, key="secret") as (url, _), opened() as browser:
        browser.get(url)
        wait_for(browser, "document.getElementById('name').textContent == 'tiny'")
        send = "document.getElementById('text').value = arguments[0]; document.getElementById('form').requestSubmit()"
        browser.execute_script(send, "We danced")
        wait_for(browser, "document.querySelector('#log .error')?.textContent.includes('the key is missing or wrong')")
        browser.execute_script("document.getElementById('key').value = 'secret'")
        for text in ("We danced", "We cried"):
            browser.execute_script(send, text)
            wait_for(browser, "document.getElementById('stop').disabled")
        answers = browser.execute_script(
            "return [...document.querySelectorAll('#log .assistant')].map(x => x.textContent)"
        )
        assert answers == [model.answer("We danced"), model.answer("We cried")]
