"""Answers that are JSON: grammars for guidance, and the calls of functions in the form of a model's chat template.

`package` copies this file for serve.py. A model is a `slmake.generation.Exported`.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

# How guidance writes JSON: as json.dumps and templates do. Left free, a weak model may write white space until its tokens end.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
TAG = r"<[^<>\s]+>|\[[A-Z_]+\]"  # as chat templates mark calls: <tool_call>, Mistral's [TOOL_CALLS]
COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
BOUND = 1000  # items that a schema may count, and objects in it: the runtime makes as many rules of its grammar
MEMBERS = 10_000  # of all lists and objects in a schema
LARGEST = 10**15
STEPS = 10_000  # what all multipleOf of a schema may be together, as a product: remainders that the runtime tells apart
CALL_ID = "call00000"  # nine letters and digits, which Mistral's templates ask for


@dataclass(frozen=True)
class CallForm:
    """How a chat template writes the call of a function: a JSON object between two texts.

    Attributes:
        before: what stands before the object.
        after: what stands behind it.
        name: the key of the function's name.
        arguments: the key of its arguments.
        id: the key of the call's own name, where the template writes it.
        hidden: tags among these texts that are special tokens, which the runtime leaves out of an answer.
    """

    before: str
    after: str
    name: str
    arguments: str
    id: str | None = None
    hidden: tuple[str, ...] = ()

    @classmethod
    def of(cls, model) -> "CallForm":
        """The form of a model's chat template, found by writing a call with it.

        Raises:
            ValueError: the template shows no tools, or no calls.
        """
        file = model.folder / "chat_template.jinja"
        if model.form["prompt"] is not None or not file.exists() or "tools" not in file.read_text(encoding="utf-8"):
            raise ValueError("this model takes no tools: its chat template does not show them.")
        asked, given = [{"role": "user", "content": "?"}], {"key": "value"}
        function = {"name": "its_name", "description": "", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]  # with none, some templates write no calls
        call = {"id": CALL_ID, "type": "function", "function": {"name": "its_name", "arguments": given}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        said, prompt = {"role": "assistant", "content": "its_text"}, model.chat_prompt(asked, tools)
        text, plain = (model.chat_prompt([*asked, turn], tools, True).removeprefix(prompt) for turn in (called, said))
        before = plain.partition("its_text")[0]  # any answer, such as an empty think block: no part of a call
        text = text.removeprefix(before).split(model.form.get("end_token") or "\0")[0]
        for brace in re.finditer("{", text):
            try:
                written, end = json.JSONDecoder().raw_decode(text, brace.start())
            except ValueError:
                continue
            keys = {json.dumps(value): key for key, value in written.items()}
            if {'"its_name"', json.dumps(given)} <= keys.keys():
                before, after = text[: brace.start()], text[end:]
                tags = re.findall(TAG, before + after)
                hidden = tuple(tag for tag in tags if tag not in model.tokenizer.decode(model.tokenizer.encode(tag)))
                names = (keys['"its_name"'], keys[json.dumps(given)], keys.get(json.dumps(CALL_ID)))
                return cls(before, after, *names, hidden)
        raise ValueError("this model takes no tools: its chat template writes their calls in a form that is not known.")

    @property
    def mark(self) -> str:
        """The first tag or word of a call; empty where calls begin with their object."""
        return re.match(rf"\s*({TAG}|\S*)", self.before)[1]

    @property
    def opening(self) -> str:
        """What an answer's text shows before the first object of a call."""
        return self._shown(self.before)

    @property
    def listed(self) -> bool:
        """Whether the calls of an answer are one JSON list, as Mistral writes them."""
        return self.before.rstrip().endswith("[") and self.after.lstrip().startswith("]")

    def _shown(self, text: str) -> str:
        for tag in self.hidden:
            text = text.replace(tag, "")
        return text.strip()

    def guidance(self, model, tools: list[dict], optional: bool = False) -> tuple[str, str]:
        """What holds an answer to the call of one of some tools, with arguments that fit its schema.

        Args:
            tools: in OpenAI's form.
            optional: an answer may also be text without a call, and text may stand before calls.

        Raises:
            ValueError: see `refuse_endless`.
        """
        calls = []
        functions = [tool["function"] for tool in tools]
        schemas = list(map(schema_of, functions))
        for schema in schemas:
            refuse_endless(schema)
        for function, schema in zip(functions, named_apart(schemas), strict=True):
            properties = {self.name: {"const": function["name"]}, self.arguments: schema}
            properties |= {self.id: {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}} if self.id else {}
            calls.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                    "additionalProperties": False,
                }
            )
        schema = {"anyOf": calls, "x-guidance": COMPACT}
        before = self.before.lstrip().removeprefix(self.mark) if optional else self.before
        written = f"%json {json.dumps(schema)}"
        written += f' (", " {written})*' if self.listed else ""
        parts = [_literal(model, before), written, _literal(model, self.after.rstrip())]
        call = " ".join(filter(None, parts))
        return "lark_grammar", self._optional(model, call) if optional else f"start: {call}"

    def _optional(self, model, call: str) -> str:
        """The grammar of a text, or of calls.

        A call's first mark is no part of a text; from there the answer is a call. Where the mark is ordinary text, `suffix` ends the text
        before it (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).

        Args:
            call: what stands behind the mark.
        """
        if not self.mark:
            return f"start: TEXT | {call}\nTEXT: /\\s*[^{{\\s](?s:.*)/"
        mark, written = _literal(model, self.mark), re.escape(self.mark).replace("/", r"\/")
        single = mark.startswith("<[")
        opening = f"TEXT? {mark}" if single else "opening"
        rules = [f"start: TEXT | call+\ncall: {opening} {call}"]
        rules += [] if single else [f"opening[suffix={mark}]: /(?s:.*)/"]
        return "\n".join([*rules, f"TEXT: /(?s:.+)/ & ~/(?s:.*){written}(?s:.*)/"])

    def read(self, text: str, names: Sequence[str]) -> tuple[str, list[tuple[str, dict]]]:
        """The calls of known functions in an answer, as names and arguments, and the text outside of them."""
        before, after = (re.escape(self._shown(part)) for part in (self.before, self.after))
        outside, calls, position = [], [], 0
        starts = rf"{before or chr(92) + 'A'}\s*(?={{)" + (r"|(?<=})\s*,\s*(?={)" if self.listed else "")
        for start in re.finditer(starts, text):
            with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
                written, end = json.JSONDecoder().raw_decode(text, start.end())
                if start.start() >= position and written[self.name] in names:
                    calls.append((written[self.name], written.get(self.arguments) or {}))
                    outside.append(text[position : start.start()])
                    position = re.compile(rf"\s*(?:{after})?").match(text, end).end()
                    rest = text[position:].strip()
                    if self._shown(self.after).startswith(rest):  # the answer was cut in what closes a call
                        position = len(text)
        return "".join([*outside, text[position:]]).strip(), calls


def schema_of(function: dict) -> dict:
    """The JSON Schema of a function's arguments: any object where it has none."""
    return function.get("parameters") or {"type": "object"}


def named_apart(schemas: list[dict]) -> list[dict]:
    """JSON Schemas that stand in another one, each with a name of its own: their references to themselves then stay within them.

    What pydantic and others make of an enumeration or of a nested object is such a reference, `#/$defs/NAME`.
    """
    named: dict[str, dict] = {}
    for number, schema in enumerate(schemas):
        own = schema.get("$id")
        name = f"urn:schema:{number}" if not isinstance(own, str) or own in named else own
        named[name] = schema | {"$id": name}
    return list(named.values())


def _literal(model, text: str) -> str:
    """A text in a grammar for guidance; tags that are one token as that token, because special tokens have no text there."""
    parts = []
    for part in filter(None, re.split(f"({TAG})", text)):
        ids = model.tokenizer.encode(part)
        parts.append(f"<[{int(ids[0])}]>" if re.fullmatch(TAG, part) and len(ids) == 1 else json.dumps(part))
    return " ".join(parts)


def refuse_endless(schema: object) -> None:
    """Raise ValueError if a grammar of this schema would take all memory, or minutes in which nothing else is answered.

    Bounded are what it counts, its objects, all members of its lists and objects, and its `multipleOf` and `pattern`: what must hold
    together is one automaton, of as many states as the product of its parts'.
    """
    apart, together, patterns = (
        0.0,
        1.0,
        0,
    )  # multipleOf of all parts, and of those that must hold together; their patterns
    waiting, objects, members = [(schema, _joined_by_reference(schema))], 0, 0
    while waiting:
        part, joined = waiting.pop()
        joined = joined or (isinstance(part, dict) and "allOf" in part)
        for name, value in part.items() if isinstance(part, dict) else ():
            number = value if isinstance(value, int | float) else 0
            if name in (*COUNTS, "multipleOf") and not -LARGEST < number < LARGEST:
                raise _endless(f"{name} is a number of {len(str(value))} letters; none so large")
            if name in COUNTS and number > BOUND:
                raise _endless(f"{name} is {value}; at most {BOUND}")
            if name == "multipleOf" and number:
                steps = max(abs(number), 1 / abs(number))
                apart, together = apart + steps, together * (steps if joined else 1)
            patterns += name == "pattern" and joined and isinstance(value, str)
        objects += isinstance(part, dict)
        members += len(part) if isinstance(part, dict | list) else 0
        if objects > BOUND:
            raise _endless(f"of its objects at most {BOUND}")
        if members > MEMBERS:
            raise _endless(f"of all members of its lists and objects at most {MEMBERS}")
        if (steps := max(apart, together)) > STEPS:
            raise _endless(f"its multipleOf come to {steps:g}; at most {STEPS}")
        if patterns > 1:
            raise _endless("of the patterns under allOf, or beside a $ref, at most 1")
        waiting += [(each, joined) for each in _members(part)]


def _joined_by_reference(schema: object) -> bool:
    """Whether a schema says of a value what a definition elsewhere in it says, too: then all its parts may have to hold together."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            every = part["allOf"] if isinstance(part.get("allOf"), list) else []
            beside = {"pattern", "multipleOf", "allOf"} & part.keys()
            if ("$ref" in part and beside) or (
                any("$ref" in each for each in every if isinstance(each, dict)) and len(part) + len(every) > 2
            ):
                return True
        waiting += _members(part)
    return False


def _members(part: object) -> list:
    """What an object or a list of a schema holds; nothing of another value."""
    return [*part.values()] if isinstance(part, dict) else part if isinstance(part, list) else []


def _endless(reason: str) -> ValueError:
    return ValueError(f"answers cannot be held to this schema: {reason} can be followed.")


def json_guidance(schema: dict) -> tuple[str, str]:
    """What holds an answer to a JSON Schema.

    Raises:
        ValueError: see `refuse_endless`.
    """
    refuse_endless(schema)
    return "json_schema", json.dumps({"x-guidance": COMPACT} | schema)
