"""Every bad input that was tried, one entry each, with the key words of what a user reads then: test_bad_inputs.py tries them all.

A new one belongs here and nowhere else. What needs more than an input (a server, two files that do not fit, a build) is tested where
it is checked.
"""

import gzip
import os
import shutil

from package_script import change_bill, file_components, reseal, swap_for_link
from tiny import make_rows

SUM = "a" * 64
SECRET = "s3cr3tS3CR3T"
ROWS = make_rows(24)
CHAT = [{"role": "user", "content": "{phrase}"}, {"role": "assistant", "content": "{tone}"}]
BUILDER = {"type": "ModelBuilder", "precision": "int4"}
GPTQ = {"type": "gptq", "bits": 4, "sym": True, "group_size": 64}

# params.yaml: section, field, value, the whole message
PARAM_VALUES = [
    ("finetune", "lora_r", 0, "finetune.lora_r: 0 is not allowed: it should be greater than or equal to 1."),
    ("finetune", "lora_r", 2048, "finetune.lora_r: 2048 is not allowed: it should be less than or equal to 1024."),
    ("finetune", "max_steps", 10**16, "finetune.max_steps: a number beyond 10^15 is not allowed."),
    ("prepare", "max_samples", 10**400, "prepare.max_samples: a number beyond 10^15 is not allowed."),
    ("finetune", "lora_r", "16", 'finetune.lora_r: "16" is not allowed: it should be a valid integer.'),
    ("finetune", "lora_r", 16.5, "finetune.lora_r: 16.5 is not allowed: it should be a valid integer."),
    ("finetune", "lora_r", True, "finetune.lora_r: true is not allowed: it should be a valid integer."),
    ("finetune", "lora_r", None, "finetune.lora_r: null is not allowed: it should be a valid integer."),
    ("finetune", "lora_r", [16], "finetune.lora_r: [16] is not allowed: it should be a valid integer."),
    ("finetune", "learning_rate", "fast", 'finetune.learning_rate: "fast" is not allowed: it should be a valid number.'),
    ("finetune", "learning_rate", True, "finetune.learning_rate: true is not allowed: it should be a valid number."),
    ("finetune", "learning_rate", 0, "finetune.learning_rate: 0 is not allowed: it should be greater than 0."),
    ("finetune", "learning_rate", float("nan"), "finetune.learning_rate: NaN is not allowed: it should be a finite number."),
    ("finetune", "max_grad_norm", float("inf"), "finetune.max_grad_norm: Infinity is not allowed: it should be a finite number."),
    ("finetune", "double_quant", 1, "finetune.double_quant: 1 is not allowed: it should be a valid boolean."),
    ("finetune", "double_quant", "true", 'finetune.double_quant: "true" is not allowed: it should be a valid boolean.'),
    ("finetune", "seed", -1, "finetune.seed: -1 is not allowed: it should be greater than or equal to 0."),
    ("finetune", "seed", 2**32, "finetune.seed: 4294967296 is not allowed: it should be less than 4294967296."),
    ("finetune", "lora_dropout", 1.0, "finetune.lora_dropout: 1.0 is not allowed: it should be less than 1."),
    ("prepare", "test_fraction", 0.6, "prepare.test_fraction: 0.6 is not allowed: it should be less than or equal to 0.5."),
    ("prepare", "max_seq_len", 7, "prepare.max_seq_len: 7 is not allowed: it should be greater than or equal to 8."),
    ("prepare", "source_max_len", 7, "prepare.source_max_len: 7 is not allowed: it should be greater than or equal to 8."),
    ("prepare", "near_duplicate_threshold", 0.5, "prepare.near_duplicate_threshold: 0.5 is not allowed: it should be greater than 0.5."),
    ("prepare", "strategy", "line by line", "prepare.strategy: \"line by line\" is not allowed: choose 'line-by-line', 'packing' or 'join'. Did you mean `line-by-line`?"),
    ("quantize", "precision", "int5", "quantize.precision: \"int5\" is not allowed: choose 'int4', 'int8', 'fp16' or 'fp32'. Did you mean `int8`?"),
    ("quantize", "precision", "bf16", "quantize.precision: \"bf16\" is not allowed: choose 'int4', 'int8', 'fp16' or 'fp32'. Did you mean `fp16`?"),
    ("quantize", "block_size", 48, "quantize.block_size: 48 is not allowed: choose 16, 32, 64, 128 or 256."),
    ("quantize", "block_size", "32", 'quantize.block_size: "32" is not allowed: choose 16, 32, 64, 128 or 256. Did you mean `32`?'),
    ("fetch_model", "trust_remote_code", True, "fetch_model.trust_remote_code: true is not allowed: choose False."),
    ("gates", "min_accuracy", 80, "gates.min_accuracy: 80 is not allowed: it should be less than or equal to 1."),
    ("package", "license_files", [], "package.license_files: [] is not allowed: it should have at least 1 item, not 0."),
    ("merge", 7, 1, "merge.7: unknown name. Known here: dtype, onto."),
    ("merge", True, 1, "merge.true: unknown name. Known here: dtype, onto."),
    ("all", "stages", "finetune", 'all.stages: "finetune" is not allowed: it should be a valid list.'),
    ("all", "stages", ["finetune", "marge"], "all.stages.1: \"marge\" is not allowed: choose 'rehearse', 'finetune', 'merge', 'quantize', 'evaluate', 'gates', 'package', 'report' or 'publish'. Did you mean `merge`?"),
]  # fmt: skip

# params.yaml: sections, the whole message
PARAM_SECTIONS = [
    ({"finetune": {"lora_rr": 8}}, "finetune.lora_rr: unknown name. Did you mean `lora_r`?"),
    ({"finetune": {"learningrate": 8}}, "finetune.learningrate: unknown name. Did you mean `learning_rate`?"),
    ({"prepare": {"max_seq_length": 64}}, "prepare.max_seq_length: unknown name. Did you mean `max_seq_len`?"),
    ({"evalute": {"batch_size": 1}}, "evalute: unknown name. Did you mean `evaluate`?"),
    ({"merge": {"zzz": 8}}, "merge.zzz: unknown name. Known here: dtype, onto."),
    ({"zzz": {}}, "zzz: unknown name. Known here: all, "),
    ({"all": {"stages": ["finetune", "finetune"]}}, "all: a stage is listed twice."),
    ({"all": {"stages": ["merge", "quantize"]}}, "all.stages: merge needs finetune, or an adapter from elsewhere: list finetune too, or set adapter.source."),
    ({"all": {"stages": ["finetune", "quantize"]}}, "all: quantize after finetune needs merge: list merge too."),
    ({"all": {"stages": ["quantize", "gates"]}}, "all: gates needs evaluate: list evaluate too, or leave gates out."),
    ({"all": {"stages": ["report"]}}, "all: report needs evaluate: list evaluate too, or leave report out."),
    ({"all": {"stages": ["quantize", "evaluate", "package"]}}, "all: package needs quantize and gates: list both, or leave package out."),
    ({"gates": {"checks": [{"metric": "acuracy", "minimum": 0.5}]}}, "gates.checks.0: unknown metric `acuracy`; did you mean `accuracy`."),
    ({"gates": {"checks": [{"metric": "accuracy", "minimum": 80}]}}, "gates.checks.0: accuracy: minimum 80 is not allowed: it is a share, from 0 to 1."),
    ({"gates": {"checks": [{"metric": "per_class.v1.0.f1", "maximum": 1.1}]}}, "gates.checks.0: per_class.v1.0.f1: maximum 1.1 is not allowed: it is a share, from 0 to 1."),
    ({"gates": {"checks": [{"metric": "macro_f1", "minimum": -0.1}]}}, "gates.checks.0.minimum: -0.1 is not allowed: it should be greater than or equal to 0."),
    ({"gates": {"checks": [{"metric": "kl_max", "maximum": float("inf")}]}}, "gates.checks.0.maximum: Infinity is not allowed: it should be a finite number."),
    ({"fetch_model": {"source": "hf:org/name"}}, "fetch_model: `hf:org/name` is not of the form hf:ORG/NAME@REVISION[/file]: a hub source needs a revision (a commit hash or a tag)."),
    ({"prepare": {"messages": CHAT}}, "prepare: give either text_template or messages."),
    ({"prepare": {"text_template": None, "answer": "tone"}}, "prepare: answer goes with text_template."),
    ({"prepare": {"text_template": None, "format": "template"}}, "prepare: format template needs text_template, or messages as a list of templates."),
    ({"prepare": {"format": "alpaca"}}, "prepare: format alpaca goes without templates: set text_template and messages to null."),
    ({"prepare": {"text_template": None, "format": "sharegpt", "messages": "turns"}}, "prepare: format sharegpt goes without messages: set it to null."),
    ({"prepare": {"text_template": None, "messages": "turns", "labels": {"0": "joy"}}}, "prepare: labels goes with a template over fields: text_template, or messages as a list of templates."),
    ({"prepare": {"labels": {0: "joy "}}}, "prepare.labels: a mapping of values to words without white space around them is expected."),
    ({"prepare": {"labels": {}}}, "prepare.labels: a mapping of values to words without white space around them is expected."),
    ({"prepare": {"chat_date": "2024-02-30"}}, "prepare.chat_date: `2024-02-30` is no date of the form 2024-01-31."),
    ({"prepare": {"chat_template_kwargs": {"tokenize": True}}}, "prepare.chat_template_kwargs: `tokenize` is no variable that a chat template can be given."),
    ({"prepare": {"chat_template_kwargs": {"a b": True}}}, "prepare.chat_template_kwargs: `a b` is no variable that a chat template can be given."),
    ({"evaluate": {"models": ["onnx"]}, "gates": {"max_accuracy_drop": 0.03}}, "gates.max_accuracy_drop: it compares onnx with an earlier model, and evaluate.models scores none such. Add merged there, or take the gate out."),
    ({"evaluate": {"models": ["merged", "onnx"]}, "gates": {"checks": [{"metric": "accuracy", "minimum_ratio": 0.9, "against": "base"}]}}, "gates.checks[0]: it compares onnx with an earlier model, and evaluate.models scores none such. Add base there, or take the gate out."),
    ({"all": {"stages": ["quantize", "evaluate", "gates"]}, "evaluate": {"models": ["merged", "onnx"]}, "gates": {"max_accuracy_drop": 0.03}}, "gates.max_accuracy_drop: it compares onnx with an earlier model, and evaluate.models scores none such. Add base there, or take the gate out."),
    ({"evaluate": {"models": ["base", "merged"]}, "gates": {"max_accuracy_drop": None}}, "evaluate.models: a package shows the scores of its own model, the exported one. Add onnx, or take package out of all.stages."),
    ({"prepare": {"text_template": None, "messages": CHAT, "answer": "tone"}}, "prepare: answer goes with text_template; with messages the assistant's turns are the answers."),
    ({"prepare": {"text_template": None, "messages": CHAT[:1]}}, "prepare: the last of messages must be the assistant's turn: it is the answer."),
    ({"prepare": {"text_template": "{phrase} {"}}, "prepare.text_template: Single '{' encountered in format string. Write {{ and }} for literal braces."),
    ({"prepare": {"text_template": "a\0{phrase}\n{tone}"}}, "prepare: a NUL in a template ends a text for the runtime. Take it out."),
    ({"prepare": {"answer": "mood"}}, "prepare.answer: `mood` is not a placeholder of text_template. Placeholders: phrase, tone."),
    ({"prepare": {"text_template": None, "messages": [{"role": "user", "content": "{the phrase}"}, CHAT[1]]}}, "prepare.messages: `{the phrase}` is not a plain field name such as {phrase}."),
    ({"prepare": {"text_template": None, "messages": []}}, "prepare: the last of messages must be the assistant's turn: it is the answer."),
    ({"prepare": {"eval_fraction": 0.45, "test_fraction": 0.5}}, "prepare: eval_fraction and test_fraction leave less than a tenth of the rows for training."),
    ({"finetune": {"early_stopping_patience": 2, "eval_steps": 0}}, "finetune: early stopping needs eval_steps of 1 or more."),
    ({"finetune": {"qat": "int4", "method": "qlora"}}, "finetune: qat goes with method lora and lora_dropout 0."),
    ({"finetune": {"qat": "int4", "lora_dropout": 0.1}}, "finetune: qat goes with method lora and lora_dropout 0."),
    ({"finetune": {"target_modules": []}}, "finetune: target_modules is empty: name at least one module, or use all-linear."),
    ({"quantize": {"matmul_mixed_precision": "last:int8"}}, "quantize: matmul_mixed_precision: `last:int8` is not one of last_matmul:int8, mixed_layers:int8 (comma between them)."),
    ({"quantize": {"matmul_mixed_precision": "last_matmul:int8;mixed_layers:int8"}}, "quantize: matmul_mixed_precision: `last_matmul:int8;mixed_layers:int8` is not one of last_matmul:int8, mixed_layers:int8 (comma between them)."),
    ({"quantize": {"algo_config": "default"}}, "quantize: matmul_mixed_precision with algo_config `default` writes a model that ONNX Runtime refuses to load: use k_quant or rtn, or set matmul_mixed_precision to null."),
    ({"quantize": {"precision": "fp16"}}, "quantize: the builder has no fp16 for cpu: choose int4, int8, fp32."),
    ({"quantize": {"int8_nodes": ["*/attn/*"], "precision": "int8"}}, "quantize: int8_nodes goes with precision int4 and algo_config rtn or k_quant."),
    ({"merge": {"onto": "dequantized"}}, "merge.onto: dequantized goes with finetune.method: qlora."),
    ({"prepare": {"eval_fraction": 0.0}, "finetune": {"early_stopping_patience": 2}}, "finetune.early_stopping_patience: without eval rows nothing says when to stop. Raise prepare.eval_fraction, " "name a file in prepare.source.eval, or set early_stopping_patience to 0."),
]  # fmt: skip

# Ten values, ten lists of them, and so on: 10^9 values in nine lines.
BOMB = "".join(f"y{n}: &y{n} [{', '.join([f'*y{n - 1}' if n else '1'] * 10)}]\n" for n in range(9))

# params.yaml as text: content, a part of the message, the line that it names
PARAM_TEXTS = [
    ("merge:\n\tdtype: auto\n", "found character '\\t' that cannot start any token", 2),
    ("merge: {dtype: auto\n", "expected ',' or '}'", 2),
    ("merge:\n  dtype: auto\n dtype: auto\n", "expected <block end>", 3),
    ('prepare:\n  source: "open\n', "while scanning a quoted scalar", 2),
    ("merge:\n  dtype: auto\nmerge:\n  dtype: auto\n", "`merge` is given twice", 3),
    ("merge:\n  dtype: auto\n  onto: full_precision\n  dtype: float32\n", "`dtype` is given twice", 4),
    ("prepare:\n  source: {train: a, train: b}\n", "`train` is given twice", 2),
    ("merge: !!python/object:os.system {}\n", "could not determine a constructor", 1),
    ("? [a, b]\n: 1\n", "", 1),
    ("prepare:\n  {phrase}: text\n", "", 2),
    ("? !!set {a}\n: 1\n", "cannot be a name", 1),
    ("package:\n  name: 2026-02-30\n", "`2026-02-30` is a date for YAML, and DVC records none", 2),
    ("finetune:\n  lora_r: 0x_\n", "a value of type int and is none: correct it, or put it in quotes", 2),
    ("finetune:\n  lora_r: 0b_\n", "a value of type int", 2),
    (f"finetune:\n  lora_r: {'9' * 5000}\n", "a value of type int", 2),
    ("finetune:\n  lora_r: !!bool 2\n", "a value of type bool", 2),
    ("all:\n  stages: !!timestamp x\n", "`x` is a date for YAML", 2),
    ("all:\n  " + "[" * 3000, "nested too deeply", 2),
    ("all: &a [*a]\n", "nested too deeply", 2),
    (BOMB + "finetune:\n  lora_r: *y8\n", "aliases (`*name`) make more than 100,000 values of it", 1),
]  # fmt: skip

# sources: text, a part of the message
SOURCES = [
    (f"https://host/a/..#sha256={SUM}", "its path has a part `.` or `..`"),
    (f"https://host/a/%2e%2e#sha256={SUM}", "its path has a part `.` or `..`"),
    (f"https://host/x%00.json#sha256={SUM}", "it holds white space, a control character or a backslash"),
    ("hf:../up@x", "cannot be a name on the hub"),
    ("hf:org/-name@x", "cannot be a name on the hub"),
    ("hf:org/a--b@x", "cannot be a name on the hub"),
    ("hf:a/b/c@main", "cannot be a name on the hub"),
    (f"hf:org/{'n' * 97}@x", "cannot be a name on the hub"),
    ("hf:org/tiny@", "is not of the form hf:ORG/NAME@REVISION"),
    ("hf:org/tiny", "a hub source needs a revision"),
    ("pypi:name/a.gguf", "is not of the form pypi:NAME==VERSION"),
    ("s3://bucket/x", "sources that begin with `s3://` are not known"),
    ("azureml://models/x", "is neither azureml://datastores"),
    ("az://UPPER/x", "is not of the form az://container/path"),
    ("az://data", "is not of the form az://container/path"),
    ("abfs://data@evil.example.org/x#etag=1", "does not name an account"),
    ("data/x.json#sha256=abc", "not of the form sha256=64 hex digits"),
    ("http://host/x.json#etag=1", "an http:// source needs #sha256="),
    ("model.pt", "model.pt, a pickle format, which can run code when it is read"),
    ("az://data/rows.pkl#etag=1", "rows.pkl, a pickle format, which can run code when it is read"),
    ("hf:org/name@v1/pytorch_model.bin", "pytorch_model.bin, a pickle format"),
]  # fmt: skip

# sources with a secret: refused in a message without it
SECRETS = [
    f"https://host/x.json?anything={SECRET}",
    # user and password
    f"https://me:{SECRET}@host/x.json",
    f"https://{SECRET}@host/x.json",
    f"https://me:a/{SECRET}@host/x.json",
    f"https://me:a#{SECRET}@host/x.json",
    f"https://me:a?{SECRET}@host/x.json",
    f"https://me:12345#{SECRET}@host/x.json",
    f"http://me:{SECRET}@host:8080/x.json#sha256={SUM}",
    f"https://host:{SECRET}/x.json#sha256={SUM}",
    f"abfs://c:{SECRET}@store.dfs.core.windows.net/x#etag=1",
    f"abfss://c:{SECRET}@store/x#etag=1",
    f"abfs://c:{SECRET}",
    f"https://host;{SECRET}/x.json#sha256={SUM}",
    f"az://c:{SECRET}@store/x#etag=1",
    f"hf:me:{SECRET}@v1",
    f"hf:org/name:{SECRET}@v1",
    f"ftp://me:{SECRET}@host/x.json",
    f"https://me%3A{SECRET}%40host/x.json#sha256={SUM}",
    f"https://a@host%3F{SECRET}",
    f"abfs://me%40host:{SECRET}",
    f"az://data/x%3F{SECRET}#etag=1",
    # a query
    f"https://a.blob.core.windows.net/c/x.json?sv=2024&sig={SECRET}#sha256={SUM}",
    f"https://host/x.json?X-Amz-Signature={SECRET}#sha256={SUM}",
    f"https://host/x.json?apikey={SECRET}#sha256={SUM}",
    f"https://host/x.json?private_token={SECRET}#sha256={SUM}",
    f"https://host/x.json?api-key={SECRET}#sha256={SUM}",
    f"https://host/x.json?code={SECRET}#sha256={SUM}",
    f"https://host/x.json?auth={SECRET}#sha256={SUM}",
    f"https://host/x.json?secret={SECRET}#sha256={SUM}",
    f"https://host/x.json?pwd={SECRET}#sha256={SUM}",
    f"https://host/x.json?subscription-key={SECRET}#sha256={SUM}",
    f"https://host/x.json?{SECRET}#sha256={SUM}",
    f"https://host/x.json?whatever={SECRET}#sha256={SUM}",
    f"https://host/x.json?raw=1;sig={SECRET}#sha256={SUM}",
    f"https://host/x.json?download={SECRET * 4}#sha256={SUM}",
    f"https://host/x.json?download=a%20{SECRET}#sha256={SUM}",
    f"https://host/x.json?raw=1&key={SECRET}#sha256={SUM}",
    f"HTTPS://host/x.json?key={SECRET}#sha256={SUM}",
    f"az://data/x?sig={SECRET}",
    f"abfs://data@store.dfs.core.windows.net/x?{SECRET}#etag=1",
    f"azureml://datastores/b/paths/x?sig={SECRET}#etag=1",
    f"azureml://datastores/b/paths/x?{SECRET}#etag=1",
    f"azureml://registries/r/models/m/versions/1?sig={SECRET}",
    f"hf:org/name@v1?token={SECRET}",
    f"hf:org/name@v1/x.json?download={SECRET}",
    f"pypi:name==1.0/m.gguf?token={SECRET}",
    f"pypi:name==1.0@https://me:{SECRET}@host/m.gguf",
    # parameters of a path, and fragments
    f"https://host/x.json;sig={SECRET}#sha256={SUM}",
    f"https://host/x.json;jsessionid={SECRET}#sha256={SUM}",
    f"https://host/x.json%3Fsig%3D{SECRET}#sha256={SUM}",
    f"https://host/x.json&sig={SECRET}#sha256={SUM}",
    f"https://host/token={SECRET}/x.json#sha256={SUM}",
    f"https://host/x#sig={SECRET}",
    f"https://host/x#sha256={SUM}&sig={SECRET}",
    f"https://host/x#{SECRET}",
    f"az://data/a#sig={SECRET}",
    f"hf:org/name@v1#token={SECRET}",
    f"https:/host/x.json?key={SECRET}",
    f"//host/x.json?sig={SECRET}",
    f"data/x.json?access_token={SECRET}",
]

# datasets: file name, content (None: there is no file), what follows the file's name in the message
DATA_FILES = [
    ("rows.json", b"", ": empty file."),
    ("rows.json", b"[]", ": no rows in it."),
    ("rows.json", b" [ ]\n", ": no rows in it."),
    ("rows.jsonl", b"\n\n", ": no rows in it."),
    ("rows.csv", b"phrase,tone\n", ": no rows in it."),
    ("rows.json", None, ": no such file or folder. Correct the source in params.yaml"),
    ("rows.json", b'"text"', ": not JSON: expected an array of objects, or one object a line."),
    ("rows.json", b'[{"phrase": "a", "tone": "x"}, {"phrase": "b" "tone": "y"}]', ": row 2: malformed JSON: "),
    ("rows.json", b'[{"phrase": "a", "tone": "x"}, {"phrase": "b", ', ": row 2: malformed JSON: "),
    ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": "b", "tone"}\n', ": row 2: malformed JSON: "),
    ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n[1]\n', ": row 2: not an object but list."),
    ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": "\\ud83d", "tone": "y"}\n', ": row 2: "),
    ("rows.json", b'[\n{"phrase": "caf\xe9", "tone": "x"}\n]', ": line 2: not UTF-8 text (byte 15 of the line: 0xe9)."),
    ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": "caf\xe9", "tone": "y"}\n', ": row 2: not UTF-8 text (byte 15"),
    ("rows.csv", b"phrase,tone\ncaf\xe9,joy\n", ": line 2: not UTF-8 text (byte 3 of the line: 0xe9). Save the file as UTF-8."),
    ("rows.csv", b"\xff\xfe" + "phrase,tone\na,b\n".encode("utf-16-le"), ": UTF-16 text (it begins with FF FE). Save the file as UTF-8."),
    ("rows.json", b"\xfe\xff" + "[]".encode("utf-16-be"), ": UTF-16 text (it begins with FE FF). Save the file as UTF-8."),
    ("rows.json", b'{\n  "data": [\n    "phrase"\n  ]\n}\n', ": one JSON object over several lines. An array [...] of objects"),
    ("rows.json", b'{"train": [{"phrase": "a"}],\n "test": [{"phrase": "b"}]}', ": the object holds rows under train and test. Save each list"),
    ("rows.json", b'{"train": [{"phrase": "a"}], "test": [{"phrase": "b"}]}', ": the object holds rows under train and test. Save each list"),
    ("rows.json", b'{\n"data": [{"phrase": "a", "tone": "x"}, {"phrase" "b"}]}', ": row 1: malformed JSON: "),
    ("rows.json", b"\xff\xfe\0\0" + "[]".encode("utf-32-le"), ": UTF-32 text (it begins with FF FE 00 00). Save the file as UTF-8."),
    ("rows.csv", b"\0\0\xfe\xff" + "a,b".encode("utf-32-be"), ": UTF-32 text (it begins with 00 00 FE FF). Save the file as UTF-8."),
    ("rows.csv.gz", b"phrase,tone\na,b\n", ": not a readable gzip file: Not a gzipped file"),
    ("rows.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], ": not a readable gzip file: "),
    ("rows.json.gz", gzip.compress(b"", mtime=0), ": empty file."),
    ("rows.txt.gz", gzip.compress(b"x", mtime=0), ": unknown ending `.txt`."),
    ("rows.tsv", b"phrase\ttone\na\tb\tc\n", ": row 1 (line 2): 3 values for 2 columns separated by tabs."),
    ("rows.jsonl", b'{"phrase": "a",\n\n"tone": "x"}\n', ": one JSON object over several lines. An array [...] of objects"),
    ("rows.json", b'{"phrase": "a", "tone"}\n{"phrase": "a"}\n', ": row 1: malformed JSON: "),
    ("rows.jsonl", b'{"phrase": "a", "tone": "x"}\n{"phrase": ' + b"9" * 5000 + b"}\n", ": row 2: a number with thousands of digits."),
    ("rows.json", b'[{"phrase": "a", "tone": "x"}, {"phrase": ' + b"9" * 5000 + b"}]", ": row 2: a number with thousands of digits."),
    ("rows.json", b'[{"phrase": "a"}, {"phrase": ' + b"[" * 2000, ": row 2: more than 100 levels of arrays and objects in each other."),
    ("rows.jsonl", b'{"phrase": "a"}\n{"phrase": ' + b"[" * 2000 + b"\n", ": row 2: more than 100 levels of arrays and objects in each other."),
    ("rows.csv", b'phrase,tone\n"unclosed,joy\nx,fear\n', ": malformed CSV: "),
    ("rows.csv", b"phrase,tone,tone\na,b,c\n", ": row 1: the header has repeated column names: tone."),
    ("rows.parquet", b"no Parquet at all", ": not a readable Parquet file: "),
    ("rows.xlsx", b"PK", ": a spreadsheet. Save the sheet with the rows as CSV (in Excel: File, Save As, CSV UTF-8), and name that file."),
    ("rows.txt", b"PK", ": unknown ending `.txt`. Use .json, .jsonl, .ndjson, .parquet, .csv, .tsv, or one of them with .gz."),
    ("rows.json", b"[1, 2]", ": row 1: not an object but int"),
]  # fmt: skip


def renamed(label: str) -> list[dict]:
    return [row | {"tone": label} if row["tone"] == "joy" else row for row in ROWS]


PLAIN = {"text_template": "{phrase}\n{tone}", "answer": "tone"}

# datasets: rows, fields of prepare, a part of the message
DATA_ROWS = [
    (renamed("jo<|end|>y"), PLAIN, "the label 'jo<|end|>y' has the special token <|end|> in it, which the runtime leaves out of an answer"),
    (renamed("<|end|>"), PLAIN, "row 2: field `tone` is an empty answer"),
    (renamed("jo\0y"), PLAIN, "the label 'jo\\x00y' has a NUL in it, which the runtime leaves out of an answer"),
    (ROWS, {}, "prepare: no known format in the first rows, whose fields are phrase, tone. Give text_template (such as"),
    ([{"instruction": "x", "output": "y", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}], {}, "prepare.format: the rows can be read as sharegpt and as alpaca. Set it"),
    (ROWS, {"format": "sharegpt"}, "the template's field `conversations` is in no row. Fields there: phrase, tone."),
    (ROWS, {"format": "alpaca"}, "the template's field `output` is in no row."),
    (ROWS, {"format": "prompt_completion"}, "in no row. Fields there: phrase, tone."),
    ([{"conversations": [{"from": "alien", "value": "x"}, {"from": "gpt", "value": "y"}]}], {"format": "sharegpt"}, "row 1: field `conversations` has a turn from 'alien'; known are human"),
    ([{"conversations": [{"from": "gpt", "value": "y"}, {"from": "human", "value": "x"}]}], {}, "row 1: field `conversations` does not end with the assistant's turn"),
    ([{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "y"}]}], {}, "row 1: field `conversations` has a message without text"),
    ([{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]}], {}, "row 1: field `conversations` ends with an empty answer"),
    ([{"conversations": "text"}], {"format": "sharegpt"}, "row 1: field `conversations` is not a list of messages"),
    ([{"instruction": 3, "output": "x"}], {}, "row 1: field `output` is there, but `instruction` is not text"),
    ([{"instruction": "x", "input": ["y"], "output": "x"}], {}, "row 1: field `output` is there, but `input` is not text"),
    ([{"instruction": "x", "output": " "}], {}, "row 1: field `output` ends with an empty answer"),
    ([{"prompt": "x", "completion": 3.5, "more": [1]}, {"prompt": 4, "completion": "x"}], {}, "row 2: field `prompt` is int, not text: 4"),
    ([{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}], {}, "row 1: field `completion` and `prompt` are not two lists of messages"),
]  # fmt: skip

# A model's folder: what is done to its files (None: deleted; bytes: written; a number: cut to so many bytes; text: renamed; fields:
# set in the JSON file), a part of the message
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer_config.json"
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"  # a single file goes before an index


def header(text: bytes) -> bytes:
    """A safetensors file with this header and no tensors."""
    return len(text).to_bytes(8, "little") + text


MODELS = [
    ({WEIGHTS: None}, "no weights (model.safetensors, or model.safetensors.index.json with its shards)"),
    ({WEIGHTS: "pytorch_model.bin"}, "weights are in pytorch_model.bin, a pickle format"),
    ({WEIGHTS: "consolidated.00.pth"}, "weights are in consolidated.00.pth, a pickle format"),
    ({WEIGHTS: "model.pt"}, "weights are in model.pt, a pickle format"),
    ({WEIGHTS: "weights.pkl"}, "weights are in weights.pkl, a pickle format"),
    ({WEIGHTS: "last.ckpt"}, "weights are in last.ckpt, a pickle format"),
    ({WEIGHTS: 0}, "truncated or corrupt safetensors"),
    ({WEIGHTS: 5}, "truncated or corrupt safetensors"),
    ({WEIGHTS: 100}, "truncated or corrupt safetensors"),
    ({WEIGHTS: -1}, "truncated or corrupt safetensors"),
    ({WEIGHTS: (2**60).to_bytes(8, "little") + b"{}"}, "the header is longer than the file"),
    ({WEIGHTS: header(b"not json")}, "truncated or corrupt safetensors"),
    ({WEIGHTS: header(b'{"a": {"dtype": "F32"}}')}, "truncated or corrupt safetensors"),
    ({WEIGHTS: header(b'{"a": 3}')}, "truncated or corrupt safetensors"),
    ({WEIGHTS: header(b'{"\xff": 1}')}, "truncated or corrupt safetensors"),
    ({WEIGHTS: header(b"[1, 2]")}, "the header is not a JSON object"),
    ({WEIGHTS: header(b'{"a": {"shape": [], "data_offsets": [0, 0]}}')}, "no 'dtype' in the header"),
    ({WEIGHTS: header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 0]}}')}, "0 bytes do not hold a F32 tensor of shape [2]"),
    ({WEIGHTS: header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}')}, "truncated or corrupt safetensors"),
    ({WEIGHTS: header(b"[" * 3000)}, "truncated or corrupt safetensors"),
    ({WEIGHTS: SHARD, INDEX: b"{}"}, "damaged: no weight_map in it"),
    ({WEIGHTS: SHARD, INDEX: b'{"metadata": {"total'}, "damaged: no weight_map in it"),
    ({WEIGHTS: SHARD, INDEX: b'{"weight_map": {"a": "other.safetensors"}}'}, "names other.safetensors, which is not there"),
    ({WEIGHTS: SHARD, INDEX: b'{"weight_map": {"a": "../other.safetensors"}}'}, "it names the file '../other.safetensors'; a plain name"),
    ({WEIGHTS: SHARD, INDEX: b'{"weight_map": {"a": "/etc/passwd"}}'}, "it names the file '/etc/passwd'; a plain name"),
    ({WEIGHTS: SHARD, INDEX: b'{"weight_map": {"a": ".."}}'}, "it names the file '..'; a plain name"),
    ({WEIGHTS: SHARD, INDEX: b'{"weight_map": {"a": ""}}'}, "it names the file ''; a plain name"),
    ({"tokenizer.json": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}}, "no usable tokenizer (tokenizer.json and tokenizer_config.json)"),
    ({"tokenizer.json": {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}], "pair": [], "special_tokens": {}}}}, "no usable tokenizer"),
    ({"tokenizer.json": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((a*)*)*b|((\\w+\\s?)*)*$"}, "behavior": "Isolated", "invert": False}}}, "it does not read some short texts: "),
    ({"tokenizer.json": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "xx"}] * 40}}}, "it does not read some short texts: "),
    ({"adapter_config.json": b"{}"}, "it holds an adapter (adapter_config.json) beside a model"),
    ({"MLmodel": b"flavors: {transformers: {model_binary: 5}}"}, "MLmodel: damaged: no list of flavors in it"),
    ({"MLmodel": b"flavors: " + b"[" * 5000}, "MLmodel: damaged: no list of flavors in it"),
    ({"MLmodel": b"flavors: {5: {}}"}, "MLmodel: the flavors are 5; a language model is read from"),
    ({CONFIG: None}, "no config.json: this is not a model folder"),
    ({CONFIG: b"{"}, "config.json is damaged: not a JSON object"),
    ({CONFIG: b"[]"}, "config.json is damaged: not a JSON object"),
    ({CONFIG: b'{"model_type": "tomorrow"}'}, "transformers does not know this model without remote code"),
    ({CONFIG: b'{"auto_map": {"AutoConfig": "x.Y"}}'}, "transformers does not know this model without remote code"),
    ({CONFIG: {"num_hidden_layers": 3}}, "is not in the weights, but config.json asks for it"),
    ({CONFIG: {"num_hidden_layers": 1}}, "is in the weights, but config.json has no such layer"),
    ({CONFIG: {"num_hidden_layers": 10**8}}, "num_hidden_layers is 100,000,000, but the weights have only"),
    ({CONFIG: {"hidden_size": 10**12}}, "hidden_size is 1,000,000,000,000, but the weights have only"),
    ({CONFIG: {"vocab_size": 2**31 - 1}}, "vocab_size is 2,147,483,647, but the weights have only"),
    ({CONFIG: {"intermediate_size": 24}}, "is of another shape than config.json says"),
    ({CONFIG: {"num_attention_heads": 0}}, "transformers cannot make a causal language model of it"),
    ({CONFIG: {"model_type": "t5"}}, "transformers cannot make a causal language model of it"),
    ({TOKENIZER: {"eos_token": "<|never seen|>"}}, "the tokenizer's token '<|never seen|>' has the number"),
    ({TOKENIZER: {"eos_token": None}}, "the tokenizer has no end-of-text token"),
    ({TOKENIZER: None, "tokenizer.json": None}, "no usable tokenizer (tokenizer.json and tokenizer_config.json)"),
    ({"tokenizer.json": 200}, "tokenizer"),
]  # fmt: skip

# adapters: fields of adapter_config.json, a part of the message
ADAPTERS = [
    ({"use_dora": True}, ": use_dora is True, which does not fit the tensors for model.layers.0."),
    ({"modules_to_save": ["lm_head"]}, ": modules_to_save has lm_head, but no tensor of it."),
    ({"trainable_token_indices": [3]}, ": trainable_token_indices is set, but no token is saved."),
    ({"peft_type": "LOHA"}, "/adapter_config.json: peft_type LOHA cannot be merged here; only LORA can."),
    ({"init_lora_weights": "pissa_niter_4"}, "/adapter_config.json: init_lora_weights: pissa_niter_4 changed the base's weights"),
    ({"use_qalora": True}, "/adapter_config.json: use_qalora is set; such an adapter cannot be merged tensor by tensor."),
    ({"layer_replication": [[0, 2], [1, 2]]}, "/adapter_config.json: layer_replication is set"),
    ({"target_parameters": ["experts.up"]}, "/adapter_config.json: target_parameters is set"),
    ({"r": 8}, "/adapter_config.json: the rank of model.layers.0."),
]  # fmt: skip

# Olive's configurations as text: content, a part of the message
OLIVE_TEXTS = [
    ('{"a": 1, // note\n "b": 2}', "JSON has no comments"),
    ('{"a": 1,}', "no comma before a closing bracket"),
    ('{"passes": {}, "passes": {}}', "the field `passes` is given twice"),
    ('{"passes": {"x": {"type": "LoRA", "type": "QLoRA"}}}', "the field `type` is given twice"),
    ("[" * 100_000, "cannot be read"),
    ("", "cannot be read"),
    ("3", "expected a mapping"),
]  # fmt: skip

# Olive's passes without a counterpart: passes, field, a part of its note
OLIVE_PASSES = [
    ([{"type": "AutoAWQQuantizer"}, BUILDER], "passes.p0.type", "nearest: gptq"),
    ([{"type": "QuaRot"}, BUILDER], "passes.p0.type", "nearest: gptq"),
    ([BUILDER, {"type": "ExtractAdapters"}], "passes.p1.type", "nearest: MergeAdapterWeights"),
    ([{"type": "DoRA"}], "passes.p0.type", "nearest: LoRA"),
    ([{"type": "LoHa"}], "passes.p0.type", "nearest: LoRA"),
    ([{"type": "LoKr"}], "passes.p0.type", "nearest: LoRA"),
    ([{"type": "OnnxConversion"}], "passes.p0.type", "nearest: ModelBuilder"),
    ([{"type": "QNNPreprocess"}], "passes.p0.type", "no such pass here"),
    ([GPTQ], "passes", "gptq without ModelBuilder"),
    ([GPTQ | {"bits": 3}, BUILDER], "passes.p0.bits", "4 bits"),
    ([GPTQ | {"group_size": -1}, BUILDER], "passes.p0.group_size", "none of 16, 32"),
    ([{"type": "SelectiveMixedPrecision", "algorithm": "magic"}, BUILDER], "passes.p0.algorithm", "none of k_quant_last"),
    ([BUILDER, {"type": "GraphSurgeries", "surgeries": [{"surgeon": "RemoveRope"}]}], "passes.p1.surgeries.0.surgeon", "as it is"),
    ([BUILDER | {"metadata_only": True}], "passes.p0.metadata_only", "the whole model is exported"),
    ([BUILDER, BUILDER], "passes.p1", "a second quantize"),
]  # fmt: skip

# Packages: what was done, how, a part of what verify says
PACKAGES = {
    "link to a folder outside": (lambda p: (p / "onnxruntime_genai").symlink_to("../evil"), "onnxruntime_genai: a link (to '../evil')"),
    "link to a file inside": (lambda p: (p / "copy.py").symlink_to("run.py"), "copy.py: a link"),
    "link to nothing": (lambda p: (p / "gone").symlink_to("nowhere"), "gone: a link"),
    "file become a link to the same bytes": (lambda p: swap_for_link(p, "model.onnx.data"), "model.onnx.data: a link"),
    "checksums become a link": (lambda p: swap_for_link(p, "SHA256SUMS"), "SHA256SUMS: a link"),
    "marker become a link": (lambda p: (p / ".snakemake_timestamp").symlink_to("run.py"), "a link (to 'run.py')"),
    "link in a folder": (lambda p: (p / "licenses" / "more").symlink_to("/etc"), "licenses/more: a link"),
    "pipe": (lambda p: os.mkfifo(p / "queue"), "queue: not a regular file"),
    "file become a pipe": (lambda p: ((p / "prompt.json").unlink(), os.mkfifo(p / "prompt.json")), "prompt.json: not a regular file"),
    "hidden library": (lambda p: (p / ".snakemake_evil.so").write_bytes(b"evil"), "'.snakemake_evil.so': not part of"),
    "marker with content": (lambda p: (p / ".snakemake_timestamp").write_text("x"), "'.snakemake_timestamp': not part"),
    "marker in a folder": (lambda p: (p / "licenses" / ".snakemake_timestamp").touch(), "not part of the package"),
    "marker as a folder": (lambda p: (p / ".snakemake_timestamp").mkdir(), "'.snakemake_timestamp': not part of"),
    "hidden folder": (lambda p: ((p / ".git").mkdir(), (p / ".git" / "config").touch()), "'.git': not part of"),
    "hidden file with checksums made to fit": (lambda p: ((p / "SHA256SUMS").write_text((p / "SHA256SUMS").read_text() + f"{'0' * 64}  .x\n"), (p / ".x").touch()), "'.x': not part of the package"),
    "unknown file": (lambda p: (p / "sitecustomize.py").touch(), "sitecustomize.py: not part of the package"),
    "unknown package": (lambda p: ((p / "onnxruntime_genai").mkdir(), (p / "onnxruntime_genai" / "__init__.py").touch()), "onnxruntime_genai/__init__.py: not part of the package"),
    "empty folder": (lambda p: (p / "onnxruntime_genai").mkdir(), "onnxruntime_genai: an empty folder"),
    "name with a line break": (lambda p: (p / "a\nb").touch(), r"'a\nb': not part of the package"),
    "missing file": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "missing folder": (lambda p: shutil.rmtree(p / "licenses"), "licenses/LICENSE: missing"),
    "missing checksums": (lambda p: (p / "SHA256SUMS").unlink(), "SHA256SUMS: missing, so nothing can be checked"),
    "missing bill": (lambda p: (p / "bom.cdx.json").unlink(), "bom.cdx.json: missing, so nothing can be checked"),
    "renamed file": (lambda p: (p / "run.py").rename(p / "Run.py"), "run.py: missing"),
    "file cut short": (lambda p: (p / "model.onnx.data").write_bytes(b""), "model.onnx.data: changed"),
    "checksums made to fit": (lambda p: ((p / "run.py").write_text("print('hello')\n"), reseal(p)), "its subjects are not the files of this package"),
    "checksums and provenance made to fit": (lambda p: ((p / "run.py").write_text("print('hello')\n"), reseal(p, "provenance")), "bom.cdx.json: its files are not those of this package: run.py."),
    "file added, checksums and provenance made to fit": (lambda p: ((p / "more.py").touch(), reseal(p, "bill", "provenance")), "bom.cdx.json: its files are not those of this package: more.py."),
    "hash changed in the bill": (lambda p: change_bill(p, lambda bom: file_components(bom)[0]["hashes"][0].update(content="0" * 64)), "its files are not those of this package"),
    "file taken from the bill": (lambda p: change_bill(p, lambda bom: bom["components"].remove(file_components(bom)[0])), "bom.cdx.json"),
    "file twice in the bill": (lambda p: change_bill(p, lambda bom: bom["components"].append(file_components(bom)[0] | {"bom-ref": "again"})), "bom.cdx.json: its files are not those of this package: one is listed twice."),
}  # fmt: skip
