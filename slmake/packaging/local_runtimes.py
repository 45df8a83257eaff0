"""What Foundry Local and AI Toolkit need to open a package, so that they write the prompts of training.

Both take a folder with genai_config.json for a model if inference_model.json beside it has a name (ScanDirectory in
https://github.com/microsoft/Foundry-Local/blob/main/sdk_v2/cpp/src/catalog/local_model_scanner.cc). Prompts: the Foundry Local of that
source applies the tokenizer's chat template; the one that
https://learn.microsoft.com/azure/ai-foundry/foundry-local/how-to/how-to-compile-hugging-face-models describes fills PromptTemplate in.
"""

import json
from pathlib import Path

FILE = "inference_model.json"
CONTENT = "{Content}"  # where the user's text belongs in PromptTemplate


def write(folder: Path, name: str, form: dict) -> None:
    """Write inference_model.json into a package; for a model of one text, its prompt as the chat template, too.

    Args:
        name: what users call the model.
        form: prompt.json.
    """
    prompt = None
    if form["prompt"] is None:
        prompt = _chat_prompt(folder, form)
    elif len(form["fields"]) == 1:
        prompt = form["prompt"].format(**{form["fields"][0]: CONTENT})
        (folder / "chat_template.jinja").write_text(_template(prompt, form), encoding="utf-8")
    templates = {"assistant": CONTENT, "prompt": prompt} if prompt else None
    text = json.dumps({"Name": name, "PromptTemplate": templates}, indent=2, ensure_ascii=False)
    (folder / FILE).write_text(f"{text}\n", encoding="utf-8")


def _chat_prompt(folder: Path, form: dict) -> str:
    """The prompt of a chat of one turn of the user, behind the system turn of training."""
    from transformers import AutoTokenizer

    from slmake.data.chat import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    chat = form["chat"]
    template = ChatTemplate(tokenizer, chat["template_kwargs"], chat["date"])
    system = [form["system"]] if "system" in form else []
    turns = [*system, {"role": "user", "content": CONTENT}]
    return template.asked(turns, form.get("tools") or None) + chat.get("answer_prefix", "")


def _template(prompt: str, form: dict) -> str:
    """The prompt as a chat template that shows the last message's text."""
    texts = [f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else "" for text in prompt.split(CONTENT)]
    begin = "{{ bos_token }}" if form.get("begin_token_ids") else ""
    return begin + "{{ messages[-1]['content'] }}".join(texts)
