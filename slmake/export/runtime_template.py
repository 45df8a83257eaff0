"""Write an export's chat template as the runtime's template engine reads it: transformers reads more of Jinja.

The engine keeps the line breaks behind blocks and the white space before them (`trim_blocks` and `lstrip_blocks` of transformers), finds
no text in a text, lacks some methods and filters of text, writes floats with six digits and the empty objects and lists of indented JSON
over several lines, and takes an empty object for true. A template that needs nothing of it stays as it is, byte for byte.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from slmake import bounded_jinja
from slmake.generation import literal

FILE = "chat_template.jinja"
OPERATORS = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/", "FloorDiv": "//", "Mod": "%", "Pow": "**"}
OPERATORS |= {"And": "and", "Or": "or"}
COMPARISONS = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
# Names of what is always text, and of objects that may be empty.
TEXTS, OBJECTS = {"content", "role", "bos_token", "eos_token"}, {"arguments", "parameters", "properties"}
METHODS = {"capitalize", "title"}  # filters that the engine has as methods only
# Indented JSON. The engine has one set of arguments for all levels of a macro: a part is indented when it is written, line by line.
INDENTED = """{% macro indented_json(json_value, json_line) %}\
{% if json_value is mapping and json_value | length > 0 %}{{ "{" }}{% for key, part in json_value.items() %}\
{{ json_line + (key | tojson) + ": " + ((indented_json(part, json_line)).split("\\n") | join(json_line)) + ("" if loop.last else ",") }}\
{% endfor %}{{ "\\n}" }}\
{% elif json_value is sequence and json_value is not string and json_value is not mapping and json_value | length > 0 %}{{ "[" }}\
{% for part in json_value %}\
{{ json_line + ((indented_json(part, json_line)).split("\\n") | join(json_line)) + ("" if loop.last else ",") }}\
{% endfor %}{{ "\\n]" }}{% else %}{{ json_value | tojson }}{% endif %}{% endmacro %}"""
UNREAD = r"\\[uUx]|{%[-+]?\s*raw"  # escapes in texts, and a block, that it does not know


class Unknown(Exception):
    """A part of a template that is not written anew."""


def rewrite(folder: Path) -> None:
    """Rewrite the chat template of an export where the runtime would read it in another way; `rehearse` compares both."""
    file = folder / FILE
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        written = rewritten(text)
        if written != text:
            file.write_text(written, encoding="utf-8")


def rewritten(template: str) -> str:
    """A chat template that means the same and that the runtime reads as transformers does; as it is if that cannot be written."""
    import jinja2

    try:
        with bounded_jinja.bounded():
            environment = bounded_jinja.compiled("").environment
            tree = environment.parse(template)
            untrimmed = environment.overlay(trim_blocks=False, lstrip_blocks=False, keep_trailing_newline=True)
            writer = Writer(tree)
            text = writer.whole(tree)
            needed = writer.changed or re.search(UNREAD, template) or _data(tree) != _data(untrimmed.parse(template))
            return text if needed else template
    except (Unknown, jinja2.TemplateError, RecursionError, TimeoutError, MemoryError):
        return template  # one that is not applied, because rows are written by text_template; or rehearse finds what differs


def _data(tree) -> list[str]:
    """The texts between the tags."""
    from jinja2 import nodes

    return [node.data for node in tree.find_all(nodes.TemplateData) if node.data]


class Writer:
    """Writes a parsed template as text: every expression in parentheses, and white space that a reader could drop as an expression.

    Attributes:
        changed: whether it has written something in another way because the runtime does not know it.
        indents: whether it has written indented JSON.
    """

    def __init__(self, tree):
        from jinja2 import nodes

        self.changed = self.indents = False
        self.items = {  # names of what is iterated over: turns, parts and tools, which are no texts
            name.name for loop in tree.find_all(nodes.For) for name in [loop.target] if isinstance(name, nodes.Name)
        }

    def whole(self, tree) -> str:
        text = self.statements(tree.body)
        return INDENTED + text if self.indents else text

    def statements(self, body: list) -> str:
        return "".join(self._write(node) for node in body)

    def _write(self, node) -> str:
        """A statement or an expression."""
        kind = type(node).__name__
        if kind in OPERATORS:
            return f"({self._write(node.left)} {OPERATORS[kind]} {self._write(node.right)})"
        write: Callable | None = getattr(self, f"_{kind.lower()}", None)
        if write is None:
            raise Unknown(kind)
        return write(node)

    def _list_of(self, parts: Iterable) -> str:
        return ", ".join(self._write(part) for part in parts)

    def _arguments(self, node) -> str:
        if node.dyn_args or node.dyn_kwargs:
            raise Unknown("* or ** before an argument")
        return self._list_of([*node.args, *node.kwargs])

    # Statements

    def _output(self, node) -> str:
        return "".join(
            self._templatedata(part) if type(part).__name__ == "TemplateData" else f"{{{{ {self._write(part)} }}}}"
            for part in node.nodes
        )

    def _templatedata(self, node) -> str:
        plain = node.data == node.data.strip() and not any(mark in node.data for mark in ("{{", "{%", "{#"))
        return node.data if plain and not node.data.endswith("{") else f"{{{{ {literal(node.data)} }}}}"

    def _if(self, node) -> str:
        text, word = "", "if"
        for branch in (node, *node.elif_):
            text += f"{{% {word} {self._condition(branch.test)} %}}{self.statements(branch.body)}"
            word = "elif"
        return text + self._else(node.else_) + "{% endif %}"

    def _else(self, body: list) -> str:
        return f"{{% else %}}{self.statements(body)}" if body else ""

    def _for(self, node) -> str:
        if node.recursive:
            raise Unknown("recursive")
        chosen = f" if {self._write(node.test)}" if node.test else ""
        head = f"{{% for {self._target(node.target)} in {self._write(node.iter)}{chosen} %}}"
        return f"{head}{self.statements(node.body)}{self._else(node.else_)}{{% endfor %}}"

    def _target(self, node) -> str:
        return self._list_of(node.items) if type(node).__name__ == "Tuple" else self._write(node)

    def _assign(self, node) -> str:
        return f"{{% set {self._target(node.target)} = {self._write(node.node)} %}}"

    def _assignblock(self, node) -> str:
        if node.filter:
            raise Unknown("filter")
        return f"{{% set {self._target(node.target)} %}}{self.statements(node.body)}{{% endset %}}"

    def _macro(self, node) -> str:
        first = len(node.args) - len(node.defaults)
        given = ["" if i < first else f"={self._write(node.defaults[i - first])}" for i in range(len(node.args))]
        names = ", ".join(f"{self._write(name)}{value}" for name, value in zip(node.args, given, strict=True))
        return f"{{% macro {node.name}({names}) %}}{self.statements(node.body)}{{% endmacro %}}"

    def _callblock(self, node) -> str:
        if type(node.call.node).__name__ != "ExtensionAttribute":
            raise Unknown("call")
        return self.statements(node.body)  # {% generation %} marks what is trained, and writes nothing

    def _break(self, _) -> str:
        return "{% break %}"

    def _continue(self, _) -> str:
        return "{% continue %}"

    # Expressions

    def _name(self, node) -> str:
        return node.name

    def _nsref(self, node) -> str:
        return f"{node.name}.{node.attr}"

    def _const(self, node) -> str:
        return "none" if node.value is None else literal(node.value)

    def _list(self, node) -> str:
        return f"[{self._list_of(node.items)}]"

    def _tuple(self, node) -> str:
        return f"({self._list_of(node.items)}{',' * (len(node.items) == 1)})"

    def _dict(self, node) -> str:
        return f"{{{', '.join(f'{self._write(pair.key)}: {self._write(pair.value)}' for pair in node.items)}}}"

    def _keyword(self, node) -> str:
        return f"{node.key}={self._write(node.value)}"

    def _condexpr(self, node) -> str:
        otherwise = f" else {self._write(node.expr2)}" if node.expr2 else ""
        return f"({self._write(node.expr1)} if {self._condition(node.test)}{otherwise})"

    def _concat(self, node) -> str:
        return f"({' ~ '.join(map(self._as_text, node.nodes))})"

    def _not(self, node) -> str:
        return f"(not {self._condition(node.node)})"

    def _condition(self, node) -> str:
        """An expression of which only the truth counts."""
        kind, text = type(node).__name__, self._write(node) if _last_name(node) in OBJECTS else ""
        if kind in ("And", "Or"):
            return f"({self._condition(node.left)} {OPERATORS[kind]} {self._condition(node.right)})"
        if not text:
            return self._write(node)
        self.changed = True
        return f"(({text} | length) > 0 if {text} is mapping else {text})"

    def _as_text(self, node) -> str:
        """An expression that becomes text. JSON's floats are Python's."""
        text = self._write(node)
        if _last_name(node) in {None, *TEXTS}:
            return text
        self.changed = True
        return f"({text} | tojson if {text} is float else {text})"

    def _neg(self, node) -> str:
        return f"-{self._write(node.node)}"

    def _getattr(self, node) -> str:
        return f"{self._write(node.node)}.{node.attr}"

    def _getitem(self, node) -> str:
        return f"{self._write(node.node)}[{self._write(node.arg)}]"

    def _slice(self, node) -> str:
        start, stop, step = (part and self._write(part) for part in (node.start, node.stop, node.step))
        return f"{start or ''}:{stop or ''}" + (f":{step}" if step else "")

    def _test(self, node) -> str:
        given = self._arguments(node)
        return f"({self._write(node.node)} is {node.name}{f'({given})' if given else ''})"

    def _filter(self, node) -> str:
        if node.node is None:
            raise Unknown("filter")
        text = self._as_text(node.node) if node.name in ("string", "safe") else self._write(node.node)
        given = self._arguments(node)
        if node.name == "replace" and len(node.args) == 2 and not node.kwargs:
            return self._replaced(text, node)
        if node.name == "tojson" and given:
            return self._json(text, node) or f"({text} | tojson({given}))"
        if node.name in METHODS:
            self.changed = True
            return f"{text}.{node.name}()"
        return f"({text} | {node.name}{f'({given})' if given else ''})"

    def _json(self, text: str, node) -> str | None:
        """`tojson` with options, of which the engine knows `indent` alone; None for those that are not written in another way."""
        options = {option.key: getattr(option.value, "value", Unknown) for option in node.kwargs}
        indent = options.pop("indent", None)
        if node.args or options.pop("ensure_ascii", False) is not False or options or indent is Unknown:
            return None
        self.changed = True
        if indent is None:
            return f"({text} | tojson)"
        self.indents = True
        return f"indented_json({text}, {literal(chr(10) + (indent if isinstance(indent, str) else ' ' * indent))})"

    def _call(self, node) -> str:
        name = node.node.attr if type(node.node).__name__ == "Getattr" else None
        given = self._arguments(node)
        if name == "replace" and len(node.args) == 2 and not node.kwargs:
            return self._replaced(self._write(node.node.node), node)
        return f"{self._write(node.node)}({given})"

    def _replaced(self, text: str, node) -> str:
        """`replace` in the words of the engine."""
        self.changed = True
        old, new = map(self._write, node.args)
        return f"({text}.split({old}) | join({new}))"

    def _compare(self, node) -> str:
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin") and self._may_be_text(node.ops[0].expr):
            self.changed = True
            part, whole = self._write(node.expr), self._write(node.ops[0].expr)
            found = f"(({whole}.split({part}) | length) > 1 if {whole} is string else {part} in {whole})"
            return found if node.ops[0].op == "in" else f"(not {found})"
        return f"({self._write(node.expr)} {' '.join(map(self._write, node.ops))})"

    def _operand(self, node) -> str:
        return f"{COMPARISONS[node.op]} {self._write(node.expr)}"

    def _may_be_text(self, node) -> bool:
        kind = type(node).__name__
        return kind not in ("List", "Tuple", "Dict") and not (kind == "Name" and node.name in self.items)


def _last_name(node) -> str | None:
    """The name of a variable, or of the part of one that is looked at; None for another expression."""
    kind = type(node).__name__
    if kind == "Getitem":
        return str(getattr(node.arg, "value", ""))
    return node.name if kind == "Name" else node.attr if kind == "Getattr" else None
